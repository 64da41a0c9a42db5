"""Edits checked and brought to one form before anything runs: one that could not fire is an error.

Outside a trace everything is refused by name. Where targets are traced (``vmap`` over layers, say)
nothing can be raised: :func:`all_fire` tells, and the result of that variant becomes NaN.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import TARGETS, Edit
from jaxtc.edits.conflicts import check_conflicts
from jaxtc.errors import EditError
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.tap.context import PerLayer
from jaxtc.tap.positions import Mask, is_traced, resolve
from jaxtc.tap.sites import BY_NAME, ORDER, check_layer
from jaxtc.tap.tap import among

# Axes that a head, a coordinate or a key can be named along.
HEADS, COORDINATES = "NK", "DHFV"
# Where a copy comes from.
SOURCES = ("from_row", "from_position")


def check_edits(
    edits: Sequence[Edit],
    config: Gemma2Config,
    reach: tuple[int, int],
    prompts: Prompts,
    extra: int = 0,
) -> tuple[tuple[Edit, ...], bool]:
    """Refuse edits that could not fire, and bring them to the form that compiled programs take.

    Args:
        edits: as the user gave them.
        config: of the model.
        reach: the last (layer, place in the layer) that this pass needs.
        prompts: as prepared.
        extra: tokens that will follow the prompts (generation).

    Returns:
        (the edits, whether some target could not be checked and :func:`all_fire` must tell).

    Raises:
        EditError: a target out of range, one that the pass never reaches, a value that does not
            fit.
        SiteError: a layer that does not exist.
    """
    checked, unsure = [], False
    for edit in edits:
        _check_kind(edit)
        sizes = _sizes(edit, config, prompts)
        edit = _layers(edit, config.num_hidden_layers, reach)
        edit = _indices(edit, sizes)
        edit = _positions(edit, prompts, extra)
        edit = _values(edit, sizes, prompts, extra)
        edit.check(sizes, prompts.known_lengths)
        unsure |= is_traced([getattr(edit, name, None) for name in (*TARGETS, *SOURCES)])
        checked.append(edit)
    if len(checked) > 1:
        check_conflicts(checked, config.num_hidden_layers, prompts.tokens.shape[1])
    return tuple(edit.prepared() for edit in checked), unsure


def of_phase(edits: Sequence[Edit], new: bool) -> tuple[Edit, ...]:
    """The edits that can apply to the prompt, or to new tokens, as far as their kind tells."""
    other = "prompt" if new else "new"
    return tuple(edit for edit in edits if getattr(edit.position, "part", None) != other)


def all_fire(
    edits: Sequence[Edit], config: Gemma2Config, reach: tuple[int, int], lengths: jax.Array
) -> jax.Array:
    """() boolean: whether every target of every edit exists, told inside a trace.

    What :func:`check_edits` says of values it can see, said of values that it cannot.
    """
    fine = jnp.ones((), bool)
    for edit in edits:
        letters = BY_NAME[edit.site].axes.split()
        if edit.layer is not None:
            last = reach[0] if ORDER[edit.site] <= reach[1] else reach[0] - 1
            fine &= _below(edit.layer, min(last + 1, config.num_hidden_layers))
            if edit.layers is not None:
                named = jnp.atleast_1d(jnp.asarray(edit.layer))
                fine &= (named[:, None] == jnp.asarray(edit.layers)).any(-1).all()
        if edit.row is not None:
            fine &= _below(edit.row, len(lengths))
        if edit.head is not None:
            fine &= _below(edit.head, config.sizes[_letter(letters, HEADS)])
        if edit.coordinate is not None:
            fine &= _below(edit.coordinate, config.sizes[letters[-1]])
        rows = jnp.ones(len(lengths), bool) if edit.row is None else among(edit.row, len(lengths))
        if edit.position is not None:
            fine &= (edit.position.exist(lengths) | ~rows).all()
            fine &= edit.position.on.any() if isinstance(edit.position, Mask) else True
        if edit.key is not None:
            fine &= (edit.key.exist(lengths) | ~rows).all()
        if getattr(edit, "from_row", None) is not None:
            fine &= _below(edit.from_row, len(lengths))
        if getattr(edit, "from_position", None) is not None:
            fine &= (edit.from_position.exist(lengths) | ~_sources(edit, rows)).all()
    return fine


def _below(given: Any, size: int) -> jax.Array:
    given = jnp.asarray(given)
    return ((given >= 0) & (given < size)).all()


def _letter(letters: Sequence[str], among: str) -> str | None:
    return next((letter for letter in letters if letter in among), None)


def _check_kind(edit: Edit) -> None:
    """Refuse what is no edit, is not registered, or reads what is not there yet."""
    if not isinstance(edit, Edit):
        raise EditError(
            f"edits must be edits such as jaxtc.Add(...), got {type(edit).__name__}: {edit!r}."
        )
    if any(leaf is edit for leaf in jax.tree.leaves(edit)):
        raise EditError(
            f"{type(edit).__name__} is not registered, so jax does not see its fields: put "
            "@jaxtc.register_edit() above the class."
        )
    site = BY_NAME[edit.site]
    if not site.per_layer and edit.layer is not None:
        raise EditError(f"{edit}: the model has {edit.site!r} once, so it takes no layer.")
    for read in edit.reads:
        if ORDER[read] > ORDER[edit.site] or BY_NAME[read].per_layer != site.per_layer:
            raise EditError(f"{edit} reads {read!r}, which is not computed before {edit.site!r}.")


def _sizes(edit: Edit, config: Gemma2Config, prompts: Prompts) -> dict[str, int]:
    """Sizes of the axis letters, and of the site's last axis."""
    sizes = dict(config.sizes)
    sizes |= {"B": len(prompts.tokens), "T": prompts.length, "S": prompts.length, "1": 1}
    sizes["L"] = config.num_hidden_layers
    sizes["last"] = sizes[BY_NAME[edit.site].axes.split()[-1]]
    return sizes


def _whole(edit: Edit, name: str) -> np.ndarray | None:
    """A field that holds whole numbers, as NumPy; None when it is absent or traced."""
    value = getattr(edit, name)
    if value is None or isinstance(value, jax.core.Tracer):
        return None
    known = np.asarray(value)
    if known.dtype.kind not in "iu" or known.ndim > 1 or not known.size:
        raise EditError(
            f"{edit}: {name} must be whole numbers, one or a row of them, got {value!r}."
        )
    return known


def _layers(edit: Edit, layers: int, reach: tuple[int, int]) -> Edit:
    """The edit with its layers counted from the front; refused when the pass ends before them."""
    if isinstance(edit.layer, jax.core.Tracer):
        front = jnp.where(edit.layer < 0, edit.layer + layers, edit.layer)
        return dataclasses.replace(edit, layer=front)
    per_layer, wanted = BY_NAME[edit.site].per_layer, _whole(edit, "layer")
    if wanted is not None:
        front = [check_layer(int(layer), layers, str(edit)) for layer in np.atleast_1d(wanted)]
        edit = dataclasses.replace(edit, layer=np.reshape(front, wanted.shape).astype(np.int32))
        missing = [layer for layer in front if edit.layers is not None and layer not in edit.layers]
        if missing:
            raise EditError(f"{edit} has nothing for layer {missing[0]}, only {edit.layers}.")
    elif edit.layers is not None:
        front = list(edit.layers)
    else:  # every layer fires when the first does
        front = [0 if per_layer else -1 if edit.site == "embed" else layers]
    late = [layer for layer in front if (layer, ORDER[edit.site]) > reach]
    if late:
        raise EditError(
            f"{edit} would never fire: nothing that was asked for depends on {edit.site!r}"
            + (f" of layer {late[0]}" if per_layer else "")
            + ". Ask for logits, or for a capture that comes after it."
        )
    return edit


def _indices(edit: Edit, sizes: dict[str, int]) -> Edit:
    """Rows, heads and coordinates: whole numbers in range, counted from the front."""
    letters, found = BY_NAME[edit.site].axes.split(), {}
    axes = {"row": "B", "head": _letter(letters, HEADS), "coordinate": letters[-1]}
    for name, letter in axes.items():
        if getattr(edit, name) is None:
            continue
        if letter is None or (name == "coordinate" and letter not in COORDINATES):
            fitting = [site for site, row in BY_NAME.items() if _fits(row.axes.split(), name)]
            raise EditError(
                f"{edit}: {edit.site} [{' '.join(letters)}] has no axis for {name}=...; these "
                f"sites have one: {', '.join(fitting)}."
            )
        known, size = _whole(edit, name), sizes[letter]
        if known is None:
            if name != "row":
                traced = getattr(edit, name)
                found[name] = jnp.where(traced < 0, traced + size, traced)
            continue
        if name != "row":
            known = np.where(known < 0, known + size, known)
        if ((known < 0) | (known >= size)).any():
            what = "the batch has rows" if name == "row" else f"this model has {name}s"
            raise EditError(f"{edit}: {what} 0 to {size - 1}.")
        found[name] = known.astype(np.int32)
    if edit.key is not None and letters[-1] != "S":
        raise EditError(f"{edit}: key=... is for attn_scores and attn_pattern only.")
    return dataclasses.replace(edit, **found) if found else edit


def _fits(letters: list[str], name: str) -> bool:
    return bool(_letter(letters, HEADS)) if name == "head" else letters[-1] in COORDINATES


def _positions(edit: Edit, prompts: Prompts, extra: int) -> Edit:
    """Positions of every kind as absolute ones; refused where a named row lacks them."""
    batch = len(prompts.tokens)
    rows = np.ones(batch, bool)
    traced_row = isinstance(edit.row, jax.core.Tracer)
    if edit.row is not None and not traced_row:
        rows = np.isin(np.arange(batch), np.asarray(edit.row))
    found = {}
    for name in ("position", "key", "from_position"):
        given = getattr(edit, name, None)
        if given is None:
            continue
        at = rows
        if name == "from_position" and edit.from_row is not None:
            at = np.zeros(batch, bool) if is_traced(edit.from_row) else _sources(edit, rows)
        found[name] = resolve(
            given,
            prompts.tokens,
            prompts.lengths if prompts.known_lengths is None else prompts.known_lengths,
            prompts.length,
            extra=extra if name == "position" else 0,
            rows=np.zeros(batch, bool) if traced_row else at,
            what=str(edit),
        )
    if extra and edit.needs_prompt and not _prompt_only(edit, found):
        raise EditError(
            f"{edit} needs the whole prompt at once and cannot apply to generated tokens: give "
            "position='prompt'."
        )
    return dataclasses.replace(edit, **found) if found else edit


def _prompt_only(edit: Edit, found: dict) -> bool:
    return getattr(found.get("position", edit.position), "part", None) == "prompt"


def _sources(edit: Any, rows: Any) -> Any:
    """(B,) booleans: the rows that the given rows copy from."""
    xp = jnp if is_traced((edit.from_row, rows)) else np
    if edit.from_row is None:
        return rows
    froms = xp.broadcast_to(xp.asarray(edit.from_row), rows.shape)
    return ((xp.arange(len(rows))[:, None] == froms[None]) & rows[None]).any(-1)


def _values(edit: Edit, sizes: dict[str, int], prompts: Prompts, extra: int) -> Edit:
    """Values in one dtype a kind, padded to the bucket; refused when they do not broadcast."""
    found = {}
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if field.name in edit.values and value is not None:
            found[field.name] = _value(edit, field.name, value, sizes, prompts, extra)
        elif field.name in edit.amounts and value is not None:
            found[field.name] = _number(edit, value)
        elif type(value) in (int, float):
            # A plain number is another type to jax than an array of one.
            found[field.name] = np.asarray(value, np.int32 if type(value) is int else np.float32)
    return dataclasses.replace(edit, **found) if found else edit


def _number(edit: Edit, value: Any) -> Any:
    """``value`` as an array of floats, whose type does not depend on how it was written."""
    if isinstance(value, PerLayer):
        return PerLayer(_number(edit, value.array))
    if not isinstance(value, jax.Array):
        value = jnp.asarray(value) if is_traced(value) else np.asarray(value)
    kind = np.dtype(value.dtype).kind
    if kind in "biu" or (isinstance(value, np.ndarray) and kind == "f"):
        return value.astype(np.float32)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise EditError(f"{edit} was given {value.dtype} values, expected real numbers.")
    if getattr(value, "weak_type", False):
        return jax.lax.convert_element_type(value, jnp.dtype(value.dtype))
    return value


def _value(edit: Edit, name: str, value: Any, sizes, prompts: Prompts, extra: int) -> Any:
    site = BY_NAME[edit.site]
    letters = site.axes.split()
    each = isinstance(value, PerLayer)
    array = _number(edit, value.array if each else value)
    if each and (not site.per_layer or array.ndim < 1 or array.shape[0] != sizes["L"]):
        raise EditError(
            f"{edit}: a PerLayer value has one entry for each of the {sizes['L']} layers in front, "
            f"at sites that each layer has; got shape {array.shape} for {edit.site}."
        )
    shape = array.shape[1:] if each else array.shape
    true = tuple(sizes[letter] for letter in letters)
    try:
        fits = np.broadcast_shapes(shape, true) == true
    except ValueError:
        fits = False
    if not fits:
        raise EditError(
            f"{edit} was given a {name} of shape {shape}, which does not broadcast to "
            f"{edit.site} [{site.axes}] = {true}."
        )
    width = prompts.tokens.shape[1]
    pads, over_tokens = [(0, 0)] * array.ndim, False
    for back, size in enumerate(reversed(shape), start=1):
        if letters[-back] in "TS" and size > 1:
            pads[-back], over_tokens = (0, width - size), True
    if over_tokens and extra and getattr(edit.position, "part", None) != "prompt":
        raise EditError(
            f"{edit}: its {name} of shape {shape} has an entry for each token of the prompt, and "
            "none for those that are generated: give position='prompt'."
        )
    if any(after for _, after in pads):
        array = jnp.pad(array, pads) if isinstance(array, jax.Array) else np.pad(array, pads)
    return PerLayer(array) if each else array
