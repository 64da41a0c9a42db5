"""``jaxtc convert``: a checkpoint in another format."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jaxtc.cli.options import parse_layers
from jaxtc.cli.runtime import working
from jaxtc.errors import InputError
from jaxtc.helpers import gigabytes
from jaxtc.weights.checkpoints.read import is_converted
from jaxtc.weights.checkpoints.sidecar import read_sidecar
from jaxtc.weights.conversion.convert import TARGETS, convert


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A model or transcoders: a hub id, a folder, a transcoder's file, a folder that "
            "this command made, or 'embedded'."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write, new or empty.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(TARGETS),
            help="orbax, for jaxtc and orbax; safetensors, a model for transformers; npz or "
            "circuit-tracer, transcoders for Gemma Scope's readers or circuit-tracer.",
        ),
    ] = "orbax",
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="model|transcoders",
            help="What to convert, where the source has both, as 'embedded'.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; by default what is stored stays as it is.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Of a hub id: a branch, tag or commit.", show_default=False),
    ] = None,
    layers: Annotated[
        str, typer.Option(metavar="all|0,5,10-12", help="Which layers' transcoders.")
    ] = "all",
    width: Annotated[
        str | None,
        typer.Option(help="Which of a layer's transcoders, such as 65k.", show_default=False),
    ] = None,
    l0: Annotated[
        str | None,
        typer.Option("--l0", help="Which, by its average L0.", show_default=False),
    ] = None,
    input_site: Annotated[
        str | None,
        typer.Option(
            metavar="SITE",
            help="What the transcoders read, where nothing tells.",
            show_default=False,
        ),
    ] = None,
    output_site: Annotated[
        str | None,
        typer.Option(
            metavar="SITE",
            help="What the transcoders imitate, where nothing tells.",
            show_default=False,
        ),
    ] = None,
    without_sites: Annotated[
        bool,
        typer.Option("--without-sites", help="Write params.npz though it cannot hold the sites."),
    ] = False,
    model_name: Annotated[
        str | None,
        typer.Option(
            help="For circuit-tracer's config.yaml, such as google/gemma-2-2b.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        float, typer.Option(metavar="GB", help="Most of a model in one safetensors file.")
    ] = 5,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="First compare the files with the Hugging Face hub's hashes (or, of a converted "
            "checkpoint, with its own).",
        ),
    ] = False,
) -> None:
    """Write a model or transcoders in another format.

    OUT.partial is written, and becomes OUT when all is there. A conversion that was interrupted
    goes on where it stopped when the same command is given again.
    """
    if not max_shard_size > 0:
        raise InputError(f"--max-shard-size is {max_shard_size:g} GB, expected more than 0.")
    with working(f"Converting {source}") as progress:
        try:
            made = convert(
                source,
                out,
                to,
                kind=kind,
                dtype=dtype,
                revision=revision,
                layers=layers if layers == "all" else parse_layers(layers),
                width=width,
                l0=l0,
                input_site=input_site,
                output_site=output_site,
                without_sites=without_sites,
                model_name=model_name,
                max_shard_size=max(1, int(max_shard_size * 10**9)),
                verify=verify,
                progress=progress.part,
            )
        except KeyboardInterrupt:
            console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
            console.print("Interrupted. Give the same command again to go on where it stopped.")
            raise
    typer.echo(f"{made}: {_size(made)}")
    names = {path.name for path in made.glob("layer_*.safetensors")}
    if to == "circuit-tracer" and names != {f"layer_{i}.safetensors" for i in range(len(names))}:
        typer.echo("circuit-tracer itself loads only a set with every layer from 0 on.", err=True)


def _size(folder: Path) -> str:
    """What was written, in a few words."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = f"{gigabytes(sum(path.stat().st_size for path in files))} in {len(files)} files"
    if not is_converted(folder):
        return size
    sidecar = read_sidecar(folder)
    return f"{size}, {sidecar.kind} in {sidecar.dtype}, content {sidecar.content[:12]}"
