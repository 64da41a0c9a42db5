"""The tap: one call at every site of the forward pass, where captures are kept and edits applied.

The model says ``x = tap("resid_mid", x)`` and nothing else. Which values are kept is static (part
of the compile key); what an edit does is data (a pytree whose arrays are arguments of the compiled
program), so other values, layers, positions, rows or heads run the same program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.errors import EditError
from jaxtc.sharding.placement import Placement
from jaxtc.tap.context import Context
from jaxtc.tap.sites import BY_NAME, LOGITS, ORDER, Address, parse


class Tap:
    """Reads and edits the sites of one forward pass.

    Args:
        captures: addresses to keep.
        edits: applied in order wherever their site is computed; as ``check_edits`` gives them (see
            :class:`jaxtc.Edit` for what is asked of them).
        positions: (B, T) int32.
        lengths: (B,) int32, tokens of each prompt.
        ends: (B,) int32, how many tokens of each text there are by the end of this pass: the
            prompts' lengths, by default.
        reducers: what to keep of a site in place of all of it, see :mod:`jaxtc.reducers`.
        placement: the mesh of this pass; every site is divided over it by its axes.
    """

    def __init__(
        self,
        captures: Sequence[Address] = (),
        edits: Sequence[Any] = (),
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
        ends: jax.Array | None = None,
        reducers: Sequence[Any] = (),
        placement: Placement | None = None,
    ):
        self.placement = placement
        self.captures = frozenset(captures)
        self.edits, self.reducers = tuple(edits), tuple(reducers)
        self.positions, self.lengths = positions, lengths
        self.ends = lengths if ends is None else ends
        self.activations: dict[Address, jax.Array] = {}
        self.reduced: dict[tuple[int, int | None], Any] = {}
        self._reducer_addresses = [parse(reducer.address) for reducer in self.reducers]
        readers = (*self.edits, *self.reducers)
        self._read_sites = frozenset(site for reader in readers for site in reader.reads)
        self._live: dict[str, jax.Array] = {}

    def at(self, layer: int) -> "LayerTap":
        """The tap of one layer: ``tap(site, x)`` gives ``x`` as it is after the edits."""
        return LayerTap(self, layer)

    @property
    def all_logits(self) -> bool:
        """Whether the logits of every token are needed, before or after the softcap."""
        return any(map(self.touches, LOGITS))

    def touches(self, site: str, layer: int | None = None) -> bool:
        """Whether a capture, an edit or a reducer is of this site: then all of it is needed."""
        asked = {Address(name, at) for name, at in self._reducer_addresses} | self.captures
        found = {Address(site), Address(site, layer)} & asked
        return bool(found) or site in self._read_sites or self.edited(site, layer)

    def edited(self, site: str, layer: int | None = None) -> bool:
        """Whether an edit may change this site."""
        return any(edit.site == site and _could(edit, layer) for edit in self.edits)

    def __call__(self, site: str, x: jax.Array, layer: int | None = None) -> jax.Array:
        """Apply the edits of this site to ``x``, keep it if asked for, and give it back."""
        held = None
        for edit in self.edits:
            if edit.site == site:
                if site in edit.reads and _could(edit, layer):
                    held = self._hold(edit, x, layer, held)
                x = self._apply(edit, x, layer)
        if self.placement is not None:
            x = self.placement.site(x, BY_NAME[site].axes)
        if site in self._read_sites:
            self._live[site] = x
        if Address(site, layer) in self.captures:
            self.activations[Address(site, layer)] = x
        for index, (name, wanted) in enumerate(self._reducer_addresses):
            if name == site and wanted in (None, layer):
                context = self._context(site, layer)
                self.reduced[index, layer] = self.reducers[index].reduce(x, context)
        return x

    def _hold(
        self, edit: Any, x: jax.Array, layer: int | None, held: tuple | None
    ) -> tuple[jax.Array, jax.Array]:
        """The value that an edit reading its own site sees, and the tokens where that is settled.

        An autoencoder put in place of a site, and the edits of its features that follow, must all
        encode the same value: the one before the first of them.
        """
        applies = self._tokens(edit, x) + _at_layer(edit, layer)
        settled = functools.reduce(jnp.logical_and, applies, jnp.ones((), bool))
        if held is not None:
            value, before = held
            x, settled = jnp.where(before, value, x), settled | before
        self._live[edit.site] = x
        return x, settled

    def stacked(self) -> list[Any]:
        """What each reducer kept: of its one place, or of all layers along a leading axis L."""
        found = []
        for index, reducer in enumerate(self.reducers):
            kept = [self.reduced[key] for key in self.reduced if key[0] == index]
            stack = lambda *layers: jnp.stack(layers)  # noqa: E731
            found.append(jax.tree.map(stack, *kept) if reducer.every_layer else kept[0])
        return found

    def unless_replaced(
        self, site: str, compute: Callable[[], jax.Array], *, after: str, layer: int | None = None
    ) -> jax.Array:
        """``compute()``, the value of ``site`` before its edits; zeros where one replaces it.

        What only serves a value that is not used is skipped, by a branch on the edit's layer as
        the program runs. ``after`` is the last site that is computed before: those in between must
        not be asked for.
        """
        here = [e for e in self.edits if e.site == site and e.replaces and _could(e, layer)]
        if not here or self._asked_between(after, site, layer):
            return compute()
        shape = jax.eval_shape(compute)
        nothing = jnp.zeros(shape.shape, shape.dtype)
        chosen = [_at_layer(edit, layer) for edit in here]
        if not all(chosen):
            return nothing
        replaced = jnp.stack([flag for (flag,) in chosen]).any()
        return jax.lax.cond(replaced, lambda: nothing, compute)

    def _asked_between(self, first: str, last: str, layer: int | None) -> bool:
        """Whether a capture, a reducer or an edit reads a site between these two."""
        asked = {address.site for address in self.captures if address.layer == layer}
        asked |= {name for name, wanted in self._reducer_addresses if wanted in (None, layer)}
        return any(ORDER[first] < ORDER[name] < ORDER[last] for name in asked | self._read_sites)

    def _context(self, site: str, layer: int | None) -> Context:
        read = self._live.__getitem__
        return Context(BY_NAME[site], layer, self.positions, self.lengths, read, self.placement)

    def _apply(self, edit: Any, x: jax.Array, layer: int | None) -> jax.Array:
        if not _could(edit, layer):
            return x
        context = self._context(edit.site, layer)
        chosen = _at_layer(edit, layer)
        if edit.costly and chosen:
            new = jax.lax.cond(chosen.pop(), lambda: self._new(edit, x, context), lambda: x)
        else:
            new = self._new(edit, x, context)
        where = self._where(edit, x)
        if BY_NAME[edit.site].axes.endswith("S"):
            # Keys that are padding, or not written yet, stay masked.
            where.insert(0, along(x, jnp.arange(x.shape[-1]) < self.ends[:, None], 0, -1))
        for part in where + chosen:
            new = jnp.where(part, new, x)
        return new

    def _new(self, edit: Any, x: jax.Array, context: Context) -> jax.Array:
        new = edit.new(x, context)
        if not hasattr(new, "dtype"):
            raise EditError(f"{edit} returned {type(new).__name__}, expected an array like x.")
        if new.shape != x.shape or new.dtype != x.dtype:
            raise EditError(
                f"{edit} returned {new.dtype}{list(new.shape)} for a site of "
                f"{x.dtype}{list(x.shape)}; `new` must keep shape and dtype."
            )
        return new

    def _tokens(self, edit: Any, x: jax.Array) -> list[jax.Array]:
        """Booleans that broadcast to ``x``: the positions and the rows of an edit."""
        parts = []
        if edit.position is not None:
            axis = BY_NAME[edit.site].sequence_axis
            parts.append(along(x, edit.position.selects(self.positions), 0, axis))
        if edit.row is not None:
            parts.append(along(x, among(edit.row, len(x)), 0))
        return parts

    def _where(self, edit: Any, x: jax.Array) -> list[jax.Array]:
        """Booleans that broadcast to ``x``, one for each target of the edit but its layer."""
        parts = self._tokens(edit, x)
        letters, size = BY_NAME[edit.site].letters, x.shape[-1]
        if edit.head is not None:
            axis = next(i for i, letter in enumerate(letters) if letter in "NK")
            parts.append(along(x, among(edit.head, x.shape[axis]), axis))
        if edit.coordinate is not None:
            parts.append(along(x, among(edit.coordinate, size), -1))
        if edit.key is not None and not edit.handles_key:
            keys = jnp.broadcast_to(jnp.arange(size), (len(x), size))
            parts.append(along(x, edit.key.selects(keys), 0, -1))
        return parts


class LayerTap:
    """The tap of one layer: what :class:`Tap` does, at that layer."""

    def __init__(self, tap: Tap, layer: int):
        self._tap, self._layer = tap, layer

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        """As :meth:`Tap.__call__`."""
        return self._tap(site, x, self._layer)

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(getattr(self._tap, name), layer=self._layer)


def along(x: jax.Array, flags: jax.Array, *axes: int) -> jax.Array:
    """``flags`` with its axes at these of ``x``, and 1 elsewhere."""
    shape = [1] * x.ndim
    for size, axis in zip(flags.shape, axes, strict=True):
        shape[axis] = size
    return flags.reshape(shape)


def _could(edit: Any, layer: int | None) -> bool:
    """Whether an edit may apply at a layer, as far as that is static."""
    return edit.layers is None or layer in edit.layers


def _at_layer(edit: Any, layer: int | None) -> list[jax.Array]:
    """[() boolean], whether the edit names this layer; empty where it applies to each."""
    if layer is None or edit.layer is None:
        return []
    return [(jnp.asarray(edit.layer) == layer).any()]


def among(named: Any, size: int, xp: Any = jnp) -> Any:
    """(..., n) indices to (..., size) booleans: those that are named."""
    return (xp.atleast_1d(xp.asarray(named))[..., None, :] == xp.arange(size)[:, None]).any(-1)
