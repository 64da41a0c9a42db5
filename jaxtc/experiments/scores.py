"""Numbers to explain: what of a run's logits an experiment looks at.

Each is a pytree that is called with a :class:`jaxtc.programs.call.RunResult`, for
``sweep(..., of=...)`` and the patching functions; its token ids are data, so another answer
runs the same program. Any function of a result will do in their place. B batch, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.errors import InputError
from jaxtc.helpers import explicit_transfers, pytree
from jaxtc.interchange import owned, plain_fields
from jaxtc.model.prompts import last_tokens
from jaxtc.programs.call import RunResult
from jaxtc.transcoders.metrics import next_token_loss

__all__ = ["LogProbability", "Logit", "LogitDifference", "Loss"]


def as_pytree(of: Callable) -> Callable:
    """A function as programs take it: a plain one has no arrays, and is part of the compile key.

    Raises:
        InputError: it cannot be called.
    """
    if not callable(of):
        raise InputError(f"of is {of!r}, expected a function of a run's result.")
    return jax.tree_util.Partial(of) if jax.tree_util.all_leaves([of]) else of


def _last(result: RunResult) -> jax.Array:
    """(B, V) logits of each prompt's last token."""
    if result.logits is None:
        raise InputError("This score is of logits, and the run kept none: logits='last'.")
    last = result.logits.ndim == 2
    return result.logits if last else last_tokens(result.logits, jnp.asarray(result.last))


def _of(logits: jax.Array, token: Any) -> jax.Array:
    """(B,) the entry of each row's token; NaN for an id that does not exist."""
    ids = jnp.broadcast_to(jnp.asarray(owned(token)), logits.shape[:1])
    ids = jnp.where(ids < 0, logits.shape[1], ids)
    return logits.at[jnp.arange(len(logits)), ids].get(mode="fill", fill_value=jnp.nan)


@pytree
@dataclasses.dataclass(frozen=True)
class Logit:
    """The logit of a token at the end of each prompt: result to (B,).

    Attributes:
        token: an id, or one for each row (B,).
    """

    token: Any

    __post_init__ = plain_fields

    @explicit_transfers
    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        return _of(_last(result), self.token)


@pytree
@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """The logit of an answer minus that of another: how clearly the model decides. To (B,).

    Attributes:
        answer: an id, or one for each row (B,).
        other: the id it is compared with, likewise.
    """

    answer: Any
    other: Any

    __post_init__ = plain_fields

    @explicit_transfers
    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        logits = _last(result)
        return _of(logits, self.answer) - _of(logits, self.other)


@pytree
@dataclasses.dataclass(frozen=True)
class LogProbability:
    """The log probability, in nats, of a token at the end of each prompt: result to (B,).

    Attributes:
        token: an id, or one for each row (B,).
    """

    token: Any

    __post_init__ = plain_fields

    @explicit_transfers
    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        return _of(jax.nn.log_softmax(_last(result)), self.token)


@pytree
@dataclasses.dataclass(frozen=True)
class Loss:
    """The mean next-token loss, in nats, of each prompt's own tokens: result to (B,).

    Of runs with ``logits="all"``. NaN for a prompt without a token to predict.

    Attributes:
        special_tokens: whether special tokens count as answers: ``<eos>``, or a ``<bos>`` that is
            not the first (static).
    """

    special_tokens: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        if result.logits is None or result.logits.ndim != 3:
            raise InputError(
                "This score is of all tokens' logits; the run kept others: logits='all'."
            )
        answers = jnp.asarray(result.answers(self.special_tokens))
        losses = next_token_loss(result.logits, result.tokens)
        count = answers.sum(1)
        total = jnp.where(answers, losses, 0).sum(1)
        return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
