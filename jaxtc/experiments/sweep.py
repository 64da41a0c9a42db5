"""``sweep``: thousands of variants of an edited run as one compiled program.

Any array or number in an edit may be an :class:`Over`: many values in place of one. Every name is
an axis of the result, and variants are all combinations of the axes.

Axis letters: L layers, B batch, T tokens, W tokens with the padding up to a bucket, D hidden, V
vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.captures.activations import Activations
from jaxtc.captures.request import Captures, check_logits, understand
from jaxtc.edits.base import Edit, spares
from jaxtc.edits.judge import Pass
from jaxtc.errors import InputError
from jaxtc.experiments.axes import Over, at_place, axes_of, check_axes, named, overs_of, prepared
from jaxtc.experiments.scores import as_pytree
from jaxtc.helpers import explicit_transfers, pytree, whole_number
from jaxtc.interchange import owned
from jaxtc.memory.needs import check_fits
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import Prompts, among_ids, prepare
from jaxtc.programs.call import Call, RunResult, forward
from jaxtc.programs.leaves import parameters, placed
from jaxtc.programs.program import Program
from jaxtc.programs.run import run
from jaxtc.sharding.mesh import MeshLike
from jaxtc.sharding.placement import Placement
from jaxtc.sharding.rules import DATA
from jaxtc.tap.columns import from_first_column
from jaxtc.tap.sites import BY_NAME

# Tokens of one chunk, all variants together, by default: enough to keep the processor busy.
TOKENS = {"cpu": 512}
TOKENS_ELSEWHERE = 16384


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What :func:`sweep` returns.

    Attributes:
        values: what ``of`` gave, an array or a pytree of them, with the axes in front.
        axes: the axes' names in order, and the values along each, (n, ...).
        left_out: (B, T) booleans: special tokens, if any edit spares them (``RunResult.left_out``).
    """

    values: Any
    axes: dict[str, Any]
    left_out: Any = None


def logits_of(result: RunResult) -> jax.Array | None:
    """The logits, the default of what a sweep keeps: (B, V), or (B, T, V) if all are asked for."""
    return result.logits


@explicit_transfers
def sweep(
    model: Gemma2,
    tokens: Any,
    edits: Sequence[Edit],
    *,
    of: Callable[[RunResult], Any] = logits_of,
    lengths: Any = None,
    attention_mask: Any = None,
    tokenizer: Any = None,
    capture: Captures = (),
    logits: str | None = "last",
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    mesh: MeshLike | None = None,
) -> Sweep:
    """Run every combination of the values that edits have :class:`Over` axes of.

    With ``edits=[Zero(site="mlp_out", layer=Over(range(26)), position=Over(range(16)))]`` these are
    416 ablations in one compiled program, run in chunks. Edits without an axis are part of every
    variant. Layers before the first one that an axis changes are computed once for the whole sweep,
    unless captures ask for them.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokens, lengths, attention_mask, tokenizer: as for :func:`jaxtc.run`.
        edits: as for :func:`jaxtc.run`; any array or number in them may be :class:`Over`.
        of: what to keep of each variant's result: a function from :class:`RunResult` to an array or
            a pytree of them, run inside the program. A plain function is part of the compile key
            (define it once); where it is a pytree, as those of :mod:`jaxtc.scores` are, its arrays
            are data. The logits by default.
        capture, logits: as for :func:`jaxtc.run`, for ``of`` to use.
        chunk: how many variants at once; by default as many as keep the processor busy.
        progress: called with (variants done, variants in all) after each chunk.
        mesh: that the model lies on, if it is given at all, see :func:`jaxtc.run`. The variants of
            a chunk are divided over its axis ``data``.

    Returns:
        The values with an axis for each name: those of the first edit first, within an edit by
        layer, position, row, head, coordinate, key and then its own fields.

    Raises:
        InputError, SiteError: as for :func:`jaxtc.run`; or no edit has an axis, or ``of`` keeps
            nothing.
        EditError: as for :func:`jaxtc.run`, of the first value along an axis that never fits; or
            axes of one name that differ in length. A *combination* whose target does not exist (a
            position that only other rows have) gives NaN, or -1 in integers.
        CapacityError: the results would not fit in memory.
        ShardingError: as :func:`jaxtc.run`.
    """
    config, layers = model.config, model.config.num_hidden_layers
    check_logits(logits)
    prompts = prepare(tokens, config, lengths, attention_mask=attention_mask, tokenizer=tokenizer)
    of = as_pytree(of, config.vocab_size, len(prompts.tokens))
    asked = understand(capture, layers)
    key = Call.of(config, prompts, asked, (), logits).key
    here = Pass(config, key.reach, prompts.lengths, prompts=prompts)
    edits = [named(edit) for edit in edits]
    axes = axes_of(edits)
    for edit in edits:
        check_axes(edit, here)
    edits = [prepared(edit) for edit in edits]
    shape = tuple(map(len, axes.values()))
    places = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=1)
    leaves = parameters(model)
    # The rows of a variant stay together.
    own = placed(model, leaves, mesh)
    place = None if own is None else own.but(batch=None)
    chunk = _chunk(chunk, prompts, len(places), leaves[0], 1 if place is None else place.rows)
    first, resume = _first_layers(edits, axes, places, layers), None
    # What is carried from layer to layer begins at the first.
    carried = any(edit.carries for edit in edits)
    if not asked and not carried and logits is not None and first.max() > 0:
        same = [edit for edit in edits if not overs_of(edit)]
        asks = dict(edits=same, capture=["embed", "resid_post"], logits="last")
        kept = run(model, prompts, **asks).activations
        resume = _entering(kept, prompts.tokens.shape[1], prompts.starts)
    # Variants that begin at the same layer go together.
    order = np.argsort(first, kind="stable")
    plan = _Plan(config, tuple(axes), logits, prompts.length, place, key.prompt_lengths)
    rows = prompts.tokens, prompts.lengths, prompts.starts
    whole, found = (*rows, asked, edits, of, resume), []
    if place is not None:
        whole = place.put_whole(whole)
    for start in range(0, len(order), chunk):
        ids = order[start : start + chunk]
        ids = np.pad(ids, (0, chunk - len(ids)), mode="edge")
        begin = np.int32(first[ids].min())
        these = places[ids]
        if place is not None:
            begin, these = place.put_whole(begin), own.put_rows(these)
        kept = _swept(plan, leaves, *whole, begin, these)
        if not found:
            _check_results(kept, len(order) / chunk)
        found.append(kept)
        if progress is not None:
            jax.block_until_ready(kept)
            progress(min(start + chunk, len(order)), len(order))
    axes = {name: owned(values) for name, values in axes.items()}  # a whole dict would be sorted
    left_out = spares(edits) & among_ids(prompts.given, config.special_ids) & prompts.mask
    return Sweep(_join(found, np.argsort(order), shape), axes, left_out)


@functools.partial(jax.jit, static_argnums=2)
def _join(found: Sequence[Any], back: np.ndarray, shape: tuple[int, ...]) -> Any:
    """The chunks' results in the order of the axes."""

    def join(*parts):
        return jnp.concatenate(parts)[back].reshape(*shape, *parts[0].shape[1:])

    return jax.tree.map(join, *found)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static half of a sweep."""

    config: Any
    axes: tuple[str, ...]
    logits: str | None
    length: int
    placement: Placement | None
    prompt_lengths: tuple[int, ...] | None


def _variants(
    plan: _Plan, leaves, tokens, lengths, starts, asked, edits, of, resume, begin, places
):
    """What ``of`` gives of each variant of a chunk; places: (chunk, axes) indices."""
    prompts = Prompts(tokens, lengths, plan.length, starts)
    divided = plan.placement is not None and DATA in plan.placement.mesh.shape

    def one(place):
        axes = dict(zip(plan.axes, place, strict=True))
        chosen = [at_place(edit, axes) for edit in edits]
        call = Call.of(
            plan.config, prompts, asked, chosen, plan.logits, plan.placement, plan.prompt_lengths
        )
        known = None if resume is None else (begin, resume)
        return of(call.result(forward(*call.arguments(leaves), resume=known)))

    return jax.vmap(one, spmd_axis_name=DATA if divided else None)(places)


_swept = Program("sweep", _variants, static_argnums=0)


def _check_results(kept: Any, chunks: float) -> None:
    """Refuse what keeps nothing, and what would not fit when all chunks are there and joined."""
    arrays = jax.tree.leaves(kept)
    if not arrays:
        raise InputError("`of` gave no array: return what to keep of a variant, or ask for logits.")
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    check_fits(int(2 * size * chunks), "What this sweep keeps")


@functools.partial(jax.jit, static_argnums=1)
def _entering(kept: Activations, width: int, starts: Any) -> jax.Array:
    """(L, B, W, D) what enters each block, of a run's embedding and ``resid_post``."""
    # Not resid_pre: a variant may still edit that site.
    entering = jnp.stack([kept["embed"], *kept["resid_post"][:-1]])
    entering = from_first_column(entering, starts, 2, rows=1)
    return jnp.pad(entering, [(0, 0), (0, 0), (0, width - entering.shape[2]), (0, 0)])


def _first_layers(
    edits: Sequence[Edit], axes: Mapping[str, Any], places: np.ndarray, layers: int
) -> np.ndarray:
    """(variants,) the first layer at which an edit with an axis may change something.

    -1 when that is at the embedding; the last layer for what comes after it.
    """
    first = np.full(len(places), layers - 1)
    for edit in filter(overs_of, edits):
        swept = isinstance(edit.layer, Over)
        if edit.site == "embed":
            found = -1
        elif not BY_NAME[edit.site].per_layer:
            continue
        elif edit.layer is None:
            found = min(edit.layers or (0,))
        else:
            named = np.asarray(edit.layer.values if swept else edit.layer) % layers
            found = named.reshape(len(named) if swept else 1, -1).min(1)
        if swept:
            found = found[places[:, list(axes).index(edit.layer.name)]]
        first = np.minimum(first, found)
    return first


def _chunk(given: int | None, prompts: Prompts, variants: int, weight: jax.Array, rows: int) -> int:
    """How many variants run at once, all chunks alike and a multiple of ``rows`` devices."""
    if given is not None:
        whole_number("chunk", given, 1)
    platform = next(iter(weight.devices())).platform
    most = given or rows * max(1, TOKENS.get(platform, TOKENS_ELSEWHERE) // prompts.tokens.size)
    even = -(-variants // -(-variants // most))
    return -(-even // rows) * rows
