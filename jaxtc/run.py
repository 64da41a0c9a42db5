"""``run``: one compiled forward pass with captures and edits."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtc.activations import Activations
from jaxtc.captures import Captures, understand
from jaxtc.config import Gemma2Config
from jaxtc.dispatch import parameters, rebuild
from jaxtc.edit import Edit
from jaxtc.errors import InputError
from jaxtc.intercept import Tap
from jaxtc.model import Gemma2
from jaxtc.prompts import prepare
from jaxtc.sites import BY_NAME, ORDER, Address, Site
from jaxtc.targets import all_fire, check_edits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunResult:
    """What :func:`run` returns.

    Attributes:
        logits: (B, T, V) float32 for "all", (B, V) for "last", None otherwise.
        activations: what was captured, by address; aliases work as keys.
        lengths: (B,) int32; in rows shorter than T, what lies past the length is padding.
        length: T.
    """

    logits: jax.Array | None
    activations: Activations
    lengths: jax.Array
    length: int = dataclasses.field(metadata={"static": True})

    @property
    def mask(self) -> jax.Array:
        """(B, T) booleans, true on real tokens."""
        return jnp.arange(self.length)[None] < self.lengths[:, None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call: with the shapes, the key under which a program is compiled."""

    config: Gemma2Config
    captures: tuple[Address, ...]
    logits: str | None
    reach: tuple[int, int]
    unsure: bool


def run(
    model: Gemma2,
    tokens: Any,
    *,
    lengths: Any = None,
    capture: Captures = (),
    edits: Sequence[Edit] = (),
    logits: Literal["all", "last"] | None = "all",
) -> RunResult:
    """Run prompts through the model once, keeping what is captured and applying edits.

    Compiled once per combination of captured sites, kinds of edits and padded length; other token
    ids, other lengths of the same bucket, and other values, layers, positions, rows or features of
    an edit run the same program (:func:`jaxtc.compiles` counts). Layers past the last one asked for
    are not run when ``logits`` is None.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokens: one prompt's ids, a list of prompts of any lengths, or an array (T,) or (B, T)
            padded on the right.
        lengths: (B,) real tokens of each row, when ``tokens`` is an array with padding.
        capture: addresses such as ``"layers.20.mlp_in_normed"`` (``"mlp_out"`` means every layer)
            and reducers of :mod:`jaxtc.reducers`, which keep less; one, several, or a mapping from
            names of your own.
        edits: see :mod:`jaxtc.edits`; applied in this order.
        logits: of every token, of each prompt's last token only, or none.

    Raises:
        InputError: tokens the model cannot run, or nothing asked for.
        SiteError: an address that names nothing here.
        EditError: an edit that does not fit or could never fire. Where its target is only known
            inside a trace (``vmap`` over layers, say) the result is NaN instead.
    """
    config = model.config
    if logits not in ("all", "last", None):
        raise InputError(f"logits is {logits!r}, expected 'all', 'last' or None.")
    layers = config.num_hidden_layers
    asked = understand(capture, layers)
    if logits is None and not asked:
        raise InputError("Nothing was asked for: give capture=[...], or logits='all' or 'last'.")
    reach = (layers, len(ORDER)) if logits else asked.reach(layers)
    prompts = prepare(tokens, config, lengths)
    length, width = prompts.length, prompts.tokens.shape[1]
    checked, unsure = check_edits(edits, config, reach, prompts)
    reducers = asked.checked(config, prompts)
    plan = Plan(config, asked.addresses, logits, reach, unsure)
    out, arrays, reduced = _run(
        plan, parameters(model), prompts.tokens, prompts.lengths, checked, reducers
    )
    if length < width:
        arrays = {a: _cut(BY_NAME[a.site], x, length) for a, x in arrays.items()}
        reduced = [r.cut(kept, length) for r, kept in zip(reducers, reduced, strict=True)]
        out = _cut(BY_NAME["logits"], out, length) if logits == "all" else out
    named = dict(zip(asked.names, reduced, strict=True))
    activations = Activations(arrays, layers, named, asked.aliases)
    return RunResult(out, activations, prompts.lengths, length)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, leaves, tokens, lengths, edits, reducers):
    """Logits, captured arrays and what reducers kept, all still padded."""
    model, layers = rebuild(plan.config, leaves), plan.config.num_hidden_layers
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    tap = Tap(plan.captures, edits, positions, lengths, reducers=reducers)
    # Editing or capturing the logits needs them all, whatever is returned.
    named = {a.site for a in (*plan.captures, *edits)} | {r.site.name for r in reducers}
    at = lengths - 1 if plan.logits == "last" and "logits" not in named else None
    depth = plan.reach[0] + 1 if plan.reach[0] < layers else None
    out, _ = model(tokens, positions=positions, tap=tap, depth=depth, logits_at=at)
    if plan.logits is None:
        out = None
    elif plan.logits == "last":
        last = lengths[:, None, None] - 1
        out = (out if at is not None else jnp.take_along_axis(out, last, axis=1))[:, 0]
    kept = out, tap.activations, tap.stacked()
    if plan.unsure:
        fine = all_fire(edits, plan.config, plan.reach, lengths)
        kept = jax.tree.map(lambda x: jnp.where(fine, x, nothing(x)), kept)
    return kept


def nothing(x: jax.Array) -> jax.Array:
    """NaN in the dtype of ``x``; -1 where that holds whole numbers."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(jnp.nan if floating else -1).astype(x.dtype)


def _cut(site: Site, x: jax.Array, length: int) -> jax.Array:
    """``x`` without the padding up to the bucket."""
    letters = site.axes.split()
    return x[tuple(slice(length) if letter in "TS" else slice(None) for letter in letters)]
