"""``jaxtc parity``: runs the comparison, draws its table, and writes the report."""

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxtc.cli.options import (
    STDOUT,
    JsonFile,
    argument,
    check_place,
    option,
    parse_layers,
    write_json,
)
from jaxtc.cli.runtime import note, plain_table, working
from jaxtc.errors import InputError
from jaxtc.parity import flow
from jaxtc.parity.certificate import Certificate, Figures, SiteRow
from jaxtc.parity.report import need_jinja2, write_report
from jaxtc.parity.texts import read_prompts

SHOWN = 12  # failures in the terminal; the report has them all
LEGEND = (
    "A digit a layer: how many decimal digits agree (7: the error is below 1e-7), = where all bits "
    "do, ! over tolerance, · where the reference's own value was put in. Isolated starts each half "
    "of a layer from the reference's residual stream; accumulated does not. Errors are means over "
    "tokens of ‖ours − theirs‖ / ‖theirs‖; worst and accumul. are those of the worst layer, "
    "largest is the largest absolute difference."
)


def command(
    model: argument(
        str, "'embedded', a hub id such as google/gemma-2-2b, or a folder."
    ) = "embedded",
    transcoder: option(
        str | None,
        "Compare this transcoder's features too: 'embedded', a hub id with or without a "
        "path, a folder or a params.npz.",
    ) = None,
    transcoder_layer: option(
        int | None, "Whose MLP it imitates, where its source does not say.", metavar="N", min=0
    ) = None,
    prompts: option(
        Path | None,
        "A text file, one prompt a line; a few built-in sentences by default.",
        metavar="FILE",
    ) = None,
    dtype: option(str, "Of both models' weights: float32 or bfloat16.") = "float32",
    layers: option(
        str | None, "Whose sites to compare; all by default.", metavar="0,5,10-12"
    ) = None,
    truth: option(
        bool, "Also run PyTorch in float64, to see which of the two is nearer.", "--truth"
    ) = False,
    new_tokens: option(int, "Greedy tokens to compare after each prompt.", min=0) = 16,
    report: option(Path | None, "Write an HTML report.", metavar="FILE") = None,
    json_file: JsonFile = None,
) -> None:
    """Certify that JAX and PyTorch agree on your weights and prompts; exit code 1 if they do not.

    Runs transformers' Gemma-2 in PyTorch and ours on the same tokens, one after the other, and
    compares every site of every layer. PyTorch comes with jaxtc's extra "parity".
    """
    chosen = layers and parse_layers(layers)
    for name, path in (("--report", report), ("--json", json_file)):
        if path is not None:
            check_place(name, path)
    if report and json_file and os.path.realpath(report) == os.path.realpath(json_file):
        raise InputError(f"--report and --json are both {report}; give each a file of its own.")
    if report:
        need_jinja2()
    # A process that a signal ends at once would leave gigabytes in the temporary folder.
    for one in signal.Signals:
        if one.name in ("SIGTERM", "SIGHUP") and signal.getsignal(one) == signal.SIG_DFL:
            signal.signal(one, signal.default_int_handler)
    with working("Starting JAX") as progress:
        found = flow.certify(
            model, prompts=prompts and read_prompts(prompts), transcoder=transcoder,
            transcoder_layer=transcoder_layer, dtype=dtype, layers=chosen, truth=truth,
            new_tokens=new_tokens, progress=progress,
        )  # fmt: skip
    try:
        write_json(json_file, found.to_dict())
        if report:
            write_report(found, report)
    finally:
        draw(Console(stderr=json_file == STDOUT), found)
    raise typer.Exit(0 if found.passed else 1)


def draw(console: Console, found: Certificate) -> None:
    """The table by site and layer, the predictions, and the verdict."""
    console.print(_sites(found))
    console.print(Text(LEGEND, "dim"))
    for name, line in _lines(found):
        console.print(Text.assemble((f"{name:<11}", "bold"), line))
    note(console, found.notes)
    if found.first_jump:
        jump = found.first_jump
        error = f"{jump.kind} {jump.relative:.1e}, tolerance {jump.tolerance:.1e}"
        console.print(f"The error begins at [bold cyan]{jump.address}[/] ({error}).")
    for failure in found.failures[:SHOWN]:
        console.print(Text.assemble(("✗ ", "red"), failure))
    if len(found.failures) > SHOWN:
        console.print(Text(f"  and {len(found.failures) - SHOWN} more; --json has them.", "dim"))
    word, agrees = ("PASSED", "agrees") if found.passed else ("FAILED", "does not agree")
    tokens = sum(prompt.tokens for prompt in found.prompts)
    model = found.model.encode(errors="backslashreplace").decode()  # a path need not be UTF-8
    console.print(
        Text.assemble(
            (word, "bold green" if found.passed else "bold red"),
            f": jaxtc {found.versions['jaxtc']} {agrees} with transformers "
            f"{found.versions['transformers']} (torch {found.versions['torch']}) on {model} "
            f"in {found.dtype}: {len(found.layers)} layers, {len(found.prompts)} prompts, "
            f"{tokens} tokens.",
        )
    )


def _sites(found: Certificate) -> Table:
    table = plain_table()
    table.add_column("site", style="bold cyan", no_wrap=True)
    table.add_column("isolated, by layer", overflow="fold")
    for name in ("worst", "accumul.", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    ratios = {row.site: row.ratio for row in found.truth or ()}
    if ratios:
        table.add_column("ours/HF", justify="right", no_wrap=True)
    for site in dict.fromkeys(row.site for row in found.sites):
        rows = [row for row in found.sites if row.site == site]
        alone = [row.isolated for row in rows if row.isolated]
        whole = [row.accumulated for row in rows]
        largest = max(figures.largest for figures in whole)
        cells = [_most(alone), _most(whole), f"{largest:.1e}"]
        if ratios:
            ratio = ratios.get(site)
            cells.append("–" if ratio is None else f"{ratio:.2f}")
        table.add_row(site, Text.assemble(*map(_digit, rows)), *cells)
    return table


def _digit(row: SiteRow) -> tuple[str, str]:
    """One character for one layer."""
    if not row.passed:
        return "!", "bold red"
    if row.isolated is None:
        return "·", "dim"
    error = row.isolated.relative
    if error == 0:
        return "=", "green"
    return str(min(9, max(0, math.floor(-math.log10(error))))), "green"


def _most(figures: list[Figures]) -> str:
    return f"{max(one.relative for one in figures):.1e}" if figures else "–"


def _lines(found: Certificate) -> Iterator[tuple[str, str]]:
    """What does not belong to one site, a line each."""
    logits = found.logits
    line = (
        f"KL {logits.kl_mean:.1e} nats (largest {logits.kl_max:.1e}), top-1 {logits.top1:.1%}, "
        f"top-5 {logits.top5:.1%}"
    )
    if logits.loss_ours is not None:
        far = logits.loss_ours - logits.loss_theirs
        line += f", loss {logits.loss_ours:.4f} ({far:+.1e})"
    yield "logits", line
    if new := found.generation:
        line = f"{new.identical} of {new.prompts} continuations of {new.new_tokens} tokens equal"
        for one in new.divergences[:1]:
            line += (
                f"; prompt {one.prompt + 1} diverges after {one.step} tokens ({one.ours_text!r}, "
                f"theirs {one.theirs_text!r}, whose lead is {one.margin:.1e})"
            )
        yield "generation", line
    if one := found.transcoder:
        line = (
            f"layer {one.layer}: L0 {one.l0_ours:.2f} (theirs {one.l0_theirs:.2f}), active sets "
            f"overlap by {one.overlap:.2%}, {one.differing} features differ, {one.near_threshold} "
            "of them within rounding of their threshold"
        )
        if one.fvu_reference is not None:
            line += (
                f"; FVU {one.fvu_ours:.4f} of ours on theirs, {one.fvu_theirs:.4f} of theirs on "
                f"ours ({one.fvu_reference:.4f} of theirs on its own)"
            )
        yield "transcoder", line
    if truth := [row for row in found.truth or () if row.ratio is not None]:
        worst = max(truth, key=lambda row: row.ratio)
        mean = sum(row.ratio for row in truth) / len(truth)
        yield (
            "truth",
            f"our error against float64 is {mean:.2f} times the reference's in the mean over "
            f"sites, {worst.ratio:.2f} at {worst.site}",
        )
