"""Activations for training transcoders: read from the model, shuffled in buckets."""

from dataclasses import dataclass, field
from functools import cached_property, partial

import jax
import numpy as np
from flax import nnx

from jaxtc.model.gemma2 import Gemma2
from jaxtc.tap.sites import Address
from jaxtc.tap.tap import Tap
from jaxtc.training.packing import BOS, EOS, PAD, Batches


@dataclass
class Harvest:
    """What the MLPs of some layers read and write, token by token, special tokens left out.

    A bucket holds ``tokens`` tokens in random order; bucket ``b`` is the same in every run, so that
    training steps are reproducible by their number.
    """

    model: Gemma2
    batches: Batches
    layers: tuple[int, ...]
    tokens: int
    _held: tuple = field(default=(None, None), init=False, repr=False)

    @cached_property
    def _read(self):
        graph, params = nnx.split(self.model)
        wanted = [Address(s, n) for s in ("mlp_in_normed", "mlp_out") for n in self.layers]

        @jax.jit
        def read(params, batch):
            tap = Tap(wanted)
            nnx.merge(graph, params)(
                batch.tokens, positions=batch.positions, segments=batch.segments, tap=tap,
                depth=max(self.layers) + 1,
            )  # fmt: skip
            return [tap.activations[address] for address in wanted]

        return partial(read, params)

    def bucket(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of a bucket, float32 (layers, tokens, D) each."""
        if self._held[0] == number:
            return self._held[1]
        D = self.model.config.hidden_size
        arrays = np.empty((2 * len(self.layers), self.tokens, D), np.float32)
        order = np.random.default_rng([5, number]).permutation(self.tokens)
        # Buckets share no batches: each needs fewer than this.
        index, filled = number * self.tokens, 0
        while filled < self.tokens:
            batch = self.batches[index]
            keep = ~np.isin(batch.tokens, (PAD, EOS, BOS))
            place = order[filled : filled + keep.sum()]
            for row, values in zip(arrays, self._read(batch), strict=True):
                row[place] = np.asarray(values)[keep][: len(place)]
            index, filled = index + 1, filled + len(place)
        pair = arrays[: len(self.layers)], arrays[len(self.layers) :]
        self._held = (number, pair)
        return pair

    def batch(self, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of a training batch, (layers, size, D) each."""
        bucket, start = divmod(number * size, self.tokens // size * size)
        x, y = self.bucket(bucket)
        return x[:, start : start + size], y[:, start : start + size]
