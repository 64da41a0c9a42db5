"""What all tests share."""

import gc
import importlib
from pathlib import Path

import jax
import pytest

import jaxtc
from jaxtc import cli
from tests.parity.figures import (  # noqa: F401
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from tests.support import tiny

# Each compiled program is a few hundred memory maps, of which Linux allows a process 65,530; past
# that the compiler crashes. A whole run of the tests compiles thousands of programs.
MANY, TOO_MANY = 10_000, 45_000
MAPS = Path("/proc/self/maps")

# A command that is run in this process would have it keep, and later load, programs on disk.
jax.config.update("jax_enable_compilation_cache", False)


def drop_programs(most: int) -> None:
    """Forget what was compiled, if it is more than ``most`` maps."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > most:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def few_programs_between_files():
    yield
    drop_programs(MANY)


@pytest.fixture(autouse=True)
def few_programs_within_a_file():
    """Rarely: tests of a file share programs, and some count compiles."""
    yield
    drop_programs(TOO_MANY)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny model with its tokenizer, and transcoders for both layers."""
    root = tmp_path_factory.mktemp("tiny")
    jaxtc.save_model(tiny.model(), root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    for layer in (0, 1):
        place = root / "transcoders" / f"layer_{layer}" / "width_50" / "average_l0_20"
        jaxtc.save_transcoder(tiny.transcoder(layer), place)
    jaxtc.save_transcoder(tiny.transcoder(1, width=16), root / "narrow" / "params.npz")
    return root


@pytest.fixture
def cli_run(capsys, monkeypatch):
    """Run the command in this process, its process-wide settings left out: (code, out, err)."""
    runtime = importlib.import_module("jaxtc.cli.runtime")
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda console: None)
    monkeypatch.setattr(runtime, "quiet", lambda: None)

    def run(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run
