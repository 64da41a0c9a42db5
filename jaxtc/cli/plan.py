"""``jaxtc plan``: what each device will hold, and whether that fits."""

import re

from rich.console import Console

from jaxtc.captures.reducers import At
from jaxtc.cli.options import (
    STDOUT,
    JsonFile,
    argument,
    check_place,
    option,
    parse_layers,
    write_json,
)
from jaxtc.errors import InputError
from jaxtc.memory.plan import plan
from jaxtc.sharding.rules import RULES, ShardingError


def command(
    model: argument(
        str,
        "2b, 9b or 27b; a hub id or a folder, of which only config.json is read; or 'embedded'.",
    ),
    mesh: option(
        str, "Devices along each axis of the mesh, such as data=2,model=4."
    ) = "data=1,model=1",
    batch: option(int, "Prompts of a call.") = 1,
    length: option(
        int | None, "Tokens of the longest prompt; 1024 by default, or what the context holds."
    ) = None,
    new_tokens: option(int, "Plan a generation of this many tokens, with its cache.") = 0,
    capture: option(
        list[str] | None,
        "Activations to keep, such as layers.20.mlp_out, or resid_post for every layer; "
        "resid_post@-1 keeps the last token's only. Several: give it again.",
        metavar="SITE[@POSITION]",
    ) = None,
    logits: option(
        str | None,
        "Which are returned; all by default, none by a generation.",
        metavar="all|last|none",
    ) = None,
    transcoders: option(
        str, "Layers with a transcoder in memory.", metavar="all|none|0,5,10-12"
    ) = "none",
    width: option(str, "Features of each transcoder: 16k, 65k, 1m or a number.") = "16k",
    dtype: option(str, "Of the weights.") = "bfloat16",
    transcoder_dtype: option(str, "Of the transcoders.") = "float32",
    skip: option(bool, "The transcoders have a skip connection.", "--skip") = False,
    replicate: option(
        list[str] | None,
        "Hold this logical axis whole on every device, such as vocab. Several: give it again.",
        metavar="AXIS",
    ) = None,
    json_file: JsonFile = None,
) -> None:
    """Show what each device of a mesh will hold, whether it fits, and what would make it fit.

    From shapes alone: no weights are fetched, no device is needed.
    """
    if json_file is not None:
        check_place("--json", json_file)
    chosen = {"all": "all", "none": ()}.get(transcoders)
    if chosen is None:
        chosen = parse_layers(transcoders, "--transcoders")
    try:
        found = plan(
            model, mesh, rules=RULES | dict.fromkeys(map(_axis, replicate or [])), dtype=dtype,
            batch=batch, length=length, new_tokens=new_tokens,
            capture=[_capture(text) for text in capture or []], transcoders=chosen, width=width,
            transcoder_dtype=transcoder_dtype, skip=skip,
            logits={None: "unset", "none": None}.get(logits, logits),
        )  # fmt: skip
    except ShardingError as error:
        if "rules=" not in str(error):
            raise
        raise ShardingError(f"{error} In place of rules, give --replicate AXIS here.") from error
    write_json(json_file, found.to_dict())
    console = Console(stderr=json_file == STDOUT)
    console.print(str(found), markup=False, emoji=False, soft_wrap=True)


def _capture(text: str) -> str | At:
    """``resid_post`` or ``resid_post@-1``."""
    site, at, position = text.rpartition("@")
    if not at:
        return text
    if not re.fullmatch(r"-?\d{1,9}", position):
        raise InputError(
            f"--capture {text}: {position!r} is not a position; expected a whole number, such as "
            "-1 for each prompt's last token."
        )
    return At(site, int(position))


def _axis(name: str) -> str:
    if name not in RULES:
        raise ShardingError(f"--replicate {name}: there is no such axis, only {', '.join(RULES)}.")
    return name
