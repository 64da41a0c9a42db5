"""``run``: one compiled forward pass with captures and edits."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtc.activations import Activations
from jaxtc.config import Gemma2Config
from jaxtc.errors import InputError, SiteError
from jaxtc.intercept import Edit, Tap
from jaxtc.model import Gemma2
from jaxtc.prompts import prepare
from jaxtc.sites import BY_NAME, ORDER, Address, Site, resolve
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
    length: int
    unsure: bool


def run(
    model: Gemma2,
    tokens: Any,
    *,
    lengths: Any = None,
    capture: Sequence[str | Address] | str = (),
    edits: Sequence[Edit] = (),
    logits: Literal["all", "last"] | None = "all",
) -> RunResult:
    """Run prompts through the model once, keeping what is captured and applying edits.

    Compiled once per combination of captured sites, kinds of edits and padded length (with edits:
    length); other token ids, and other values, layers, positions or rows of an edit, run the same
    program. Layers past
    the last one asked for are not run when ``logits`` is None.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokens: one prompt's ids, a list of prompts of any lengths, or an array (T,) or (B, T)
            padded on the right.
        lengths: (B,) real tokens of each row, when ``tokens`` is an array with padding.
        capture: addresses such as ``"layers.20.mlp_in_normed"``; ``"mlp_out"`` means every layer.
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
    asked = [capture] if isinstance(capture, str | Address) else list(capture)
    layers = config.num_hidden_layers
    captures = tuple(sorted({a for name in asked for a in resolve(name, layers)}, key=str))
    if logits is None and not captures:
        raise InputError("Nothing was asked for: give capture=[...], or logits='all' or 'last'.")
    reach = (
        (layers, len(ORDER)) if logits else max(map(functools.partial(_reach, layers), captures))
    )
    prompts = prepare(tokens, config, lengths)
    batch, width = prompts.tokens.shape
    checked, unsure = check_edits(edits, layers, reach, prompts.known_lengths, batch)
    # Only edits need to know where the prompts ended before padding.
    plan = Plan(config, captures, logits, reach, prompts.length if edits else width, unsure)
    out, arrays = _run(plan, parameters(model), prompts.tokens, prompts.lengths, checked)
    if prompts.length < width:
        arrays = {a: _cut(BY_NAME[a.site], x, prompts.length) for a, x in arrays.items()}
        out = _cut(BY_NAME["logits"], out, prompts.length) if logits == "all" else out
    return RunResult(out, Activations(arrays, layers), prompts.lengths, prompts.length)


def _reach(layers: int, address: Address) -> tuple[int, int]:
    """How far the pass must go for an address: (layer, place in the layer)."""
    if address.layer is not None:
        return address.layer, ORDER[address.site]
    return (-1 if address.site == "embed" else layers), ORDER[address.site]


def parameters(model: Gemma2) -> list[jax.Array]:
    """The model's arrays in a fixed order: what compiled programs take.

    Read anew at each call, so a parameter that was replaced is never stale.

    Raises:
        SiteError: the model's structure was changed after it was built.
    """
    leaves, structure = jax.tree.flatten(model)
    if structure != _structure(model.config):
        raise SiteError(
            "The modules of this model were changed after it was built; compiled programs would "
            "ignore that. Use edits (jaxtc.edits) to change what a model computes."
        )
    return leaves


@functools.lru_cache(maxsize=64)
def _structure(config: Gemma2Config) -> jax.tree_util.PyTreeDef:
    return jax.tree.structure(Gemma2.abstract(config))


def rebuild(config: Gemma2Config, leaves: Sequence[jax.Array]) -> Gemma2:
    """The model around the arrays of :func:`parameters`, inside a trace."""
    return jax.tree.unflatten(_structure(config), leaves)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, leaves, tokens, lengths, edits):
    """Logits and captured arrays, both still padded."""
    model, layers = rebuild(plan.config, leaves), plan.config.num_hidden_layers
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    tap = Tap(plan.captures, edits, positions, lengths, plan.length)
    # Editing or capturing the logits needs them all, whatever is returned.
    whole = any(a.site == "logits" for a in (*plan.captures, *edits))
    at = lengths - 1 if plan.logits == "last" and not whole else None
    depth = plan.reach[0] + 1 if plan.reach[0] < layers else None
    out, _ = model(tokens, positions=positions, tap=tap, depth=depth, logits_at=at)
    if plan.logits is None:
        out = None
    elif plan.logits == "last":
        out = jnp.take_along_axis(out, lengths[:, None, None] - 1, axis=1) if whole else out
        out = out[:, 0]
    if plan.unsure:
        fine = all_fire(edits, layers, plan.reach, lengths)
        out, arrays = jax.tree.map(
            lambda x: jnp.where(fine, x, jnp.nan).astype(x.dtype), (out, tap.activations)
        )
        return out, arrays
    return out, tap.activations


def _cut(site: Site, x: jax.Array, length: int) -> jax.Array:
    """``x`` without the padding up to the bucket."""
    letters = site.axes.split()
    return x[tuple(slice(length) if letter in "TS" else slice(None) for letter in letters)]
