"""Gemma-2 done wrong: each mistake, where it shows, and the first site that it moves."""

import dataclasses

import jax
import jax.numpy as jnp

import jaxtc
from jaxtc.model.gemma2 import Embedder, Norm
from jaxtc.programs.leaves import parameters, rebuild


def changed(**changes):
    """A loader of our model with other constants than the folder's config says."""

    def load(folder, dtype):
        model = jaxtc.load_model(folder, dtype=dtype)
        types = changes.get("layer_types")
        new = changes | ({"layer_types": types(model.config)} if types else {})
        return rebuild(dataclasses.replace(model.config, **new), parameters(model))

    return load


def swapped(config):
    kinds = config.layer_types
    return tuple(next(other for other in kinds if other != kind) for kind in kinds)


# What is wrong with ours: constants, the shape that shows it, and the first address it moves.
CONSTANTS = {
    "layer types swapped": ({"layer_types": swapped}, "2b", "layers.0.attn_scores"),
    "attention softcap": ({"attn_logit_softcapping": 51.0}, "2b", "layers.0.attn_scores"),
    "final softcap": ({"final_logit_softcapping": 31.0}, "9b", "logits"),
    "query scale from head_dim": ({"query_pre_attn_scalar": 8}, "27b", "layers.0.attn_scores"),
    "window": ({"sliding_window": 8}, "9b", "layers.0.attn_scores"),
    "rope base": ({"rope_theta": 10100.0}, "2b", "layers.0.q"),
    "norm eps": ({"rms_norm_eps": 1e-5}, "2b", "layers.0.attn_in_scale"),
}


def cast_before_the_gain(self, x, tap, scale, normed=None):
    wide = x.astype(jnp.float32)
    rate = tap(scale, jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps))
    wide = wide * rate
    if normed is not None:
        wide = tap(normed, wide)
    return wide.astype(x.dtype) * (1 + self.weight[...])


def unrounded_scale(self, tokens):
    rows = self.weight[...][tokens]
    return (rows.astype(jnp.float32) * self.weight.shape[1] ** 0.5).astype(rows.dtype)


def scaled_twice(self, tokens):
    rows = self.weight[...][tokens]
    return rows * jnp.asarray(self.weight.shape[1], rows.dtype)


# The dtype in which it shows; float32 hides the first two.
CODE = {
    "norm cast order": (Norm, "__call__", cast_before_the_gain, "bfloat16", "layers.0.attn_in"),
    "embedding scale not rounded": (Embedder, "encode", unrounded_scale, "bfloat16", "embed"),
    "embedding scaled twice": (Embedder, "encode", scaled_twice, "float32", "embed"),
}
