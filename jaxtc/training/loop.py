"""The training loop that the model and the transcoders share: compiled in chunks, resumable.

Several steps run in one compiled ``lax.scan``: at these sizes, dispatching step by step costs
half as much again. While a chunk computes, the host prepares the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

Log = Callable[[str], None]
#: (carry, batch) -> (carry, figures), traceable; figures are scalars by name.
Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
#: (first step, how many) -> the batches of these steps, stacked along a new first axis.
Stacked = Callable[[int, int], Any]


class Checkpoints:
    """The latest state of a training run in a folder, written whole or not at all.

    Args:
        folder: created when missing; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        latest = ocp.training.preservation_policies.LatestN(1)
        self.checkpointer = folder and ocp.training.Checkpointer(
            Path(folder).absolute(), preservation_policy=latest
        )

    def restore(self, carry: Any) -> tuple[int, Any]:
        """(steps done, state); (0, ``carry``) when nothing was saved."""
        latest = self.checkpointer and self.checkpointer.latest
        if not latest:
            return 0, carry
        leaves, structure = jax.tree.flatten(carry)
        abstract = jax.tree.map(ocp.arrays.to_shape_dtype_struct, _named(leaves))
        saved = self.checkpointer.load(latest.step, abstract)
        return latest.step, jax.tree.unflatten(structure, [saved[name] for name in abstract])

    def save(self, done: int, carry: Any) -> None:
        """Keep ``carry`` as the state after ``done`` steps."""
        if self.checkpointer:
            self.checkpointer.save(done, _named(jax.tree.leaves(carry)))

    def close(self) -> None:
        """Wait until what was saved is on disk."""
        if self.checkpointer:
            self.checkpointer.close()


def _named(leaves: list) -> dict[str, Any]:
    return {f"leaf_{index:04d}": leaf for index, leaf in enumerate(leaves)}


def fit(
    step: Step,
    carry: Any,
    batches: Stacked,
    steps: int,
    *,
    name: str,
    folder: Path | None = None,
    chunk: int = 25,
    save_every: int = 500,
    stop_at: int | None = None,
    log: Log = print,
) -> Any:
    """Run ``steps`` steps from ``carry``, or from the checkpoint in ``folder`` if there is one.

    Args:
        step: one step.
        carry: parameters, optimiser state and whatever else a step changes; a pytree of arrays.
        batches: gives the data; must depend on its arguments only, so that a run resumes exactly.
        steps: how many in all.
        name: of what is trained, for the log.
        folder: where checkpoints go; None for none.
        chunk: steps in one compiled call.
        save_every: steps between checkpoints, rounded up to whole chunks.
        stop_at: stop early after this many steps, saved, as if killed there.
        log: called with a line of progress at each checkpoint.

    Returns:
        The carry after the last step.
    """

    @jax.jit
    def run_chunk(carry, stacked):
        carry, figures = jax.lax.scan(step, carry, stacked)
        return carry, jax.tree.map(jnp.mean, figures)

    checkpoints = Checkpoints(folder)
    done, carry = checkpoints.restore(carry)
    if done:
        log(f"{name}: going on from step {done} of {steps}")
    # Whole chunks from step 0, so that a resumed run computes the very same programs.
    end = steps if stop_at is None else min(stop_at, steps)
    started, first, saved = time.monotonic(), done, done
    stacked = batches(done, min(chunk, steps - done)) if done < end else None
    while done < end:
        carry, figures = run_chunk(carry, stacked)
        done += min(chunk, steps - done)
        if done < end:
            stacked = batches(done, min(chunk, steps - done))  # while the chunk computes
        if done - saved >= save_every or done >= end:
            values = " ".join(f"{key} {float(value):.4g}" for key, value in figures.items())
            rate = (time.monotonic() - started) / (done - first)
            pace = f"{rate * 1e3:.0f} ms/step, {rate * (steps - done):.0f} s left"
            log(f"{name}: step {done}/{steps} {values} ({pace})")
            checkpoints.save(done, carry)
            saved = done
    checkpoints.close()
    return carry
