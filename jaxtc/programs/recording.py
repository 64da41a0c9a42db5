"""Captures over a generation: arrays as long as the cache, in which every pass writes its part.

The prompts' pass makes them, each step writes its one token in place (they are donated, as the
cache is), so that nothing is concatenated and the memory is that of the result.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.captures.activations import Activations
from jaxtc.captures.base import Reducer
from jaxtc.captures.request import Asked
from jaxtc.model.gemma2 import MASKED
from jaxtc.sharding.placement import Placement
from jaxtc.tap.sites import BY_NAME, Address
from jaxtc.tap.tap import Tap

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
    kept = zip(tap.reducers, tap.stacked(), strict=True)
    reduced = [jax.tree.map(lambda x, r=r: _room(x, slots, _axes(r)[1]), part) for r, part in kept]
    return arrays, reduced


def proceed(record: Record, tap: Tap, places: jax.Array) -> Record:
    """The record with what a step kept, (B, 1, ...), written at each row's place (B,)."""
    arrays, reduced = record
    arrays = {
        address: _write(
            whole, tap.activations[address], places, 0, BY_NAME[address.site].sequence_axis
        )
        for address, whole in arrays.items()
    }
    parts = zip(tap.reducers, reduced, tap.stacked(), strict=True)
    reduced = [
        jax.tree.map(lambda whole, x, r=r: _write(whole, x, places, *_axes(r)), whole, part)
        for r, whole, part in parts
    ]
    return arrays, reduced


def settled(record: Record, reducers: Sequence[Reducer], placement: Placement) -> Record:
    """The record on a mesh: arrays by the axes of their sites, what reducers kept by rows."""
    arrays, reduced = record

    def by_rows(reducer: Reducer, x: jax.Array) -> jax.Array:
        axes = ["tokens"] * x.ndim
        axes[_axes(reducer)[0]] = "batch"
        return placement.constrain(x, axes)

    arrays = {a: placement.site(x, BY_NAME[a.site].axes) for a, x in arrays.items()}
    kept = zip(reducers, reduced, strict=True)
    return arrays, [jax.tree.map(lambda x, r=r: by_rows(r, x), part) for r, part in kept]


def finish(
    record: Record,
    asked: Asked,
    reducers: Sequence[Reducer],
    layers: int,
    length: int,
    padded: bool = True,
    logits: jax.Array | None = None,
) -> tuple[Activations, jax.Array | None]:
    """The record as :class:`Activations` of ``length`` tokens, and the logits cut likewise.

    Args:
        record: what was kept.
        asked: the captures.
        reducers: of the captures, checked.
        layers: of the model.
        length: T.
        padded: whether anything is longer.
        logits: (B, W, V).
    """
    arrays, reduced = record
    if padded:
        sites = tuple(address.site for address in arrays)
        cut, logits = _cut(sites, length, list(arrays.values()), logits)
        arrays = dict(zip(arrays, cut, strict=True))
        reduced = [r.cut(kept, length) for r, kept in zip(reducers, reduced, strict=True)]
    named = dict(zip(asked.names, reduced, strict=True))
    return Activations(arrays, layers, named, asked.aliases), logits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cut(sites: tuple[str, ...], length: int, arrays, logits):
    """Arrays of these sites, and logits, with axes over tokens and keys no longer than ``length``.

    One program for all: a slice by itself takes jax as long as a short model's whole pass.
    """

    def cut(site, x):
        letters = BY_NAME[site].axes.split()
        return x[tuple(slice(length) if letter in "TS" else slice(None) for letter in letters)]

    return [*map(cut, sites, arrays)], None if logits is None else cut("logits", logits)


def _axes(reducer: Reducer) -> tuple[int, int]:
    """The axes B and T of what a reducer of each token keeps; L may be in front of them."""
    return int(reducer.every_layer), reducer.site.sequence_axis + reducer.every_layer


def _room(x: jax.Array, slots: int, axis: int, fill: float = 0) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, pads, constant_values=fill)


def _write(whole: jax.Array, new: jax.Array, places: jax.Array, rows: int, axis: int) -> jax.Array:
    """``whole`` with ``new``, of one token, at each row's place along ``axis``."""

    def one(whole: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, new, place, axis=axis - 1)

    return jax.vmap(one, (rows, rows, 0), rows)(whole, new, places)
