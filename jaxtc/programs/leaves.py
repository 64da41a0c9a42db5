"""From a model to the flat list of arrays that compiled programs take, and back inside a trace.

Flattening an NNX model of 26 layers takes half a millisecond, as long as everything else that a
call does. :func:`parameters` walks a model once and from then on only looks whether it is still the
same modules with the same attributes, and reads the arrays where they are now.
"""

import functools
import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import NamedSharding

from jaxtc.errors import SiteError
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.mesh import MeshLike, make_mesh, show
from jaxtc.sharding.placement import Placement, placement_of
from jaxtc.sharding.rules import ShardingError

# As in NNX's own flattening: `[...]` would run hooks, and copy a mutable array.
_array = attrgetter("_raw_value")
_metadata = attrgetter("_var_metadata")


def parameters(model: Gemma2) -> list[jax.Array]:
    """The model's arrays in a fixed order, that of ``jax.tree.leaves``: what programs take.

    Read again at each call, so that a replaced parameter is never stale.

    Raises:
        SiteError: the model's structure was changed after it was built.
    """
    layout = _LAYOUTS.get(model)
    leaves = None if layout is None else layout.read(model)
    if leaves is not None:
        return leaves
    leaves, structure = jax.tree.flatten(model)
    if structure != _structure(model.config):
        raise SiteError(
            "The modules of this model were changed after it was built; compiled programs would "
            "ignore that. Use edits (jaxtc.edits) to change what a model computes."
        )
    layout = _Layout.of(model)
    read = layout.read(model)
    if read is not None and len(read) == len(leaves) and all(map(is_, read, leaves)):
        _LAYOUTS[model] = layout
    return leaves


def placed(
    model: Gemma2, leaves: Sequence[jax.Array], mesh: MeshLike | None = None
) -> Placement | None:
    """Where the model lies, None on a single device.

    Args:
        model: whose arrays these are.
        leaves: as :func:`parameters` gives them.
        mesh: where the user says it is.

    Raises:
        ShardingError: it is not.
    """
    first = leaves[0]
    if isinstance(first, jax.core.Tracer):
        return None if mesh is None else Placement.of(make_mesh(mesh))
    found = None
    if isinstance(first.sharding, NamedSharding):
        layout, found = _PLACED.get(model, (None, None))
        if layout != [leaf.sharding for leaf in leaves]:
            found = placement_of(model)
            _PLACED[model] = [leaf.sharding for leaf in leaves], found
    if mesh is not None and (found is None or make_mesh(mesh) != found.mesh):
        own = "a single device" if found is None else f"another mesh, {show(found.mesh)}"
        raise ShardingError(
            f"mesh={show(make_mesh(mesh))}, but the model lies on {own}. Put it there first, once: "
            "jaxtc.load_model(source, mesh=mesh), or jaxtc.shard(model, mesh) when it is in memory."
        )
    return found


def rebuild(config: Gemma2Config, leaves: Sequence[jax.Array]) -> Gemma2:
    """The model around the arrays of :func:`parameters`, inside a trace."""
    return jax.tree.unflatten(_structure(config), leaves)


@functools.lru_cache(maxsize=64)
def _structure(config: Gemma2Config) -> jax.tree_util.PyTreeDef:
    return jax.tree.structure(Gemma2.abstract(config))


class _Layout(NamedTuple):
    """Where a model's arrays stand among the attributes of its modules, laid end to end.

    It keeps no parameter and no array, nor the model itself, which is its key in a weak mapping.

    Attributes:
        modules: every module but the model, each as often as it is reached.
        kinds: their types, the model's first.
        names: of all attributes of the model and the modules.
        pick: the parameters among these attributes, in the order of ``jax.tree.leaves``.
        rest: the other attributes.
        same: what the others were; all of these must still be the same objects.
        variables: types of the parameters.
        metadata: of each parameter.
    """

    modules: tuple[nnx.Module, ...]
    kinds: list[type]
    names: list[str]
    pick: itemgetter
    rest: itemgetter
    same: tuple
    variables: set[type]
    metadata: list[dict]

    @classmethod
    def of(cls, model: Gemma2) -> "_Layout":
        modules, places = [], []

        def walk(module: nnx.Module) -> None:
            place = len(modules)
            modules.append(module)
            # One level of it: an attribute that is data, whatever it is, is a leaf here.
            paths, _ = jax.tree_util.tree_flatten_with_path(module, lambda x: x is not module)
            for (key,), child in paths:
                if isinstance(child, nnx.Variable):
                    places.append((place, str(getattr(key, "name", getattr(key, "idx", None)))))
                elif isinstance(child, nnx.Module):
                    walk(child)

        walk(model)
        attributes = [(i, name) for i, module in enumerate(modules) for name in vars(module)]
        at = {attribute: index for index, attribute in enumerate(attributes)}
        wanted = [at[place] for place in places]
        others = sorted(set(at.values()).difference(wanted))
        values = [value for module in modules for value in vars(module).values()]
        found = [values[index] for index in wanted]
        return cls(
            tuple(modules[1:]),
            [type(module) for module in modules],
            [name for _, name in attributes],
            itemgetter(*wanted),
            itemgetter(*others),
            tuple(values[index] for index in others),
            {type(parameter) for parameter in found},
            [dict(_metadata(parameter)) for parameter in found],
        )

    def read(self, model: Gemma2) -> list[jax.Array] | None:
        """The arrays as they are now; None when anything but them is another than it was."""
        modules = (model, *self.modules)
        held = list(map(vars, modules))
        if list(map(type, modules)) != self.kinds or list(chain.from_iterable(held)) != self.names:
            return None
        values = list(chain.from_iterable(map(dict.values, held)))
        # By identity: `==` of two parameters compares their arrays.
        if not all(map(is_, self.rest(values), self.same)):
            return None
        found = self.pick(values)
        if set(map(type, found)) != self.variables:
            return None
        if list(map(_metadata, found)) != self.metadata:
            return None
        arrays = list(map(_array, found))
        return arrays if jax.tree_util.all_leaves(arrays) else None


_LAYOUTS: "weakref.WeakKeyDictionary[Gemma2, _Layout]" = weakref.WeakKeyDictionary()
# The shardings of a model's arrays, and what they amount to.
_PLACED: "weakref.WeakKeyDictionary[Gemma2, tuple]" = weakref.WeakKeyDictionary()
