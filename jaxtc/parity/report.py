"""The certificate as one HTML file: no script, nothing fetched, fit for a phone and for paper."""

import dataclasses
import math
import os
import shlex
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from jaxtc.errors import InputError, SourceError
from jaxtc.helpers import write_whole
from jaxtc.parity.certificate import KINDS, Certificate, Figures, SiteRow
from jaxtc.parity.texts import EMBEDDED_TEXTS, TEXTS
from jaxtc.weights.sources.resolve import EMBEDDED

# Colours of an error from 1e-8 or less to 1 or more, two steps a decade.
LEAST, STEPS = -8, 17
LIGHT = ("#f3f7fb", "#cadef0", "#86b2da", "#3877b3", "#0f3262")
DARK = ("#1a2530", "#1d3d5c", "#2c649a", "#70a8dc", "#dcecfb")
# How many failures are shown before the rest is folded away.
SHOWN = 12


def write_report(certificate: dict[str, Any], path: str | os.PathLike) -> Path:
    """Write the HTML report of a certificate.

    The file holds everything it shows, and nothing in it is a script; what came from outside
    (prompts, names) is escaped. It is written beside its place and moved there when whole.

    Args:
        certificate: of :meth:`jaxtc.parity.Certificate.to_dict`.
        path: of the file, replaced if it exists.

    Returns:
        The path.

    Raises:
        InputError: this is no certificate, or jinja2 is not installed.
        SourceError: the place is a folder, or cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise SourceError(f"{path} is a folder; name a file in it, such as {path / 'parity.html'}.")
    write_whole(path, render(certificate))
    return path


def render(certificate: dict[str, Any]) -> str:
    """The page; raises as :func:`write_report`."""
    try:
        import jinja2
    except ImportError as error:
        raise InputError(
            "The HTML report needs jinja2, which is not installed here: pip install "
            "'jaxtc[parity]'. The JSON form of the certificate needs nothing."
        ) from error
    try:
        held = Certificate.from_dict(certificate)
    except ValueError as error:
        raise InputError(f"No report can be made of this: {error}") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"short": short, "exact": exact, "percent": percent, "step": step}
    environment.filters["value"] = lambda x: exact(x) if isinstance(x, int | float) else x
    source = resources.files("jaxtc.parity").joinpath("report.html.j2").read_text("utf-8")
    maps = [heat_map(held, kind) for kind in KINDS]
    return environment.from_string(source).render(
        c=held,
        maps=[one for one in maps if one.rows],
        farthest={kind: farthest(held, kind) for kind in KINDS},
        over=sum(not row.passed for row in held.sites),
        shown=SHOWN,
        colours={"light": colours(LIGHT), "dark": colours(DARK)},
        decades=range(LEAST, 1),
        command=command(held),
        from_file=not built_in(held),
        one_a_line=all(one.text and not {*"\r\n"} & {*one.text} for one in held.prompts),
        layers=spans(held.layers),
        tolerances=tolerance_table(held.tolerances),
        ratios=[row.ratio for row in held.truth or () if row.ratio is not None],
    )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a heat map.

    Attributes:
        row: the address, None where there is none.
        figures: its error; None where it was given rather than compared.
        jumps: whether the first jump is here.
    """

    row: SiteRow | None = None
    figures: Figures | None = None
    jumps: bool = False


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """The error by layer and site.

    Attributes:
        kind: "isolated" or "accumulated".
        layers: the columns.
        rows: (site, whether every layer has it, its cells) in the order of computation.
    """

    kind: str
    layers: list[int]
    rows: list[tuple[str, bool, list[Cell]]]


def heat_map(certificate: Certificate, kind: str) -> HeatMap:
    """The heat map of one kind of error."""
    jump = certificate.first_jump
    by_site: dict[str, dict[int | None, Cell]] = {}
    for row in certificate.sites:
        jumps = jump is not None and (jump.site, jump.layer, jump.kind) == (
            row.site, row.layer, kind,
        )  # fmt: skip
        cell = Cell(row, getattr(row, kind), jumps)
        by_site.setdefault(row.site, {})[row.layer] = cell
    layers = sorted({row.layer for row in certificate.sites if row.layer is not None})
    rows = []
    for site, cells in by_site.items():
        each = None not in cells
        columns = [cells.get(layer, Cell()) for layer in layers] if each else [cells[None]]
        if any(cell.figures for cell in columns):
            rows.append((site, each, columns))
    return HeatMap(kind, layers, rows)


def farthest(certificate: Certificate, kind: str) -> tuple[str, Figures] | None:
    """(address, figures) where the error of this kind is largest, NaN before all."""
    found = [(address(row), getattr(row, kind)) for row in certificate.sites if getattr(row, kind)]
    size = lambda one: math.inf if math.isnan(one[1].relative) else one[1].relative  # noqa: E731
    return max(found, key=size, default=None)


def address(row: SiteRow) -> str:
    """Such as ``layers.20.mlp_out`` or ``embed``."""
    return row.site if row.layer is None else f"layers.{row.layer}.{row.site}"


def command(certificate: Certificate) -> str:
    """The command line that makes this certificate again."""
    parts = ["jaxtc", "parity", certificate.model, "--dtype", certificate.dtype]
    if certificate.transcoder is not None:
        layer = str(certificate.transcoder.layer)
        parts += ["--transcoder", certificate.transcoder.source, "--transcoder-layer", layer]
    if not built_in(certificate):
        parts += ["--prompts", "prompts.txt"]
    if len(certificate.layers) < certificate.config.get("num_hidden_layers", 0):
        parts += ["--layers", spans(certificate.layers)]
    if certificate.truth is not None:
        parts += ["--truth"]
    count = certificate.generation.new_tokens if certificate.generation else 0
    return shlex.join([*parts, "--new-tokens", str(count), "--report", "parity.html"])


def built_in(certificate: Certificate) -> bool:
    """Whether the prompts are those that are run by default."""
    default = EMBEDDED_TEXTS if certificate.model == EMBEDDED else TEXTS
    return [prompt.text for prompt in certificate.prompts] == list(default)


def tolerance_table(tolerances: dict[str, Any]) -> tuple[list[str], list[tuple[str, list]]]:
    """(columns, rows with the value of each column): what is given for each site."""
    tables = {name: table for name, table in tolerances.items() if isinstance(table, dict)}
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    return list(tables), [(key, [table.get(key) for table in tables.values()]) for key in keys]


def spans(layers: Iterable[int]) -> str:
    """``0,5,10-12``."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def short(number: float | None) -> str:
    """One digit and the exponent, ``3e-7``, for a cell."""
    if number is None:
        return "–"
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "∞" if number > 0 else "−∞"
    return _exponent(f"{number:.0e}") if number else "0"


def exact(number: float | int | None) -> str:
    """Four digits: ``3.142e-7``, ``0.9981``; whole numbers as they are."""
    if number is None:
        return "–"
    if isinstance(number, int) or not math.isfinite(number) or not number:
        return short(number) if isinstance(number, float) else str(number)
    return _exponent(f"{number:.4g}")


def percent(fraction: float) -> str:
    """Never rounded up to all: ``99.99%`` where one in a million differs."""
    kept = fraction if fraction in (0, 1) else min(max(fraction, 0.0001), 0.9999)
    return f"{100 * kept:.4g}%"


def _exponent(text: str) -> str:
    digits, mark, power = text.partition("e")
    return f"{digits}e{int(power)}" if mark else text


def step(number: float) -> int:
    """Which of the colours an error has."""
    if not math.isfinite(number):
        return STEPS - 1
    if number <= 0:
        return 0
    return min(max(round(2 * (math.log10(number) - LEAST)), 0), STEPS - 1)


def colours(stops: tuple[str, ...]) -> list[tuple[str, str]]:
    """(background, text) of each step, the text in whichever of black and white reads better."""
    made = []
    for index in range(STEPS):
        place = index / (STEPS - 1) * (len(stops) - 1)
        at = min(int(place), len(stops) - 2)
        low, high = (_channels(stop) for stop in stops[at : at + 2])
        mixed = [round(a + (b - a) * (place - at)) for a, b in zip(low, high, strict=True)]
        ground = "#" + "".join(f"{channel:02x}" for channel in mixed)
        made.append((ground, max("#000000", "#ffffff", key=lambda ink: contrast(ink, ground))))
    return made


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as WCAG 2.2 defines it: 1 to 21."""
    light = sorted(_luminance(colour) + 0.05 for colour in (one, other))
    return light[1] / light[0]


def _luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
