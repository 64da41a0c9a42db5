"""A process that reads mutants: ``python -m tests.weights.hostile.child FORMAT FIRST COUNT``.

Prints one line of JSON; exit status 1 when a mutant did anything but be refused by a JaxtcError or
load as what it says, took too long, or took more memory than its honest size warrants.
"""

import contextlib
import importlib
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from jaxtc.errors import JaxtcError

FORMATS = {
    "safetensors": "tensors", "transcoder": "tensors", "npz": "npz", "index": "folders",
    "config": "folders", "generation": "folders", "metadata": "folders",
    "converted": "converted", "converted-transcoders": "converted",
    "cross-layer": "cross_layer",
    "saelens": "described", "sparsify": "described", "config.yaml": "described",
    "gemma-scope-2": "described",
    "adapter": "adapters", "google": "google",
}  # fmt: skip
SECONDS = 10
# Python's objects for a byte of JSON, and what any reading takes.
TIMES, FREE = 100, 4 << 20
# One mutant in so many goes through load_model or load_transcoder, every other one of them onto a
# mesh; the rest go to their readers.
DEEP = 10
# Address space beyond what the process has when it begins.
SPACE = 2 << 30


class Hang(BaseException):
    """A mutant that takes too long."""


@contextlib.contextmanager
def limit():
    def ring(*_):
        raise Hang(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def one(case, number: int, seed: int) -> tuple[str, bool, float, float]:
    """(kind of the mutation, whether it loaded, seconds, peak bytes over what is warranted)."""
    kind = case.mutate(np.random.default_rng([seed, number]))
    allowed = case.warranted() * TIMES + FREE
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
    loaded = None
    try:
        with limit():
            loaded = case.load(deep=0 if number % DEEP else 1 + number // DEEP % 2)
    except JaxtcError as error:
        message = str(error)
        assert "\n" not in message and 20 < len(message) < 6000, f"not a paragraph: {message[:300]}"
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak <= allowed, f"{peak} bytes at the most, for {case.warranted()} on the disk"
    if loaded is not None:
        case.check(loaded)
    return kind, loaded is not None, seconds, peak / allowed


def main(name: str, first: int, count: int) -> int:
    """Read ``count`` mutants of a format from number ``first`` on."""
    warnings.simplefilter("error")
    made = importlib.import_module(f"tests.weights.hostile.{FORMATS[name]}").CASES[name]
    seed, failures, kinds, slowest, largest = zlib.crc32(name.encode()), [], Counter(), 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        case = made(Path(folder))
        case.restore()
        for deep in (0, 1, 2):  # what honest files say, and everything imported
            case.check(case.load(deep=deep))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, used + SPACE))
        tracemalloc.start()
        for number in range(first, first + count):
            try:
                kind, loaded, seconds, share = one(case, number, seed)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                text = "".join(traceback.format_exception(error)[-4:])
                failures.append(f"{name} {number} ({case.kind}): {text}")
                if len(failures) >= 20:
                    break
                continue
            kinds[kind, loaded] += 1
            slowest, largest = max(slowest, seconds), max(largest, share)
    summary = {
        "loaded": sum(n for (_, loaded), n in kinds.items() if loaded),
        "refused": sum(n for (_, loaded), n in kinds.items() if not loaded),
        "kinds": {f"{kind}{' loaded' * loaded}": n for (kind, loaded), n in sorted(kinds.items())},
        "slowest": round(slowest, 3), "largest share of the memory allowed": round(largest, 3),
    }  # fmt: skip
    print(json.dumps(summary))
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
