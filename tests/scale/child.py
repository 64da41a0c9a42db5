"""Starting other Python processes from a test, none of which outlives it."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(devices: int) -> dict[str, str]:
    """Of a process that has so many CPU devices and compiles quickly."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip


def run_all(
    commands: list[list[str]], devices: int, seconds: float, *, together: bool = True
) -> list[tuple[int, str]]:
    """(exit status, output) of each command, all at the same time, killed after ``seconds``.

    ``together``: as soon as one fails the others have 20 seconds more; they may be waiting for it.
    """
    started, end = [], time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        for command in commands:
            # A file, not a pipe: nobody reads until the end, and a full pipe would stop them.
            log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(
                [sys.executable, *command], env=environment(devices), cwd=ROOT,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            started.append((process, log))
        while any(process.poll() is None for process, _ in started) and time.monotonic() < end:
            if together and any(process.poll() for process, _ in started):
                together, end = False, min(end, time.monotonic() + 20)
            time.sleep(0.1)
        told = []
        for process, log in started:
            late = "" if process.poll() is not None else "\n(killed: it took too long)"
            process.kill()
            status = process.wait(20)
            log.seek(0)
            told.append((status, log.read() + late))
        return told
