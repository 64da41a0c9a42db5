"""What a user may give as tokens, checked and padded: the door between Python lists and arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.config import Gemma2Config
from jaxtc.errors import InputError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as the compiled programs take them.

    Attributes:
        tokens: (B, bucket) int32, padded on the right.
        lengths: (B,) int32, real tokens of each row.
        known_lengths: the same as NumPy, or None inside a trace.
        length: T, the longest prompt (or the width the caller gave).
    """

    tokens: jax.Array
    lengths: jax.Array
    known_lengths: np.ndarray | None
    length: int


def bucket(length: int) -> int:
    """The padded length: one compiled program serves every prompt up to it.

    Steps of 16 up to 128, then eighths of the next power of two, so at most about 12% of a long
    prompt's work is padding.
    """
    step = 16 if length <= 128 else 1 << max((length - 1).bit_length() - 3, 4)
    return -(-length // step) * step


def prepare(
    tokens: Any, config: Gemma2Config, lengths: Any = None, extra: int = 0, pad: bool = True
) -> Prompts:
    """Check token ids and pad them.

    Args:
        tokens: ids of one prompt, a list of prompts of any lengths, or an array (T,) or (B, T)
            padded on the right.
        config: for the vocabulary and the context length.
        lengths: (B,) real tokens of each row of an array; all of them by default.
        extra: tokens that will be generated after the prompts.
        pad: whether to pad up to a bucket.

    Raises:
        InputError: an empty prompt, ids that are not whole numbers of the vocabulary, lengths
            that do not fit, or more tokens than the model's context.
    """
    if isinstance(tokens, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return _traced(tokens, config, lengths, extra, pad)
    array, known = _rows(tokens, config.pad_token_id or 0, lengths)
    if array.size == 0 or (known < 1).any():
        row = int(np.argmin(known)) if known.size else 0
        raise InputError(
            f"Prompt {row} is empty; a prompt needs at least one token, and Gemma-2 expects the "
            "first to be <bos> (the tokenizer adds it)."
        )
    if (known > array.shape[1]).any():
        raise InputError(
            f"lengths say up to {known.max()} tokens, but the rows hold {array.shape[1]}."
        )
    real = np.arange(array.shape[1])[None] < known[:, None]
    wrong = real & ((array < 0) | (array >= config.vocab_size))
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        raise InputError(
            f"Token id {array[row, place]} (prompt {row}, position {place}) is outside the model's "
            f"vocabulary of {config.vocab_size} ids, 0 to {config.vocab_size - 1}. Was the text "
            "tokenized with this model's own tokenizer?"
        )
    array = np.where(real, array, config.pad_token_id or 0).astype(np.int32)
    _check_context(int(known.max()), extra, config)
    width = bucket(array.shape[1]) if pad else array.shape[1]
    padded = np.pad(array, [(0, 0), (0, width - array.shape[1])])
    return Prompts(padded, known.astype(np.int32), known, array.shape[1])


def _traced(tokens: Any, config: Gemma2Config, lengths: Any, extra: int, pad: bool) -> Prompts:
    """Inside a trace ids cannot be checked here: the embedding gives NaN for a bad one's row."""
    tokens = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
    length = tokens.shape[1]
    _check_context(length, extra, config)
    known = None
    if lengths is None:
        known = np.full(tokens.shape[0], length)
        lengths = known
    else:
        # What lies past a length may be no token at all, and its NaN would reach the others.
        real = jnp.arange(length)[None] < jnp.asarray(lengths)[:, None]
        tokens = jnp.where(real, tokens, config.pad_token_id or 0)
    width = bucket(length) if pad else length
    padded = jnp.pad(tokens, [(0, 0), (0, width - length)])
    return Prompts(padded, jnp.asarray(lengths, jnp.int32), known, length)


def _check_context(length: int, extra: int, config: Gemma2Config) -> None:
    if length + extra > config.max_position_embeddings:
        more = f" and {extra} new ones" if extra else ""
        raise InputError(
            f"A prompt of {length} tokens{more} is longer than this model's context of "
            f"{config.max_position_embeddings}. Shorten it, or split it into several."
        )


def _rows(tokens: Any, pad_id: int, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) ids and (B,) lengths from whatever was given."""
    if isinstance(tokens, str) or (
        isinstance(tokens, Sequence) and tokens and isinstance(tokens[0], str)
    ):
        raise InputError(
            "Got text where token ids are expected; tokenize it first: "
            "jaxtc.load_tokenizer(source)(text).input_ids."
        )
    nested = isinstance(tokens, Sequence) and tokens and np.ndim(tokens[0]) == 1
    rows = [np.asarray(row) for row in tokens] if nested else [np.asarray(tokens)]
    if not nested and rows[0].ndim == 2:
        rows = list(rows[0])
    for row in rows:
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise InputError(
                f"Token ids are whole numbers in one row or several, got an array of "
                f"{row.dtype} with shape {row.shape}."
            )
    width = max((len(row) for row in rows), default=0)
    array = np.full((len(rows), width), pad_id, np.int64)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    if lengths is None:
        return array, np.array([len(row) for row in rows])
    known = np.atleast_1d(np.asarray(lengths))
    if known.shape != (len(rows),) or known.dtype.kind not in "iu":
        raise InputError(f"lengths must be {len(rows)} whole numbers, got {lengths!r}.")
    return array, known
