"""The tap: one call at every site of the forward pass, where captures are kept and edits applied.

The model says ``x = tap("resid_mid", x)`` and nothing else. Which values are kept is static (part
of the compile key); what an edit does is data (a pytree whose arrays are arguments of the compiled
program), so other values, layers, positions, rows or heads run the same program.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import EditError
from jaxtc.sharding.placement import Placement
from jaxtc.tap.context import Context
from jaxtc.tap.sites import BY_NAME, ORDER, SITES, Address, parse

# The score of a key that a query may not see; finite, as -inf times 0 would be NaN.
MASKED = float(np.finfo(np.float32).min)


class Tap:
    """Reads and edits the sites of one forward pass, or (:meth:`at`) those of one of its layers.

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
        special: (B, T) booleans, the tokens that edits of transcoders leave alone by default.
        prompt_lengths: tokens of each prompt as plain ints, for reducers that see no padding.
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
        special: jax.Array | None = None,
        prompt_lengths: tuple[int, ...] | None = None,
    ):
        self.placement, self.special = placement, special
        self.prompt_lengths = prompt_lengths
        self.captures = frozenset(captures)
        self.edits, self.reducers = tuple(edits), tuple(reducers)
        self.positions, self.lengths = positions, lengths
        self.ends = lengths if ends is None else ends
        self.activations: dict[Address, jax.Array] = {}
        self.reduced: dict[tuple[int, int | None], Any] = {}
        self._reducer_places = [parse(reducer.address) for reducer in self.reducers]
        readers = (*self.edits, *self.reducers)
        self._read_sites = frozenset(site for reader in readers for site in reader.reads)
        self._live: dict[str, jax.Array] = {}
        self._carried: dict[int, dict[int, Any]] = {}
        self.layer: int | None = None

    def at(self, layer: int) -> "Tap":
        """This tap inside a layer; what it keeps is kept here too."""
        inside = copy.copy(self)
        inside.layer = layer
        return inside

    def touches(self, site: str) -> bool:
        """Whether a capture, an edit or a reducer is of this site: then all of it is needed."""
        return self._asked(site) or self.edited(site)

    def edited(self, site: str) -> bool:
        """Whether an edit may change this site."""
        return bool(self._edits(site))

    def _asked(self, site: str) -> bool:
        """Whether a capture, a reducer or an edit of another site reads this one."""
        captured = Address(site, self.layer) in self.captures or site in self._read_sites
        return captured or bool(self._reducers(site))

    def _edits(self, site: str) -> list[Any]:
        """The edits that may apply here, as far as that is static."""
        here = (edit for edit in self.edits if edit.site == site)
        return [edit for edit in here if edit.layers is None or self.layer in edit.layers]

    def _reducers(self, site: str) -> list[int]:
        """The indices of the reducers of this place."""
        places = enumerate(self._reducer_places)
        return [i for i, (name, layer) in places if name == site and layer in (None, self.layer)]

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        """Apply the edits of this site to ``x``, keep it if asked for, and give it back."""
        held, address = None, Address(site, self.layer)
        row, read = BY_NAME[site], self._live.__getitem__
        context = Context(
            row, self.layer, self.positions, self.lengths, read, self.placement, self.ends
        )
        for edit in self._edits(site):
            if site in edit.reads:
                held = self._hold(edit, x, held)
            x = self._apply(edit, x, context)
        if self.placement is not None:
            x = self.placement.site(x, row.axes)
        if site in self._read_sites:
            self._live[site] = x
        if address in self.captures:
            self.activations[address] = x
        for index in self._reducers(site):
            kept = self.reducers[index].kept(x, context, self.prompt_lengths)
            self.reduced[index, self.layer] = kept
        return x

    def _hold(self, edit: Any, x: jax.Array, held: tuple | None) -> tuple[jax.Array, jax.Array]:
        """The value that an edit reading its own site sees, and the tokens where that is settled.

        An autoencoder put in place of a site, and the edits of its features that follow, must all
        encode the same value: the one before the first of them.
        """
        applies = self._tokens(edit, x) + self._at_layer(edit)
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
        self, site: str, compute: Callable[[], jax.Array], *, after: str
    ) -> jax.Array:
        """``compute()``, the value of ``site`` before its edits; zeros where one replaces it.

        What only serves a value that is not used is skipped, by a branch on the edit's layer as
        the program runs. ``after`` is the last site that is computed before: those in between must
        not be asked for.
        """
        here = [edit for edit in self._edits(site) if edit.replaces]
        between = [row.name for row in SITES[ORDER[after] + 1 : ORDER[site]]]
        if not here or any(map(self._asked, between)):
            return compute()
        shape = jax.eval_shape(compute)
        nothing = jnp.zeros(shape.shape, shape.dtype)
        chosen = [self._at_layer(edit) + self._everywhere(edit) for edit in here]
        if not all(chosen):
            return nothing
        replaced = jnp.stack([functools.reduce(jnp.logical_and, flags) for flags in chosen]).any()
        return jax.lax.cond(replaced, lambda: nothing, compute)

    def _apply(self, edit: Any, x: jax.Array, context: Context) -> jax.Array:
        chosen = self._at_layer(edit)
        if edit.carries:
            # Outside of any branch, as later layers use it.
            kept = self._carried.setdefault(id(edit), {})
            kept[self.layer] = edit.carry(context)
            context = dataclasses.replace(context, carried=kept)
        if edit.costly and chosen:
            new = jax.lax.cond(chosen.pop(), lambda: self._new(edit, x, context), lambda: x)
        else:
            new = self._new(edit, x, context)
        where = self._where(edit, x)
        if context.site.kind == "pairs":
            # Keys that are padding, or not written yet, stay masked.
            where.insert(0, along(x, jnp.arange(x.shape[-1])[None] < self.ends[:, None], 0, -1))
        if context.site.name == "attn_scores" and not edit.unmasks:
            # Scaled by -1 they would be the largest.
            where.append(~(x <= MASKED))
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

    def _at_layer(self, edit: Any) -> list[jax.Array]:
        """[() boolean], whether the edit applies at this layer; empty where it does at each."""
        if self.layer is None or edit.layer is None:
            return []
        named = jnp.asarray(edit.layer)
        return [(named <= self.layer if edit.onward else named == self.layer).any()]

    def _everywhere(self, edit: Any) -> list[jax.Array]:
        """[() boolean], whether no token is left alone as special; empty where none ever is."""
        return [~self.special.any()] if self._spares(edit) else []

    def _spares(self, edit: Any) -> bool:
        """Whether the edit leaves special tokens alone."""
        return not edit.special_tokens and self.special is not None

    def _tokens(self, edit: Any, x: jax.Array) -> list[jax.Array]:
        """Booleans that broadcast to ``x``: the positions and the rows of an edit."""
        parts = []
        if self._spares(edit):
            parts.append(along(x, ~self.special, 0, BY_NAME[edit.site].sequence_axis))
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


def along(x: jax.Array, flags: jax.Array, *axes: int) -> jax.Array:
    """``flags`` with its axes at these of ``x``, and 1 elsewhere."""
    shape = [1] * x.ndim
    for size, axis in zip(flags.shape, axes, strict=True):
        shape[axis] = size
    return flags.reshape(shape)


def among(named: Any, size: int, xp: Any = jnp) -> Any:
    """(..., n) indices to (..., size) booleans: those that are named."""
    return (xp.atleast_1d(xp.asarray(named))[..., None, :] == xp.arange(size)[:, None]).any(-1)
