"""Decode at 2B widths, side by side with transformers' ``generate`` on this CPU in float32.

    python -m tests.benchmarks.make_checkpoint FOLDER
    python -m tests.benchmarks.bench_decode FOLDER [--batches 1 8] [--repeats 3] [--tokens 6]

Both run the very same weights in the same memory and take turns. Each generates greedily from the
same prompts of 12 tokens; a token's time is that between two calls of the streamers, so that
prefill and compiling are left out. Every token reads all the weights (the tied embedding as
unembedding): their bytes over the time are the bandwidth reached, shown next to what products of
vectors with the same matrices, alone in a program, and the mere reading of them reach in turns with
it. A ratio is PyTorch's median time over ours.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_2b import torch_twin

PROMPT = 12
WANTED = 1.6
console = Console()


class Clock:
    """A streamer for both: notes when each token came, and which."""

    def __init__(self):
        self.times, self.ids = [], []

    def __call__(self, step: int, ids: list[int | None]) -> None:
        self.times.append(time.perf_counter())
        self.ids.append(ids)

    def put(self, ids) -> None:
        """As transformers calls it: first with the prompts, then with each token."""
        if ids.ndim == 1:
            self(0, ids.tolist())

    def end(self) -> None:
        """As transformers calls it."""

    @property
    def seconds(self) -> list[float]:
        """Of each token after the first, which prefill made, and the second, which may compile."""
        return np.diff(self.times)[1:].tolist()


def peaks(leaves: list[jax.Array], batch: int) -> tuple[Callable, Callable, float]:
    """(products with the large matrices, reading them, their bytes)."""
    large = [x.reshape(x.shape[0], -1) for x in leaves if x.ndim == 2 and x.nbytes > 2**25]
    vectors = {width: jnp.ones((batch, width)) for width in {x.shape[1] for x in large}}

    @jax.jit
    def products(vectors, matrices):
        return [
            jnp.einsum("oi,bi->ob", m, vectors[m.shape[1]], precision="highest") for m in matrices
        ]

    @jax.jit
    def read(matrices):
        return [m.max() for m in matrices]

    done = jax.block_until_ready
    total = sum(x.nbytes for x in large)
    return lambda: done(products(vectors, large)), lambda: done(read(large)), total


def timed(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=6, help="timed in each turn")
    given = parser.parse_args()

    import torch

    import jaxtc

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = jaxtc.load_model(given.folder, dtype="float32")
    twin = torch_twin(model)
    twin.generation_config.eos_token_id, twin.generation_config.pad_token_id = None, 0
    leaves = jax.tree.leaves(model)
    weights = sum(leaf.nbytes for leaf in leaves)
    table = Table(title=f"decode, 2B widths, {model.config.num_hidden_layers} layers, float32")
    for heading in ("batch", "jaxtc", "PyTorch", f"ratio (≥ {WANTED})", "GB/s", "of products'",
                    "of reading's"):  # fmt: skip
        table.add_column(heading, justify="right")
    for batch in given.batches:
        rng = np.random.default_rng(batch)
        ids = rng.integers(3, model.config.vocab_size, (batch, PROMPT))
        count = given.tokens + 2

        def ours(ids=ids, count=count) -> Clock:
            clock = Clock()
            jaxtc.generate(model, ids, count, stop=(), stream=clock)
            return clock

        def theirs(ids=ids, count=count) -> Clock:
            clock, tokens = Clock(), torch.from_numpy(ids)
            twin.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count,
                do_sample=False, streamer=clock,
            )  # fmt: skip
            return clock

        products, read, size = peaks(leaves, batch)
        products(), read()
        assert ours().ids == theirs().ids, "the two do not generate the same"
        found = {"ours": [], "theirs": [], "products": [], "read": []}
        for _ in range(given.repeats):
            found["ours"] += ours().seconds
            found["theirs"] += theirs().seconds
            found["products"] += [timed(products) for _ in range(2)]
            found["read"] += [timed(read) for _ in range(2)]
        median = {name: float(np.median(seconds)) for name, seconds in found.items()}
        rate = weights / median["ours"]
        shares = [rate / (size / median[name]) for name in ("products", "read")]
        table.add_row(
            str(batch), f"{median['ours']:.3f} s", f"{median['theirs']:.3f} s",
            f"{median['theirs'] / median['ours']:.2f}", f"{rate / 1e9:.1f}",
            *(f"{share:.0%}" for share in shares),
        )  # fmt: skip
        console.print(
            f"batch {batch}: ours {spread(found['ours'])}, PyTorch {spread(found['theirs'])}"
        )
    console.print(table)


def spread(seconds: list[float]) -> str:
    """Median, least and most."""
    return f"{np.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    main()
