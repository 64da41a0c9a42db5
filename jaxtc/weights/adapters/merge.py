"""What an adapter does to one parameter, on the host, to any part of it.

A parameter is (out..., in...): the axes of the layer's output, then those of its input. The
arithmetic is PEFT's: in float32 (float64 where the model is), rounded once to the model's dtype.
Axis letters: r rank.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from jaxtc.weights.files.arrays import CHUNK_BYTES, cast
from jaxtc.weights.files.shards import Box

# (dtype) -> the tensor; read when it is wanted, so that one layer's are in memory at a time.
Tensor = Callable[[np.dtype], np.ndarray]


class Change(Protocol):
    """One change of a parameter."""

    whole: bool  # whether it must see all of the parameter at once

    def apply(self, part: np.ndarray, box: Box, shape: Sequence[int]) -> None:
        """Change, in place, the part of a parameter of this shape that lies in ``box``."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """W + scale · B A (LoRA, 2106.09685); with a magnitude m, m · (W + scale · B A) / its norm
    over the input of each output (DoRA, 2402.09353).

    Attributes:
        left: (out, r), B of a layer; of an embedding, A transposed.
        right: (r, in).
        scale: see :meth:`jaxtc.weights.adapters.settings.LoraSettings.scale`.
        split: how many axes of the parameter are its output's.
        magnitude: of DoRA: (out,), or of an embedding (in,).
        of_input: whether the magnitude is (in,), and the norm over the output.
    """

    left: Tensor
    right: Tensor
    scale: float
    split: int
    magnitude: Tensor | None = None
    of_input: bool = False

    @property
    def whole(self) -> bool:
        """DoRA's norms are over whole rows."""
        return self.magnitude is not None

    def apply(self, part: np.ndarray, box: Box, shape: Sequence[int]) -> None:
        """Add it, some rows at a time."""
        wide = np.dtype(np.float64 if part.dtype == np.float64 else np.float32)
        out, inner = shape[: self.split], shape[self.split :]
        left, right = self.left(wide), self.right(wide)
        ranges = [slice(*bounds) for bounds in box]
        rank = len(right)
        left = left.reshape(*out, rank)[tuple(ranges[: self.split])]
        right = right.reshape(rank, *inner)[(slice(None), *ranges[self.split :])]
        right = right.reshape(rank, -1)
        factor = self._factor(part, left.reshape(-1, rank), right, wide) if self.whole else None
        for rows, block in _rows(part):
            b = left[rows].reshape(-1, rank)
            block = block.reshape(len(b), -1)
            total = block.astype(wide) + (b @ right) * wide.type(self.scale)
            if factor is not None and self.of_input:
                total = total * factor
            elif factor is not None:
                first = rows.start * (math.prod(part.shape[1 : self.split]))
                total = total * factor[first : first + len(b), None]
            cast(total, block)

    def _factor(
        self, part: np.ndarray, left: np.ndarray, right: np.ndarray, wide: np.dtype
    ) -> np.ndarray:
        """m / ‖W + scale · B A‖, of each output, or of each input."""
        squares = []
        for rows, block in _rows(part.reshape(len(left), -1)):
            total = block.astype(wide) + (left[rows] @ right) * wide.type(self.scale)
            squares.append(np.einsum("oi,oi->i" if self.of_input else "oi,oi->o", total, total))
        norms = np.sqrt(np.sum(squares, axis=0) if self.of_input else np.concatenate(squares))
        return self.magnitude(wide).reshape(-1) / norms


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of an embedding put in the place of its own (trainable tokens)."""

    ids: tuple[int, ...]
    values: Tensor  # (ids, in)

    whole = False

    def apply(self, part: np.ndarray, box: Box, shape: Sequence[int]) -> None:
        """Replace those that are in this part."""
        (start, stop), *inner = box
        values = self.values(part.dtype)[(slice(None), *(slice(*bounds) for bounds in inner))]
        for row, value in zip(self.ids, values, strict=True):
            if start <= row < stop:
                part[row - start] = value


def _rows(part: np.ndarray):
    """(range of the first axis, the view of it), so that none takes much memory as float32."""
    step = max(1, CHUNK_BYTES * len(part) // max(part.size * 4, 1))
    for start in range(0, len(part), step):
        rows = slice(start, min(start + step, len(part)))
        yield rows, part[rows]
