"""The tokens that a transcoder's features promote, and the names of tokens.

Axis letters: D hidden, M features, V vocabulary, n features asked about.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError, JaxtcError, some
from jaxtc.helpers import explicit_transfers, is_whole, ranked
from jaxtc.interchange import plain, to_numpy
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket
from jaxtc.transcoders.cross_layer import LayerFeatures
from jaxtc.transcoders.encoder import Encoder
from jaxtc.transcoders.transcoder import Transcoder

# What is written to the residual stream reaches the logits through the final norm alone.
_RESIDUAL = frozenset({"attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"})
_BLOCK = 64  # features whose logits are computed at once: bounds the (features, V) array


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Pieces of the vocabulary; models often have rows for more ids than their tokenizer has."""
    found = tokenizer.convert_ids_to_tokens(list(ids))
    return tuple(
        f"<id {index}>" if piece is None else piece for index, piece in zip(ids, found, strict=True)
    )


@functools.partial(jax.jit, static_argnames="count")
def _promoted(rows: jax.Array, gain: jax.Array, matrix: jax.Array, count: int) -> jax.Array:
    wide = rows.astype(jnp.float32)
    rows = (wide * ranked(1 + gain.astype(jnp.float32), wide)).astype(matrix.dtype)
    logits = jnp.einsum(
        "md,vd->mv", rows, matrix, precision="highest", preferred_element_type=jnp.float32
    )
    return jax.lax.top_k(logits, count)[1]


@explicit_transfers
def promoted_tokens(
    model: Gemma2,
    transcoder: Transcoder | LayerFeatures,
    features: Sequence[int],
    count: int = 5,
) -> np.ndarray:
    """The tokens that features promote: direct logit attribution of their decoder rows.

    ``(W_dec[f] · (1 + w)) Uᵀ`` with w the final norm's gain and U the output matrix. The norm's
    1/rms and the softcap are left out and change no order; what later layers do with the feature is
    left out too, so it says most about late layers.

    Args:
        model: whose unembedding to use.
        transcoder: one that writes to the residual stream (``mlp_out``, say). Of a cross-layer one,
            one of its ``layers``; the stream adds up what a feature writes at each layer, so the
            sum of its decoder rows counts.
        features: ids of n features.
        count: how many tokens, at most V.

    Returns:
        (n, count) int32 token ids, strongest first.

    Raises:
        InputError: no such feature, or not so many tokens.
        JaxtcError: the transcoder's D differs from the model's, or it writes elsewhere.
    """
    wanted = _ids(features)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < transcoder.features:
        wrong = some([str(one) for one in wanted if not 0 <= one < transcoder.features])
        raise InputError(
            f"This transcoder has features 0 to {transcoder.features - 1}, got {wrong}."
        )
    if not is_whole(count) or count > model.config.vocab_size:
        raise InputError(
            f"count is {count!r}, the vocabulary has {model.config.vocab_size} tokens."
        )
    if transcoder.output_site not in _RESIDUAL or transcoder.d_out != model.config.hidden_size:
        raise JaxtcError(
            f"This transcoder writes D={transcoder.d_out} at {transcoder.output_site}; only what "
            f"is added to the residual stream (D={model.config.hidden_size}) promotes tokens."
        )
    found = np.zeros((len(wanted), count), np.int32)
    block = min(_BLOCK, bucket(max(len(wanted), 1)))
    for start in range(0, len(wanted), block):
        some_ids = wanted[start : start + block]
        rows = transcoder.W_dec[...][np.pad(some_ids, (0, block - len(some_ids)))]
        rows = rows.sum(1) if rows.ndim == 3 else rows
        gain, matrix = model.final_norm.weight[...], model.unembed.weight[...]
        best = np.asarray(_promoted(rows, gain, matrix, count))
        found[start : start + block] = best[: len(some_ids)]
    return found


def _ids(features: Any) -> np.ndarray:
    """(n,) whole numbers."""
    try:
        found = np.asarray(to_numpy(plain(features)))
    except ValueError:  # ragged
        found = np.asarray(None)
    if found.ndim > 1 or (found.size and found.dtype.kind not in "iu"):
        raise InputError(
            f"features are {features!r}, expected the ids of n features, whole numbers in one row."
        )
    return found.reshape(-1).astype(np.int64)


def promoted_pieces(
    model: Gemma2, tokenizer: Any, transcoder: Encoder, tops: dict[str, np.ndarray], count: int
) -> dict[int, tuple[str, ...]]:
    """Pieces of the vocabulary by feature, for every active feature of ``tops``."""
    shown = np.unique(tops["ids"][tops["values"] > 0])
    if transcoder.output_site not in _RESIDUAL:
        return {int(feature): () for feature in shown}
    best = promoted_tokens(model, transcoder, shown, min(count, model.config.vocab_size))
    return {
        int(feature): pieces_of(tokenizer, row.tolist())
        for feature, row in zip(shown, best, strict=True)
    }
