"""What all tests share."""

import gc
import importlib
import os
import signal
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

# Programs compiled without LLVM's optimizations take half as long, and most tests' time is that.
# These folders compare programs with each other or with NumPy, within tolerances that do not depend
# on it; parity with PyTorch is tested with programs as users run them.
# JAXTC_OPTIMIZED=1 runs everything as users do.
QUICK = (
    "captures", "cli", "edits", "embedded", "experiments", "explore", "model", "programs", "tap",
    "tests", "transcoders",
)  # fmt: skip
OPTIMIZED = bool(os.environ.get("JAXTC_OPTIMIZED"))
# What takes longest comes first, so that no process is left alone with it at the end.
LONG = (
    "test_embedded", "test_patching", "test_processes", "test_readme", "test_generate",
    "test_sweep", "test_certificate", "test_flow_edits", "parity/test_gradients",
    "parity/test_notebook", "test_plan", "test_interventions", "test_model", "test_gemma2",
    "test_hostile_files", "test_transformations", "test_variants", "test_cli", "test_mesh",
)  # fmt: skip

# Started in the background of a script, pytest and what it starts would ignore Ctrl-C, which some
# tests send.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A command that is run in this process would have it keep, and later load, programs on disk.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_collection_modifyitems(items):
    def order(item):
        file = item.nodeid.partition(".py")[0]
        return next((n for n, name in enumerate(LONG) if file.endswith(name)), len(LONG))

    items.sort(key=order)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles(request):
    """See :data:`QUICK`."""
    before = jax.config.read("jax_disable_most_optimizations")  # set by processes of tests/scale
    quick = request.path.parent.name in QUICK and not OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", before or quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
