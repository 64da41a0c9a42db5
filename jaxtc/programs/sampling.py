"""Choosing the next token: argmax, or sampling after temperature, top-k and top-p.

Everything but the shapes is data, so any temperature, k, p or seed runs the same program. Nothing
is sorted: what top-k and top-p keep lies above a threshold, which is found bit by bit in 32 passes
over the logits (2 ms for a row of 256,000 on a CPU, where sorting it takes 70). Axis letters: B
batch, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# What `top_k` is when nothing is left out: more than any vocabulary.
EVERY = np.iinfo(np.int32).max
_SIGN = np.uint32(1 << 31)


def greedy(logits: jax.Array) -> jax.Array:
    """(B, V) logits to (B,) int32 ids of the largest; the first of several."""
    return logits.argmax(-1).astype(jnp.int32)


def tempered(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """(B, V) logits divided by a temperature above 0, shifted so that each row's largest is 0."""
    largest = logits.max(-1, keepdims=True)
    # An infinite logit takes all: infinity less itself would be NaN.
    return jnp.where(logits == largest, 0, (logits - largest) / temperature)


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """(B, V) logits with -inf at all but the ``k`` largest; the ties of the last are kept too.

    As ``TopKLogitsWarper`` of transformers (Fan et al. 2018, arXiv 1805.04833, §5.4).
    """
    return _keep(logits, lambda chosen: chosen.sum(-1) >= k)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """(B, V) logits with -inf outside the fewest tokens whose probabilities sum to ``p``.

    As ``TopPLogitsWarper`` of transformers (Holtzman et al. 2020, arXiv 1904.09751, §3.1), but that
    equally likely tokens stay or go together, where it keeps some of them by the order of its sort.
    At least one token stays. ``p`` is above 0 and at most 1; 1 keeps all.
    """
    probabilities = jax.nn.softmax(logits)
    enough = jnp.maximum(p, jnp.finfo(jnp.float32).tiny)
    kept = _keep(logits, lambda chosen: jnp.where(chosen, probabilities, 0).sum(-1) >= enough)
    # Rounding may leave the sum of all below a p of nearly 1; at 1 itself all are kept.
    return jnp.where(p >= 1, logits, kept)


def draw(
    logits: jax.Array,
    key: jax.Array,
    places: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """The next token of each row: temperature first, then top-k, then top-p, as transformers does.

    The random numbers of a token depend on the key, its row and its place in its text only: not on
    the other rows, nor on how the text got there, so that a text cut short and given as a prompt
    goes on as it did before.

    Args:
        logits: (B, V) float32.
        key: one key.
        places: (B,) int32, position of the new token in each row's text.
        temperature: () float32; 0 takes the argmax.
        top_k: () int32 of at least 1; :data:`EVERY` leaves nothing out.
        top_p: () float32, above 0; 1 leaves nothing out.

    Returns:
        (B,) int32 ids; -1 for a row that has none: NaN among its logits, or nothing above -inf.
    """

    def sampled() -> jax.Array:
        scores = tempered(logits, temperature)
        scores = jax.lax.cond(top_k < scores.shape[-1], keep_top_k, _as_is, scores, top_k)
        scores = jax.lax.cond(top_p < 1, keep_top_p, _as_is, scores, top_p)
        rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
        keys = jax.vmap(jax.random.fold_in)(rows, places)
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)

    chosen = jax.lax.cond(temperature > 0, sampled, lambda: greedy(logits))
    none = jnp.isnan(logits).any(-1) | (logits == -jnp.inf).all(-1)
    return jnp.where(none, -1, chosen)


def _as_is(scores: jax.Array, _: jax.Array) -> jax.Array:
    return scores


def _keep(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """``logits`` from the highest threshold on at which ``enough`` is kept, -inf below it.

    Args:
        logits: (B, V) float32.
        enough: (B, V) booleans of what is kept to (B,), false once too little is.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    # Whole numbers in the order of the floats: their bits, inverted for negative ones.
    order = jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)

    def settle(index: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (_SIGN >> index.astype(jnp.uint32))
        return jnp.where(enough(order >= higher[:, None]), higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, settle, jnp.zeros(len(logits), jnp.uint32))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)
