"""Hundreds of mutants of every format: refused by name or read as they are, in time and in memory.

Every run reads some of each, ``pytest -m slow`` hundreds; with ``JAXTC_MUTANTS=2000``, thousands.
Each is told by its number, so that
``python -m tests.weights.hostile.child npz 1234 1`` reads one again.
"""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from jaxtc.errors import WeightsError
from tests.weights.hostile import child

SOME, MUTANTS = 20, int(os.environ.get("JAXTC_MUTANTS", "500"))
# A process each: a crash is a failure of its batch, and no other's.
BATCH = 500


def read(format: str, first: int, count: int) -> dict:
    """What a process of its own says of some mutants."""
    command = [sys.executable, "-m", "tests.weights.hostile.child", format, str(first), str(count)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=120 + count, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(60 + 2 * MUTANTS)
@pytest.mark.parametrize("mutants", [SOME, pytest.param(MUTANTS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", child.FORMATS)
def test_mutants(format, mutants):
    loaded = refused = 0
    for first in range(0, mutants, BATCH):
        count = min(BATCH, mutants - first)
        said = read(format, first, count)
        assert said["loaded"] + said["refused"] == count
        loaded, refused = loaded + said["loaded"], refused + said["refused"]
        print(format, first, json.dumps(said))
    # Some mutations change nothing that matters; many must not pass.
    assert refused > mutants / 3 and loaded > 0


class Made:
    """A case whose loading does what a test says."""

    kind = "made"

    def __init__(self, load, check=lambda: None):
        self.load, self.check = lambda deep: load(), lambda loaded: check()

    def mutate(self, rng):
        return self.kind

    def warranted(self):
        return 100


def hang():
    while True:
        pass


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (Made(lambda: fail(WeightsError("the file is not sound: fetch it again"))), None),
        (Made(dict), None),
        (Made(lambda: fail(ValueError("as numpy says it"))), ValueError),
        (Made(lambda: fail(WeightsError("short"))), AssertionError),
        (Made(dict, lambda: fail(AssertionError("other values"))), AssertionError),
        (Made(lambda: {"x": bytearray(32 << 20)}), AssertionError),
        (Made(hang), child.Hang),
    ],
)
def test_a_reader_that_does_wrong_is_noticed(made, error, monkeypatch):
    monkeypatch.setattr(child, "SECONDS", 0.2)
    tracemalloc.start()
    try:
        if error is None:
            assert child.one(made, 0, 0)[0] == "made"
        else:
            with pytest.raises(error):
                child.one(made, 0, 0)
    finally:
        tracemalloc.stop()
