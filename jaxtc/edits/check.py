"""Edits checked and brought to one form before anything runs: one that cannot fire is an error.

Whether their targets exist is decided by :mod:`jaxtc.edits.judge`. Where targets are traced
(``vmap`` over layers, say) nothing can be raised, and the result of that variant becomes NaN.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import Edit, own_shape
from jaxtc.edits.judge import Pass, check_conflicts, judge, refusal, settle
from jaxtc.errors import EditError
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.tap.columns import from_first_column
from jaxtc.tap.context import PerLayer, broadcasts
from jaxtc.tap.positions import is_traced
from jaxtc.tap.sites import BY_NAME, ORDER
from jaxtc.transcoders.transcoder import nameless


def check_edits(
    edits: Sequence[Edit],
    config: Gemma2Config,
    reach: tuple[int, int],
    prompts: Prompts,
    extra: int = 0,
) -> tuple[tuple[Edit, ...], bool]:
    """Refuse edits that could not fire, and bring them to the form that compiled programs take.

    ``config, reach, prompts, extra`` are as of :class:`jaxtc.edits.judge.Pass`.

    Returns:
        (the edits, whether some target is traced, so that only ``judge.all_there`` can tell).

    Raises:
        EditError: a target out of range or never reached, or a value that does not fit.
        SiteError: a layer that does not exist.
    """
    checked, unsure, here = [], False, Pass(config, reach, prompts.lengths, extra, prompts)
    for given in edits:
        edit = settled(given, here)
        for rule, fine in judge(edit, here).items():
            if not fine:
                raise refusal(rule, edit, given, here)
        unsure |= is_traced([getattr(edit, name) for name in edit.targets])
        checked.append(edit)
    if len(checked) > 1:
        check_conflicts(checked, config.num_hidden_layers, prompts.tokens.shape[1])
    return nameless(tuple(checked)), unsure


def settled(edit: Edit, here: Pass) -> Edit:
    """The edit in its compiled form, all of it checked but for whether its targets exist."""
    _check_kind(edit)
    sizes = here.sizes(edit) | dict.fromkeys("TS", here.prompts.length)
    found = {}
    for name in (field.name for field in dataclasses.fields(edit)):
        value = getattr(edit, name)
        if value is None:
            continue
        if name in edit.targets:
            found[name] = settle(edit, name, value, here)
        elif name in edit.values:
            found[name] = _value(edit, name, _real(edit, value), sizes, here)
        elif name in edit.amounts:
            found[name] = _real(edit, value)
        else:
            found[name] = typed(value)
    if here.extra and edit.needs_prompt and _part(edit) != "prompt":
        raise EditError(
            f"{edit} needs the whole prompt at once and cannot apply to generated tokens: give "
            "position='prompt'."
        )
    edit = dataclasses.replace(edit, **found)
    edit.check(sizes)
    return edit


def of_phase(edits: Sequence[Edit], new: bool) -> tuple[Edit, ...]:
    """The edits that can apply to the prompt, or to new tokens, as far as their kind tells."""
    other = "prompt" if new else "new"
    return tuple(edit for edit in edits if _part(edit) != other)


def _part(edit: Edit) -> str | None:
    """ "prompt" or "new", where that is all that the edit's position names."""
    return getattr(edit.position, "part", None)


def _check_kind(edit: Edit) -> None:
    """Refuse what is not an edit, is not registered, or reads a later site."""
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


def typed(value: Any) -> Any:
    """A number as an array, whose type does not depend on how it was written; others as is.

    Raises:
        EditError: an integer of more than 32 bits.
    """
    if type(value) is float:
        return np.float32(value)
    array = isinstance(value, np.generic | np.ndarray | jax.Array) and not is_traced(value)
    single = array and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    if type(value) is not int and not single:
        return value
    value = int(value)
    if not -(2**31) <= value < 2**31:
        raise EditError(f"{value} is not a 32-bit integer, as edits take them.")
    return np.int32(value)


def _real(edit: Edit, value: Any) -> Any:
    """``value`` as an array of floats, whose type does not depend on how it was written."""
    if isinstance(value, PerLayer):
        return PerLayer(_real(edit, value.array))
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


def _value(edit: Edit, name: str, value: Any, sizes: dict[str, int], here: Pass) -> Any:
    """``value``, if it broadcasts to the site, padded as the prompts are."""
    shape, site = own_shape(edit, value, sizes["L"]), BY_NAME[edit.site]
    if not broadcasts(shape, site.shape(sizes)):
        raise EditError(
            f"{edit} was given a {name} of shape {shape}, which does not broadcast to "
            f"{edit.site} [{site.axes}] = {site.shape(sizes)}."
        )
    letters = site.letters[len(site.letters) - len(shape) :]
    tokens = [letter in "TS" and n > 1 for letter, n in zip(letters, shape, strict=True)]
    if any(tokens) and here.extra and _part(edit) != "prompt":
        raise EditError(
            f"{edit}: its {name} of shape {shape} has an entry for each token of the prompt, and "
            "none for those that are generated: give position='prompt'."
        )
    missing = here.prompts.tokens.shape[1] - here.prompts.length
    starts = None if getattr(edit, "laid", False) else here.prompts.starts
    if not any(tokens) or not missing and starts is None:
        return value

    def lay(x):
        """As the prompts are: from the first column on, and padded."""
        xp = jnp if isinstance(x, jax.Array) else np
        before = x.ndim - len(shape)
        if starts is not None:
            wide = (1,) * (len(site.letters) - len(shape)) + shape
            x = x.reshape(*x.shape[:before], *wide)
            x = xp.broadcast_to(x, (*x.shape[:before], sizes["B"], *x.shape[before + 1 :]))
        over = [0] * (x.ndim - len(tokens)) + tokens
        for axis in np.flatnonzero(over):
            x = from_first_column(x, starts, int(axis), before)
        return xp.pad(x, [(0, missing * each) for each in over])

    return jax.tree.map(lay, value)
