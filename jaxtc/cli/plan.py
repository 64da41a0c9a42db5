"""``jaxtc plan``: what each device will hold, and whether that fits."""

import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
from jaxtc.cli.runtime import plain_table
from jaxtc.errors import InputError
from jaxtc.helpers import gigabytes
from jaxtc.memory.plan import Plan, plan
from jaxtc.sharding.mesh import show
from jaxtc.sharding.rules import RULES, ShardingError

LEGEND = (
    "GB are 10⁹ bytes. The workspace is an estimate; everything else is counted, byte by byte, "
    "from shapes."
)


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
    cross_layer: option(
        bool, "They are one cross-layer transcoder of all layers.", "--cross-layer"
    ) = False,
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
            transcoder_dtype=transcoder_dtype, skip=skip, cross_layer=cross_layer,
            logits={None: "unset", "none": None}.get(logits, logits),
        )  # fmt: skip
    except ShardingError as error:
        if "rules=" not in str(error):
            raise
        raise ShardingError(f"{error} In place of rules, give --replicate AXIS here.") from error
    write_json(json_file, found.to_dict())
    draw(Console(stderr=json_file == STDOUT), found)


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


def draw(console: Console, found: Plan) -> None:
    """What is held, then where it fits."""
    asked = found.request
    devices = f"{asked.devices} device" + "s" * (asked.devices > 1)
    prompts = f"{asked.batch} prompt" + "s" * (asked.batch > 1)
    work = f"{prompts} of {asked.length:,} tokens"
    work += f" and {asked.new_tokens:,} new ones" if asked.new_tokens else ""
    mesh = show(dict(asked.mesh))
    console.print(Text.assemble((found.model, "bold cyan"), f" on {mesh} ({devices}), {work}"))
    held = plain_table(2, show_footer=True)
    held.add_column("what", "together", style="bold cyan", no_wrap=True)
    held.add_column("whole", gigabytes(found.total), justify="right", no_wrap=True)
    each = Text(gigabytes(found.per_device), "bold")
    held.add_column("each device", each, justify="right", no_wrap=True)
    held.add_column("", overflow="fold", style="dim")
    for part in found.parts:
        numbers = gigabytes(part.total), gigabytes(part.per_device)
        held.add_row(part.name, *numbers, Text(part.detail))
    console.print(held)
    console.print(_fits(found))
    for note in found.notes:
        console.print(Text.assemble(("Note: ", "bold yellow"), note))
    console.print(Text(LEGEND, "dim"))


def _fits(found: Plan) -> Table:
    table = plain_table(2)
    table.add_column("fits on a", style="bold cyan", no_wrap=True)
    for name in ("memory", "usable", "needed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what would make it fit", overflow="fold")
    for verdict in found.verdicts:
        sizes = map(gigabytes, (verdict.memory, verdict.usable, verdict.needed))
        mark = Text("✓", "bold green") if verdict.fits else Text("✗", "bold red")
        lines = [
            Text.assemble((one.option, "yellow"), f" → {gigabytes(one.needed)} ({one.meaning})")
            for one in verdict.suggestions
        ] or [Text("" if verdict.fits else "nothing that was tried", "dim")]
        table.add_row(verdict.device, *sizes, mark, Text("\n").join(lines))
    return table
