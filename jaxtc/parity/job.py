"""The work given to the PyTorch process: its description, its folder, and how it is run."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxtc.errors import JaxtcError

Step = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """One pass of the reference over the prompts.

    Attributes:
        name: of the pass, and of its folder.
        root: the private folder everything is written in.
        model: local folder.
        dtype: of the weights: "float32" or "bfloat16".
        truth: whether to compute in float64 with the weights as that dtype rounds them.
        prompts: ids of each.
        layers: whose sites are written.
        new_tokens: how many greedy tokens to add to each prompt.
        transcoder: local ``params.npz``, or None.
        transcoder_layer: whose MLP it imitates.
        cpu: leave accelerators alone.
    """

    name: str
    root: str
    model: str
    dtype: str
    truth: bool
    prompts: list[list[int]]
    layers: list[int]
    new_tokens: int = 0
    transcoder: str | None = None
    transcoder_layer: int | None = None
    cpu: bool = False

    @property
    def report(self) -> Path:
        """What the process says at its end, JSON."""
        return Path(self.root) / f"{self.name}.report.json"

    def folder(self, prompt: int) -> Path:
        """Where a prompt's arrays are."""
        return Path(self.root) / f"{self.name}.{prompt}"

    def file(self, prompt: int, name: object) -> Path:
        """Where an array is: of an address, or one of "transcoder.*"."""
        return self.folder(prompt) / f"{name}.npy"

    def array(self, prompt: int, name: object) -> np.ndarray:
        """An array of the reference's, read from disk as it is used; no batch axis."""
        return np.load(self.file(prompt, name), mmap_mode="r", allow_pickle=False)

    def forget(self, prompt: int) -> None:
        """Delete a prompt's arrays."""
        for file in self.folder(prompt).iterdir():
            file.unlink()

    @classmethod
    def read(cls, path: Path) -> "Job":
        """A job that :func:`run` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder only this user can read (mode 0700), removed at the end, whatever that is."""
    with tempfile.TemporaryDirectory(prefix="jaxtc-parity-") as folder:
        yield Path(folder)


def need_torch() -> None:
    """Refuse to begin without PyTorch.

    Raises:
        JaxtcError: it is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise JaxtcError(
            "Parity runs transformers' PyTorch model beside ours, and PyTorch (torch) is not "
            "installed in this environment. Install it with: pip install 'jaxtc[parity]'"
        )


def run(job: Job, progress: Step) -> dict:
    """Do the job in a process of its own, and give back its report.

    Raises:
        JaxtcError: the process failed; its last words are in the message.
    """
    path = Path(job.root) / f"{job.name}.json"
    path.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    # It imports from where this process does, the folder it happens to run in left out (-P).
    places = os.pathsep.join(place for place in sys.path if place)
    environment = {
        **os.environ,
        "PYTHONPATH": places,
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-P", "-m", "jaxtc.parity.torch_side", str(path)]
    with open(Path(job.root) / f"{job.name}.stderr", "w+b") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=environment, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        try:
            for line in process.stdout:
                if line.startswith('{"step"'):
                    progress(json.loads(line)["step"])
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if code:
            errors.seek(0)
            raise JaxtcError(_failed(code, errors.read().decode(errors="replace")))
    return json.loads(job.report.read_text(encoding="utf-8"))


def _failed(code: int, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code == -9:
        last = (
            "it was killed (signal 9), as systems do when memory runs out. Try --dtype bfloat16, "
            "fewer or shorter prompts, or leave --truth out: float64 takes 8 bytes a weight"
        )
    return f"The PyTorch half of the comparison failed (exit code {code}): {last.rstrip('.')}."
