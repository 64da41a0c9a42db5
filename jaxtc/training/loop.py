"""The training loop that the model and the transcoders share: compiled in chunks, resumable.

Several steps run in one compiled ``lax.scan``: at these sizes, dispatching step by step takes half
as long again. While a chunk computes, the host prepares the next one: JAX does not wait for it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

Log = Callable[[str], None]


def fit(
    step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    carry: Any,
    batch: Callable[[int], Any],
    steps: int,
    *,
    name: str,
    folder: Path | None = None,
    chunk: int = 25,
    save_every: int = 500,
    stop_at: int | None = None,
    log: Log = print,
) -> Any:
    """Run ``steps`` steps from ``carry``, or from the latest checkpoint in ``folder``.

    Args:
        step: one step, traceable: (carry, batch) -> (carry, figures), scalars by name.
        carry: parameters, optimiser state and whatever else a step changes; a pytree of arrays.
        batch: the data of a step, by its number only, so that a run resumes exactly.
        steps: in all.
        name: of what is trained, for the log.
        folder: of the latest checkpoint, written whole or not at all; None for none.
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

    keep = ocp.training.preservation_policies.LatestN(1)
    saver = folder and ocp.training.Checkpointer(folder.absolute(), preservation_policy=keep)
    done = saver.latest.step if saver and saver.latest else 0
    if done:
        carry = saver.load(done, jax.tree.map(ocp.arrays.to_shape_dtype_struct, carry))
        log(f"{name}: resuming from step {done} of {steps}")
    # Whole chunks from step 0, so that a resumed run executes the same programs.
    end = steps if stop_at is None else min(stop_at, steps)
    started, first, saved = time.monotonic(), done, done
    while done < end:
        count = min(chunk, steps - done)
        stacked = jax.tree.map(lambda *one: np.stack(one), *map(batch, range(done, done + count)))
        carry, figures = run_chunk(carry, stacked)  # returns at once
        done += count
        if done - saved >= save_every or done >= end:
            values = " ".join(f"{key} {float(value):.4g}" for key, value in figures.items())
            rate = (time.monotonic() - started) / (done - first)
            pace = f"{rate * 1e3:.0f} ms/step, {rate * (steps - done):.0f} s left"
            log(f"{name}: step {done}/{steps} {values} ({pace})")
            if saver:
                saver.save(done, carry)
            saved = done
    if saver:
        saver.close()  # waits until everything is on disk
    return carry
