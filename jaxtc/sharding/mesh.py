"""Meshes of devices, and modules and arrays laid out on them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxtc.errors import did_you_mean
from jaxtc.helpers import explicit_transfers, is_whole
from jaxtc.sharding.rules import DATA, MODEL, RULES, Rules, ShardingError, shardings

Module = TypeVar("Module", bound=nnx.Module)

# What :func:`make_mesh` takes.
MeshLike: TypeAlias = Mesh | Mapping[str, int] | str


def mesh_sizes(mesh: MeshLike) -> dict[str, int]:
    """The axes of a mesh, and how many devices lie along each.

    Raises:
        ShardingError: neither a mesh, nor sizes by name, nor ``"data=2,model=4"``; an unknown axis,
            one named twice, or no devices along one.
    """
    known, expected = (DATA, MODEL), "expected sizes such as 'data=2,model=4' or 'model=8'"
    sizes: dict[str, Any] = {}
    if isinstance(mesh, str):
        for part in mesh.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*[=:]\s*(-?\d{1,9})\s*", part, re.ASCII)
            if match is None:
                raise ShardingError(f"The mesh {mesh!r} has {part.strip()!r} in it, {expected}.")
            axis, size = match.groups()
            if axis in sizes:
                raise ShardingError(f"The mesh {mesh!r} names the axis {axis!r} twice, {expected}.")
            sizes[axis] = int(size)
    else:
        sizes |= mesh.shape if isinstance(mesh, Mesh) else mesh if isinstance(mesh, Mapping) else {}
    if not sizes:
        raise ShardingError(f"A mesh is {mesh!r}, {expected}.")
    for axis, size in sizes.items():
        if axis not in known:
            raise ShardingError(
                f"A mesh has the axes 'data' (rows of the batch) and 'model' (heads, neurons, "
                f"vocabulary, features), not {axis!r}.{did_you_mean(str(axis), known)}"
            )
        if not is_whole(size, 1):
            raise ShardingError(
                f"{size!r} devices along the mesh axis {axis!r}: expected an integer of at least 1."
            )
    return {axis: int(size) for axis, size in sizes.items()}


def make_mesh(sizes: MeshLike, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of devices whose programs are partitioned by the compiler (axes of type Auto).

    Args:
        sizes: ``"data=2,model=4"`` or ``{"data": 2, "model": 4}``; a mesh is given back as it is.
        devices: all devices of all processes by default; if there are more than the mesh takes,
            the first ones are used.

    Raises:
        ShardingError: invalid sizes, more than there are devices, or no device of this process.
    """
    if isinstance(sizes, Mesh):
        return sizes
    sizes = mesh_sizes(sizes)
    devices = jax.devices() if devices is None else list(devices)
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ShardingError(
            f"A mesh of {show(sizes)} takes {count} devices, and there are {len(devices)}. Make "
            "it smaller; or, to try it on a CPU, have more of them before jax starts: "
            f"jax.config.update('jax_num_cpu_devices', {count})."
        )
    chosen = devices[:count]
    if jax.process_index() not in {device.process_index for device in chosen}:
        raise ShardingError(
            f"A mesh of {show(sizes)} takes the first {count} of {len(devices)} devices, none of "
            f"them of process {jax.process_index()}. Every process needs a part: use all devices."
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=chosen)


def show(mesh: Mesh | Mapping[str, int]) -> str:
    """``data=2,model=4``."""
    sizes = mesh.shape if isinstance(mesh, Mesh) else mesh
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


@explicit_transfers
def shard(module: Module, mesh: MeshLike, rules: Rules = RULES) -> Module:
    """A copy on a mesh of a model or transcoder that is in memory.

    :func:`jaxtc.load_model` and :func:`jaxtc.load_transcoder` take ``mesh=`` themselves and never
    hold more than each device's share.

    Args:
        module: a :class:`jaxtc.Gemma2` or :class:`jaxtc.Transcoder`.
        mesh: see :func:`make_mesh`.
        rules: see :data:`RULES`.

    Raises:
        ShardingError: as :func:`make_mesh` and :func:`partition`.
    """
    mesh = make_mesh(mesh)
    leaves, structure = jax.tree.flatten(module)
    places = shardings(module, mesh, rules)
    return jax.tree.unflatten(structure, [put(x, at) for x, at in zip(leaves, places, strict=True)])


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """``x`` so sharded. In many processes each has the same ``x`` or its part of a global one."""
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if isinstance(x, np.ndarray):
        x = x.copy()  # jax may read it in place, and callers may write to it
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(_same, out_shardings=sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _same(x: jax.Array) -> jax.Array:
    return x


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of the first array of a pytree that lies on one."""
    for leaf in jax.tree.leaves(tree):
        known = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if known and isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh
    return None
