"""The work given to the PyTorch process: its description, its folder, and how it is run."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from jaxtc.errors import JaxtcError
from jaxtc.tap.sites import SITES, Address

_KILLED = (
    "it was killed (signal 9), as systems do when memory runs out. Try --dtype bfloat16, fewer or "
    "shorter prompts, or leave --truth out: float64 takes 8 bytes a weight"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One pass of the reference over the prompts."""

    name: str  # of the pass and its folder
    root: str  # private folder that everything is written in
    model: str  # local folder
    dtype: str  # of the weights: "float32" or "bfloat16"
    truth: bool  # compute in float64, with the weights as ``dtype`` rounds them
    prompts: list[list[int]]
    layers: list[int]  # whose sites are written
    new_tokens: int = 0  # greedy tokens after each prompt
    transcoder: str | None = None  # local ``params.npz``
    transcoder_layer: int | None = None
    cpu: bool = False  # leave accelerators alone

    @property
    def report(self) -> Path:
        """The JSON that the process writes when it is done."""
        return Path(self.root) / f"{self.name}.report.json"

    def folder(self, prompt: int) -> Path:
        """Where a prompt's arrays are."""
        return Path(self.root) / f"{self.name}.{prompt}"

    def array(self, prompt: int, name: object) -> np.ndarray:
        """Of an address or "transcoder.*", memory-mapped; no batch axis."""
        file = self.folder(prompt) / f"{name}.npy"
        return np.load(file, mmap_mode="r", allow_pickle=False)


def addresses(layers: Iterable[int]) -> list[Address]:
    """Every site of these layers, and those the model has once, in the order of computation."""
    first, *last = [Address(site.name) for site in SITES if not site.per_layer]
    sites = [site.name for site in SITES if site.per_layer]
    return [first, *(Address(site, layer) for layer in layers for site in sites), *last]


def need_torch() -> None:
    """Raise JaxtcError where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise JaxtcError(
            "Parity runs transformers' PyTorch model beside ours, and PyTorch (torch) is not "
            "installed in this environment. Install it with: pip install 'jaxtc[parity]'"
        )


def run(job: Job, progress: Callable[[str], None]) -> dict:
    """Run the job in a process of its own, and return its report.

    Raises:
        JaxtcError: the process failed; the last line of its stderr is in the message.
    """
    path = Path(job.root) / f"{job.name}.json"
    path.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    # It imports from where this process does, except the current folder (-P).
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-P", "-m", "jaxtc.parity.torch_side", str(path)]
    with (
        open(Path(job.root) / f"{job.name}.stderr", "w+b") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=environment, text=True, encoding="utf-8", errors="replace",
        ) as process,
    ):  # fmt: skip
        try:
            for line in process.stdout:
                if line.startswith('{"step"'):
                    progress(json.loads(line)["step"])
            code = process.wait()
        finally:
            process.kill()
        if code:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            last = _KILLED if code == -9 else lines[-1].strip().rstrip(".")
            raise JaxtcError(
                f"The PyTorch half of the comparison failed (exit code {code}): {last}."
            )
    return json.loads(job.report.read_text(encoding="utf-8"))
