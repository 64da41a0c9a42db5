"""Conversions killed at random moments, for test_convert_killed.

    python -m tests.weights.killed_conversions FOLDER KILLS SEED
    python -m tests.weights.killed_conversions FOLDER merge STEP

With ``merge``, conversions are killed while orbax merges the layers that it has saved, before the
first call that changes the file system, and before each STEP-th after it; what was saved must not
be saved again.

Each conversion runs in a fork of this process, which has imported everything already. Half of the
kills come before some call that changes the file system (a count drawn from all of them), half
after some time. A conversion is killed up to three times, then left alone; its files must be those
of one that nobody disturbed, and what was finished before a kill must not have been written again.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import orbax.checkpoint.experimental.v1  # noqa: F401 - once, for all forks

import jaxtc
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.conversion.convert import convert
from tests.support.weights_files import params, write_tier

NOTES = ("_METADATA", "commit_success.txt")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def sources(folder: Path) -> dict[str, tuple[Path, dict]]:
    """What is converted, by a name: the source and how. Made by other processes than the killed."""
    config = jaxtc.Gemma2Config(
        vocab_size=5000, hidden_size=64, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=4,
    )  # fmt: skip
    made = folder / "made"
    if not made.exists():
        run(lambda: _make(made, config))
    return {
        "model to orbax": (made / "hf", {}),
        "model to safetensors": (made / "tree", {"to": "safetensors", "max_shard_size": 400_000}),
        "transcoders to orbax": (made / "gemma-scope-2b-pt-transcoders", {"to": "orbax"}),
        "transcoders to npz": (made / "scopetree", {"to": "npz"}),
    }


def _make(made: Path, config: jaxtc.Gemma2Config) -> None:
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    model = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.bfloat16),
        jaxtc.Gemma2.abstract(config),
    )
    jaxtc.save_model(model, made / "hf", max_shard_size=300_000)
    convert(made / "hf", made / "tree")
    for layer in range(3):
        write_tier(
            made / "gemma-scope-2b-pt-transcoders",
            f"layer_{layer}/width_1k/average_l0_9",
            params(64, 1024),
        )
    convert(made / "gemma-scope-2b-pt-transcoders", made / "scopetree")


def run(action) -> int:
    """``action`` in a fork; the status it ended with."""
    child = os.fork()
    if not child:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:  # nothing may escape into the parent's code
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def conversion(source: Path, out: Path, options: dict, *, count=None, seconds=None, told=None):
    """A conversion that kills itself before its ``count``-th change, or after ``seconds``.

    The changes are counted from its first one below ``out``'s folder; ``told`` is a file that gets
    how many there were and how long they took.
    """

    def action() -> None:
        watch = Watch(out, count, seconds)
        convert(source, out, **options)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if told:
            Path(told).write_text(json.dumps([watch.seen, time.monotonic() - watch.began]))

    return action


class Watch:
    """Counts changes below a folder from now on, and kills this process."""

    def __init__(self, out: Path, count: int | None, seconds: float | None = None):
        self.seen, self.began = 0, None
        self.out, self.count, self.seconds = str(out), count, seconds
        sys.addaudithook(self.event)

    def event(self, event: str, arguments: tuple) -> None:
        """An audit event."""
        opens = event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
        written = opens and "b" in arguments[1] + "b" and set(arguments[1]) & set("wa+")
        if not (event in CHANGES or written) or self.out not in str(arguments[0]):
            return
        if self.began is None:
            self.began = time.monotonic()
            if self.seconds is not None:
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                signal.setitimer(signal.ITIMER_REAL, self.seconds)
        self.seen += 1
        if self.seen == self.count:
            os.kill(os.getpid(), signal.SIGKILL)


def merge(folder: Path, step: int) -> None:
    """Kill in the merge of the layers; print what was seen as JSON."""
    source, options = sources(folder)["model to orbax"]
    assert run(conversion(source, folder / "reference", options)) == 0
    reference, out, count, kills = results(folder / "reference"), folder / "out", 1, 0
    real = tree.finalize, tree.save_part

    def killed() -> None:
        def finalize(files) -> None:
            Watch(out, count)
            real[0](files)

        tree.finalize = finalize
        convert(source, out, **options)

    def continued() -> None:
        tree.save_part = None  # nothing is saved again
        convert(source, out, **options)

    while os.WIFSIGNALED(run(killed)) and not out.exists():
        kills, count = kills + 1, count + step
        assert run(continued) == 0, count
        assert results(out) == reference, count
        shutil.rmtree(out)
    print(json.dumps({"kills": kills, "changes": count}))


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def results(folder: Path) -> dict[str, bytes]:
    """As :func:`contents`, without orbax's notes on times, places and the order of writing."""
    return {k: raw for k, raw in contents(folder).items() if not k.endswith(NOTES)}


def finished(partial: Path) -> dict[str, tuple[int, int]]:
    """The files that are done, by name: inode and time of change."""
    # Whole files; parts that orbax saved; those of them that it has merged.
    roots = [partial / "files", *partial.glob("*/*.pending_*"), partial / "files.partial_save"]
    found = {}
    for root in roots:
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and ".pending_" not in name and (root == roots[0] or "/" in name):
                found[name] = path.stat().st_ino, path.stat().st_mtime_ns
    return {name: one for name, one in found.items() if not name.endswith(NOTES)}


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill until there were enough; print what was seen as JSON."""
    rng = random.Random(seed)
    cases, reference, sizes = sources(folder), {}, {}
    for name, (source, options) in cases.items():
        out, told = folder / f"reference {name}", folder / "told"
        assert run(conversion(source, out, options, told=told)) == 0
        reference[name], sizes[name] = results(out), json.loads(told.read_text())
    seen = {"kills": 0, "kept": 0, "whole": 0, "before": 0, "runs": 0}
    while seen["kills"] < kills:
        name = rng.choice(list(cases))
        (source, options), (changes, seconds) = cases[name], sizes[name]
        out = folder / "out"
        partial = folder / "out.partial"
        kept: dict[str, tuple[int, int]] = {}
        for _ in range(rng.randint(1, 3)):
            when = {"count": rng.randint(1, changes)}
            if rng.random() < 0.5:
                when = {"seconds": max(rng.random() * seconds, 1e-4)}
            status = run(conversion(source, out, options, **when))
            if os.WIFSIGNALED(status):
                seen["kills"] += 1
            else:
                assert os.WEXITSTATUS(status) == 0, (name, when, status)
            if out.exists():
                seen["whole"] += 1
                break
            now = finished(partial)
            seen["before"] += not now
            kept |= now
        if not out.exists() or partial.exists() and any(partial.iterdir()):
            assert run(conversion(source, out, options)) == 0, name
        assert results(out) == reference[name], name
        for file, (inode, changed) in kept.items():
            now = (out / file).stat()
            assert (now.st_ino, now.st_mtime_ns) == (inode, changed), (name, file)
        seen["kept"] += len(kept)
        seen["runs"] += 1
        if partial.exists():
            partial.rmdir()
        shutil.rmtree(out)
    print(json.dumps(seen | {"changes": {name: size[0] for name, size in sizes.items()}}))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*fork.*")
    if sys.argv[2] == "merge":
        merge(Path(sys.argv[1]), int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
