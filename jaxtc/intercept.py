"""The tap: one call at every site of the forward pass, where captures are kept and edits applied.

The model says ``x = tap("resid_mid", x)`` and nothing else. Which values are kept is static (part
of the compile key); what an edit does is data (a pytree whose arrays are arguments of the compiled
program), so other values, layers, positions or rows run the same program.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import EditError
from jaxtc.sites import BY_NAME, Address, Site, parse


@dataclass_transform(frozen_default=True, kw_only_default=False)
def register_edit(*static: str) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass, and a pytree whose fields are leaves but ``static``."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        fixed = {"site", *static}
        data = [name for name in names if name not in fixed]
        return jax.tree_util.register_dataclass(cls, data, [n for n in names if n in fixed])

    return register


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """What every edit has: where it applies. Subclasses say what happens there (:meth:`new`).

    Attributes:
        site: a site of the table, or an alias (static). ``layers.12.resid_post`` also sets `layer`.
        layer: int, array of ints, or None for every layer. Negative counts from the last.
        position: int, array of ints, or None for every token. Negative counts from each prompt's
            own end, so -1 is the last real token of every row of a padded batch.
        row: batch row or rows, or None for all.
    """

    site: str = dataclasses.field(default="", kw_only=True)
    layer: Any = dataclasses.field(default=None, kw_only=True)
    position: Any = dataclasses.field(default=None, kw_only=True)
    row: Any = dataclasses.field(default=None, kw_only=True)

    # Sites of the same layer that `new` asks its context for.
    reads = ()

    def __post_init__(self):
        if not self.site:
            raise EditError(
                f"{type(self).__name__} needs a site, for example site='resid_post'; "
                "`jaxtc sites` lists them."
            )
        name, layer = parse(self.site)
        object.__setattr__(self, "site", name)
        if layer is not None:
            if self.layer is not None:
                raise EditError(
                    f"{type(self).__name__} names layer {layer} in its site and layer={self.layer} "
                    "besides; give one of the two."
                )
            object.__setattr__(self, "layer", layer)

    def new(self, x: jax.Array, context: "Context") -> jax.Array:
        """The value of the whole site after the edit; the tap keeps ``x`` where it does not apply.

        Args:
            x: the site's value, with the axes of the table.
            context: tokens' positions, and the upstream sites listed in :attr:`reads`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it changes")

    def __str__(self):
        parts = [self.site]
        for name in ("layer", "position", "row"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, jax.core.Tracer):
                parts.append(f"{name}={np.asarray(value).tolist()}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class Context:
    """What an edit may know about the pass it is part of.

    Attributes:
        site: row of the table of the site being edited.
        positions: (B, T) int32, position of each token in its own text.
        lengths: (B,) int32, tokens of each prompt.
        length: T as the caller gave it, before padding to a bucket.
        read: value of an upstream site of the same layer, after its edits.
    """

    site: Site
    positions: jax.Array
    lengths: jax.Array
    length: int
    read: Callable[[str], jax.Array]

    def fit(self, value: Any, x: jax.Array, edit: Edit) -> jax.Array:
        """``value`` in the dtype of ``x``, broadcastable to it.

        An axis over tokens is filled with zeros up to the bucket that the prompts were padded to:
        no position there is ever selected.

        Raises:
            EditError: the shape does not broadcast to the site's.
        """
        value = jnp.asarray(value)
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise EditError(f"{edit} was given complex numbers, expected {x.dtype}.")
        value = value.astype(x.dtype)
        pads = [(0, 0)] * value.ndim
        letters = self.site.axes.split()[-value.ndim :] if value.ndim else []
        for axis, letter in enumerate(letters):
            if letter in "TS" and value.shape[axis] == self.length and self.length > 1:
                pads[axis] = (0, x.shape[axis - value.ndim] - self.length)
        value = jnp.pad(value, pads) if pads else value
        try:
            fits = jnp.broadcast_shapes(value.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            axes = self.site.axes.split()
            shape = [
                self.length if letter in "TS" else size
                for letter, size in zip(axes, x.shape, strict=True)
            ]
            raise EditError(
                f"{edit} was given a value of shape {value.shape}, which does not broadcast to "
                f"{self.site.name} [{self.site.axes}] = {tuple(shape)}."
            )
        return value


class Tap:
    """Reads and edits the sites of one forward pass.

    Args:
        captures: addresses to keep.
        edits: applied in order wherever their site is computed.
        positions: (B, T) int32.
        lengths: (B,) int32.
        length: T before padding.
        real: (B, T) booleans, false on padding; None when every token is real.
    """

    def __init__(
        self,
        captures: Sequence[Address] = (),
        edits: Sequence[Edit] = (),
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
        length: int = 0,
        real: jax.Array | None = None,
    ):
        self.captures = frozenset(captures)
        self.edits = tuple(edits)
        self.positions, self.lengths, self.length = positions, lengths, length
        self.activations: dict[Address, jax.Array] = {}
        self.real = real
        # For each edit (B,) flags: the row is not its business, or it has applied there. An edit
        # whose target is a tracer (under vmap) cannot be checked before the run; `run` turns its
        # false flags into NaN.
        self.fired = [self._other_rows(edit) for edit in self.edits]
        self._read_sites = frozenset(site for edit in self.edits for site in edit.reads)
        self._live: dict[str, jax.Array] = {}

    def at(self, layer: int) -> Callable[[str, jax.Array], jax.Array]:
        """The tap of one layer: ``tap(site, x)`` gives ``x`` as it is after the edits."""
        return lambda site, x: self(site, x, layer)

    def __call__(self, site: str, x: jax.Array, layer: int | None = None) -> jax.Array:
        """Apply the edits of this site to ``x``, keep it if asked for, and give it back."""
        for index, edit in enumerate(self.edits):
            if edit.site == site:
                x = self._apply(index, edit, x, layer)
        if site in self._read_sites:
            self._live[site] = x
        address = Address(site, layer)
        if address in self.captures:
            self.activations[address] = x
        return x

    def _apply(self, index: int, edit: Edit, x: jax.Array, layer: int | None) -> jax.Array:
        if layer is not None and isinstance(edit.layer, int) and edit.layer != layer:
            return x  # a static layer (Splice): nothing is traced at the others
        row = BY_NAME[edit.site]
        context = Context(row, self.positions, self.lengths, self.length, self._live.__getitem__)
        new = edit.new(x, context)
        if new.shape != x.shape or new.dtype != x.dtype:
            raise EditError(
                f"{edit} returned {new.dtype}{list(new.shape)} for a site of "
                f"{x.dtype}{list(x.shape)}; `new` must keep shape and dtype."
            )
        here = self._where(edit, row, layer)
        if here is None:
            self.fired[index] = jnp.ones_like(self.fired[index])
            return new
        reached = here if self.real is None else here & self.real
        self.fired[index] |= jnp.broadcast_to(reached, self.positions.shape).any(-1)
        shape = [1] * x.ndim
        if here.ndim:
            shape[0], shape[row.sequence_axis] = here.shape
        return jnp.where(here.reshape(shape), new, x)

    def _rows(self, edit: Edit) -> jax.Array:
        """(B,) booleans: the batch rows an edit names."""
        rows = jnp.arange(self.positions.shape[0])
        if edit.row is None:
            return jnp.ones_like(rows, bool)
        return (rows[:, None] == jnp.atleast_1d(jnp.asarray(edit.row))[None, :]).any(-1)

    def _other_rows(self, edit: Edit) -> jax.Array:
        """(B,) booleans: the rows an edit does not name; none when it names no row that exists."""
        rows = self._rows(edit)
        return ~rows & rows.any()

    def _where(self, edit: Edit, site: Site, layer: int | None) -> jax.Array | None:
        """Where an edit applies, as () or (B, T) booleans; None when everywhere."""
        parts = []
        if layer is not None and edit.layer is not None and not isinstance(edit.layer, int):
            parts.append((jnp.asarray(edit.layer) == layer).any())
        if edit.position is not None:
            wanted = jnp.atleast_1d(jnp.asarray(edit.position))[None, :]
            wanted = jnp.where(wanted < 0, wanted + self.lengths[:, None], wanted)
            hit = (self.positions[:, :, None] == wanted[:, None, :]).any(-1)
            parts.append(hit)
        if edit.row is not None:
            rows = self._rows(edit)
            parts.append(jnp.broadcast_to(rows[:, None], self.positions.shape))
        if not parts:
            return None
        here = parts[0]
        for part in parts[1:]:
            here = here & part
        return here
