"""What a compiled program knows about the mesh of its model.

Programs take a :class:`Placement` as a static argument, None on a single device; there is no
ambient mesh. Axis letters: ... leading axes, C entries kept, D hidden, M features.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtc.sharding.mesh import mesh_of, put, show
from jaxtc.sharding.rules import DATA, RULES, Rules, ShardingError, logical, partition, variables

FREE = PartitionSpec.UNCONSTRAINED


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules by which arrays lie on it. Hashable: part of compile keys."""

    mesh: Mesh
    rules: tuple[tuple[str, str | None], ...]  # (logical axis, mesh axis), sorted

    @classmethod
    def of(cls, mesh: Mesh, rules: Rules = RULES) -> "Placement":
        """With rules as users give them."""
        return cls(mesh, tuple(sorted({**RULES, **rules}.items())))

    def but(self, **rules: str | None) -> "Placement":
        """The same with some rules changed."""
        return Placement.of(self.mesh, dict(self.rules) | rules)

    def __str__(self):
        own = [f"{axis}: {to}" for axis, to in self.rules if RULES[axis] != to]
        return show(self.mesh) + (f" ({', '.join(own)})" if own else "")

    @property
    def rows(self) -> int:
        """How many devices lie along the axis ``data``."""
        return self.mesh.shape.get(DATA, 1)

    def sharding(self, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
        """Of an array with these logical axes."""
        spec = partition(axes, shape, self.mesh.shape, dict(self.rules))
        return NamedSharding(self.mesh, spec)

    @property
    def whole(self) -> NamedSharding:
        """Replicated."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, axes: Sequence[str]) -> jax.Array:
        """Inside a program: ``x``, sharded by its logical axes."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def site(self, x: jax.Array, letters: str) -> jax.Array:
        """:meth:`constrain` for a site with these axis letters, ``"B T N H"``."""
        return self.constrain(x, logical(letters))

    def put_rows(self, x: Any) -> Any:
        """(B, ...) on the mesh, its rows sharded if they divide; traced arrays stay."""
        if isinstance(x, jax.core.Tracer):
            return x
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        return put(x, self.sharding(("batch", *["tokens"] * (x.ndim - 1)), x.shape))

    def put_whole(self, tree: Any) -> Any:
        """Edits or reducers on the mesh: their arrays replicated, modules in them as they are.

        Always replicated, so that a program is the same wherever a value comes from.

        Raises:
            ShardingError: a module that lies elsewhere.
        """

        def one(leaf: Any) -> Any:
            if isinstance(leaf, nnx.Module):
                return self._checked(leaf)
            array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
            traced = isinstance(leaf, jax.core.Tracer)
            return put(leaf, self.whole) if array and not traced else leaf

        return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Module))

    def _checked(self, module: nnx.Module) -> nnx.Module:
        arrays = jax.tree.leaves(module)
        traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
        if traced or mesh_of(arrays) == self.mesh:
            return module
        kind = type(module).__name__
        raise ShardingError(
            f"The model lies on a mesh of {show(self.mesh)} and this {kind.lower()} does not: put "
            f"it there once, jaxtc.shard({kind.lower()}, mesh), or load it with mesh=mesh."
        )

    def parts(self, axis: str, size: int) -> int:
        """How many shards an axis of this length has."""
        spec = self.sharding((axis,), (size,)).spec
        return self.mesh.shape[spec[0]] if len(spec) else 1

    def split(self, x: jax.Array, at: int, axis: str) -> jax.Array:
        """``x``, sharded along ``at``, which has an entry for each shard of a logical axis."""
        spec = [FREE] * x.ndim
        spec[at] = dict(self.rules)[axis]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))


def placement_of(module: nnx.Module) -> Placement | None:
    """Where a model or transcoder lies; None on a single device, and inside a trace.

    The rules are read off the shardings of its parameters.
    """
    mesh, rules = None, {}
    for _, param in variables(module):
        array = param[...]
        traced = isinstance(array, jax.core.Tracer)
        if traced or not isinstance(array.sharding, NamedSharding):
            return None
        mesh = array.sharding.mesh
        spec = (*array.sharding.spec, *[None] * array.ndim)[: array.ndim]
        for axis, target in zip(param.logical_axes, spec, strict=True):
            # Along one device nothing is divided, whatever the rule is.
            rules[axis] = target if mesh.shape.get(RULES[axis], 2) > 1 else RULES[axis]
    return None if mesh is None else Placement.of(mesh, rules)


def top_k(
    x: jax.Array, k: int, placement: Placement | None, axes: Sequence[str]
) -> tuple[jax.Array, jax.Array]:
    """``jax.lax.top_k``, each device among its own entries first: (..., M) to (..., k) twice.

    The same values and ids in the same order: in both steps the first of equal values comes first,
    and the parts are in the order of the axis. Only k entries of each part are sent. ``axes`` are
    the logical axes of ``x``.
    """
    if placement is None:
        return jax.lax.top_k(x, k)
    spec = (*placement.sharding(axes, x.shape).spec, *[None] * x.ndim)[: x.ndim]
    last = spec[-1]

    def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(x, min(k, x.shape[-1]))
        if last is None:
            return values, ids
        ids = ids + jax.lax.axis_index(last).astype(ids.dtype) * x.shape[-1]
        values, ids = jax.lax.all_gather((values, ids), last, axis=x.ndim - 1, tiled=True)
        values, places = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, places, axis=-1)

    # By hand: the compiler would gather all of `x` first. It cannot see either that the results
    # are the same along `last`.
    kept = PartitionSpec(*spec[:-1], None)
    by_hand = jax.shard_map(
        local, mesh=placement.mesh, in_specs=PartitionSpec(*spec), out_specs=(kept, kept),
        check_vma=False,
    )  # fmt: skip
    return by_hand(x)


def mix_rows(
    values: jax.Array, ids: jax.Array, rows: jax.Array, placement: Placement | None, axis: str
) -> jax.Array:
    """Σ over C of ``values`` (..., C) times the rows that ``ids`` (..., C) name, to (..., D).

    Each device mixes the rows that it holds, and the sums are added: no row is sent anywhere.
    ``axis`` is the logical name of the first axis of ``rows`` (M, D), which lie at ``placement``.
    """
    parts = placement.parts(axis, len(rows)) if placement else 1
    if parts == 1:
        taken = jnp.take(rows, ids, axis=0)
        return jnp.einsum("...c,...cd->...d", values, taken, precision="highest")
    each = len(rows) // parts
    grouped = placement.split(rows.reshape(parts, each, -1), 0, axis)
    starts = each * jnp.arange(parts).reshape(-1, *[1] * ids.ndim)
    local = placement.split(ids[None] - starts, 0, axis)
    held = jnp.where((local >= 0) & (local < each), values[None], 0)
    taken = jax.vmap(lambda part, at: jnp.take(part, at, axis=0, mode="clip"))(grouped, local)
    mixed = jnp.einsum("p...c,p...cd->p...d", held, taken, precision="highest")
    return placement.split(mixed, 0, axis).sum(0)
