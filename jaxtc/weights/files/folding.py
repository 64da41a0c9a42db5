"""Constants that a library multiplies with while it runs, multiplied into the weights instead.

With an input scaled by s, norms n of the decoder's rows and gains g of the features::

    a = f(n (s x W_enc + b_enc)),  y = ((g a / n) W_dec + b_dec) / s

is the plain form with ``W_enc' = s n W_enc``, ``b_enc' = n b_enc``, ``W_dec' = g W_dec / (n s)``
and ``b_dec' = b_dec / s``. Axis letters: D hidden, M features.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.weights.files.arrays import all_finite, converted

# Of a row of zeros, as SAELens has it.
_SMALLEST_NORM = 1e-8


@dataclasses.dataclass(frozen=True)
class Fold:
    """The constants: a number, and two arrays (M,) or None."""

    scale: float = 1.0
    norms: np.ndarray | None = None
    gains: np.ndarray | None = None

    @functools.cached_property
    def factors(self) -> dict[str, np.ndarray | float]:
        """What each parameter of :class:`jaxtc.Transcoder` is multiplied with, if with anything."""
        n = 1.0 if self.norms is None else self.norms
        g = 1.0 if self.gains is None else self.gains
        rows = np.asarray(g / (n * self.scale))
        found = {
            "W_enc": n * self.scale, "b_enc": n, "b_dec": 1 / self.scale,
            "W_dec": rows[:, None] if rows.ndim else rows,
        }  # fmt: skip
        return {name: factor for name, factor in found.items() if np.any(factor != 1.0)}


def norms_of(decoder: np.ndarray) -> np.ndarray:
    """(M,) of W_dec (M, D)."""
    return np.maximum(np.linalg.norm(decoder.astype(np.float64), axis=-1), _SMALLEST_NORM)


def multiplied(
    array: np.ndarray | jax.Array,
    factor: np.ndarray | float,
    dtype: np.dtype,
    sharding: NamedSharding | None,
) -> tuple[np.ndarray | jax.Array, str]:
    """(``array`` times ``factor`` in ``dtype``, what is wrong with the values here or "")."""
    factor = np.asarray(factor, array.dtype)
    if sharding is not None:
        made = jax.jit(lambda x, f: (x * f).astype(dtype), out_shardings=sharding)(array, factor)
        fine = all(all_finite(np.asarray(part.data)) for part in made.addressable_shards)
        return made, "" if fine else f"holds values too large for {np.dtype(dtype).name}"
    with np.errstate(over="ignore", invalid="ignore"):
        product = array * factor
    made, problem = converted(product, np.dtype(dtype))
    return made, problem and f"holds values too large for {np.dtype(dtype).name}"
