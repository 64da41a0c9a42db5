"""Captures over a generation: arrays as long as the cache, in which every pass writes its part.

The prompts' pass makes them, each step writes its one token in place (they are donated, as the
cache is), so that nothing is concatenated and the memory is that of the result.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.captures.activations import Activations
from jaxtc.captures.base import Reducer
from jaxtc.captures.padding import blanked_after
from jaxtc.captures.request import Asked
from jaxtc.model.prompts import Prompts
from jaxtc.sharding.placement import Placement
from jaxtc.tap.columns import returned
from jaxtc.tap.sites import BY_NAME, Address
from jaxtc.tap.tap import MASKED, Tap

# Whole captures by address, and what each reducer kept.
Record = tuple[dict[Address, jax.Array], list[Any]]


def begin(tap: Tap, slots: int) -> Record:
    """What the prompts' pass kept, (B, W, ...), with room for ``slots`` tokens."""
    arrays = {}
    for address, x in tap.activations.items():
        site = BY_NAME[address.site]
        x = _room(x, slots, site.sequence_axis)
        if site.axes.endswith("S"):
            x = _room(x, slots, -1, MASKED if address.site == "attn_scores" else 0)
        arrays[address] = x
    return arrays, _each(lambda _, axis, x: _room(x, slots, axis), tap.reducers, tap.stacked())


def proceed(record: Record, tap: Tap, places: jax.Array) -> Record:
    """The record with what a step kept, (B, 1, ...), written at each row's place (B,)."""
    arrays, reduced = record

    def write(rows: int, axis: int, whole: jax.Array, new: jax.Array) -> jax.Array:
        one = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
        return jax.vmap(one, (rows, rows, 0), rows)(whole, new, places)

    arrays = {
        address: write(0, BY_NAME[address.site].sequence_axis, whole, tap.activations[address])
        for address, whole in arrays.items()
    }
    return arrays, _each(write, tap.reducers, reduced, tap.stacked())


def settled(record: Record, reducers: Sequence[Reducer], placement: Placement) -> Record:
    """The record on a mesh: arrays by the axes of their sites, what reducers kept by rows."""
    arrays, reduced = record

    def by_rows(rows: int, _, x: jax.Array) -> jax.Array:
        return placement.constrain(x, ["batch" if i == rows else "tokens" for i in range(x.ndim)])

    arrays = {a: placement.site(x, BY_NAME[a.site].axes) for a, x in arrays.items()}
    return arrays, _each(by_rows, reducers, reduced)


def finish(
    record: Record,
    asked: Asked,
    reducers: Sequence[Reducer],
    layers: int,
    prompts: Prompts,
    padded: bool = True,
    logits: jax.Array | None = None,
    ends: jax.Array | None = None,
) -> tuple[Activations, jax.Array | None]:
    """The record as :class:`Activations` of T tokens, where they stood as they were given.

    Logits (B, W, V) are cut and moved likewise. ``reducers`` are those of ``asked``, checked;
    ``padded`` says whether anything is longer than T, the length of ``prompts``. Past the ``ends``
    (B,) of texts, if given, reducers of each token keep nothing.
    """
    arrays, reduced = record
    length, starts = prompts.length, prompts.starts
    if padded or starts is not None:
        sites = tuple(address.site for address in arrays)
        cut, logits = _cut(sites, length, starts, list(arrays.values()), logits)
        arrays = dict(zip(arrays, cut, strict=True))
        reduced = [r.cut(kept, length) for r, kept in zip(reducers, reduced, strict=True)]
    if ends is not None:
        pairs = zip(reducers, reduced, strict=True)
        reduced = [blanked_after(r.every_layer, r, kept, ends) for r, kept in pairs]
    if starts is not None:
        reduced = [r.moved(kept, starts) for r, kept in zip(reducers, reduced, strict=True)]
    named = dict(zip(asked.names, reduced, strict=True))
    return Activations(arrays, layers, named, asked.aliases, starts), logits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cut(sites: tuple[str, ...], length: int, starts, arrays, logits):
    """Arrays of these sites, and logits, with axes over tokens and keys no longer than ``length``.

    What runs over tokens begins at the columns ``starts``, see :mod:`jaxtc.tap.columns`.
    One program for all: a slice by itself takes jax as long as a short model's whole pass.
    """

    def cut(site, x):
        letters = BY_NAME[site].axes.split()
        x = x[tuple(slice(length) if letter in "TS" else slice(None) for letter in letters)]
        for axis in (i for i, letter in enumerate(letters) if letter in "TS"):
            x = returned(x, starts, axis)
        return x

    return [*map(cut, sites, arrays)], None if logits is None else cut("logits", logits)


def _each(function: Callable, reducers: Sequence[Reducer], *kept: Sequence[Any]) -> list[Any]:
    """``function(rows, axis, *arrays)`` of the arrays that each reducer of each token kept.

    Their axis B is ``rows`` and T is ``axis``: L may be in front of them.
    """
    found = []
    for reducer, *parts in zip(reducers, *kept, strict=True):
        rows = int(reducer.every_layer)
        axis = reducer.site.sequence_axis + rows
        found.append(jax.tree.map(functools.partial(function, rows, axis), *parts))
    return found


def _room(x: jax.Array, slots: int, axis: int, fill: float = 0) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, pads, constant_values=fill)
