"""Gemma-2, top to bottom. Every activation passes through ``tap(site, x)`` on its way.

Axis letters: B batch, T query position, S key position, D hidden, N query heads, K key/value heads,
G = N/K query heads per key head, H head dim, F MLP width, V vocabulary. Matrices keep the
orientation of the released checkpoints, [out, in], with heads split off.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtc.helpers import ranked
from jaxtc.interchange import owned, plain
from jaxtc.model.config import FULL, SLIDING, Gemma2Config
from jaxtc.model.parameters import declare, normal, zeros
from jaxtc.tap.tap import MASKED, Tap

# Keys and values of the tokens so far, each (B, S, K, H), a pair a layer; slot number = position.
Cache: TypeAlias = list[tuple[jax.Array, jax.Array]]


def empty_cache(config: Gemma2Config, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """Room for ``slots`` tokens of ``batch`` texts."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in config.layer_types]


def einsum(spec: str, *arrays: jax.Array, **options) -> jax.Array:
    """``jnp.einsum`` at the full precision of its inputs (TPU and GPU would round float32)."""
    return jnp.einsum(spec, *arrays, precision="highest", **options)


def linear(x: jax.Array, weight: jax.Array, out_axes: int = 1) -> jax.Array:
    """``x`` (B, T, in...) through a weight [out..., in...], with ``out_axes`` axes [out].

    The weight is flattened to two axes first, which costs nothing: XLA's CPU backend copies one
    of three axes into another layout at every call (half the time of a short prompt at 2B widths).
    """
    out, inner = weight.shape[:out_axes], weight.shape[out_axes:]
    flat = x.reshape(*x.shape[:2], -1), weight.reshape(math.prod(out), math.prod(inner))
    return einsum("bti,oi->bto", *flat).reshape(*x.shape[:2], *out)  # (B, T, out...)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """``cap · tanh(x / cap)``; ``x`` when there is no cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of ``x`` (B, T, heads, H), halves paired; angles in float32.

    ``positions`` are (B, T), ``theta`` is the base of the frequencies.
    """
    half = x.shape[-1] // 2
    exponents = np.arange(0, half, dtype=np.float32) * np.float32(2) / np.float32(2 * half)
    # NumPy's float32 power is off in the last bit where the reference's is not, which put queries
    # at position 4096 off by 6e-5 (H = 256); float64's, rounded, has the reference's bits.
    power = (np.float64(theta) ** exponents).astype(np.float32)
    frequencies = (np.float32(1) / power).reshape(1, 1, 1, half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # (B, T, 1, H/2)
    # Rounded to the activations' dtype, as the reference does.
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Norm(nnx.Module):
    """RMSNorm with gain ``1 + w``, all in float32, cast last (Gemma-2 report, arXiv 2408.00118)."""

    def __init__(self, config: Gemma2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = declare(rngs, (config.hidden_size,), ("embed",), zeros, dtype)
        self.eps = config.rms_norm_eps

    def __call__(self, x, tap, scale: str, normed: str | None = None):
        """(B, T, D) to (B, T, D), through the sites called ``scale`` and ``normed``."""
        with jax.named_scope(scale.removesuffix("_scale") + "_norm"):
            wide = x.astype(jnp.float32)
            mean = jnp.mean(wide * wide, -1, keepdims=True)
            wide = wide * tap(scale, jax.lax.rsqrt(mean + self.eps))  # (B, T, D) * (B, T, 1)
            if normed is not None:
                wide = tap(normed, wide)
            gain = ranked(1 + self.weight[...].astype(jnp.float32), wide)
            return (wide * gain).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with softcapped scores."""

    def __init__(self, config: Gemma2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, N, K, H = (config.sizes[letter] for letter in "DNKH")
        self.q = declare(rngs, (N, H, D), ("heads", "head_dim", "embed"), normal(D), dtype)
        self.k = declare(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), normal(D), dtype)
        self.v = declare(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), normal(D), dtype)
        self.o = declare(rngs, (D, N, H), ("embed", "heads", "head_dim"), normal(N * H), dtype)
        self.config = config

    @jax.named_scope("attention")
    def __call__(self, x, positions, visible, past, tap):
        """((B, T, D), the new ``past``) from the input norm's output, (B, T, D).

        ``positions`` are (B, T); ``visible``, (B, T, S) booleans; ``past``, (keys, values) of the
        cache, each (B, S, K, H), or None.
        """
        config = self.config
        with jax.named_scope("qkv"):
            q, k, v = (linear(x, weight[...], out_axes=2) for weight in (self.q, self.k, self.v))
            q = rotate(tap("q_unrotated", q), positions, config.rope_theta)
            q = tap("q", q)  # (B, T, N, H)
            k = rotate(tap("k_unrotated", k), positions, config.rope_theta)
            k = tap("k", k)  # (B, T, K, H)
            v = tap("v", v)  # (B, T, K, H)
            if past is not None:
                past = k, v = write(past[0], k, positions), write(past[1], v, positions)

        (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
        with jax.named_scope("attn_scores"):
            q = q.reshape(B, T, K, N // K, H)
            scores = einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
            scores = scores.reshape(B, N, T, S) * config.query_pre_attn_scalar**-0.5
            scores = softcap(scores, config.attn_logit_softcapping)
            scores = tap("attn_scores", jnp.where(visible[:, None], scores, MASKED))
        with jax.named_scope("attn_pattern"):
            pattern = tap("attn_pattern", jax.nn.softmax(scores, axis=-1).astype(x.dtype))
        with jax.named_scope("attn_heads"):
            pattern = pattern.reshape(B, K, N // K, T, S)
            heads = einsum("bkgts,bskh->btkgh", pattern, v).reshape(B, T, N, H)
            heads = tap("attn_heads", heads)
        with jax.named_scope("attn_proj"):
            out = linear(heads, self.o[...])  # (B, T, D)
            if tap.touches("head_out"):
                each = tap("head_out", einsum("btnh,dnh->btnd", heads, self.o[...]))
                # Summed in float32 and rounded once; without an edit it is the same number.
                out = jnp.sum(each, axis=2) if tap.edited("head_out") else out
            return tap("attn_proj", out), past


class MLP(nnx.Module):
    """``down(gelu_tanh(gate(x)) · up(x))``."""

    def __init__(self, config: Gemma2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = declare(rngs, (F, D), ("mlp", "embed"), normal(D), dtype)
        self.up = declare(rngs, (F, D), ("mlp", "embed"), normal(D), dtype)
        self.down = declare(rngs, (D, F), ("embed", "mlp"), normal(F), dtype)

    @jax.named_scope("mlp")
    def __call__(self, x, tap):
        """(B, T, D) to (B, T, D)."""
        gate = tap("mlp_gate", linear(x, self.gate[...]))  # (B, T, F)
        up = tap("mlp_up", linear(x, self.up[...]))  # (B, T, F)
        # Rounded once; in bfloat16 each of its steps would round.
        gate = jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(x.dtype)
        act = tap("mlp_act", gate * up)
        return tap("mlp_proj", linear(act, self.down[...]))  # (B, T, D)


class Block(nnx.Module):
    """One layer: attention and MLP, each between two norms, each added to the residual stream."""

    def __init__(self, config: Gemma2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn_in_norm = Norm(config, dtype, rngs)
        self.attn = Attention(config, dtype, rngs)
        self.attn_out_norm = Norm(config, dtype, rngs)
        self.mlp_in_norm = Norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs)
        self.mlp_out_norm = Norm(config, dtype, rngs)

    def __call__(self, x, positions, visible, past, tap):
        """(B, T, D) to (B, T, D); ``past`` as in :class:`Attention`."""
        x = tap("resid_pre", x)  # (B, T, D), as every x and h below
        h = tap("attn_in", self.attn_in_norm(x, tap, "attn_in_scale"))
        h, past = self.attn(h, positions, visible, past, tap)
        h = tap("attn_out", self.attn_out_norm(h, tap, "attn_out_scale"))
        x = tap("resid_mid", x + h)
        h = tap("mlp_in", self.mlp_in_norm(x, tap, "mlp_in_scale", normed="mlp_in_normed"))

        def feed_forward():
            return self.mlp_out_norm(self.mlp(h, tap), tap, "mlp_out_scale")

        # A transcoder in place of the MLP: the MLP is not computed.
        out = tap("mlp_out", tap.unless_replaced("mlp_out", feed_forward, after="mlp_in"))
        return tap("resid_post", x + out), past


class Embedder(nnx.Module):
    """The tied embedding: tokens in, logits out."""

    def __init__(self, config: Gemma2Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.weight = declare(rngs, (V, D), ("vocab", "embed"), normal(D), dtype)
        self.cap = config.final_logit_softcapping

    @jax.named_scope("embed")
    def encode(self, tokens: jax.Array) -> jax.Array:
        """(B, T) ids to (B, T, D), times sqrt(D) rounded to the weights' dtype.

        An id outside the vocabulary gives NaN rather than some other token's row.
        """
        V, D = self.weight.shape
        known = jnp.where(tokens < 0, V, tokens)  # negative ids would count from the end
        rows = jnp.take(self.weight[...], known, axis=0, mode="fill", fill_value=jnp.nan)
        return rows * jnp.asarray(D**0.5, rows.dtype)

    @jax.named_scope("unembed")
    def decode(self, x: jax.Array, tap: Tap) -> jax.Array:
        """(B, T, D) to softcapped logits, (B, T, V) float32."""
        logits = einsum("btd,vd->btv", x, self.weight[...], preferred_element_type=jnp.float32)
        return tap("logits", softcap(tap("logits_uncapped", logits), self.cap))


class Gemma2(nnx.Module):
    """The Gemma-2 language model (arXiv 2408.00118) with a tap at every site.

    Args:
        config: sizes and constants.
        dtype: of the weights, hence of the activations (norms, softmax and logits are float32).
        rngs: for the random initial weights.
    """

    def __init__(self, config: Gemma2Config, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedder(config, dtype, rngs)
        layers = config.num_hidden_layers
        self.layers = nnx.List([Block(config, dtype, rngs) for _ in range(layers)])
        self.final_norm = Norm(config, dtype, rngs)

    @classmethod
    def abstract(cls, config: Gemma2Config, dtype: jnp.dtype = jnp.float32) -> "Gemma2":
        """The same model with shapes in place of arrays; nothing is allocated."""
        return nnx.eval_shape(lambda: cls(config, dtype=dtype, rngs=nnx.Rngs(0)))

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights."""
        return self.embed.weight.dtype

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        tap: Tap | None = None,
        depth: int | None = None,
        logits_at: jax.Array | None = None,
        resume: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array | None, Cache | None]:
        """One pass, not jitted: ``jaxtc.run`` and ``jaxtc.generate`` are its compiled forms.

        Args:
            tokens: (B, T) int32, padded on the right.
            positions: (B, T) int32, each token's position in its own text; 0, 1, ... by default.
            segments: (B, T) int32, for texts packed in a row: tokens attend to their own segment.
            cache: keys and values of earlier tokens; also makes this pass return its own.
            tap: captures and edits.
            depth: stop after this many layers, without logits.
            logits_at: (B,) int32, the only token of each row whose logits are wanted.
            resume: (layer, (L, B, T, D) inputs of the blocks): begin there; earlier blocks are not
                run and their sites cannot be captured. The layer is traced.

        Returns:
            (logits, cache). Logits are (B, T, V) float32, (B, 1, V) with ``logits_at``, None with
            ``depth``; the cache is None when none was given.
        """
        config, tap = self.config, tap or Tap()
        tokens, positions, segments, logits_at = owned(
            plain((tokens, positions, segments, logits_at))
        )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        visible = masks(config, positions, segments, cache)
        x = tap("embed", self.embed.encode(tokens))
        pasts = []
        for layer, block in enumerate(self.layers[:depth]):
            past = cache[layer] if cache else None
            seen = visible[config.layer_types[layer]]
            if resume is not None:
                x = resumed(layer, *resume, x, block, positions, seen, None, tap.at(layer))
                continue
            with jax.named_scope(f"layers.{layer}"):
                x, past = block(x, positions, seen, past, tap.at(layer))
            pasts.append(past)
        cache = pasts if cache else None
        if depth is not None:
            return None, cache
        x = tap("final_norm", self.final_norm(x, tap, "final_scale"))
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        return self.embed.decode(x, tap), cache


def resumed(layer: int, start: jax.Array, entering: jax.Array, x: jax.Array, block, *context):
    """``x`` after this block, run from layer ``start`` on, whose input is ``entering[start]``."""
    x = jnp.where(start == layer, entering[layer], x)
    return jax.lax.cond(start <= layer, lambda x: block(x, *context)[0], lambda x: x, x)


def masks(config, positions, segments, cache) -> dict[str, jax.Array]:
    """Which keys each query sees, (B, T, S) booleans, for each of the two layer types.

    By position: key j is visible to query i when ``0 <= i - j``, and ``i - j < window`` in layers
    that slide. With a cache, slot j holds position j, and slots not written yet lie ahead of i.
    """
    keys = positions[:, None, :]
    if cache is not None:
        keys = jnp.arange(cache[0][0].shape[1])[None, None, :]
    back = positions[:, :, None] - keys
    full = back >= 0
    if segments is not None:
        full &= segments[:, :, None] == segments[:, None, :]
    return {FULL: full, SLIDING: full & (back < config.sliding_window)}


def write(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """``slots`` (B, S, K, H) with ``new`` (B, T, K, H) put at each row's first position."""
    place = jax.vmap(lambda s, n, p: jax.lax.dynamic_update_slice_in_dim(s, n, p, axis=0))
    return place(slots, new.astype(slots.dtype), positions[:, 0])
