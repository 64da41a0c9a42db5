"""The command line: parses, calls the library, draws.

Importing any of jaxtc imports JAX; transformers, which is as slow, is imported when a tokenizer is
loaded, and what training needs by the commands of ``jaxtc embedded``.

Errors of the user's are one paragraph on stderr and exit code 2; Ctrl-C is 130.
"""

import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from jaxtc.cli import convert, explain, generate, parity, plan, sites
from jaxtc.cli.options import option
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
    version: option(
        bool, "Show the version and exit.", "--version", callback=_show_version, is_eager=True
    ) = False,
) -> None:
    pass


for _module in (explain, generate, parity, plan, convert, sites):
    app.command(_module.__name__.rpartition(".")[2])(_module.command)


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
