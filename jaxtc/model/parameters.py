"""How a parameter is declared: shape, dtype, logical axes and initialiser in one call.

The loader, the sharding rules and ``eval_shape`` all read this declaration; nothing repeats it.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

Init: TypeAlias = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def declare(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: Init, dtype: jnp.dtype
) -> nnx.Param:
    """One parameter; ``axes`` name its axes in the sharding rules, as ``param.logical_axes``."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes)


def normal(fan_in: int) -> Init:
    """Gaussian with standard deviation ``fan_in ** -0.5``."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    return init


# Norm gains (stored as ``w`` of ``1 + w``) and biases.
zeros: Init = jax.nn.initializers.zeros
# Over the first axis (He et al. 2015), as Gemma Scope's decoders start.
he_uniform: Init = jax.nn.initializers.he_uniform()
