"""Options that several commands have, and what they share in reading them."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxtc.errors import InputError, SourceError
from jaxtc.helpers import for_json, write_whole
from jaxtc.weights.files import local


def option(kind: Any, text: str, *names: str, **settings: Any) -> Any:
    """The annotation of a command's parameter that is an option; ``text`` is its help."""
    return Annotated[kind, typer.Option(*names, help=text, **settings)]


def argument(kind: Any, text: str, **settings: Any) -> Any:
    """The same of a positional argument."""
    return Annotated[kind, typer.Argument(help=text, **settings)]


Model = option(str, "'embedded', a hub id such as google/gemma-2-2b, or a folder.")
Dtype = option(
    str | None,
    "Of the model's weights: float32, bfloat16 or float16. float32 on a CPU and "
    "bfloat16 on accelerators by default.",
)
Sites = option(
    str | None,
    "What the transcoder was trained to read and to write, where its source does not say: "
    "mlp_in_normed,mlp_out for Gemma Scope's transcoders.",
    metavar="READ,WRITTEN",
)
Format = option(
    str | None,
    "Whose transcoders' arrays they are, where nothing else says it.",
    metavar="circuit-tracer",
)
OnlyJson = option(bool, "Only JSON on stdout.", "--json")
JsonFile = option(Path | None, "Write every figure; - for stdout.", "--json", metavar="FILE")
STDOUT = Path("-")


def parse_layers(text: str, option: str = "--layers") -> list[int]:
    """``0,5,10-12`` as [0, 5, 10, 11, 12]; an InputError names ``option``."""
    found: list[int] = []
    for part in text.split(","):
        # No model has more than 10,000 layers.
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InputError(
                f"{option} is {text!r}, expected numbers of layers from 0 and ranges of them, "
                "such as 0,5,10-12."
            )
        found += range(first, last + 1)
    return found


def told(sites: str | None, format: str | None) -> dict[str, str]:
    """What ``--sites`` and ``--format`` say of a transcoder, as load_transcoder takes it."""
    read, _, written = (part.strip() for part in (sites or "").partition(","))
    if sites is not None and not (read and written):
        raise InputError(f"--sites is {sites!r}, expected two, such as mlp_in_normed,mlp_out.")
    found = {"input_site": read, "output_site": written} if sites else {}
    return found | ({"format": format} if format is not None else {})


def check_place(option: str, path: Path) -> None:
    """Refuse a file that cannot be written before the work is done, not after."""
    if path == STDOUT:
        return
    if path.is_dir():
        raise SourceError(f"{option} {path} is a folder; name a file in it.")
    parent = local.find(path.parent)
    if parent is None or not parent.is_dir():
        raise SourceError(f"{option} {path}: there is no folder {path.parent}; make it first.")


def write_json(path: Path | None, value: Any) -> None:
    """What ``--json`` asked for: to a file, to stdout, or nothing. NaN and infinities are null."""
    if path is None:
        return
    value = for_json(value)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if path != STDOUT:
        write_whole(path, text + "\n")
        return
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)
