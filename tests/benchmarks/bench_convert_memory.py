"""Peak memory of `jaxtc convert` against the largest tensor of what it converts.

    python -m tests.benchmarks.make_checkpoint FOLDER --layers 26
    python -m tests.benchmarks.bench_convert_memory FOLDER OUT

Converts FOLDER to an orbax tree, the tree to safetensors, and a transcoder's params.npz to a tree
and to circuit-tracer's file, each in a process of its own, below OUT (twice the size of FOLDER);
compares every tensor that came back with the one it was; and measures loading the tree. What each
process holds is read from /proc twenty times a second, as in bench_parity_memory.

The unit is the largest layer (of a model, the embedding), and a peak is to be at most 1.5 times
that and Python.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jaxtc.model.config import Gemma2Config
from jaxtc.weights.files.model import open_checkpoint
from jaxtc.weights.names import EMBEDDING
from tests.benchmarks.bench_parity_memory import held

CONVERT = "from jaxtc.weights.conversion.convert import convert; convert({!r}, {!r}, {!r}, **{!r})"
LOAD = "import jaxtc; jaxtc.load_model({!r}, dtype='bfloat16')"


def peak(code: str) -> tuple[dict[str, int], float]:
    """The most that a Python process held, and how long it took."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    most: dict[str, int] = {}
    while process.poll() is None:
        for name, size in held(process.pid).items():
            most[name] = max(most.get(name, 0), size)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    return most, time.monotonic() - began


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(one: Path, other: Path) -> int:
    """How many tensors two models have, each the same in both; the bits are compared."""
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        assert sorted(first.files) == sorted(second.files)
        for name in first.files:
            dtype = first.entry(name).dtype
            assert dtype == second.entry(name).dtype, name
            a, b = (each.files[name].read(name, dtype)[0] for each in (first, second))
            assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), name
        return len(first.files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    with open_checkpoint(given.folder) as checkpoint:
        entry = checkpoint.entry(EMBEDDING)
        unit = entry.stop - entry.start
    layers = Gemma2Config.from_file(given.folder / "config.json").num_hidden_layers
    tree, back, scope = (given.out / name for name in ("tree", "back", "scope"))
    print(f"{layers} layers, {size_of(given.folder) / 1e9:.2f} GB; embedding {unit / 1e6:.0f} MB")
    base, _ = peak(
        "import jax, orbax.checkpoint.experimental.v1; "
        "from jaxtc.weights.conversion.convert import convert"
    )

    def convert(source: Path, out: Path, to: str, **options) -> str:
        """Code for a process."""
        return CONVERT.format(str(source), str(out), to, options)

    runs = {
        "hf -> orbax": (convert(given.folder, tree, "orbax"), tree, unit),
        "orbax -> hf": (convert(tree, back, "safetensors"), back, unit),
    }
    npz = given.folder / "transcoder"
    if npz.exists():
        largest = next(npz.rglob("params.npz")).stat().st_size
        runs |= {
            "npz -> orbax": (
                convert(npz, scope, "orbax", input_site="mlp_in_normed", output_site="mlp_out"),
                scope, largest,
            ),
            "orbax -> circuit-tracer": (
                convert(scope, given.out / "ct", "circuit-tracer"), given.out / "ct", largest
            ),
        }  # fmt: skip
    for name, (code, out, work) in runs.items():
        most, seconds = peak(code)
        print(
            f"{name:<24} {seconds:5.0f} s, {size_of(out) / 1e6 / seconds:4.0f} MB/s; peak "
            f"{most['VmRSS'] / 1e6:4.0f} MB ({base['VmRSS'] / 1e6:.0f} MB of them before it began),"
            f" the rest {(most['VmRSS'] - base['VmRSS']) / work:.2f} times {work / 1e6:.0f} MB",
            flush=True,
        )
    print(f"{compare(given.folder, back)} tensors came back bit for bit")
    for name, folder in (("hf", given.folder), ("orbax", tree)):
        most, seconds = peak(LOAD.format(str(folder)))
        share = most["VmRSS"] / size_of(tree)
        print(f"load {name:<19} {seconds:5.0f} s; peak {share:.2f} times the weights")
