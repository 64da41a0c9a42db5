"""The HTML report: everything the certificate says, nothing from outside the file, no surprises."""

import dataclasses
import json
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

from jaxtc.errors import InputError, SourceError
from jaxtc.parity import report
from jaxtc.parity.certificate import (
    KINDS,
    Certificate,
    Divergence,
    Figures,
    Generation,
    Jump,
    Logits,
    Prompt,
    SiteRow,
    Transcoder,
    TruthRow,
)
from jaxtc.parity.texts import EMBEDDED_TEXTS
from jaxtc.tap.sites import SITES

LAYERS = [0, 1, 5]
# The one place that is above its tolerance in a failed certificate.
BAD = ("attn_scores", 1)
EVIL = "<script>alert('x')</script> & \"quotes\" {{ c.model }} \u202eright to left \ud800"
VOID = {"meta", "br", "hr", "img", "input", "link"}


def row(site, layer, passed):
    size = 1.25e-7 * (1 + (layer or 0))
    bad = not passed and (site, layer) == BAD
    given = site in ("resid_pre", "resid_mid")
    alone = math.inf if bad else size
    isolated = None if given else Figures(alone, 4 * size, 10 * size, 5e-6, 5e-5)
    accumulated = Figures(10 * size, 40 * size, 100 * size, 1e-4, 1e-3)
    return SiteRow(site, layer, accumulated, isolated, 12 * bad, not bad)


def certificate(passed=True, **changes):
    rows = [row("embed", None, passed)]
    rows += [row(site.name, n, passed) for n in LAYERS for site in SITES if site.per_layer]
    rows += [row(site.name, None, passed) for site in SITES[1:] if not site.per_layer]
    address = f"layers.{BAD[1]}.{BAD[0]}"
    made = Certificate(
        passed=passed,
        failures=[] if passed else [f"{address}: masks differ in 12 scores."],
        notes=["No prompt is longer than the window."],
        first_jump=None if passed else Jump(address, *BAD, "isolated", math.inf, 5e-6),
        model="a model/of mine",
        dtype="bfloat16",
        layers=LAYERS,
        config={"hidden_size": 2304, "num_hidden_layers": 26},
        prompts=[Prompt("The capital of Texas is", 6), Prompt(None, 21)],
        sites=rows,
        logits=Logits(27, 1.23e-9, 4.56e-8, 0.999999, 1, 0.75, 3.25, 3.125),
        generation=Generation(16, 2, 1, [Divergence(1, 7, 123, 45, " ours", " <b>", 0.0123)], 0.01),
        transcoder=Transcoder(
            "a/transcoder", 5, 16384, 25, 17.5, 17.46, 0.9981, 3, 2, 2.5e-7, 3.5e-7,
            0.0711, 0.0722, 0.0733, 5e-6, 1e-3,
        ),
        truth=[TruthRow("embed", 0.0, 0.0, None), TruthRow("q", 2e-3, 4e-3, 0.5),
               TruthRow("k", 6e-3, 4e-3, 1.5)],
        tolerances={
            "factor": 8, "worst": 10.0, "isolated": {"q": 5e-6, "k": 6e-6},
            "accumulated": {"q": 1e-4},
        },
        versions={"jaxtc": "0.1.0", "torch": "2.13.0"},
        machine={"platform": "Linux", "ours": "cpu", "theirs": "cuda:0"},
        seconds={"theirs": 12.34, "ours": 10.06},
        created="2026-11-23T12:00:00+00:00",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


class Page(HTMLParser):
    """Text, tags and cells of a page; fails on tags that do not pair."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.ids = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def cells(self, mark=None):
        classes = [(a.get("class") or "", a) for tag, a in self.tags if tag == "td"]
        heat = [(c.split(), a) for c, a in classes if re.match(r"e\d+\b", c)]
        return [a for c, a in heat if mark is None or mark in c]


def page(**changes):
    return Page(report.render(certificate(**changes)))


@pytest.mark.parametrize("passed", [True, False])
def test_one_file_with_nothing_from_outside(passed, tmp_path):
    path = report.write_report(certificate(passed), tmp_path / "out.html")
    assert path == tmp_path / "out.html" and [path] == list(tmp_path.iterdir())
    html = path.read_text("utf-8")
    found = Page(html)
    names = Counter(tag for tag, _ in found.tags)
    assert not names.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "svg"}
    for _, attrs in found.tags:
        assert not attrs.keys() & {"src", "href", "srcset", "action", "data"}
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"url\(|@import|https?:|//[a-z]", html)
    policy = [a["content"] for tag, a in found.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert names["main"] == names["h1"] == 1 and names["h2"] >= 6
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attrs in found.tags:
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
    # Each wide table scrolls inside a region that the keyboard reaches.
    regions = [a for _, a in found.tags if "scroll" in (a.get("class") or "").split()]
    assert len(regions) == names["table"]
    assert all(a["role"] == "region" and a["tabindex"] == "0" for a in regions)


def test_the_verdict_comes_first():
    good, bad = page().text, page(passed=False).text
    count = len(certificate().sites)
    assert good.index("✓ Passed") < good.index("Error by layer")
    assert "✕ Failed" not in good and "✓ Passed" not in bad
    assert f"{count} activations (3 of 26 layers) were compared over 27 tokens of 2 prompts" in good
    assert "and none is above tolerance" in good and "and 1 is above tolerance" in bad
    assert "made at one place is 7.5e-7 (layers.5." in good
    assert "all layers before it 7.5e-6 (layers.5." in good
    assert "made at one place is ∞ (layers.1.attn_scores)" in bad
    assert "first jumps" not in good
    assert "The error first jumps at layers.1.attn_scores : isolated relative error ∞" in bad
    assert "layers.1.attn_scores: masks differ in 12 scores." in bad
    jump = Jump("layers.1.q", "q", 1, "accumulated", 2e-4, 1e-4)
    assert "No isolated error is above its tolerance" in page(passed=False, first_jump=jump).text


def test_heat_maps_hold_every_figure():
    made, found = certificate(False), page(passed=False)
    expected = [
        (row, figures)
        for kind in KINDS
        for row in sorted(made.sites, key=lambda row: [r.site for r in made.sites].index(row.site))
        if (figures := getattr(row, kind)) is not None
    ]
    cells = found.cells()
    assert len(cells) == len(expected) == 2 * len(made.sites) - 2 * len(LAYERS)
    for cell, (row, figures) in zip(cells, expected, strict=True):
        where = row.site if row.layer is None else f"{row.site}, layer {row.layer}"
        assert cell["title"].startswith(
            f"{where}: {report.exact(figures.relative)}, "
            f"tolerance {report.exact(figures.tolerance)}; "
            f"worst token {report.exact(figures.worst)}, "
            f"tolerance {report.exact(figures.worst_tolerance)}; "
            f"largest difference {report.exact(figures.largest)}"
        )
        assert f"e{report.step(figures.relative)}" in cell["class"].split()
    [over], [jump] = found.cells("over"), found.cells("jump")
    assert over is jump
    assert over["title"].startswith("attn_scores, layer 1: ∞, tolerance 5e-6")
    assert over["title"].endswith("12 masked in one only; the first jump")
    assert not page().cells("over") and not page().cells("jump")
    assert "▲ above its tolerance" in found.text
    # resid_pre and resid_mid are given to the isolated pass: no row of dots.
    assert not [a for tag, a in found.tags if a.get("title") == "given, not compared"]


def test_exact_figures_of_every_place():
    made, text = certificate(False), page(passed=False).text
    assert f"Exact figures of all {len(made.sites)} places" in text
    for one in made.sites:
        parts = [one.address]
        for held in (one.isolated, one.accumulated):
            shown = held and (
                held.relative, held.tolerance, held.worst, held.worst_tolerance, held.largest,
            )  # fmt: skip
            parts += map(report.exact, shown) if shown else ["given"]
        verdict = "passed" if one.passed else "failed, 12 masked in one only"
        assert " ".join([*parts, verdict]) in text


def test_what_is_no_number_is_above_its_tolerance():
    made = certificate()
    sites = list(made.sites)
    broken = Figures(math.nan, math.nan, math.nan, 1e-4, 1e-3)
    sites[3] = dataclasses.replace(sites[3], accumulated=broken, passed=False)
    found = page(sites=sites)
    [over] = found.cells("over")
    assert f"e{report.STEPS - 1}" in over["class"] and ": NaN, tolerance" in over["title"]
    assert f"all layers before it NaN ({sites[3].address})" in found.text


def test_a_token_far_above_its_tolerance_is_marked():
    sites = list(certificate().sites)
    # Of the accumulated error only, whose tolerance is 1e-3 for one token.
    for index, worst in ((3, 1.1e-3), (4, 0.9e-3)):
        figures = dataclasses.replace(sites[index].accumulated, worst=worst)
        sites[index] = dataclasses.replace(sites[index], accumulated=figures)
    [over] = page(sites=sites).cells("over")
    assert "worst token 0.0011" in over["title"]


def test_sites_without_some_layers():
    made = certificate()
    sites = [one for one in made.sites if (one.site, one.layer) != ("q", 1)]
    titles = [a.get("title", "") for tag, a in page(sites=sites).tags if tag == "td"]
    q = [at for at, title in enumerate(titles) if title.startswith("q, layer")]
    assert len(q) == 2 * (len(LAYERS) - 1)
    assert [titles[at - 1] for at in q[1::2]] == 2 * ["not asked for"]
    assert titles.count("not asked for") == 2
    once = [one for one in made.sites if one.layer is None]
    assert page(sites=once, layers=[]).cells()


def test_figures_of_predictions_generation_transcoder_and_truth():
    text = page().text
    for part in (
        "mean over 27 tokens 1.23e-9 nats", "KL, worst token 4.56e-8 nats",
        "Same argmax of the next token 99.99% of tokens", "reference is sure 1",
        "among our top five 75%", "loss, ours 3.25 nats", "loss, theirs 3.125 nats",
        "ours − theirs 0.125 nats",
        "1 of 2 continuations of 16 tokens are identical", "as near as 0.01 to each other",
        "2 7 123 ours 45 <b> 0.0123",
        "a/transcoder, layer 5, 16384 features, over 25 tokens", "L0, ours 17.5",
        "L0, theirs 17.46", "Jaccard) 0.9981", "Active in one only 3",
        "within rounding of the threshold 2", "(≤ 5e-6) 2.5e-7", "(≤ 5e-6) 3.5e-7",
        "FVU of theirs on their target 0.0733", "FVU of ours on their target 0.0711",
        "FVU of theirs on our target 0.0722", "differ from the first by 0.001",
        "Our error is 1 times the reference’s in the mean over sites; 1 of 2 sites are at most 1",
        "embed 0 0 –", "q 0.002 0.004 0.5 ours", "k 0.006 0.004 1.5 theirs",
    ):  # fmt: skip
        assert part in text, part


def test_how_it_was_run():
    text = page().text
    for part in (
        "The capital of Texas is (6 tokens)", "given as token ids (21 tokens)",
        "jaxtc parity 'a model/of mine' --dtype bfloat16 --transcoder a/transcoder "
        "--transcoder-layer 5 --prompts prompts.txt --layers 0-1,5 --truth --new-tokens 16 "
        "--report parity.html",
        "jaxtc 0.1.0", "torch 2.13.0", "Platform Linux", "Ours ran on cpu", "Theirs ran on cuda:0",
        "Made 2026-11-23T12:00:00+00:00", "Layers 0-1,5", "theirs 12.3, ours 10.1.",
        "factor 8 worst 10 site isolated accumulated q 5e-6 0.0001 k 6e-6 –", "hidden_size 2304",
        "Some of the prompts above are token ids", "above its tolerance, in the mean or at a token",
        "No prompt is longer than the window.",
    ):  # fmt: skip
        assert part in text, part


def test_what_was_not_asked_for_is_absent():
    changes = {"generation": None, "transcoder": None, "truth": None, "notes": [], "layers": [0]}
    prompts = [Prompt(text, 10) for text in EMBEDDED_TEXTS]
    changes |= {"model": "embedded", "config": {"num_hidden_layers": 1}}
    assert "prompts.txt" in page(**changes).text
    own = page(**changes, prompts=prompts[:2]).text
    assert "--prompts prompts.txt" in own and "holds the prompts above, one a line" in own
    text = page(**changes, prompts=prompts).text
    assert "prompts.txt" not in text
    for part in ("Greedy", "Transcoder", "against float64", "could not test", "What failed"):
        assert part not in text
    assert "jaxtc parity embedded --dtype bfloat16 --new-tokens 0 --report parity.html" in text
    nothing = dataclasses.replace(certificate().logits, loss_ours=None, loss_theirs=None)
    assert "ours − theirs –" in page(logits=nothing).text


def test_many_failures_are_folded():
    failures = [f"failure {index}." for index in range(100)]
    text = page(passed=False, failures=failures).text
    assert all(failure in text for failure in failures)
    assert f"{100 - report.SHOWN} more" in text
    assert text.index("failure 11.") < text.index("88 more") < text.index("failure 12.")


def test_everything_is_escaped(tmp_path):
    made = certificate(
        False,
        model=EVIL,
        prompts=[Prompt(EVIL, 3)],
        failures=[EVIL],
        notes=[EVIL],
        versions={EVIL: EVIL},
        machine={EVIL: EVIL},
        config={EVIL: EVIL},
        tolerances={EVIL: {EVIL: EVIL}, "x" + EVIL: EVIL},
        generation=Generation(1, 1, 0, [Divergence(0, 0, 1, 2, EVIL, EVIL, 0.5)], 0.5),
        transcoder=dataclasses.replace(certificate().transcoder, source=EVIL),
    )
    # As it comes from a JSON file.
    raw = json.loads(json.dumps(made.to_dict()))
    path = report.write_report(Certificate.from_dict(raw), tmp_path / "out.html")
    html = path.read_text("utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert EVIL[:-1] in "".join(Page(html).texts)


def test_a_folder_is_never_overwritten(tmp_path):
    held = certificate()
    with pytest.raises(SourceError, match="cannot be written: Is a directory"):
        report.write_report(held, tmp_path)
    with pytest.raises(SourceError, match="missing.* cannot be written: No such file"):
        report.write_report(held, tmp_path / "missing" / "out.html")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.html"
    path.write_text("before")

    def full(self, target):
        assert self.read_text("utf-8").rstrip().endswith("</html>")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", full)
        with pytest.raises(SourceError, match="No space left"):
            report.write_report(certificate(), path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    report.write_report(certificate(), path)
    assert path.read_text("utf-8").startswith("<!doctype html>")


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"needs jinja2.*pip install 'jaxtc\[parity\]'"):
        report.render(certificate())


def test_numbers():
    cells = {3.14e-7: "3e-7", 1.0: "1e0", 0.0: "0", math.inf: "∞", math.nan: "NaN", 9.6e-4: "1e-3"}
    assert {number: report.short(number) for number in cells} == cells
    assert report.short(None) == report.exact(None) == "–"
    assert [report.exact(x) for x in (3.14159e-7, 0.99812, 12, 0.0, -math.inf, 123456.0)] == [
        "3.142e-7", "0.9981", "12", "0", "−∞", "1.235e5",
    ]  # fmt: skip
    assert [report.percent(x) for x in (1, 1 - 1e-9, 0.5, 1e-9, 0)] == [
        "100%", "99.99%", "50%", "0.01%", "0%",
    ]  # fmt: skip
    assert report.spans([0, 5, 10, 11, 12]) == "0,5,10-12" and report.spans([3]) == "3"


def test_colours_go_by_decade_and_can_be_read():
    sizes = [10 ** (exponent / 2) for exponent in range(-16, 1)]
    assert [report.step(size) for size in sizes] == list(range(report.STEPS))
    assert [report.step(x) for x in (0, 1e-30, 1e9, math.inf, math.nan)] == [0, 0, 16, 16, 16]
    for made in report.COLOURS.values():
        assert len(made) == report.STEPS
        assert all(contrast(*pair) >= 4.5 for pair in made)
        # Ever darker, or ever lighter: distinct without colour vision.
        light = [contrast("#000000", ground) for ground, _ in made]
        assert light in (sorted(light), sorted(light, reverse=True))
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as WCAG 2.2 defines it: 1 to 21."""
    dark, light = sorted(luminance(colour) + 0.05 for colour in (one, other))
    return light / dark


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
