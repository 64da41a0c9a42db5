"""Greedy generation: the prompts once (prefill), then one compiled step a token, with a cache."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.config import Gemma2Config
from jaxtc.dispatch import parameters, rebuild
from jaxtc.edit import Edit
from jaxtc.errors import InputError, JaxtcError
from jaxtc.intercept import Tap
from jaxtc.model import Cache, Gemma2
from jaxtc.prompts import bucket, prepare
from jaxtc.sites import ORDER
from jaxtc.targets import check_edits


@dataclasses.dataclass(frozen=True)
class Generation:
    """What :func:`generate` returns.

    Attributes:
        prompts: the ids of each prompt, without padding.
        tokens: the new ids of each prompt, up to and including its stop token.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and continuation of each row."""
        return [[*a, *b] for a, b in zip(self.prompts, self.tokens, strict=True)]


def generate(
    model: Gemma2,
    tokens: Any,
    max_new_tokens: int,
    *,
    lengths: Any = None,
    edits: Sequence[Edit] = (),
    stop: int | Sequence[int] | None = None,
) -> Generation:
    """Continue each prompt with its most likely next token, again and again.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokens: as for :func:`jaxtc.run`; prompts of one batch may differ in length.
        max_new_tokens: how many to add at most; a prompt that stops earlier waits for the others.
        lengths: as for :func:`jaxtc.run`.
        edits: applied to prompts and new tokens alike; a ``position`` counts from the prompt's
            start, or its end when negative, and may name a new token.
        stop: id or ids that end a text; the config's ``eos_token_id`` by default, none when empty.

    Raises:
        InputError: tokens the model cannot run, or more of them than its context.
        EditError: an edit that does not fit or could never fire.
        JaxtcError: the model computed NaN.
    """
    config = model.config
    whole = isinstance(max_new_tokens, int | np.integer) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens!r}, expected a whole number of at least 1."
        )
    leaves = parameters(model)
    if any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((tokens, lengths, edits, leaves))
    ):
        raise InputError("generate loops in Python and cannot run inside jit, vmap or grad.")
    prompts = prepare(tokens, config, lengths, extra=max_new_tokens)
    layers = config.num_hidden_layers
    # The last new token is never fed back, so an edit at its position would not fire.
    checked, _ = check_edits(edits, config, (layers, len(ORDER)), prompts, max_new_tokens - 1)
    stop = config.eos_token_id if stop is None else stop
    stop = () if stop is None else np.atleast_1d(stop).tolist()
    slots = bucket(prompts.length + max_new_tokens)
    token, cache = _prefill(
        config,
        max(slots, prompts.tokens.shape[1]),
        leaves,
        prompts.tokens,
        prompts.lengths,
        checked,
    )
    new = [_ids(token)]
    done = np.isin(new[0], stop)
    for step in range(max_new_tokens - 1):
        if done.all():
            break
        places = prompts.lengths + step
        token, cache = _step(config, leaves, token, places, prompts.lengths, cache, checked)
        new.append(_ids(token))
        done |= np.isin(new[-1], stop)
    rows = np.stack(new, axis=1)
    texts = np.asarray(prompts.tokens)
    return Generation(
        [texts[i, :n].tolist() for i, n in enumerate(prompts.known_lengths)],
        [_until(row.tolist(), stop) for row in rows],
    )


def _ids(token: jax.Array) -> np.ndarray:
    """(B,) ids on the host; refuses what :func:`_likeliest` marked."""
    ids = np.asarray(token)
    if (ids < 0).any():
        raise JaxtcError(
            f"The model computed NaN for prompt {int(np.argmin(ids))}, so it has no next token. An "
            "edit put NaN or something too large there, or the weights' dtype overflows (float16 "
            "does, with Gemma-2's activations): use bfloat16 or float32."
        )
    return ids


def _likeliest(logits: jax.Array) -> jax.Array:
    """(B, V) logits to (B,) ids of the largest, -1 where there is NaN among them."""
    best = logits.argmax(-1).astype(jnp.int32)
    return jnp.where(jnp.isnan(logits).any(-1), -1, best)


def _until(row: list[int], stop: Sequence[int]) -> list[int]:
    """``row`` up to and including its first stop token."""
    ends = [index + 1 for index, token in enumerate(row) if token in stop]
    return row[: ends[0]] if ends else row


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(config: Gemma2Config, slots: int, leaves, tokens, lengths, edits):
    """The prompts at once: (B, T) ids to each row's next id, and the cache."""
    model = rebuild(config, leaves)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = Cache.empty(config, tokens.shape[0], slots, model.dtype)
    tap = Tap((), edits, positions, lengths)
    # An edit of the logits selects among those of every token.
    at = None if any(edit.site == "logits" for edit in edits) else lengths - 1
    logits, cache = model(tokens, positions=positions, cache=cache, tap=tap, logits_at=at)
    if at is None:
        logits = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)
    return _likeliest(logits[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _step(config: Gemma2Config, leaves, token, places, lengths, cache, edits):
    """One token more: (B,) ids at positions (B,) to the next ids, and the cache."""
    model = rebuild(config, leaves)
    positions = places[:, None]
    tap = Tap((), edits, positions, lengths, ends=places + 1)
    logits, cache = model(token[:, None], positions=positions, cache=cache, tap=tap)
    return _likeliest(logits[:, 0]), cache
