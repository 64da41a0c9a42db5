"""``jaxtc convert``: a checkpoint in another format."""

from pathlib import Path

import typer

from jaxtc.cli.options import Format, argument, option, parse_layers
from jaxtc.cli.runtime import working
from jaxtc.helpers import gigabytes
from jaxtc.weights.checkpoints.sidecar import read_sidecar
from jaxtc.weights.conversion.convert import TARGETS, convert


def command(
    source: argument(
        str,
        "A model or transcoders: a hub id, a folder (of a LoRA adapter or Google's Flax "
        "checkpoint, too), a transcoder's file, a folder that this command made, or 'embedded'.",
    ),
    out: argument(Path, "The folder to write, new or empty."),
    to: option(
        str,
        "orbax, for jaxtc and orbax; safetensors, a model for transformers; npz or "
        "circuit-tracer, transcoders for Gemma Scope's readers or circuit-tracer.",
        metavar="|".join(TARGETS),
    ) = "orbax",
    kind: option(
        str | None,
        "What to convert, where the source has both, as 'embedded'.",
        metavar="model|transcoders",
    ) = None,
    dtype: option(
        str | None, "float32, bfloat16 or float16; by default what is stored stays as it is."
    ) = None,
    revision: option(str | None, "Of a hub id: a branch, tag or commit.") = None,
    layers: option(str, "Which layers' transcoders.", metavar="all|0,5,10-12") = "all",
    width: option(str | None, "Which of a layer's transcoders, such as 65k.") = None,
    l0: option(str | None, "Which, by its average L0.", "--l0") = None,
    format: Format = None,
    input_site: option(
        str | None, "What the transcoders read, where their source does not say.", metavar="SITE"
    ) = None,
    output_site: option(
        str | None, "What the transcoders imitate, where their source does not say.", metavar="SITE"
    ) = None,
    model_name: option(
        str | None, "For circuit-tracer's config.yaml, such as google/gemma-2-2b."
    ) = None,
    max_shard_size: option(float, "Largest safetensors file of a model.", metavar="GB") = 5,
    verify: option(
        bool,
        "First compare the files with the Hugging Face hub's hashes (or, of a converted "
        "checkpoint, with its own).",
        "--verify",
    ) = False,
    ignore: option(
        list[str] | None,
        "A tensor of the model to leave out, such as score.weight of a reward model; * for any "
        "characters. Several: give it again.",
        metavar="TENSOR",
    ) = None,
    base: option(
        str | None,
        "Of a LoRA adapter, the model to merge it into; by default the one that it names.",
        metavar="MODEL",
    ) = None,
    config: option(
        Path | None,
        "Of Google's Flax checkpoint, a config.json, where its sizes are no release's.",
        metavar="FILE",
    ) = None,
) -> None:
    """Write a model or transcoders in another format.

    OUT.partial is written, and renamed to OUT once complete. The same command resumes a conversion
    that was interrupted.
    """
    with working(f"Converting {source}") as progress:
        try:
            made = convert(
                source, out, to, kind=kind, dtype=dtype, revision=revision,
                layers=layers if layers == "all" else parse_layers(layers), width=width, l0=l0,
                input_site=input_site, output_site=output_site, format=format,
                model_name=model_name, max_shard_size=max_shard_size * 10**9,
                verify=verify, ignore=ignore or (), base=base, config=config,
                progress=progress.part,
            )  # fmt: skip
        except KeyboardInterrupt:
            note = "Interrupted. Give the same command again to go on where it stopped."
            typer.echo(note, err=True)
            raise
    files = [path for path in made.rglob("*") if path.is_file()]
    size = f"{gigabytes(sum(path.stat().st_size for path in files))} in {len(files)} files"
    if to == "orbax":
        sidecar = read_sidecar(made)
        size += f", {sidecar.kind} in {sidecar.dtype}, content {sidecar.content[:12]}"
    typer.echo(f"{made}: {size}")
    names = {path.name for path in made.glob("layer_*.safetensors")}
    if to == "circuit-tracer" and names != {f"layer_{i}.safetensors" for i in range(len(names))}:
        typer.echo("circuit-tracer itself loads only a set with every layer from 0 on.", err=True)
