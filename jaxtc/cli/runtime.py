"""What the commands share: a quiet JAX with a compilation cache, and progress on stderr."""

import contextlib
import logging
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from platformdirs import user_cache_path
from rich.console import Console
from rich.status import Status
from rich.table import Table, box
from rich.text import Text


def plain_table(gap: int = 1, **options: Any) -> Table:
    """A table with a rule under its headings and nothing else drawn."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0), **options)


def note(console: Console, notes: Iterable[str]) -> None:
    """What a person should know besides the result, a paragraph each."""
    for one in notes:
        console.print(Text.assemble(("Note: ", "bold yellow"), one))


class Progress:
    """Shows the current step: on a spinner when there is one, else one line per step."""

    def __init__(self, console: Console, status: Status | None = None):
        self._console, self._status, self._step = console, status, ""

    def __call__(self, step: str) -> None:
        """Begin a step, named by a few words."""
        self._step = step
        text = Text(f"{step} …")  # a Text: what the user typed is no markup
        if self._status:
            self._status.update(text)
        else:
            self._console.print(text, highlight=False, soft_wrap=True)

    def part(self, done: int, total: int) -> None:
        """How far the step is; shown by a spinner only."""
        if self._status and total:
            self._status.update(Text(f"{self._step} … {done / total:.0%}"))


@contextlib.contextmanager
def working(first: str) -> Iterator[Progress]:
    """A spinner on stderr (a plain line a step where stderr is no terminal) around long work.

    Whatever a library prints to stdout meanwhile goes to stderr: stdout is for the result.
    """
    console = Console(stderr=True)
    spinner = console.status("") if console.is_terminal else contextlib.nullcontext()
    with contextlib.redirect_stdout(sys.stderr), spinner as status:
        progress = Progress(console, status)
        progress(first)
        quiet()
        use_compilation_cache(console)
        yield progress


def quiet() -> None:
    """Keep the libraries' notes to developers from the user; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("jax", "jax._src.xla_bridge", "absl", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)


def use_compilation_cache(console: Console) -> None:
    """Keep compiled programs between runs, unless the user has said where, or not to.

    A cached program is code that will be run, so the folder is the user's own, with mode 0700.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = user_cache_path("jaxtc") / "xla"
    if problem := make_private(folder):
        text = (
            f"Compiled programs are not kept: {problem}. Set JAX_COMPILATION_CACHE_DIR to a folder "
            "of your own to keep them."
        )
        console.print(Text(text), highlight=False, soft_wrap=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Many small programs are compiled once each; together they are a second or more.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def make_private(folder: Path) -> str | None:
    """Make ``folder`` with mode 0700, or say why it would not be private."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        if not hasattr(os, "getuid"):
            return None
        me = os.getuid()
        for place in (folder, *folder.resolve().parents):
            seen = place.lstat()
            if stat.S_ISLNK(seen.st_mode):
                return f"{place} is a link"
            if seen.st_uid not in ((me,) if place == folder else (me, 0)):
                return f"{place} belongs to another user"
            # In a sticky folder such as /tmp only its owner can replace a file.
            if seen.st_mode & 0o022 and (place == folder or not seen.st_mode & stat.S_ISVTX):
                return f"others can write to {place}"
        if stat.S_IMODE(folder.lstat().st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        return f"{folder} cannot be used ({error.strerror})"
    return None
