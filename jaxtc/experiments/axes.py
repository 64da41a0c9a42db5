"""Axes of a sweep: fields of edits that hold many values in place of one."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import TARGETS, Edit
from jaxtc.errors import EditError, InputError, JaxtcError
from jaxtc.tap.positions import is_traced, one_array

# Kinds of values that a program takes.
NUMBERS = (jnp.number, jnp.bool_, jax.dtypes.prng_key)


# Whether a value of one of these is there can depend on that of another.
TOGETHER = {"position", "row", "key", "from_position", "from_row"}
# Ids that are there from 0 on: when the ends of an axis fit, all of it does.
IDS = {"feature", "coordinate"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Over:
    """Many values in place of one: ``SetTo(v, site="mlp_out", layer=Over(range(26)))``.

    Attributes:
        values: (n, ...), one entry for each variant: a range, a list or an array.
        name: of the axis; the name of the edit's field by default. All that has one name moves
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
        numbers = any(map(functools.partial(jnp.issubdtype, dtype), NUMBERS))
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
                    f"{len(values)} elsewhere. All that has one name moves together; give the axis "
                    "another name, Over(values, 'name'), to combine them all."
                )
    if not axes:
        raise InputError(
            "No edit has an axis to sweep over: give one, such as layer=jaxtc.Over(range(26))."
        )
    return axes


def at_place(edit: Edit, place: Mapping[str, Any]) -> Edit:
    """The edit of one variant; axes that are not named are at their first value."""

    def pick(leaf):
        return leaf.values[place.get(leaf.name, 0)] if _is_over(leaf) else leaf

    return jax.tree.map(pick, edit, is_leaf=_is_over)


def prepared(edit: Edit) -> Edit:
    """As compiled programs take it, its axes kept."""
    leaves, structure = jax.tree.flatten(at_place(edit, {}).prepared())
    mine = jax.tree.leaves(edit, is_leaf=_is_over)
    kept = [own if _is_over(own) else new for own, new in zip(mine, leaves, strict=True)]
    return jax.tree.unflatten(structure, kept)


def check_axes(edit: Edit, check: Callable[[Edit], Any]) -> None:
    """Check an edit at each value of each of its axes, the others at their first.

    Where what is there depends on several axes, a value is fine if it is with some of the others.
    """
    overs = [(field, Over(_known(over.values), over.name)) for field, over in overs_of(edit)]
    if not overs:
        check(edit)
        return
    known = iter([over for _, over in overs])
    edit = jax.tree.map(lambda x: next(known) if _is_over(x) else x, edit, is_leaf=_is_over)
    done = _all_there(edit, check)
    sizes = {over.name: len(over) for field, over in overs if field not in done}
    joint = {over.name: len(over) for field, over in overs if field in TOGETHER}
    ends = {over.name: _ends(over.values) for field, over in overs if field in IDS}
    for name, size in sizes.items():
        alone = sum(over.name == name for _, over in overs) == 1
        for index in ends.get(name, range(size)) if alone else range(size):
            try:
                check(at_place(edit, {name: index}))
            except JaxtcError:
                if name not in joint or not _somewhere(edit, check, joint, name, index):
                    raise


def _all_there(edit: Edit, check: Callable[[Edit], Any]) -> set[str]:
    """The targets whose axes are fine: an edit that names all their values at once is.

    That is one check in place of hundreds; when it fails, they are checked one by one.
    """
    plain = {
        field: np.unique(over.values)
        for field in TARGETS
        if _is_over(over := getattr(edit, field))
        and isinstance(over.values, np.ndarray)
        and over.values.ndim == 1
        and over.values.dtype.kind in "iu"
    }
    try:
        check(at_place(dataclasses.replace(edit, **plain), {}))
    except JaxtcError:
        return set()
    return set(plain)


def _ends(values: Any) -> Sequence[int]:
    """Where the lowest and the highest are, of whole numbers; else everywhere."""
    if is_traced(values) or values.ndim > 1 or values.dtype.kind not in "iu":
        return range(len(values))
    return [int(values.argmin()), int(values.argmax())]


def _somewhere(edit: Edit, check, joint: Mapping[str, int], name: str, index: int) -> bool:
    """Whether a value fits with some combination of the others."""
    ranges = [range(size) if other != name else [index] for other, size in joint.items()]
    for place in itertools.product(*ranges):
        try:
            check(at_place(edit, dict(zip(joint, place, strict=True))))
        except JaxtcError:
            continue
        return True
    return False


def _known(values: Any) -> Any:
    """As NumPy, whose single entries are cheap to take; keys and traced values as they are."""
    if is_traced(values) or jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        return values
    return np.asarray(values)
