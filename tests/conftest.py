"""What all tests share."""

import gc
from pathlib import Path

import jax
import pytest

# Each compiled program is some memory maps, of which Linux allows a process 65,530; past that the
# compiler crashes. A whole run of the tests compiles thousands of programs.
MOST_MAPS = 15_000
MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs between test files, when there are many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
