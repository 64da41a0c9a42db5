"""Where edits apply, checked before anything runs: an edit that could not fire is an error."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import EditError
from jaxtc.intercept import Edit, named_rows, places
from jaxtc.sites import BY_NAME, ORDER, check_layer


def check_edits(
    edits: Sequence[Edit],
    layers: int,
    reach: tuple[int, int],
    lengths: np.ndarray | None,
    batch: int,
    extra: int = 0,
) -> tuple[tuple[Edit, ...], bool]:
    """Refuse edits that could not fire, and bring their targets to one form.

    Args:
        edits: as the user gave them.
        layers: layers of the model.
        reach: the last (layer, place in the layer) that this pass needs.
        lengths: (B,) prompt lengths, or None when traced.
        batch: B.
        extra: tokens that will follow the prompts (generation).

    Returns:
        (the edits, whether some target could not be checked and :func:`all_fire` must tell).

    Raises:
        EditError: a target out of range, or one that the pass never reaches.
        SiteError: a layer that does not exist.
    """
    checked, unsure = [], False
    for edit in edits:
        _check_kind(edit)
        edit = _check_layers(edit, layers, reach)
        _check_rows(edit, batch)
        if lengths is not None:
            _check_positions(edit, lengths, extra)
        targets = (edit.layer, edit.position, edit.row)
        unsure |= any(isinstance(target, jax.core.Tracer) for target in targets)
        unsure |= lengths is None and edit.position is not None
        whole = {
            name: _known(getattr(edit, name)).astype(np.int32)
            for name in ("layer", "position", "row")
            if name not in edit.static and _known(getattr(edit, name)) is not None
        }
        checked.append(dataclasses.replace(edit, **whole).prepared())
    return tuple(checked), unsure


def all_fire(
    edits: Sequence[Edit], layers: int, reach: tuple[int, int], lengths: jax.Array
) -> jax.Array:
    """() boolean: whether every target of every edit exists, told inside a trace.

    What :func:`check_edits` says of values it can see, said of values that it cannot.
    """
    fine = jnp.ones((), bool)
    for edit in edits:
        if edit.layer is not None:
            wanted, order = jnp.atleast_1d(jnp.asarray(edit.layer)), ORDER[edit.site]
            last = reach[0] if order <= reach[1] else reach[0] - 1
            fine &= ((wanted >= 0) & (wanted <= min(last, layers - 1))).all()
        if edit.row is not None:
            wanted = jnp.atleast_1d(jnp.asarray(edit.row))
            fine &= ((wanted >= 0) & (wanted < len(lengths))).all()
        if edit.position is not None:
            wanted = places(edit.position, lengths)
            there = ((wanted >= 0) & (wanted < lengths[:, None])).all(-1)
            fine &= (there | ~named_rows(edit, len(lengths))).all()
    return fine


def _known(value: Any) -> np.ndarray | None:
    """``value`` as NumPy, or None when it is absent or only known inside a trace."""
    if value is None or isinstance(value, jax.core.Tracer):
        return None
    return np.atleast_1d(np.asarray(value))


def _check_kind(edit: Edit) -> None:
    """Refuse what is no edit, reads what is not there yet, or has targets of another kind."""
    if not isinstance(edit, Edit):
        raise EditError(
            f"edits must be edits such as jaxtc.Add(...), got {type(edit).__name__}: {edit!r}."
        )
    if any(leaf is edit for leaf in jax.tree.leaves(edit)):
        raise EditError(
            f"{type(edit).__name__} is not registered, so jax does not see its fields: put "
            "@jaxtc.register_edit() above the class."
        )
    per_layer = BY_NAME[edit.site].per_layer
    if not per_layer and edit.layer is not None:
        raise EditError(f"{edit}: the model has {edit.site!r} once, so it takes no layer.")
    for read in edit.reads:
        if ORDER[read] >= ORDER[edit.site] or BY_NAME[read].per_layer != per_layer:
            raise EditError(f"{edit} reads {read!r}, which is not computed before {edit.site!r}.")
    for name in ("layer", "position", "row"):
        value = getattr(edit, name)
        known = _known(value)
        whole = known is None or (known.dtype.kind in "iu" and known.size)
        if not whole or np.ndim(value) > 1:
            raise EditError(
                f"{edit}: {name} must be whole numbers, one or a row of them, got {value!r}."
            )


def _check_layers(edit: Edit, layers: int, reach: tuple[int, int]) -> Edit:
    """The edit with its layers counted from the front; refused when the pass ends before them."""
    if isinstance(edit.layer, jax.core.Tracer):
        front = jnp.where(edit.layer < 0, edit.layer + layers, edit.layer)
        return dataclasses.replace(edit, layer=front)
    per_layer, wanted = BY_NAME[edit.site].per_layer, _known(edit.layer)
    if wanted is None:  # every layer fires when the first does
        first = 0 if per_layer else -1 if edit.site == "embed" else layers
        front = np.array([first])
    else:
        front = np.array([check_layer(int(layer), layers, str(edit)) for layer in wanted])
        layer = int(front[0]) if np.ndim(edit.layer) == 0 else front.astype(np.int32)
        edit = dataclasses.replace(edit, layer=layer)
    late = [int(layer) for layer in front if (int(layer), ORDER[edit.site]) > reach]
    if late:
        raise EditError(
            f"{edit} would never fire: nothing that was asked for depends on {edit.site!r}"
            + (f" of layer {late[0]}" if per_layer else "")
            + ". Ask for logits, or for a capture that comes after it."
        )
    return edit


def _check_rows(edit: Edit, batch: int) -> None:
    """Refuse a row that the batch does not have."""
    rows = _known(edit.row)
    if rows is not None and ((rows < 0) | (rows >= batch)).any():
        raise EditError(f"{edit}: the batch has rows 0 to {batch - 1}.")


def _check_positions(edit: Edit, lengths: np.ndarray, extra: int) -> None:
    """Refuse a position that some prompt does not have."""
    positions, rows = _known(edit.position), _known(edit.row)
    if positions is None or isinstance(edit.row, jax.core.Tracer):
        return
    shortest = (lengths if rows is None else lengths[rows]).min()
    for position in positions:
        if not -shortest <= position < shortest + extra:
            raise EditError(
                f"{edit}: position {position} lies outside a prompt of {shortest} tokens "
                f"(0 to {shortest - 1}, or -{shortest} to -1)."
            )
