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
        cls.static = fixed = frozenset({"site", *static})
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
    # Fields that are part of the compile key; `register_edit` fills it in.
    static = frozenset({"site"})

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

    def prepared(self) -> "Edit":
        """The edit as compiled programs take it: static parts that change nothing are dropped."""
        return self

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

        An axis over tokens is filled with zeros up to the bucket that the prompts were padded to;
        the tap keeps what padding keys had.

        Raises:
            EditError: the shape does not broadcast to the site's.
        """
        value = jnp.asarray(value)
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise EditError(f"{edit} was given complex numbers, expected {x.dtype}.")
        value = value.astype(x.dtype)
        width = self.positions.shape[1]
        letters = self.site.axes.split()
        true = tuple(
            self.length if letter in "TS" and size == width else size
            for letter, size in zip(letters, x.shape, strict=True)
        )
        try:
            fits = jnp.broadcast_shapes(value.shape, true) == true
        except ValueError:
            fits = False
        if not fits:
            raise EditError(
                f"{edit} was given a value of shape {value.shape}, which does not broadcast to "
                f"{self.site.name} [{self.site.axes}] = {true}."
            )
        pads = [(0, 0)] * value.ndim
        for axis in range(-value.ndim, 0):
            if value.shape[axis] > 1:
                pads[axis] = (0, x.shape[axis] - true[axis])
        return jnp.pad(value, pads) if pads else value


class Tap:
    """Reads and edits the sites of one forward pass.

    Args:
        captures: addresses to keep.
        edits: applied in order wherever their site is computed.
        positions: (B, T) int32.
        lengths: (B,) int32, tokens of each prompt.
        length: T before padding.
        ends: (B,) int32, how many tokens of each text there are by the end of this pass: the
            prompts' lengths, by default.
    """

    def __init__(
        self,
        captures: Sequence[Address] = (),
        edits: Sequence[Edit] = (),
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
        length: int = 0,
        ends: jax.Array | None = None,
    ):
        self.captures = frozenset(captures)
        self.edits = tuple(edits)
        self.positions, self.lengths, self.length = positions, lengths, length
        self.ends = lengths if ends is None else ends
        self.activations: dict[Address, jax.Array] = {}
        self._read_sites = frozenset(site for edit in self.edits for site in edit.reads)
        self._live: dict[str, jax.Array] = {}

    def at(self, layer: int) -> Callable[[str, jax.Array], jax.Array]:
        """The tap of one layer: ``tap(site, x)`` gives ``x`` as it is after the edits."""
        return lambda site, x: self(site, x, layer)

    def __call__(self, site: str, x: jax.Array, layer: int | None = None) -> jax.Array:
        """Apply the edits of this site to ``x``, keep it if asked for, and give it back."""
        for edit in self.edits:
            if edit.site == site:
                x = self._apply(edit, x, layer)
        if site in self._read_sites:
            self._live[site] = x
        address = Address(site, layer)
        if address in self.captures:
            self.activations[address] = x
        return x

    def _apply(self, edit: Edit, x: jax.Array, layer: int | None) -> jax.Array:
        if "layer" in edit.static and edit.layer not in (None, layer):
            return x  # nothing is traced at the layers of a static edit's others
        row = BY_NAME[edit.site]
        context = Context(row, self.positions, self.lengths, self.length, self._live.__getitem__)
        new = edit.new(x, context)
        if new.shape != x.shape or new.dtype != x.dtype:
            raise EditError(
                f"{edit} returned {new.dtype}{list(new.shape)} for a site of "
                f"{x.dtype}{list(x.shape)}; `new` must keep shape and dtype."
            )
        if row.axes.endswith("S"):
            # Keys that are padding, or not written yet, are nobody's to attend to.
            there = jnp.arange(x.shape[-1]) < self.ends[:, None]
            new = jnp.where(there[:, None, None, :], new, x)
        here = self._where(edit, layer)
        if here is None:
            return new
        shape = [1] * x.ndim
        if here.ndim:
            shape[0], shape[row.sequence_axis] = here.shape
        return jnp.where(here.reshape(shape), new, x)

    def _where(self, edit: Edit, layer: int | None) -> jax.Array | None:
        """Where an edit applies, as () or (B, T) booleans; None when everywhere."""
        parts = []
        if layer is not None and edit.layer is not None and "layer" not in edit.static:
            parts.append((jnp.asarray(edit.layer) == layer).any())
        if edit.position is not None:
            wanted = places(edit.position, self.lengths)
            parts.append((self.positions[:, :, None] == wanted[:, None, :]).any(-1))
        if edit.row is not None:
            rows = named_rows(edit, self.positions.shape[0])
            parts.append(jnp.broadcast_to(rows[:, None], self.positions.shape))
        if not parts:
            return None
        here = parts[0]
        for part in parts[1:]:
            here = here & part
        return here


def places(position: Any, lengths: jax.Array) -> jax.Array:
    """(B, P) positions counted from the front, of P that may count from each prompt's end."""
    wanted = jnp.atleast_1d(jnp.asarray(position))[None, :]
    return jnp.where(wanted < 0, wanted + lengths[:, None], wanted)


def named_rows(edit: Edit, batch: int) -> jax.Array:
    """(B,) booleans: the batch rows an edit names."""
    rows = jnp.arange(batch)
    if edit.row is None:
        return jnp.ones_like(rows, bool)
    return (rows[:, None] == jnp.atleast_1d(jnp.asarray(edit.row))[None, :]).any(-1)
