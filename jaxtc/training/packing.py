"""Documents packed into rows of a fixed length, and the next-token loss on them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

# Ids of the special tokens: those of Gemma's tokenizer, which the embedded one shares.
PAD, EOS, BOS, UNK = range(4)


class Batch(NamedTuple):
    """Packed documents, each int32 [B, T]; a token sees only its own segment.

    Attributes:
        tokens: token ids; every document is ``<bos> … <eos>``.
        positions: from 0 in each document.
        segments: number of the document in its row, from 1; 0 is padding.
    """

    tokens: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    segments: jax.Array | np.ndarray


def pack(documents: list[list[int]], rows: int, length: int) -> Batch:
    """Put each document, cut as by :func:`pieces`, into the first row with room, until one fits
    nowhere; B is ``rows`` and T ``length``."""
    tokens, positions, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
    used, count = np.zeros(rows, int), np.zeros(rows, int)
    for ids in pieces(documents, length):
        fits = np.flatnonzero(used + len(ids) <= length)
        if not len(fits):
            break
        row = fits[0]
        span = slice(used[row], used[row] + len(ids))
        count[row] += 1
        tokens[row, span] = ids
        positions[row, span] = np.arange(len(ids))
        segments[row, span] = count[row]
        used[row] += len(ids)
    return Batch(tokens, positions, segments)


def pieces(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Token ids that begin with ``<bos>``, plus ``<eos>``, in pieces of at most ``length`` that all
    begin with ``<bos>``."""
    for ids in documents:
        body = [*ids[1:], EOS]
        for start in range(0, len(body), length - 1):
            yield [BOS, *body[start : start + length - 1]]


@dataclass(frozen=True)
class Batches:
    """Packed batches of documents; batch ``i`` is the same in every run."""

    documents: Callable[[int, int, int, bool], list[str]]  # (stream, batch, count, held_out)
    tokenizer: Tokenizer
    rows: int  # B
    length: int  # T
    stream: int = 0  # which sequence of batches, as one for the model and one for transcoders
    held_out: bool = False  # the held-out text, not the training text

    def __getitem__(self, index: int) -> Batch:
        # Enough even of the shortest documents (8 tokens) to fill the rows; the rest is dropped.
        count = max(self.rows * self.length // 8, 2 * self.rows)
        texts = self.documents(self.stream, index, count, self.held_out)
        encoded = self.tokenizer.encode_batch(texts)
        return pack([e.ids for e in encoded], self.rows, self.length)


def next_token_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross-entropy in nats of the next token, within documents.

    Args:
        logits: [B, T, V], float32.
        batch: what they were computed from.
    """
    after = batch.segments[:, 1:]
    mask = (after > 0) & (after == batch.segments[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.tokens[:, 1:])
    return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1)
