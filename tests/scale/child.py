"""Starting other Python processes from a test, none of which outlives it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(devices: int) -> dict[str, str]:
    """Of a process that has so many CPU devices and compiles quickly."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip


def run_all(commands: list[list[str]], devices: int, seconds: float) -> list[tuple[int, str]]:
    """(exit status, output) of each command, run at the same time, after ``seconds`` at the most.

    As soon as one fails the others get a few seconds more: they may be waiting for it in vain.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = []
    try:
        for command in commands:
            made = subprocess.Popen(
                [sys.executable, *command], env=environment(devices), cwd=ROOT, **options
            )
            started.append(made)
        told = []
        for process in started:
            failed = any(one.poll() for one in started)
            try:
                output, _ = process.communicate(timeout=20 if failed else seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate(timeout=20)
                output += f"\n(killed after {seconds} s)"
            told.append((process.returncode, output))
        return told
    finally:
        for process in started:
            process.kill()
            process.wait(20)
