"""Numbers to explain: what of a run's logits an experiment looks at.

Each is a pytree that is called with a :class:`jaxtc.programs.call.RunResult`, for
``sweep(..., of=...)`` and the patching functions; its token ids are data, so another answer
runs the same program. Any function of a result will do in their place. B batch, V vocabulary.

Ids that do not fit the model or the batch are an InputError, before anything runs, wherever their
values are known; inside a trace the score of an id that does not exist is NaN.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError
from jaxtc.helpers import explicit_transfers, pytree
from jaxtc.interchange import owned, plain_fields, to_numpy
from jaxtc.model.prompts import last_tokens
from jaxtc.programs.call import RunResult
from jaxtc.tap.positions import is_traced
from jaxtc.transcoders.metrics import next_token_loss

__all__ = ["LogProbability", "Logit", "LogitDifference", "Loss"]


class Score:
    """What the scores here share: each field is a token's id, or one for each row (B,)."""

    __post_init__ = plain_fields

    def check(self, vocabulary: int, rows: int) -> None:
        """Raise InputError for ids that do not fit V = ``vocabulary`` and B = ``rows``."""
        for field in dataclasses.fields(self):
            what = f"{type(self).__name__}: {field.name}"
            _check_ids(what, getattr(self, field.name), vocabulary, rows)

    def _logits(self, result: RunResult) -> jax.Array:
        """(B, V) logits of each prompt's last token, once the ids were checked."""
        logits = _last(result)
        self.check(logits.shape[1], len(logits))
        return logits


def as_pytree(of: Callable, vocabulary: int, rows: int) -> Callable:
    """A function as programs take it: a plain one has no arrays, and is part of the compile key.

    Raises:
        InputError: it cannot be called; or it holds a :class:`Score` that does not fit a model of
            this vocabulary, or so many rows.
    """
    if not callable(of):
        raise InputError(f"of is {of!r}, expected a function of a run's result.")
    for part in jax.tree.leaves(of, is_leaf=lambda node: isinstance(node, Score)):
        if isinstance(part, Score):
            part.check(vocabulary, rows)
    return jax.tree_util.Partial(of) if jax.tree_util.all_leaves([of]) else of


def _check_ids(what: str, token: Any, vocabulary: int, rows: int) -> None:
    traced = is_traced(token)
    try:
        ids = jnp.asarray(token) if traced else np.asarray(to_numpy(token))
    except (TypeError, ValueError):  # ragged
        ids = np.asarray(None)
    if ids.dtype.kind not in "iu":
        raise InputError(
            f"{what} is {token!r}, expected a token's id, a whole number, or one for each of the "
            f"{rows} prompts: tokenizer.convert_tokens_to_ids('▁Texas') gives it, and the whole "
            "vocabulary is tokenizer.get_vocab()."
        )
    if ids.shape not in ((), (rows,)):
        raise InputError(
            f"{what} has ids of shape {ids.shape}, expected one id, or one for each of the {rows} "
            f"prompts, ({rows},)."
        )
    wrong = () if traced else np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if len(wrong):
        row = f" of prompt {wrong[0]}" if ids.shape else ""
        raise InputError(
            f"{what} is token id {np.ravel(ids)[wrong[0]]}{row}, outside the model's vocabulary of "
            f"{vocabulary} ids, 0 to {vocabulary - 1}. Was it given by this model's own tokenizer?"
        )


def _last(result: RunResult) -> jax.Array:
    """(B, V) logits of each prompt's last token."""
    if not hasattr(result, "logits"):
        raise InputError(
            f"A score takes what jaxtc.run returns, and reads its logits; got {type(result)}."
        )
    if result.logits is None:
        raise InputError("This score is of logits, and the run kept none: logits='last'.")
    last = result.logits.ndim == 2
    return result.logits if last else last_tokens(result.logits, jnp.asarray(result.last))


def _of(logits: jax.Array, token: Any) -> jax.Array:
    """(B,) the entry of each row's token; NaN for an id that does not exist, known in no trace."""
    ids = jnp.broadcast_to(jnp.asarray(owned(token)), logits.shape[:1])
    ids = jnp.where(ids < 0, logits.shape[1], ids)
    return logits.at[jnp.arange(len(logits)), ids].get(mode="fill", fill_value=jnp.nan)


@pytree
@dataclasses.dataclass(frozen=True)
class Logit(Score):
    """The logit of a token at the end of each prompt: result to (B,).

    Attributes:
        token: an id, or one for each row (B,).
    """

    token: Any

    @explicit_transfers
    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        logits = self._logits(result)
        return _of(logits, self.token)


@pytree
@dataclasses.dataclass(frozen=True)
class LogitDifference(Score):
    """The logit of an answer minus that of another: how clearly the model decides. To (B,).

    Attributes:
        answer: an id, or one for each row (B,).
        other: the id it is compared with, likewise.
    """

    answer: Any
    other: Any

    @explicit_transfers
    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        logits = self._logits(result)
        return _of(logits, self.answer) - _of(logits, self.other)


@pytree
@dataclasses.dataclass(frozen=True)
class LogProbability(Score):
    """The log probability, in nats, of a token at the end of each prompt: result to (B,).

    Attributes:
        token: an id, or one for each row (B,).
    """

    token: Any

    @explicit_transfers
    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        return _of(jax.nn.log_softmax(self._logits(result)), self.token)


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

    # What patching has to ask for.
    logits = "all"

    @explicit_transfers
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
