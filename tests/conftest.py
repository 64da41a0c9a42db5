"""What all tests share."""

import gc
from pathlib import Path

import jax
import pytest

from tests.parity.figures import (  # noqa: F401
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

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
