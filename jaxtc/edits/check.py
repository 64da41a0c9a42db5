"""Edits checked and brought to one form before anything runs: one that cannot fire is an error.

Whether their targets exist is what :mod:`jaxtc.edits.judge` says. Where targets are traced
(``vmap`` over layers, say) nothing can be raised, and the result of that variant becomes NaN.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import Edit, own_shape
from jaxtc.edits.judge import check_conflicts, judge, lengths_of, refusal, settle, sizes_of
from jaxtc.errors import EditError
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.tap.context import PerLayer
from jaxtc.tap.positions import is_traced
from jaxtc.tap.sites import BY_NAME, ORDER


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
        (the edits, whether some target is traced, so that ``judge.all_there`` must tell).

    Raises:
        EditError: a target out of range or never reached, or a value that does not fit.
        SiteError: a layer that does not exist.
    """
    checked, unsure = [], False
    for given in edits:
        edit = settled(given, config, prompts, extra)
        sizes, lengths = sizes_of(edit, config, len(prompts.tokens)), lengths_of(prompts)
        for rule, fine in judge(edit, sizes, reach, lengths, extra).items():
            if not fine:
                raise refusal(rule, edit, given, sizes, lengths, extra)
        unsure |= is_traced([getattr(edit, name) for name in edit.targets])
        checked.append(edit)
    if len(checked) > 1:
        check_conflicts(checked, config.num_hidden_layers, prompts.tokens.shape[1])
    return tuple(edit.prepared() for edit in checked), unsure


def settled(edit: Edit, config: Gemma2Config, prompts: Prompts, extra: int = 0) -> Edit:
    """The edit in its compiled form, all of it checked but for whether its targets exist."""
    _check_kind(edit)
    sizes = sizes_of(edit, config, len(prompts.tokens))
    sizes |= {"T": prompts.length, "S": prompts.length, "1": 1}
    sizes["last"] = sizes[BY_NAME[edit.site].axes.split()[-1]]
    found = _values(edit, sizes, prompts.tokens.shape[1], extra)
    for name in edit.targets:
        given = getattr(edit, name)
        if given is not None:
            found[name] = settle(edit, name, given, sizes, prompts, extra)
    if extra and edit.needs_prompt and not _prompt_only(edit):
        raise EditError(
            f"{edit} needs the whole prompt at once and cannot apply to generated tokens: give "
            "position='prompt'."
        )
    edit = dataclasses.replace(edit, **found) if found else edit
    edit.check(sizes, prompts.known_lengths)
    return edit


def of_phase(edits: Sequence[Edit], new: bool) -> tuple[Edit, ...]:
    """The edits that can apply to the prompt, or to new tokens, as far as their kind tells."""
    other = "prompt" if new else "new"
    return tuple(edit for edit in edits if getattr(edit.position, "part", None) != other)


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


def _values(edit: Edit, sizes: dict[str, int], width: int, extra: int) -> dict[str, Any]:
    """Values in one dtype a kind, padded to the bucket; refused when they do not broadcast."""
    found = {}
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if value is None or field.name in edit.targets:
            continue
        if field.name in edit.values:
            found[field.name] = _value(edit, field.name, value, sizes, width, extra)
        elif field.name in edit.amounts:
            found[field.name] = _number(edit, value)
        elif type(value) in (int, float) or _whole(value):
            # A plain number is another type to jax than an array of one.
            array = np.asarray(value)
            found[field.name] = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    return found


def _whole(value: Any) -> bool:
    """Whether this is a single whole number of NumPy's or JAX's that can be seen."""
    if not isinstance(value, np.generic | np.ndarray | jax.Array) or is_traced(value):
        return False
    return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)


def _prompt_only(edit: Edit) -> bool:
    return getattr(edit.position, "name", None) == "prompt"


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


def _value(edit: Edit, name: str, value: Any, sizes: dict[str, int], width: int, extra: int) -> Any:
    if isinstance(value, PerLayer):
        value = PerLayer(_number(edit, value.array))
        shape, array = own_shape(edit, value, sizes["L"]), value.array
    else:
        array = value = _number(edit, value)
        shape = array.shape
    site = BY_NAME[edit.site]
    letters = site.axes.split()
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
    pads, over_tokens = [(0, 0)] * array.ndim, False
    for back, size in enumerate(reversed(shape), start=1):
        if letters[-back] in "TS" and size > 1:
            pads[-back], over_tokens = (0, width - size), True
    if over_tokens and extra and not _prompt_only(edit):
        raise EditError(
            f"{edit}: its {name} of shape {shape} has an entry for each token of the prompt, and "
            "none for those that are generated: give position='prompt'."
        )
    if any(after for _, after in pads):
        array = jnp.pad(array, pads) if isinstance(array, jax.Array) else np.pad(array, pads)
    return PerLayer(array) if isinstance(value, PerLayer) else array
