"""One table from logical axes to mesh axes: how parameters, caches and activations are sharded.

A mesh has the axes ``data`` (rows of a batch, variants of a sweep) and ``model`` (heads, neurons,
tokens of the vocabulary, transcoder features). Axis letters: B batch, T and S tokens, D hidden, N
heads, K kv heads, H head dim, F MLP width, V vocabulary, M transcoder features.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtc.errors import JaxtcError, did_you_mean, some

Rules: TypeAlias = Mapping[str, str | None]

DATA, MODEL = "data", "model"

# Logical axis -> mesh axis, None for an axis that is replicated.
RULES: Rules = MappingProxyType({
    "batch": DATA,
    "vocab": MODEL, "heads": MODEL, "kv_heads": MODEL, "mlp": MODEL, "features": MODEL,
    "embed": None, "head_dim": None, "tokens": None, "slots": None, "layers": None,
})  # fmt: skip

# What the axis letters of sites and docstrings are in the rules.
LETTERS: Mapping[str, str] = MappingProxyType({
    "B": "batch", "T": "tokens", "S": "slots", "D": "embed", "N": "heads", "K": "kv_heads",
    "H": "head_dim", "F": "mlp", "V": "vocab", "M": "features", "L": "layers",
})  # fmt: skip


def logical(letters: str) -> tuple[str, ...]:
    """The logical axes of a site with these axis letters, ``"B T N H"``."""
    # An axis of length 1 has no letter and is never sharded.
    return tuple(LETTERS.get(letter, "tokens") for letter in letters.split())


# Logical axes of a layer's keys and values in the cache, (B, S, K, H).
CACHE = ("batch", "slots", "kv_heads", "head_dim")


class ShardingError(JaxtcError):
    """An invalid mesh, or arrays that do not divide over it."""


def partition(
    axes: Sequence[str],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    rules: Rules = RULES,
    name: str = "",
) -> PartitionSpec:
    """How an array of these logical axes is sharded; from sizes alone, no devices are needed.

    Two axes that do not divide are replicated rather than refused: rows of a batch, and key/value
    heads that are fewer than the devices and divide them (2, 4 or 8 devices for 2 heads).

    Args:
        axes: a logical name for each axis of the array.
        shape: of the array.
        sizes: of the mesh, devices along each of its axes.
        rules: logical axis -> mesh axis.
        name: of the array, for messages.

    Raises:
        ShardingError: an axis that does not divide, two axes over one axis of the mesh, or rules
            for unknown axes.
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
        devices = sizes.get(target, 1)
        count = _parts(axis, size, devices)
        if not count:
            fit = [n for n in range(1, min(4 * devices, 4096) + 1) if _parts(axis, size, n)]
            raise ShardingError(
                f"{name or 'An array'} has {axis} = {size}, which does not divide over the "
                f"{devices} devices of the mesh axis {target!r}. Choose {target}="
                f"{' or '.join(map(str, fit[-6:]))}, or replicate this axis: "
                f"rules=jaxtc.sharding.RULES | {{{axis!r}: None}}."
            )
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


def _parts(axis: str, size: int, devices: int) -> int:
    """How many parts an axis has on so many devices; 0 when it does not divide."""
    if size % devices == 0:
        return devices
    return int(axis == "batch" or (axis == "kv_heads" and devices % size == 0))


def shardings(module: nnx.Module, mesh: Mesh, rules: Rules = RULES) -> list[NamedSharding]:
    """Of each parameter of a module (possibly an abstract one), in the order of its leaves.

    Raises:
        ShardingError: as :func:`partition`.
    """
    return [
        NamedSharding(mesh, partition(param.logical_axes, param.shape, mesh.shape, rules, name))
        for name, param in variables(module)
    ]


def variables(module: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """(name, parameter) of a module, in the order of its leaves: ``layers.3.attn.q``."""
    leaves = jax.tree.leaves_with_path(module, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [(jax.tree_util.keystr(p, simple=True, separator="."), leaf) for p, leaf in leaves]
