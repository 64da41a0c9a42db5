"""What each of several processes reads, holds and needs to load a model onto one mesh.

    python -m tests.benchmarks.bench_sharded_load FOLDER [--processes 4] [--devices 2]
        [--mesh model=8] [--dtype bfloat16]

FOLDER as tests.benchmarks.make_checkpoint writes it, or a converted one. Linux only.
"""

import argparse
import json
import socket
import time
from pathlib import Path

import jax

import jaxtc
from tests.scale.child import run_all
from tests.scale.process import proc


def one(index: int, count: int, port: int, folder: Path, mesh: str, dtype: str) -> None:
    """One of the processes; prints a line of JSON."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    jax.devices()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    read, before, start = proc("io", "rchar"), proc("status", "VmRSS") * 1024, time.monotonic()
    model = jaxtc.load_model(folder, mesh=mesh, dtype=dtype)
    seconds = time.monotonic() - start
    pieces = {
        (number, str(shard.index)): shard.data.nbytes
        for number, x in enumerate(jax.tree.leaves(model))
        for shard in x.addressable_shards
    }
    told = {
        "share": sum(pieces.values()),
        "read": proc("io", "rchar") - read,
        "peak": proc("status", "VmHWM") * 1024 - before,
        "seconds": round(seconds, 1),
        "whole": sum(x.nbytes for x in jax.tree.leaves(model)),
    }
    print(json.dumps(told), flush=True)
    jax.distributed.shutdown()


def main() -> None:
    """Start the processes and print what each of them told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--mesh", default="model=8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        index, port = map(int, args.child.split(","))
        return one(index, args.processes, port, args.folder, args.mesh, args.dtype)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = ["-m", "tests.benchmarks.bench_sharded_load", str(args.folder.absolute())]
    common += ["--processes", str(args.processes), "--mesh", args.mesh, "--dtype", args.dtype]
    commands = [[*common, "--child", f"{index},{port}"] for index in range(args.processes)]
    for index, (status, output) in enumerate(run_all(commands, args.devices, 1200)):
        lines = [line for line in output.splitlines() if line.startswith("{")]
        print(f"process {index}:", lines[-1] if status == 0 and lines else output[-3000:])


if __name__ == "__main__":
    main()
