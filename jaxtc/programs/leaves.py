"""From a model to the flat list of arrays that compiled programs take, and back inside a trace.

Flattening an NNX model of 26 layers takes half a millisecond, as long as everything else that a
call does. :func:`parameters` walks a model once and from then on only looks whether it is still the
same modules with the same attributes, and reads the arrays where they are now.
"""

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import jax
import jax.numpy as jnp
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
    read = _READERS.get(model)
    if read and (leaves := read(model)) is not None:
        return leaves
    leaves, structure = jax.tree.flatten(model)
    if structure != _structure(model.config):
        raise SiteError(_what_changed(model))
    read = _reader(model)
    found = read(model)
    if found is not None and len(found) == len(leaves) and all(map(is_, found, leaves)):
        _READERS[model] = read
    return leaves


def placed(
    model: Gemma2, leaves: Sequence[jax.Array], mesh: MeshLike | None = None
) -> Placement | None:
    """Where the model of these :func:`parameters` lies, None on a single device.

    Raises:
        ShardingError: not on ``mesh``, where the user says it is.
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
    """The model around the arrays of :func:`parameters`, inside a trace.

    Raises:
        SiteError: an array of another shape than the model was built with, or not of floats.
    """
    # Another shape or dtype is traced anew, so it is enough to look here.
    shapes, structure = _built(config)
    for index, (leaf, shape) in enumerate(zip(leaves, shapes, strict=True)):
        if leaf.shape != shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            paths, _ = jax.tree_util.tree_flatten_with_path(Gemma2.abstract(config))
            raise SiteError(
                f"The model's {_spelled(paths[index][0])} is {leaf.dtype}{list(leaf.shape)}, "
                f"expected floats of shape {list(shape)}. Write new numbers into a parameter, "
                "weight[...] = new, which refuses other shapes."
            )
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=64)
def _built(config: Gemma2Config) -> tuple[list[tuple[int, ...]], jax.tree_util.PyTreeDef]:
    """The shapes of a model's arrays, and its structure."""
    leaves, structure = jax.tree.flatten(Gemma2.abstract(config))
    return [leaf.shape for leaf in leaves], structure


def _structure(config: Gemma2Config) -> jax.tree_util.PyTreeDef:
    return _built(config)[1]


def _spelled(path: Sequence) -> str:
    """A path of jax as Python writes it: ``layers[0].attn.q``."""
    names = [str(getattr(key, "name", getattr(key, "idx", ""))) for key in path]
    names = [name for name in names if name not in ("value", "_raw_value", "")]
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(names))


def _what_changed(model: Gemma2) -> str:
    """The first thing in which a model is not as it was built, and what to do in its place."""
    for path, found, built in _changes(model, Gemma2.abstract(model.config), ()):
        name = "model." + re.sub(r"\.(\d+)", r"[\1]", ".".join(path))
        if isinstance(built, nnx.Variable):
            what = "gone" if found is None else f"of the type {type(found).__name__}"
            what = "an array" if hasattr(found, "shape") else what
            what = "another nnx.Param" if isinstance(found, nnx.Variable) else what
            return (
                f"This model was changed after it was built: {name} was a parameter and is {what} "
                f"now. Write into the parameter, which stays where it is: {name}[...] = new."
            )
        break
    else:
        name = "Something in the model"
    return (
        f"{name} was changed after it was built, and compiled programs would ignore that. Use "
        "edits (jaxtc.edits) to change what a model computes; write new weights into parameters: "
        "weight[...] = new."
    )


def _changes(found: Any, built: Any, path: tuple[str, ...]) -> Iterator[tuple]:
    """(path, what is there, what was built) of each attribute that is not as it was built."""
    if isinstance(built, nnx.Module) and type(found) is type(built):
        names = dict.fromkeys((*vars(built), *vars(found)))
        for name in names:
            if not name.startswith("_"):
                pair = (vars(one).get(name) for one in (found, built))
                yield from _changes(*pair, (*path, name))
    elif isinstance(built, nnx.Variable):
        alike = type(found) is type(built) and _metadata(found) == _metadata(built)
        if not alike:
            yield path, found, built
    elif type(found) is not type(built) or found is not built and found != built:
        yield path, found, built


def _reader(model: Gemma2) -> Callable[[Gemma2], list[jax.Array] | None]:
    """What reads the arrays of this model as they are now, by where they stood at this moment.

    It gives None when anything but them was changed. It keeps no parameter and no array, nor the
    model itself, which is its key in a weak mapping.
    """
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
    kinds, inner = list(map(type, modules)), tuple(modules[1:])
    attributes = [(i, name) for i, module in enumerate(modules) for name in vars(module)]
    names = [name for _, name in attributes]
    at = {attribute: index for index, attribute in enumerate(attributes)}
    wanted = [at[place] for place in places]
    pick, rest = itemgetter(*wanted), itemgetter(*sorted(set(at.values()).difference(wanted)))
    values = [value for module in modules for value in vars(module).values()]
    others, variables = rest(values), set(map(type, pick(values)))
    metadata = [dict(_metadata(parameter)) for parameter in pick(values)]

    def read(model: Gemma2) -> list[jax.Array] | None:
        now = (model, *inner)
        held = list(map(vars, now))
        if list(map(type, now)) != kinds or list(chain.from_iterable(held)) != names:
            return None
        values = list(chain.from_iterable(map(dict.values, held)))
        # By identity: `==` of two parameters compares their arrays.
        if not all(map(is_, rest(values), others)):
            return None
        found = pick(values)
        if set(map(type, found)) != variables or list(map(_metadata, found)) != metadata:
            return None
        arrays = list(map(_array, found))
        return arrays if jax.tree_util.all_leaves(arrays) else None

    return read


# A model's reader; the shardings of its arrays, and what they amount to.
_READERS: "weakref.WeakKeyDictionary[Gemma2, Callable]" = weakref.WeakKeyDictionary()
_PLACED: "weakref.WeakKeyDictionary[Gemma2, tuple]" = weakref.WeakKeyDictionary()
