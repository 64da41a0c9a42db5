"""The certificate as one HTML file: no script, nothing fetched, fit for a phone and for paper."""

import functools
import itertools
import math
import os
import shlex
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from types import ModuleType

from jaxtc.errors import InputError
from jaxtc.helpers import write_whole
from jaxtc.parity.certificate import KINDS, Certificate, SiteRow
from jaxtc.parity.texts import built_in

# (background, text) of an error from 1e-8 or less to 1 or more, two steps a decade.
LEAST, STEPS = -8, 17
_INKS = "#000000", "#ffffff"
_LIGHT = """#f3f7fb #e9f1f8 #deeaf6 #d4e4f3 #cadef0 #b9d3ea #a8c8e5 #97bde0 #86b2da #72a3d0 #5f94c6
            #4c86bd #3877b3 #2e669f #24548a #194376 #0f3262"""
_DARK = """#1a2530 #1b2b3b #1c3146 #1c3751 #1d3d5c #21476c #24507b #285a8a #2c649a #3d75aa #4e86bb
           #5f97cc #70a8dc #8bb9e4 #a6caec #c1dbf3 #dcecfb"""
COLOURS = {
    "light": [(ground, _INKS[at >= 12]) for at, ground in enumerate(_LIGHT.split())],
    "dark": [(ground, _INKS[at < 10]) for at, ground in enumerate(_DARK.split())],
}
# How many failures are shown before the rest is folded away.
SHOWN = 12


def need_jinja2() -> ModuleType:
    """The module; raises InputError where it is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise InputError(
            "The HTML report needs jinja2, which is not installed here: pip install "
            "'jaxtc[parity]'. The JSON form of the certificate (--json) needs nothing."
        ) from error
    return jinja2


def write_report(certificate: Certificate, path: str | os.PathLike) -> Path:
    """Write the HTML report of a certificate, whole or not at all; returns the path.

    Raises:
        InputError: jinja2 is not installed.
        SourceError: the file cannot be written.
    """
    write_whole(Path(path), render(certificate))
    return Path(path)


def render(certificate: Certificate) -> str:
    """The page; what came from outside (prompts, names) is escaped."""
    jinja2 = need_jinja2()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"short": short, "exact": exact, "percent": percent, "step": step}
    source = resources.files("jaxtc.parity").joinpath("report.html.j2").read_text("utf-8")
    sites: dict[str, dict[int | None, SiteRow]] = {}
    for row in certificate.sites:
        sites.setdefault(row.site, {})[row.layer] = row
    return environment.from_string(source).render(
        c=certificate,
        kinds=KINDS,
        sites=sites,
        farthest={kind: farthest(certificate, kind) for kind in KINDS},
        shown=SHOWN,
        colours=COLOURS,
        decades=range(LEAST, 1),
        command=command(certificate),
        from_file=not runs_default(certificate),
        one_a_line=all(one.text and not {*"\r\n"} & {*one.text} for one in certificate.prompts),
        layers=spans(certificate.layers),
    )


def farthest(certificate: Certificate, kind: str) -> SiteRow | None:
    """The row whose error of this kind is largest, NaN before all."""
    size = lambda row: (math.isnan(getattr(row, kind).relative), getattr(row, kind).relative)  # noqa: E731
    return max((row for row in certificate.sites if getattr(row, kind)), key=size, default=None)


def command(certificate: Certificate) -> str:
    """The command line that makes this certificate again."""
    parts = ["jaxtc", "parity", certificate.model, "--dtype", certificate.dtype]
    if certificate.transcoder is not None:
        layer = str(certificate.transcoder.layer)
        parts += ["--transcoder", certificate.transcoder.source, "--transcoder-layer", layer]
    if not runs_default(certificate):
        parts += ["--prompts", "prompts.txt"]
    if len(certificate.layers) < certificate.config.get("num_hidden_layers", 0):
        parts += ["--layers", spans(certificate.layers)]
    if certificate.truth is not None:
        parts += ["--truth"]
    count = certificate.generation.new_tokens if certificate.generation else 0
    return shlex.join([*parts, "--new-tokens", str(count), "--report", "parity.html"])


def runs_default(certificate: Certificate) -> bool:
    """Whether the prompts are the built-in ones."""
    return [prompt.text for prompt in certificate.prompts] == built_in(certificate.model)


def spans(layers: Iterable[int]) -> str:
    """``0,5,10-12``."""
    layers, found = sorted(layers), []
    for _, run in itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        (_, first), *_, (_, last) = [*run] * 2
        found.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(found)


def exact(number: float | str | None, form: str = ".4g") -> str:
    """Four digits: ``3.142e-7``, ``0.9981``; whole numbers and text as they are."""
    if not isinstance(number, float):
        return "–" if number is None else str(number)
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "∞" if number > 0 else "−∞"
    digits, mark, power = f"{number:{form if number else 'g'}}".partition("e")
    return f"{digits}e{int(power)}" if mark else digits


# One digit and the exponent, ``3e-7``, for a cell.
short = functools.partial(exact, form=".0e")


def percent(fraction: float) -> str:
    """Never rounded up to all: ``99.99%`` where one in a million differs."""
    kept = fraction if fraction in (0, 1) else min(max(fraction, 0.0001), 0.9999)
    return f"{100 * kept:.4g}%"


def step(number: float) -> int:
    """Index of an error's colour."""
    if not math.isfinite(number):
        return STEPS - 1
    if number <= 0:
        return 0
    return min(max(round(2 * (math.log10(number) - LEAST)), 0), STEPS - 1)
