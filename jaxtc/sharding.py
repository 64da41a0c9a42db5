"""One table from logical axes to mesh axes: where parameters, caches and activations lie.

A mesh has the axes ``data`` (rows of a batch, variants of a sweep) and ``model`` (heads, neurons,
tokens of the vocabulary, transcoder features). Axis letters: B batch, T and S tokens, D hidden, N
heads, K kv heads, H head dim, F MLP width, V vocabulary, M transcoder features.
"""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtc.counts import is_whole
from jaxtc.errors import JaxtcError, did_you_mean, some

Module = TypeVar("Module", bound=nnx.Module)
Rules: TypeAlias = Mapping[str, str | None]
# What :func:`make_mesh` takes.
MeshLike: TypeAlias = Mesh | Mapping[str, int] | str

DATA, MODEL = "data", "model"

# Logical axis -> mesh axis, None for an axis that every device holds whole.
RULES: Rules = MappingProxyType({
    "batch": DATA,
    "vocab": MODEL, "heads": MODEL, "kv_heads": MODEL, "mlp": MODEL, "features": MODEL,
    "embed": None, "head_dim": None, "tokens": None, "slots": None,
})  # fmt: skip

# What the axis letters of sites and docstrings are in the rules.
LETTERS: Mapping[str, str] = MappingProxyType({
    "B": "batch", "T": "tokens", "S": "slots", "D": "embed", "N": "heads", "K": "kv_heads",
    "H": "head_dim", "F": "mlp", "V": "vocab", "M": "features",
})  # fmt: skip


def logical(letters: str) -> tuple[str, ...]:
    """The logical axes of a site with these axis letters, ``"B T N H"``."""
    # An axis of length 1 is nothing to divide.
    return tuple(LETTERS.get(letter, "tokens") for letter in letters.split())


# Logical axes of a layer's keys and values in the cache, (B, S, K, H).
CACHE = ("batch", "slots", "kv_heads", "head_dim")


class ShardingError(JaxtcError):
    """A mesh that is none, or arrays that cannot be divided over it."""


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of a mesh, ``"data=2,model=4"``, and how many devices lie along each.

    Raises:
        ShardingError: not of this form, an unknown axis, one named twice, or no devices along one.
    """
    expected = "expected sizes such as 'data=2,model=4' or 'model=8'"
    if not isinstance(text, str):
        raise ShardingError(f"A mesh is {text!r}, {expected}.")
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*[=:]\s*(-?\d{1,9})\s*", part, re.ASCII)
        if match is None:
            raise ShardingError(f"The mesh {text!r} has {part.strip()!r} in it, {expected}.")
        if match[1] in sizes:
            raise ShardingError(f"The mesh {text!r} names the axis {match[1]!r} twice, {expected}.")
        sizes[match[1]] = int(match[2])
    return _checked(sizes)


def _checked(sizes: Mapping[str, int]) -> dict[str, int]:
    """``sizes`` when they are those of a mesh."""
    known = (DATA, MODEL)
    if not sizes:
        raise ShardingError("A mesh needs at least one axis, such as {'model': 4}.")
    for axis, size in sizes.items():
        if axis not in known:
            raise ShardingError(
                f"A mesh has the axes 'data' (rows of the batch) and 'model' (heads, neurons, "
                f"vocabulary, features), not {axis!r}.{did_you_mean(str(axis), known)}"
            )
        if not is_whole(size, 1):
            raise ShardingError(
                f"{size!r} devices along the mesh axis {axis!r}: expected a whole number of at "
                "least 1."
            )
    return {axis: int(size) for axis, size in sizes.items()}


def make_mesh(sizes: MeshLike, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of devices whose programs are partitioned by the compiler (axes of type Auto).

    Args:
        sizes: ``"data=2,model=4"`` or ``{"data": 2, "model": 4}``; a mesh is given back as it is.
        devices: all devices of all processes by default; if there are more than the mesh takes,
            the first ones are used.

    Raises:
        ShardingError: sizes that are none, or more than there are devices; a mesh without devices
            of this process.
    """
    if isinstance(sizes, Mesh):
        return sizes
    sizes = _checked(sizes) if isinstance(sizes, Mapping) else parse_mesh(sizes)
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
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        devices=chosen,
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def show(mesh: Mesh | Mapping[str, int]) -> str:
    """``data=2,model=4``."""
    sizes = mesh.shape if isinstance(mesh, Mesh) else mesh
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def partition(
    axes: Sequence[str],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    rules: Rules = RULES,
    name: str = "",
) -> PartitionSpec:
    """How an array of these logical axes lies on a mesh; from sizes alone, no devices are needed.

    Two axes that do not divide are held whole in place of refused: rows of a batch, and key/value
    heads that are fewer than the devices and divide them (2, 4 or 8 devices for 2 heads).

    Args:
        axes: a logical name for each axis of the array.
        shape: of the array.
        sizes: of the mesh, devices along each of its axes.
        rules: logical axis -> mesh axis.
        name: of the array, for messages.

    Raises:
        ShardingError: an axis that cannot be divided, two axes over one axis of the mesh, or rules
            with names that are no logical axes.
    """
    unknown = sorted(set(rules) - set(RULES))
    if unknown:
        raise ShardingError(
            f"There is no logical axis {unknown[0]!r} to give a rule for."
            f"{did_you_mean(unknown[0], RULES)} There are {some(list(RULES), 20)}."
        )
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        target = rules.get(axis)
        count = sizes.get(target, 1) if target is not None else 1
        if size % count and (axis == "batch" or (axis == "kv_heads" and count % size == 0)):
            count = 1
        if size % count:
            raise _uneven(name, axis, size, target, count)
        if count > 1 and target in spec:
            other = axes[spec.index(target)]
            raise ShardingError(
                f"The rules put both {other!r} and {axis!r} of {name or 'an array'} on the mesh "
                f"axis {target!r}; one must be None: rules=RULES | {{{axis!r}: None}}."
            )
        spec.append(target if count > 1 else None)
    # Trailing Nones say nothing, and jax compiles again for a spec that is written otherwise.
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _uneven(name: str, axis: str, size: int, target: str, count: int) -> ShardingError:
    low = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    fit = sorted({*low, *(size // n for n in low)})
    if axis == "kv_heads":
        fit += [size * n for n in range(2, 9)]
    near = sorted(fit, key=lambda n: abs(math.log(n / count)))[:6]
    return ShardingError(
        f"{name or 'An array'} has {axis} = {size}, which does not divide over the {count} devices "
        f"of the mesh axis {target!r}. Choose {target}={' or '.join(map(str, sorted(near)))}, or "
        f"hold this axis whole on each device: rules=jaxtc.sharding.RULES | {{{axis!r}: None}}."
    )


def shardings(module: nnx.Module, mesh: Mesh, rules: Rules = RULES) -> list[NamedSharding]:
    """Of each parameter of a module (possibly an abstract one), in the order of its leaves.

    Raises:
        ShardingError: as :func:`partition`.
    """
    found = []
    for path, param in variables(module):
        spec = partition(param.logical_axes, param.shape, mesh.shape, rules, path)
        found.append(NamedSharding(mesh, spec))
    return found


def variables(module: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """(name, parameter) of a module, in the order of its leaves: ``layers.3.attn.q``."""
    flat = jax.tree_util.tree_flatten_with_path(
        module, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )[0]
    return [(jax.tree_util.keystr(p, simple=True, separator="."), leaf) for p, leaf in flat]


def shard(module: Module, mesh: MeshLike, rules: Rules = RULES) -> Module:
    """A model or transcoder that is in memory, on a mesh; the one given stays as it is.

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
    """``x`` laid out so. In many processes each has the same ``x`` or its part of a global one."""
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
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
    """The mesh that the arrays of a pytree lie on: that of the first one that lies on any."""
    for leaf in [tree] if isinstance(tree, jax.Array) else jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            found = leaf.sharding
            if isinstance(found, NamedSharding):
                return found.mesh
    return None
