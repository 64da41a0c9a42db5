"""The half of a transcoder that reads: from activations to sparse features.

Axis letters: ... leading axes (usually B T), D hidden, M features, K of them asked for, C capacity
of the sparse path.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtc.errors import CapacityError, JaxtcError
from jaxtc.helpers import explicit_transfers, is_whole, plain_number, pytree, ranked
from jaxtc.interchange import owned, plain
from jaxtc.model.parameters import zeros
from jaxtc.sharding.mesh import mesh_of, put
from jaxtc.sharding.placement import Placement, placement_of, top_k
from jaxtc.sharding.processes import whole
from jaxtc.tap.sites import parse
from jaxtc.transcoders.activations import Activation, activation_of, feature_axes, parameter_names


@pytree
@dataclasses.dataclass(frozen=True)
class SparseFeatures:
    """The active features of each token.

    Attributes:
        values: (..., C) float, largest first; 0 where a token has fewer than C active features.
        ids: (..., C) int32, the feature of each value.
        count: (...) int32, how many features are active. Where it exceeds C (possible only under
            ``jit``: outside, that raises), ``values`` are NaN for that token.
    """

    values: jax.Array
    ids: jax.Array
    count: jax.Array


# Compiled, as sharded arrays outside a trace need a program.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _sparse(a: jax.Array, capacity: int, placement: Placement | None) -> SparseFeatures:
    """Of dense activations (..., M)."""
    values, ids = top_k(a, capacity, placement, feature_axes(a.ndim))
    count = (a != 0).sum(-1, dtype=jnp.int32)
    values = jnp.where((count > capacity)[..., None], jnp.nan, values)
    return SparseFeatures(values, ids, count)


class Encoder(nnx.Module):
    """``a = activation(x W_enc + b_enc)``, (..., D) to (..., M) (arXiv 2408.05147, §2-3).

    What is made of the features is the subclass's.

    Attributes:
        W_enc: (D, M), b_enc: (M,).
        activation: static; JumpReLU unless another is named, see
            :mod:`jaxtc.transcoders.activations`.
        threshold: (M,) of JumpReLU; None for an activation without one, as are the parameters of
            every other activation.
        W_skip: (D, D), [out, in], or None.
        layer: of the model, from 0, or None when unknown (static).
        input_site, output_site: what is read, and what is imitated (static).
        source: where it was loaded from, for messages and links (static).
    """

    W_enc: nnx.Param
    b_enc: nnx.Param
    activation: Activation
    W_skip: nnx.Param | None
    layer: int | None
    input_site: str
    output_site: str
    source: str

    def _declare_place(
        self, layer: int | None, source: str, input_site: str, output_site: str
    ) -> None:
        """Where it belongs. Raises JaxtcError for what is no layer."""
        layer = plain_number(layer)
        if layer is not None and not is_whole(layer):
            raise JaxtcError(f"layer is {layer!r}, expected a whole number from 0, or None.")
        self.layer, self.source = None if layer is None else int(layer), source
        self.input_site, self.output_site = parse(input_site)[0], parse(output_site)[0]

    def __setattr__(self, name: str, value: Any) -> None:
        parameter = isinstance(vars(self).get(name), nnx.Variable)
        if parameter and value is not None and not isinstance(value, nnx.Variable):
            raise JaxtcError(
                f"{name} is a parameter: write into it, transcoder.{name}[...] = new, in place of "
                f"replacing it by {type(value).__name__}."
            )
        super().__setattr__(name, value)

    def _declare_activation(
        self,
        activation: str | Activation | Mapping[str, Any],
        features: int,
        param: Callable[..., nnx.Param],
    ) -> None:
        """The activation and its parameters; ``param`` is :func:`declare` but for the shape."""
        self.activation = activation_of(activation)
        self.activation.check(features)
        for name in parameter_names():
            axes = self.activation.parameters.get(name)
            made = None if axes is None else param((features,) * len(axes), axes, zeros)
            setattr(self, name, made)

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def features(self) -> int:
        """M, how many features it has."""
        return self.W_enc.shape[1]

    @explicit_transfers
    def pre_activations(self, x: jax.Array) -> jax.Array:
        """``x W_enc + b_enc``: (..., D) to (..., M), in the transcoder's dtype."""
        z = jnp.matmul(self._encoded(x), self.W_enc[...], precision="highest")
        return z + ranked(self.b_enc[...], z)

    @explicit_transfers
    def encode(self, x: jax.Array, *, placement: Placement | None = None) -> jax.Array:
        """Feature activations: (..., D) to (..., M), 0 where a feature is not active.

        Only activations that compare features use ``placement``, see :meth:`encode_sparse`.

        Raises:
            JaxtcError: the last axis of ``x`` is not D.
        """
        z = self.pre_activations(x)
        own = {name: ranked(one, z) for name, one in self._thresholds().items()}
        return self.activation(z, own, self._placement() or placement)

    def _thresholds(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...] for name in self.activation.parameters}

    @explicit_transfers
    def encode_features(
        self, x: jax.Array, ids: jax.Array, *, placement: Placement | None = None
    ) -> jax.Array:
        """``encode(x)[..., ids]``: (..., D) to (..., K), NaN for a feature that does not exist.

        Where the activation allows it, only their pre-activations are computed.
        """
        if not self.activation.per_feature:
            return self._pick(self.encode(x, placement=placement), ids, -1)
        z = jnp.matmul(self._encoded(x), self._pick(self.W_enc[...], ids, 1), precision="highest")
        own = self._thresholds().items()
        own = {name: ranked(self._pick(one, ids, 0) if one.ndim else one, z) for name, one in own}
        bias = ranked(self._pick(self.b_enc[...], ids, 0), z)
        return self.activation(z + bias, own, placement)

    def _pick(self, array: jax.Array, ids: jax.Array, axis: int) -> jax.Array:
        ids = jnp.where(ids < 0, self.features, ids)
        return jnp.take(array, ids, axis=axis, mode="fill", fill_value=jnp.nan)

    @explicit_transfers
    def encode_sparse(
        self, x: jax.Array, capacity: int, *, placement: Placement | None = None
    ) -> SparseFeatures:
        """The active features of ``x`` (..., D), largest first; the dense (..., M) is not kept.

        Args:
            capacity: C, room for active features of one token, at most M.
            placement: of the features (``placement_of(transcoder)``), for use under ``jit``, where
                arrays do not show it; each device then searches its own features first.

        Raises:
            CapacityError: a token has more than C active features. Under ``jit`` nothing can be
                raised: that token's values are NaN, and ``count`` exceeds C.
        """
        if not is_whole(capacity, 1) or capacity > self.features:
            raise CapacityError(
                f"capacity is {capacity!r}, expected 1 to {self.features} (this transcoder's M)."
            )
        a = self.encode(x, placement=placement)
        found = _sparse(a, capacity, self._placement() or placement)
        if not isinstance(found.count, jax.core.Tracer):
            counts = whole(found.count)
            most = int(np.max(counts, initial=0))
            if most > capacity:
                at = ", ".join(map(str, np.argwhere(counts == most)[0]))
                raise CapacityError(
                    f"A token (at [{at}] of those given) has {most} active features, but capacity "
                    f"is {capacity}: dropping any would give a wrong reconstruction. Ask for "
                    f"capacity={most} or more; or, if that is padding, give tokens only, x[mask]."
                )
        return found

    def _input(self, x: jax.Array) -> jax.Array:
        """``x`` in the transcoder's dtype, its width checked."""
        x = owned(plain(x))
        if x.shape[-1:] != (self.d_in,):
            remedy = "it belongs to another model or another site"
            if x.ndim > 1 and x.shape[-2] * x.shape[-1] == self.d_in:
                remedy = "join the heads first: x.reshape(*x.shape[:-2], -1)"
            raise JaxtcError(
                f"This transcoder reads arrays whose last axis is D={self.d_in}, got "
                f"{tuple(x.shape)}; {remedy}."
            )
        weight = self.W_enc[...]
        mesh = mesh_of(weight)
        if mesh is not None and not isinstance(x, jax.core.Tracer) and mesh_of(x) is None:
            x = put(x, NamedSharding(mesh, PartitionSpec()))
        return jnp.asarray(x).astype(weight.dtype)

    def _encoded(self, x: jax.Array) -> jax.Array:
        """What is multiplied with ``W_enc``, of ``x``."""
        return self._input(x)

    def _skipped(self, y: jax.Array, x: jax.Array | None) -> jax.Array:
        """``y + x W_skipᵀ`` where there is a skip connection, else ``y``."""
        if self.W_skip is None:
            return y
        if x is None:
            raise JaxtcError(
                "This transcoder has a skip connection, so its output is not a function of the "
                "features alone: give what it read too, decode(a, x)."
            )
        skip = jnp.einsum("...i,oi->...o", self._input(x), self.W_skip[...], precision="highest")
        return y + skip

    def _placement(self) -> Placement | None:
        """:func:`placement_of`, quick on a single device."""
        return None if mesh_of(self.W_enc[...]) is None else placement_of(self)

    @classmethod
    def abstract(cls, *args, **kwargs) -> Self:
        """The same with shapes in place of arrays; nothing is allocated."""
        return nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0), **kwargs))
