"""Token ids as users give them, checked and padded to arrays.

However prompts were padded, programs see them padded on the right; results go back to where the
tokens stood (:mod:`jaxtc.tap.columns`). Axis letters: B batch, T columns as given, W with the
padding up to a bucket.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError
from jaxtc.helpers import pytree
from jaxtc.interchange import owned, plain
from jaxtc.model.config import Gemma2Config
from jaxtc.model.given import ids_and_mask, is_text, not_a_mask, not_ids, rows_of, spans_of
from jaxtc.tap.columns import from_first_column, returned, tokens_of


@pytree
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as the compiled programs take them.

    Attributes:
        tokens: (B, W) int32 ids, padded on the right up to a bucket.
        lengths: (B,) int32, real tokens of each row; NumPy where known.
        length: T, the longest prompt, or the width of the array that was given (static).
        starts: (B,) int32, in which of the T columns each prompt began when it was given; None
            where all began in the first.
    """

    tokens: jax.Array
    lengths: np.ndarray | jax.Array
    length: int = dataclasses.field(metadata={"static": True})
    starts: np.ndarray | jax.Array | None = None

    def without_left_padding(self) -> "Prompts":
        """The same prompts as if they had been given from the first column on."""
        longest = int(np.max(self.lengths))
        return dataclasses.replace(self, length=longest, starts=None)

    @property
    def mask(self) -> Any:
        """(B, T) booleans, true on real tokens where they stood when they were given."""
        return tokens_of(self.length, self.lengths, self.starts)

    @property
    def given(self) -> Any:
        """(B, T) ids where they stood when they were given, 0 in the place of padding."""
        return returned(owned(self.tokens[:, : self.length]), self.starts, 1)


def bucket(length: int) -> int:
    """The padded length: one compiled program serves every prompt up to it.

    Steps of 16 up to 128, then a quarter to an eighth of the length: a long prompt's padding is at
    most a quarter of the prompt.
    """
    step = 16 if length <= 128 else 1 << max((length - 1).bit_length() - 3, 4)
    return -(-length // step) * step


def prepare(
    tokens: Any,
    config: Gemma2Config,
    lengths: Any = None,
    extra: int = 0,
    *,
    attention_mask: Any = None,
    tokenizer: Any = None,
) -> Prompts:
    """Check prompts and pad them to a bucket.

    Args:
        tokens: ids of one prompt, a list of prompts of any lengths, or an array (T,) or (B, T); a
            tokenizer's output, whose ``attention_mask`` counts; with ``tokenizer``, text or texts.
            What is prepared already stays as it is.
        config: for the vocabulary, the context length and the id of padding.
        lengths: (B,) real tokens of each row, which is padded on the right.
        extra: tokens that will be generated after the prompts.
        attention_mask: as ``tokens``, 1 (or true) on real tokens and 0 on padding, which may lie on
            either side of a prompt.
        tokenizer: the model's, called with each text. A UserWarning says what is odd about how
            it reads one: words that it does not know, ``<bos>`` missing or there twice.

    Raises:
        InputError: an empty prompt; ids that are not whole numbers of the vocabulary; more tokens
            than the model's context; a mask or lengths that do not fit; a row that begins with the
            config's ``pad_token_id`` without a mask, or ends in it without a mask or lengths; text
            without a tokenizer. Inside a trace, where values cannot be seen, the embedding gives
            NaN for a prompt with a bad id, length or mask.
    """
    if isinstance(tokens, Prompts):
        traced = isinstance(tokens.lengths, jax.core.Tracer)
        longest = tokens.length if traced else int(np.max(tokens.lengths))
        _check_context(longest, extra, config)
        return tokens
    text = is_text(tokens)
    tokens, mask = ids_and_mask(tokens, attention_mask, tokenizer, config.bos_token_id)
    lengths = plain(lengths)
    if lengths is not None and (mask is not None or text):
        raise InputError(
            "lengths are given besides "
            + ("text" if text else "an attention_mask")
            + ", which says where prompts end itself; give one of the two."
        )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((tokens, lengths, mask))):
        return _traced(tokens, config, lengths, mask, extra)
    rows = rows_of(tokens)
    held = np.array([len(row) for row in rows], int)
    starts = np.zeros(len(rows), np.int32)
    if mask is None:
        known = _lengths(lengths, held)
        if not text:
            _check_padding(rows, known, config, told=lengths is not None)
    else:
        starts, known = spans_of(mask, rows)
    # No token attends to padding; 0 is an id of every vocabulary.
    array = np.zeros((len(rows), bucket(int(held.max()))), np.int32)
    for index, (row, start, count) in enumerate(zip(rows, starts, known, strict=True)):
        row = row[start : start + count]
        wrong = np.flatnonzero((row < 0) | (row >= config.vocab_size))
        if wrong.size:
            raise InputError(
                f"Token id {row[wrong[0]]} (prompt {index}, position {wrong[0]}) is outside the "
                f"model's vocabulary of {config.vocab_size} ids, 0 to {config.vocab_size - 1}. Was "
                "the text tokenized with this model's own tokenizer?"
            )
        array[index, :count] = row
    _check_context(int(known.max()), extra, config)
    starts = starts if starts.any() else None
    return Prompts(array, known.astype(np.int32), int(held.max()), starts)


def _traced(tokens: Any, config: Gemma2Config, lengths: Any, mask: Any, extra: int) -> Prompts:
    """:func:`prepare` inside a trace: shapes are checked, wrong values lead to NaN."""
    tokens = jnp.atleast_2d(jnp.asarray(tokens))
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise not_ids(tokens)
    (batch, length), starts, fits = tokens.shape, None, jnp.ones(len(tokens), bool)
    _check_context(length, extra, config)
    if mask is not None and not isinstance(mask, jax.core.Tracer):
        starts, lengths = spans_of(mask, list(np.zeros(tokens.shape)))
        starts = starts if starts.any() else None
        tokens = from_first_column(tokens, starts, 1)
    elif mask is not None:
        given = jnp.atleast_2d(jnp.asarray(mask))
        on = given != 0
        if on.shape != tokens.shape:
            raise not_a_mask(f"has shape {on.shape}", tokens.shape)
        starts, lengths = jnp.argmax(on, axis=1).astype(jnp.int32), on.sum(1)
        at = jnp.arange(length)[None] - starts[:, None]
        fits = ((on == ((at >= 0) & (at < lengths[:, None]))) & (given == on)).all(1)
        tokens = from_first_column(tokens, starts, 1)
    elif config.pad_token_id is not None:
        fits &= tokens[:, 0] != config.pad_token_id
    if isinstance(lengths, jax.core.Tracer):
        lengths = jnp.broadcast_to(lengths, (batch,))
        fits &= (lengths >= 1) & (lengths <= length)
        lengths = jnp.clip(lengths, 1, length)
    else:
        lengths = _lengths(lengths, np.full(batch, length))
    # The embedding of an id outside the vocabulary is NaN.
    tokens = jnp.where(fits[:, None], tokens, config.vocab_size)
    # Ids past a prompt's length may be out of range, and their NaN would reach other tokens.
    real = jnp.arange(length)[None] < lengths[:, None]
    tokens = jnp.where(real, tokens, 0).astype(jnp.int32)
    padded = jnp.pad(tokens, [(0, 0), (0, bucket(length) - length)])
    return Prompts(padded, lengths.astype(np.int32), length, starts)


def _check_context(length: int, extra: int, config: Gemma2Config) -> None:
    if length + extra > config.max_position_embeddings:
        more = f" and {extra} new ones" if extra else ""
        raise InputError(
            f"A prompt of {length} tokens{more} is longer than this model's context of "
            f"{config.max_position_embeddings}. Shorten it, or split it into several."
        )


def _lengths(lengths: Any, held: np.ndarray) -> np.ndarray:
    """(B,) tokens of each prompt, all of the ``held`` ones by default."""
    try:
        known = held if lengths is None else np.atleast_1d(np.asarray(lengths))
    except ValueError:  # ragged
        known = np.atleast_1d(None)
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


def _check_padding(
    rows: list[np.ndarray], known: np.ndarray, config: Gemma2Config, told: bool
) -> None:
    """Refuse rows that seem to hold padding where nothing says so.

    ``told`` says that lengths were, which can only be of rows padded on the right.
    """
    ends = {i for i in np.ravel(config.eos_token_id).tolist() if i is not None}
    # Prompts that were padded are of one length; a single one needs no padding.
    alike = len(rows) > 1 and len({len(row) for row in rows}) == 1
    for index, (row, count) in enumerate(zip(rows, known, strict=True)):
        ids = row[:count]
        for side, some in ("begins", ids), ("ends", ids[::-1]):
            pad = int(some[0])
            if pad != config.pad_token_id and pad not in ends:
                continue
            # What ends texts pads them too, for some tokenizers: one at an end may be that end.
            run = int(np.argmin(some == pad)) or len(some)
            padding = pad == config.pad_token_id and (pad not in ends or run > 1)
            if pad in ends:
                in_front = side == "begins" and config.bos_token_id in some[run : run + 1]
                padding |= in_front or (run > 1 and alike)
            if not padding or (told and side == "ends"):
                continue
            raise InputError(
                f"Prompt {index} {side} with id {pad}, which pads or ends texts in this model. "
                "Give the tokenizer's whole output, or the ids with a mask of the tokens, "
                '{"input_ids": ids, "attention_mask": mask}; or leave the padding out.'
            )


def among_ids(tokens: Any, ids: tuple[int, ...]) -> Any:
    """(B, T) booleans, in the library of ``tokens`` (B, T): which of them are among these ids."""
    found = tokens != tokens
    for one in ids:
        found = found | (tokens == one)
    return found


def last_tokens(x: jax.Array, last: jax.Array) -> jax.Array:
    """(B, T, V) to (B, V): of each prompt's last token, which stands in column ``last`` (B,)."""
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
