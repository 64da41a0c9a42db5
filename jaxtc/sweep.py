"""``sweep``: thousands of variants of an edited run as one compiled program.

Any field of an edit may be an :class:`Over`: many values in place of one. Every name is an axis of
the result, and variants are all combinations of the axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.captures import Asked, Captures, understand
from jaxtc.compiles import Fact, Program, description
from jaxtc.dispatch import parameters
from jaxtc.edit import Edit
from jaxtc.errors import EditError, InputError
from jaxtc.memory import check_fits
from jaxtc.model import Gemma2
from jaxtc.prompts import Prompts, prepare
from jaxtc.run import Call, RunResult, forward, run
from jaxtc.sites import BY_NAME

# Tokens of one chunk, all variants together, by default: enough to keep the processor busy.
TOKENS = {"cpu": 512}
TOKENS_ELSEWHERE = 16384


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Over:
    """Many values for one field of an edit: ``SetTo(v, site=..., layer=Over(range(26)))``.

    Attributes:
        values: (n, ...), one entry for each variant.
        name: of the axis; the field's name by default. Fields whose axes have one name move
            together (static).
    """

    values: Any
    name: str = dataclasses.field(default="", metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.values, range | list | tuple):
            object.__setattr__(self, "values", np.asarray(self.values))

    def __len__(self):
        return np.shape(self.values)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What :func:`sweep` returns.

    Attributes:
        values: what ``of`` gave, an array or a pytree of them, with the axes in front.
        axes: the axes' names in order, and their values.
    """

    values: Any
    axes: dict[str, np.ndarray]


def last_logits(result: RunResult) -> jax.Array:
    """(B, V): the logits of each prompt's last token, the default of what a sweep keeps."""
    return result.logits


def sweep(
    model: Gemma2,
    tokens: Any,
    edits: Sequence[Edit],
    *,
    of: Callable[[RunResult], Any] = last_logits,
    lengths: Any = None,
    capture: Captures = (),
    logits: str | None = "last",
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Run every combination of the values that edits have :class:`Over` axes of.

    With ``edits=[Zero(site="mlp_out", layer=Over(range(26)), position=Over(range(16)))]`` these are
    416 ablations in one compiled program, run in chunks. Layers that no edit of a chunk has
    touched yet are the same in all its variants: they are computed once for the whole sweep, unless
    captures ask for them.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokens: as for :func:`jaxtc.run`.
        edits: as for :func:`jaxtc.run`, any of whose fields may be :class:`Over`.
        of: what to keep of each variant's result: a function from :class:`RunResult` to an array or
            a pytree of them, run inside the program. A plain function is part of the compile key
            (define it once); where it is a pytree, as those of :mod:`jaxtc.scores` are, its arrays
            are data. The last token's logits by default.
        lengths: as for :func:`jaxtc.run`.
        capture: as for :func:`jaxtc.run`, for ``of`` to use.
        logits: as for :func:`jaxtc.run`, the last token's by default.
        chunk: how many variants at once; by default as many as keep the processor busy.
        progress: called with (variants done, variants in all) after each chunk.

    Returns:
        The values with one axis for each name, in the order in which the edits have them.

    Raises:
        InputError, SiteError: as for :func:`jaxtc.run`; or no edit has an axis.
        EditError: as for :func:`jaxtc.run`, of the first value along an axis that does not fit; or
            axes of one name that differ in length. A *combination* that names what is not there (a
            position that only other rows have, say) gives NaN.
        CapacityError: the results would not fit in memory.
    """
    config = model.config
    edits = [_named(edit) for edit in edits]
    axes = _axes(edits)
    prompts = prepare(tokens, config, lengths)
    asked = understand(capture, config.num_hidden_layers)
    for name, values in axes.items():
        for index in range(len(values)):
            Call.of(config, prompts, asked, _at(edits, {name: index}), logits)
    edits = [edit.prepared() for edit in edits]
    # A plain function is a leaf, which no program takes.
    of = jax.tree_util.Partial(of) if jax.tree_util.all_leaves([of]) else of
    shape = tuple(map(len, axes.values()))
    places = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=1)
    chunk = _chunk(chunk, prompts, len(places), parameters(model)[0])
    first = _first_layers(edits, axes, places, config.num_hidden_layers)
    resume = None
    if not asked.addresses and not asked.reducers and first.max() > 0 and logits is not None:
        clean = run(
            model, prompts.tokens, lengths=prompts.lengths, capture="resid_pre", logits=None
        )
        resume = clean.activations["resid_pre"]
    # Variants that begin at the same layer go together.
    order = np.argsort(first, kind="stable")
    plan = _Plan(config, tuple(axes), logits, prompts.length)
    leaves, found = parameters(model), []
    facts = functools.partial(_facts, plan, leaves, prompts, asked, edits, chunk)
    for start in range(0, len(order), chunk):
        ids = order[start : start + chunk]
        ids = np.pad(ids, (0, chunk - len(ids)), mode="edge")
        begin = np.int32(first[ids].min())
        kept = _swept(
            plan, leaves, prompts.tokens, prompts.lengths, asked, edits, of, resume, begin,
            places[ids], describe=facts,
        )  # fmt: skip
        if not found:
            each = sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) // chunk
            check_fits(2 * each * len(order), "the results of this sweep")
        found.append(kept)
        if progress is not None:
            jax.block_until_ready(kept)
            progress(min(start + chunk, len(order)), len(order))
    back = np.argsort(order)

    def join(*parts):
        return jnp.concatenate(parts)[back].reshape(*shape, *parts[0].shape[1:])

    values = jax.tree.map(join, *found)
    return Sweep(values, {name: np.asarray(over) for name, over in axes.items()})


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static half of a sweep."""

    config: Any
    axes: tuple[str, ...]
    logits: str | None
    length: int


def _variants(plan: _Plan, leaves, tokens, lengths, asked, edits, of, resume, begin, places):
    """What ``of`` gives of each variant of a chunk; places: (chunk, axes) indices."""
    prompts = Prompts(tokens, lengths, None, plan.length)

    def one(place):
        chosen = _at(edits, dict(zip(plan.axes, place, strict=True)))
        call = Call.of(plan.config, prompts, asked, chosen, plan.logits)
        known = None if resume is None else (begin, resume)
        return of(call.result(forward(*call.arguments(leaves), resume=known)))

    return jax.vmap(one)(places)


_swept = Program("sweep", _variants, static_argnums=0)


def _facts(plan: _Plan, leaves, prompts: Prompts, asked: Asked, edits, chunk: int) -> list[Fact]:
    return description(
        plan.config, leaves, batch=len(prompts.tokens), length=prompts.length,
        padded=prompts.tokens.shape[1], captures=asked.addresses, edits=edits,
        reducers=asked.reducers, logits=plan.logits, axes=plan.axes, chunk=chunk,
    )  # fmt: skip


def _named(edit: Edit) -> Edit:
    """The edit with its axes named, as compiled programs take it."""
    if not isinstance(edit, Edit):
        raise EditError(f"edits must be edits such as jaxtc.Add(...), got {type(edit).__name__}.")
    found = {
        field.name: Over(over.values, over.name or field.name)
        for field in dataclasses.fields(edit)
        if isinstance(over := getattr(edit, field.name), Over)
    }
    return dataclasses.replace(edit, **found) if found else edit


def _fields(edit: Edit) -> dict[str, Over]:
    """The fields that have an axis."""
    values = {field.name: getattr(edit, field.name) for field in dataclasses.fields(edit)}
    return {name: value for name, value in values.items() if isinstance(value, Over)}


def _axes(edits: Sequence[Edit]) -> dict[str, Any]:
    """Values along each axis, by name."""
    axes: dict[str, Any] = {}
    for edit in edits:
        for field, over in _fields(edit).items():
            values = axes.setdefault(over.name, over.values)
            if np.ndim(over.values) < 1 or len(over) < 1:
                raise EditError(f"{edit}: {field} is Over nothing; give one value or more.")
            if len(values) != len(over):
                raise EditError(
                    f"{edit}: the axis {over.name!r} has {len(over)} values in {field} and "
                    f"{len(values)} elsewhere. Fields of one name move together; give the axis "
                    "another name, Over(values, 'name'), to combine them all."
                )
    if not axes:
        raise InputError(
            "No edit has an axis to sweep over: give one, such as layer=jaxtc.Over(range(26))."
        )
    return axes


def _at(edits: Sequence[Edit], place: Mapping[str, Any]) -> list[Edit]:
    """The edits of one variant; axes that are not named are at their first value."""

    def pick(over: Over) -> Any:
        index = place.get(over.name, 0)
        return over.values[index] if isinstance(index, int) else jnp.asarray(over.values)[index]

    return [
        dataclasses.replace(edit, **{name: pick(over) for name, over in _fields(edit).items()})
        for edit in edits
    ]


def _first_layers(
    edits: Sequence[Edit], axes: Mapping[str, Any], places: np.ndarray, layers: int
) -> np.ndarray:
    """(variants,) the first layer at which each variant differs from the clean run.

    -1 when that is at the embedding; the last layer for what comes after it.
    """
    first = np.full(len(places), layers - 1)
    for edit in edits:
        if edit.site == "embed":
            found = -1
        elif not BY_NAME[edit.site].per_layer:
            continue
        elif isinstance(edit.layer, Over):
            named = np.asarray(edit.layer.values).reshape(len(edit.layer), -1)
            named = np.where(named < 0, named + layers, named).min(1)
            found = named[places[:, list(axes).index(edit.layer.name)]]
        elif edit.layer is not None:
            named = np.asarray(edit.layer)
            found = np.where(named < 0, named + layers, named).min()
        else:
            found = min(edit.layers or (0,))
        first = np.minimum(first, found)
    return first


def _chunk(given: int | None, prompts: Prompts, variants: int, weight: jax.Array) -> int:
    """How many variants run at once, all chunks alike."""
    if given is not None and (not isinstance(given, int) or given < 1):
        raise InputError(f"chunk is {given!r}, expected a whole number of at least 1.")
    platform = next(iter(weight.devices())).platform
    most = given or max(1, TOKENS.get(platform, TOKENS_ELSEWHERE) // prompts.tokens.size)
    return -(-variants // -(-variants // most))
