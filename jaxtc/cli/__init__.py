"""The command line: parses, calls the library, draws.

Importing any of jaxtc imports JAX; transformers, which is as slow, is imported when a tokenizer is
loaded, and what training needs by the commands of ``jaxtc embedded``.

Errors of the user's are one paragraph on stderr and exit code 2; Ctrl-C is 130.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from jaxtc.cli.convert import command as convert_command
from jaxtc.cli.explain import command as explain_command
from jaxtc.cli.generate import command as generate_command
from jaxtc.cli.options import Dtype, JsonFile, Model, OnlyJson
from jaxtc.cli.parity import command as parity_command
from jaxtc.cli.plan import command as plan_command
from jaxtc.cli.sites import command as sites_command
from jaxtc.errors import JaxtcError
from jaxtc.helpers import JAXTC_VERSION


class _Embedded(TyperGroup):
    """The commands of ``jaxtc embedded``, imported when one of them is asked for."""

    def _group(self) -> TyperGroup:
        from jaxtc.cli.embedded import app as embedded

        return typer.main.get_group(embedded)

    def list_commands(self, ctx):
        return self._group().list_commands(ctx)

    def get_command(self, ctx, cmd_name):
        return self._group().get_command(ctx, cmd_name)


app = typer.Typer(
    name="jaxtc",
    help="Gemma-2 and its transcoders in JAX: see what an MLP does with a prompt.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(
    typer.Typer(cls=_Embedded, no_args_is_help=True),
    name="embedded",
    help="The small model and transcoders that ship with jaxtc: train them again, measure them.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxtc {JAXTC_VERSION}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command("explain")
def _explain(
    prompt: Annotated[str, typer.Argument(help="The text to explain; <bos> is added.")],
    model: Model = "embedded",
    transcoder: Annotated[
        str | None,
        typer.Option(
            help="'embedded', a hub id with or without a path (google/gemma-scope-2b-pt-transcoders"
            "/layer_20/width_16k/average_l0_11), a folder or a params.npz. The model's own, if "
            "it has some.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Which layer's MLP, from 0; 'all' for a row per layer. "
            "By default 3, the last, for the embedded model and 20, the Gemma Scope "
            "tutorial's, for google/gemma-2-2b.",
            show_default=False,
        ),
    ] = None,
    input_site: Annotated[
        str | None,
        typer.Option(
            metavar="SITE",
            help="Feed the transcoder another site than the one it was trained on; mlp_in is what "
            "the Gemma Scope tutorial feeds.",
            show_default=False,
        ),
    ] = None,
    top_features: Annotated[int, typer.Option(help="Strongest features shown per token.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 2,
    dtype: Dtype = None,
    as_json: OnlyJson = False,
) -> None:
    """Show, token by token, which transcoder features explain what an MLP did with a prompt."""
    explain_command(
        prompt,
        model=model,
        transcoder=transcoder,
        layer=layer,
        input_site=input_site,
        top_features=top_features,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        as_json=as_json,
    )


@app.command("generate")
def _generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; <bos> is added.")],
    model: Model = "embedded",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 40,
    temperature: Annotated[
        float,
        typer.Option(help="0 takes the likeliest token; 1 draws from the model's distribution."),
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among the K likeliest only.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw among the fewest likeliest of this probability together only.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    stop: Annotated[
        str | None,
        typer.Option(help="End before this text, if it comes up.", show_default=False),
    ] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FEATURE=VALUE",
            help="Set a transcoder's feature to this activation on every token but <bos>. "
            "Several: give it again.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Whose MLP's features --steer names, from 0; by default as for `jaxtc explain`.",
            show_default=False,
        ),
    ] = None,
    transcoder: Annotated[
        str | None,
        typer.Option(
            help="Where --steer's features are, as for `jaxtc explain`.", show_default=False
        ),
    ] = None,
    dtype: Dtype = None,
    as_json: OnlyJson = False,
) -> None:
    """Continue a text, token by token as they come; steer it by transcoder features."""
    generate_command(
        prompt,
        model=model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        steer=steer or [],
        layer=layer,
        transcoder=transcoder,
        dtype=dtype,
        as_json=as_json,
    )


@app.command("parity")
def _parity(
    model: Annotated[
        str, typer.Argument(help="'embedded', a hub id such as google/gemma-2-2b, or a folder.")
    ] = "embedded",
    transcoder: Annotated[
        str | None,
        typer.Option(
            help="Compare this transcoder's features too: 'embedded', a hub id with or without a "
            "path, a folder or a params.npz.",
            show_default=False,
        ),
    ] = None,
    transcoder_layer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Whose MLP it imitates, where its source does not say.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A text file, one prompt a line; a few built-in sentences by default.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of both models' weights: float32 or bfloat16.")
    ] = "float32",
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,5,10-12", help="Whose sites to compare; all by default.", show_default=False
        ),
    ] = None,
    truth: Annotated[
        bool,
        typer.Option(
            "--truth", help="Also run PyTorch in float64, to see which of the two is nearer."
        ),
    ] = False,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Greedy tokens to compare after each prompt.")
    ] = 16,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an HTML report.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Certify that JAX and PyTorch agree on your weights and prompts; exit code 1 if they do not.

    Runs transformers' Gemma-2 in PyTorch and ours on the same tokens, one after the other, and
    compares every site of every layer. PyTorch comes with jaxtc's extra "parity".
    """
    passed = parity_command(
        model,
        transcoder=transcoder,
        transcoder_layer=transcoder_layer,
        prompts=prompts,
        dtype=dtype,
        layers=layers,
        truth=truth,
        new_tokens=new_tokens,
        report=report,
        json_file=json_file,
    )
    raise typer.Exit(0 if passed else 1)


app.command("plan")(plan_command)
app.command("convert")(convert_command)


@app.command("sites")
def _sites(
    model: Annotated[
        str, typer.Option(help="Whose shapes to show; only its config.json is read.")
    ] = "embedded",
    as_json: OnlyJson = False,
) -> None:
    """List every site that can be captured or edited, with its shape and its names elsewhere."""
    sites_command(model, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """The ``jaxtc`` command; raises SystemExit with its exit code."""
    try:
        app(arguments)
    except JaxtcError as error:
        console = Console(stderr=True)
        message = Text.assemble(("Error: ", "bold red"), " ".join(str(error).split()))
        # A file or a pipe gets one line, which is easier to search than a wrapped one.
        console.print(message, soft_wrap=not console.is_terminal)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
