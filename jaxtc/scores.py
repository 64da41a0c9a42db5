"""Numbers to explain: what of a run's logits an experiment looks at.

Each is a pytree that is called with a :class:`jaxtc.run.RunResult`, for ``sweep(..., of=...)`` and
the patching functions; its token ids are data, so another answer runs the same program. Any
function of a result will do in their place. B batch, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.run import RunResult

__all__ = ["LogProbability", "Logit", "LogitDifference"]


def _last(result: RunResult) -> jax.Array:
    """(B, V) logits of each prompt's last token."""
    if result.logits.ndim == 2:
        return result.logits
    at = result.lengths[:, None, None] - 1
    return jnp.take_along_axis(result.logits, at, axis=1)[:, 0]


def _of(logits: jax.Array, token: Any) -> jax.Array:
    """(B,) the entry of each row's token; NaN for an id that does not exist."""
    ids = jnp.broadcast_to(jnp.asarray(token), logits.shape[:1])
    ids = jnp.where(ids < 0, logits.shape[1], ids)
    found = logits.at[jnp.arange(len(logits)), ids].get(mode="fill", fill_value=jnp.nan)
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logit:
    """The logit of a token at the end of each prompt: result to (B,).

    Attributes:
        token: an id, or one for each row (B,).
    """

    token: Any

    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        return _of(_last(result), self.token)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """The logit of an answer minus that of another: how clearly the model decides. To (B,).

    Attributes:
        answer: an id, or one for each row (B,).
        other: the id it is compared with, likewise.
    """

    answer: Any
    other: Any

    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        logits = _last(result)
        return _of(logits, self.answer) - _of(logits, self.other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbability:
    """The log probability, in nats, of a token at the end of each prompt: result to (B,).

    Attributes:
        token: an id, or one for each row (B,).
    """

    token: Any

    def __call__(self, result: RunResult) -> jax.Array:
        """(B,)."""
        return _of(jax.nn.log_softmax(_last(result)), self.token)
