"""Columns of a batch: where each prompt's tokens stood when they were given.

Programs see every prompt from the first column on. A prompt that was padded on the left is laid
there before, and what a result holds of it goes back after. Axis letters: B batch, T columns.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtc.interchange import below


def tokens_of(length: int, lengths: Any, starts: Any) -> Any:
    """(B, T) booleans, T = ``length``: true on each row's tokens, where they stood as given.

    ``lengths`` and ``starts``, (B,), are of :class:`jaxtc.model.prompts.Prompts`.
    """
    if starts is None:
        return below(length, lengths)
    return below(length, starts + lengths) & ~below(length, starts)


def _moved(x: Any, by: Any, axis: int, rows: int) -> Any:
    """``x`` with each row's entries along ``axis`` rolled by its number (B,), as numpy.roll does.

    ``rows`` is the axis B of ``x``.
    """
    xp = np if isinstance(x, np.ndarray) and isinstance(by, np.ndarray) else jnp
    size, axis = x.shape[axis], axis % x.ndim
    shape = [1] * x.ndim
    shape[rows], shape[axis] = len(by), size
    places = (xp.arange(size)[None] - by[:, None]) % size
    return xp.take_along_axis(x, xp.broadcast_to(places, (len(by), size)).reshape(shape), axis=axis)


def returned(x: Any, starts: Any, axis: int, rows: int = 0) -> Any:
    """``x``, whose ``axis`` runs over T columns, with each row's tokens where they stood as given.

    ``starts`` are of :class:`jaxtc.model.prompts.Prompts`; ``rows`` is the axis B of ``x``.
    """
    return x if starts is None else _moved(x, starts, axis, rows)


def from_first_column(x: Any, starts: Any, axis: int, rows: int = 0) -> Any:
    """The inverse of :func:`returned`: each row's tokens first, then its padding."""
    return x if starts is None else _moved(x, -starts, axis, rows)
