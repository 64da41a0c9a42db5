"""Token ids as users give them, checked and padded to arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError
from jaxtc.interchange import plain
from jaxtc.model.config import Gemma2Config


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as the compiled programs take them."""

    tokens: jax.Array  # (B, bucket) int32, padded on the right
    lengths: np.ndarray | jax.Array  # (B,) int32, real tokens of each row; NumPy where known
    length: int  # T, the longest prompt (or the width the caller gave)


def bucket(length: int) -> int:
    """The padded length: one compiled program serves every prompt up to it.

    Steps of 16 up to 128, then a quarter to an eighth of the length: a long prompt's padding is at
    most a quarter of the prompt.
    """
    step = 16 if length <= 128 else 1 << max((length - 1).bit_length() - 3, 4)
    return -(-length // step) * step


def prepare(tokens: Any, config: Gemma2Config, lengths: Any = None, extra: int = 0) -> Prompts:
    """Check token ids and pad them to a bucket.

    Args:
        tokens: ids of one prompt, a list of prompts of any lengths, or an array (T,) or (B, T)
            padded on the right.
        config: for the vocabulary and the context length.
        lengths: (B,) real tokens of each row; all of them by default.
        extra: tokens that will be generated after the prompts.

    Raises:
        InputError: an empty prompt, ids that are not whole numbers of the vocabulary, lengths
            that do not fit, or more tokens than the model's context. Inside a trace, where values
            cannot be seen, the embedding gives NaN for a prompt with a bad id or length.
    """
    tokens, lengths = plain(tokens), plain(lengths)
    if isinstance(tokens, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return _traced(tokens, config, lengths, extra)
    rows = _rows(tokens)
    held = np.array([len(row) for row in rows], int)
    known = _lengths(lengths, held)
    # No token attends to padding; 0 is an id of every vocabulary.
    array = np.zeros((len(rows), bucket(int(held.max()))), np.int32)
    for index, (row, count) in enumerate(zip(rows, known, strict=True)):
        wrong = np.flatnonzero((row[:count] < 0) | (row[:count] >= config.vocab_size))
        if wrong.size:
            raise InputError(
                f"Token id {row[wrong[0]]} (prompt {index}, position {wrong[0]}) is outside the "
                f"model's vocabulary of {config.vocab_size} ids, 0 to {config.vocab_size - 1}. Was "
                "the text tokenized with this model's own tokenizer?"
            )
        array[index, :count] = row[:count]
    _check_context(int(known.max()), extra, config)
    return Prompts(array, known.astype(np.int32), int(held.max()))


def _traced(tokens: Any, config: Gemma2Config, lengths: Any, extra: int) -> Prompts:
    """:func:`prepare` inside a trace: shapes are checked, wrong values lead to NaN."""
    tokens = jnp.atleast_2d(jnp.asarray(tokens))
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise _not_ids(tokens)
    batch, length = tokens.shape
    _check_context(length, extra, config)
    if isinstance(lengths, jax.core.Tracer):
        lengths = jnp.broadcast_to(lengths, (batch,))
        # The embedding of an id outside the vocabulary is NaN.
        fits = (lengths >= 1) & (lengths <= length)
        tokens = jnp.where(fits[:, None], tokens, config.vocab_size)
        lengths = jnp.clip(lengths, 1, length)
    else:
        lengths = _lengths(lengths, np.full(batch, length))
    # Ids past a prompt's length may be out of range, and their NaN would reach other tokens.
    real = jnp.arange(length)[None] < lengths[:, None]
    tokens = jnp.where(real, tokens, 0).astype(jnp.int32)
    padded = jnp.pad(tokens, [(0, 0), (0, bucket(length) - length)])
    return Prompts(padded, lengths.astype(np.int32), length)


def _check_context(length: int, extra: int, config: Gemma2Config) -> None:
    if length + extra > config.max_position_embeddings:
        more = f" and {extra} new ones" if extra else ""
        raise InputError(
            f"A prompt of {length} tokens{more} is longer than this model's context of "
            f"{config.max_position_embeddings}. Shorten it, or split it into several."
        )


def _rows(tokens: Any) -> list[np.ndarray]:
    several = isinstance(tokens, Sequence) and len(tokens) > 0
    if isinstance(tokens[0] if several else tokens, str):
        raise InputError(
            "Got text where token ids are expected; tokenize it first: "
            "jaxtc.load_tokenizer(source)(text).input_ids."
        )
    nested = several and np.ndim(tokens[0]) > 0
    rows = [np.asarray(row) for row in tokens] if nested else [np.asarray(tokens)]
    if not nested and rows[0].ndim == 2:
        rows = list(rows[0])
    # A tokenizer asked for arrays gives each prompt as a batch of one.
    rows = [row[0] if row.ndim == 2 and len(row) == 1 else row for row in rows]
    for row in rows:
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise _not_ids(row)
    return rows


def _not_ids(array: Any) -> InputError:
    return InputError(
        f"Token ids are whole numbers in one row or several, got an array of {array.dtype} with "
        f"shape {array.shape}."
    )


def _lengths(lengths: Any, held: np.ndarray) -> np.ndarray:
    """(B,) tokens of each prompt, all of the ``held`` ones by default."""
    known = held if lengths is None else np.atleast_1d(np.asarray(lengths))
    if known.shape != held.shape or known.dtype.kind not in "iu":
        raise InputError(f"lengths must be {len(held)} whole numbers, got {lengths!r}.")
    if (known > held).any():
        row = int(np.argmax(known > held))
        raise InputError(
            f"lengths say {known[row]} tokens for prompt {row}, which has {held[row]}."
        )
    if (known < 1).any() or not known.size:
        row = int(np.argmin(known)) if known.size else 0
        raise InputError(
            f"Prompt {row} is empty; a prompt needs at least one token, and Gemma-2 expects the "
            "first to be <bos> (the tokenizer adds it)."
        )
    return known


def last_tokens(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """(B, T, V) to (B, V): of each prompt's last token."""
    return jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
