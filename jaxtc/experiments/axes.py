"""Axes of a sweep: fields of edits that hold many values in place of one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import Edit
from jaxtc.edits.check import check_edits, settled, typed
from jaxtc.edits.judge import Pass, judge, settle
from jaxtc.errors import EditError, InputError
from jaxtc.helpers import pytree
from jaxtc.tap.positions import is_traced, one_array
from jaxtc.transcoders.transcoder import nameless

KEYS = jax.dtypes.prng_key


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Over:
    """Many values in place of one: ``SetTo(v, site="mlp_out", layer=Over(range(26)))``.

    Attributes:
        values: (n, ...), one entry for each variant: a range, a list or an array.
        name: of the axis; the name of the edit's field by default. Axes of one name advance
            together, in one edit or in several: ``layer=Over(range(26))`` twice is one axis, and
            ``Over(range(26), "from")`` another (static).
    """

    values: Any
    name: str = dataclasses.field(default="", metadata={"static": True})

    def __post_init__(self):
        object.__setattr__(self, "values", one_array(self.values))

    def __len__(self):
        return np.shape(self.values)[0]


def _is_over(node: Any) -> bool:
    return isinstance(node, Over)


def _replaced(edit: Any, function: Callable[[Over], Any]) -> Any:
    """The edit with ``function`` of each axis in its place."""
    swap = lambda node: function(node) if _is_over(node) else node  # noqa: E731
    return jax.tree.map(swap, edit, is_leaf=_is_over)


def overs_of(edit: Edit) -> list[tuple[str, Over]]:
    """(the edit's field, the axis) for each axis in an edit, in order."""
    found = jax.tree_util.tree_leaves_with_path(edit, is_leaf=_is_over)
    return [(path[0].name, leaf) for path, leaf in found if _is_over(leaf)]


def named(edit: Edit) -> Edit:
    """The edit with its axes named, as compiled programs take it."""
    if not isinstance(edit, Edit):
        raise EditError(f"edits must be edits such as jaxtc.Add(...), got {type(edit).__name__}.")
    swept = {field for field, _ in overs_of(edit)}
    for field in dataclasses.fields(edit):
        if _is_over(getattr(edit, field.name)) and field.name not in swept:
            raise EditError(
                f"{type(edit).__name__}: {field.name} is static, a program of its own for each "
                "value, and cannot be Over several. Sweep once for each."
            )

    def name(path, leaf):
        if not _is_over(leaf):
            return leaf
        dtype = getattr(leaf.values, "dtype", np.dtype(object))
        numbers = any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_, KEYS))
        if not numbers or np.ndim(leaf.values) < 1 or len(leaf) < 1:
            raise EditError(
                f"{type(edit).__name__}: {path[0].name} is Over {leaf.values!r}, expected numbers "
                "(or booleans, or keys): a range, a list or an array with one or more along its "
                "first axis."
            )
        return Over(leaf.values, leaf.name or path[0].name)

    return jax.tree_util.tree_map_with_path(name, edit, is_leaf=_is_over)


def axes_of(edits: Sequence[Edit]) -> dict[str, Any]:
    """Values along each axis, by name."""
    axes: dict[str, Any] = {}
    for edit in edits:
        for field, over in overs_of(edit):
            values = axes.setdefault(over.name, over.values)
            if len(values) != len(over):
                raise EditError(
                    f"{edit}: the axis {over.name!r} has {len(over)} values in {field} and "
                    f"{len(values)} elsewhere. Axes of one name advance together; give this one "
                    "another name, Over(values, 'name'), to combine them all."
                )
    if not axes:
        raise InputError(
            "No edit has an axis to sweep over: give one, such as layer=jaxtc.Over(range(26))."
        )
    return axes


def at_place(edit: Any, place: Mapping[str, Any]) -> Any:
    """The edit of one variant; axes that are not named are at their first value."""
    return _replaced(edit, lambda over: over.values[place.get(over.name, 0)])


def prepared(edit: Edit) -> Edit:
    """As compiled programs take it, its axes kept."""
    leaves, structure = jax.tree.flatten(nameless(at_place(edit, {})))
    mine = jax.tree.leaves(edit, is_leaf=_is_over)
    kept = [own if _is_over(own) else typed(new) for own, new in zip(mine, leaves, strict=True)]
    return jax.tree.unflatten(structure, kept)


def check_axes(edit: Edit, here: Pass) -> None:
    """Refuse the first value along an axis that fits in no combination with the others.

    Raises:
        EditError, SiteError: as :func:`jaxtc.edits.check.check_edits`.
    """
    edit = _replaced(edit, _on_host)
    overs = overs_of(edit)
    axes = {over.name: len(over) for _, over in overs}
    if not axes:
        check_edits([edit], here.config, here.reach, here.prompts)
        return
    first = settled(at_place(edit, {}), here)
    if type(edit).check is not Edit.check:
        for name in {over.name: None for field, over in overs if field not in edit.targets}:
            for index in range(1, axes[name]):
                settled(at_place(edit, {name: index}), here)
    targets = {}
    for field in {field: None for field, _ in overs if field in edit.targets}:
        value, mine = getattr(edit, field), {over.name for name, over in overs if name == field}
        lead = [size if name in mine else 1 for name, size in axes.items()]
        places = [dict(zip(axes, place, strict=True)) for place in np.ndindex(*lead)]
        each = [settle(first, field, at_place(value, place), here) for place in places]
        targets[field] = jax.tree.map(functools.partial(_stacked, lead), *each)
    found = judge(dataclasses.replace(first, **targets), here)
    problems = sum(np.broadcast_to(~fine, (*axes.values(),)).astype(int) for fine in found.values())
    for axis, name in enumerate(axes):
        least = problems.min(tuple(i for i in range(len(axes)) if i != axis))
        if least.any():
            index = int(np.argmax(least > 0))
            # Of its combinations the one with the fewest problems tells what is wrong with it.
            others = np.take(problems, [index], axis)
            place = dict(zip(axes, np.unravel_index(others.argmin(), others.shape), strict=True))
            variant = at_place(edit, place | {name: index})
            check_edits([variant], here.config, here.reach, here.prompts)


def _stacked(lead: list[int], *arrays: Any) -> Any:
    """Values of one target, a variant each, as one array with the axes of ``lead`` in front."""
    xp = jnp if is_traced(arrays) else np
    arrays = [xp.atleast_1d(x) for x in arrays]
    return xp.stack(arrays).reshape(*lead, *arrays[0].shape)


def _on_host(over: Over) -> Over:
    """With its values as NumPy, whose entries are cheap; keys and traced ones stay."""
    stays = is_traced(over) or jnp.issubdtype(over.values.dtype, KEYS)
    return over if stays else Over(np.asarray(over.values), over.name)
