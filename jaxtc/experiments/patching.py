"""Patching: which activations carry the difference between two runs?

Activations of a clean run are put into a corrupted one, place by place, and a score says how much
of the clean behaviour comes back. :func:`activation_patching` runs the model for each place,
:func:`attribution_patching` estimates all places from one gradient. Axis letters: L layers, T
tokens, N heads, B batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import Edit
from jaxtc.edits.values import SetTo
from jaxtc.errors import InputError, SiteError
from jaxtc.experiments.axes import Over
from jaxtc.experiments.gradients import gradients
from jaxtc.experiments.pairs import Pairs, pairs
from jaxtc.experiments.scores import as_pytree
from jaxtc.experiments.sweep import sweep
from jaxtc.helpers import explicit_transfers, ranked, whole_number
from jaxtc.model.gemma2 import Gemma2
from jaxtc.programs.call import RunResult
from jaxtc.programs.run import run
from jaxtc.tap.columns import from_first_column, returned
from jaxtc.tap.context import PerLayer
from jaxtc.tap.sites import BY_NAME, SITES, Site, parse

Score = Callable[[RunResult], jax.Array]


@dataclasses.dataclass(frozen=True)
class Patching:
    """Scores of a corrupted run in which one place at a time is as in the clean run.

    Attributes:
        values: (L, T) or (L, T, N), and B behind where ``of`` gives one score a row. The scores
            themselves, in the unit of ``of``; :attr:`recovered` is their share. NaN where a pair
            has no such token: T is the longest pair's. Where ``of`` gives one number for all rows,
            the rows without the token stay corrupted in it.
        axes: names and values of the axes in front: "layer" (the first of a window), "position"
            (counted from each prompt's own first token, or as given), perhaps "head".
        clean: score of the clean run.
        corrupted: score of the corrupted run.
        site: the site that was patched.
        window: how many layers were patched at once.
    """

    values: jax.Array
    axes: dict[str, np.ndarray]
    clean: jax.Array
    corrupted: jax.Array
    site: str
    window: int = 1

    @property
    @explicit_transfers
    def recovered(self) -> jax.Array:
        """The share of the difference that each place brings back: 0 none, 1 all of it."""
        with jax.debug_nans(False):  # NaN says that a token is missing
            before = ranked(jnp.asarray(self.corrupted), self.values)
            return (self.values - before) / ranked(self.clean - self.corrupted, self.values)


@explicit_transfers
def activation_patching(
    model: Gemma2,
    clean: Any,
    corrupted: Any,
    of: Score,
    site: str = "resid_pre",
    *,
    edits: Sequence[Edit] = (),
    positions: Sequence[Any] | None = None,
    window: int = 1,
    heads: bool = False,
    tokenizer: Any = None,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Patching:
    """Put the clean run's activations into the corrupted run, at each layer and position in turn.

    The causal tracing of Meng et al. (2022, arXiv 2202.05262, §2): give the clean prompt twice and
    ``edits=[Noise(0, scale, site="embed", position=...)]`` to corrupt it; ``window=10`` at
    ``mlp_out`` or ``attn_out`` restores as many layers at once, as it does there. With two prompts
    it is the interchange of Vig et al. (2020, arXiv 2004.12265).

    Args:
        model: from :func:`jaxtc.load_model`.
        clean: prompt or prompts, as for :func:`jaxtc.run`. Pairs may differ in length: each gives
            what it gives alone, and NaN past its end.
        corrupted: as many prompts, each as long as its clean one unless ``positions`` are given.
        of: the score, see :mod:`jaxtc.scores`.
        site: a site that every layer has, with an axis T.
        edits: of the corrupted runs only.
        positions: which places to patch, all by default: whole numbers (negative ones from each
            prompt's own end) and :class:`jaxtc.Token`, found in the clean and in the corrupted
            prompt by themselves.
        window: how many layers to patch together: row l restores layers l to l + window - 1, as far
            as there are layers. (Meng et al. centre their windows: theirs at layer l is row
            l - window // 2.)
        heads: patch each head by itself, at a site with an axis N or K.
        tokenizer: the model's, when the prompts are text.
        chunk, progress: as for :func:`jaxtc.sweep`.

    Raises:
        InputError: a pair of two lengths without ``positions``, a place that no pair has, a window
            wider than the model, and as for :func:`jaxtc.run`.
        SiteError: a site that not every layer has, or heads where there are none.
    """
    places = pairs(model.config, clean, corrupted, positions, tokenizer)
    corrupted = places.prompts[1]
    kept, axes = _clean_run(model, places, [site], heads, of)
    ((site, along),) = axes.items()
    layers, value = along["layer"], kept.activations[site]
    if whole_number("window", window, 1) > len(layers):
        raise InputError(f"window is {window}, and this model has {len(layers)} layers.")
    if positions is None:
        # Token by token, where the corrupted prompts' tokens stand.
        wider = corrupted.length - value.shape[2]
        value = jnp.pad(value, [(0, wider * (axis == 2)) for axis in range(value.ndim)])
        value = returned(value, corrupted.starts, 2, rows=1)
    else:
        # Each place's own value, whatever its position is: (P, L, B, 1, ...).
        own = _at(value, places.clean)
        value = Over(jnp.moveaxis(own, 2, 0)[:, :, :, None], "position")
    swept = {name: Over(values) for name, values in along.items()} | {
        "layer": Over(np.minimum(layers[:, None] + np.arange(window), layers[-1])),
        "position": Over(places.masks),
    }
    patch = SetTo(PerLayer(value), site=site, **swept)
    logits = _logits(of)
    found = sweep(
        model, corrupted, [*edits, patch], of=of, logits=logits, chunk=chunk, progress=progress
    )
    bad = run(model, corrupted, edits=edits, logits=logits)
    before = of(bad)
    values = _only_there(found.values, places, jnp.ndim(before) > 0)
    return Patching(values, along, of(kept), before, site, window)


@explicit_transfers
def attribution_patching(
    model: Gemma2,
    clean: Any,
    corrupted: Any,
    of: Score,
    sites: str | Sequence[str] = "resid_pre",
    *,
    edits: Sequence[Edit] = (),
    positions: Sequence[Any] | None = None,
    heads: bool = False,
    tokenizer: Any = None,
) -> dict[str, Patching]:
    """Estimate what :func:`activation_patching` measures, for all sites in one pass there and back.

    The first-order estimate: the corrupted score plus the gradient in the corrupted run times
    (clean − corrupted) (Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv 2310.10348).
    Cheap enough for every site; wrong where the model is far from linear in between, so check the
    places that matter.

    Args:
        model, clean, corrupted, of, edits, positions, tokenizer: as for
            :func:`activation_patching`.
        sites: one or several that every layer has, with an axis T.
        heads: keep heads apart, at sites with an axis N or K.

    Returns:
        By site, with the same axes as :func:`activation_patching` gives.

    Raises:
        InputError, SiteError: as :func:`activation_patching`.
    """
    names = [sites] if isinstance(sites, str) else sites
    places = pairs(model.config, clean, corrupted, positions, tokenizer)
    corrupted = places.prompts[1]
    kept, axes = _clean_run(model, places, names, heads, of)
    slopes = gradients(model, corrupted, of, list(axes), edits=edits, logits=_logits(of))
    found = {}
    for name, along in axes.items():
        there, here, slope = (
            _at(from_first_column(group[name].astype(jnp.float32), starts, 2, rows=1), at)
            for group, starts, at in (
                (kept.activations, None, places.clean),
                (slopes.activations, corrupted.starts, places.corrupted),
                (slopes.gradients, corrupted.starts, places.corrupted),
            )
        )
        # One term for each number; then summed to (L, P, ...), with B last.
        terms = slope * (there - here)
        change = jnp.moveaxis(terms.sum(tuple(range(len(along) + 1, terms.ndim))), 1, -1)
        if not jnp.ndim(slopes.score):
            change = jnp.where(_rows(places, change), change, 0).sum(-1)
        values = ranked(slopes.score, change) + change
        values = _only_there(values, places, jnp.ndim(slopes.score) > 0)
        found[name] = Patching(values, along, of(kept), slopes.score, name)
    return found


def _at(x: jax.Array, at: np.ndarray) -> jax.Array:
    """(L, B, T, ...) to (L, B, P, ...): at the places (B, P) of each row, missing ones anywhere."""
    at = np.clip(at, 0, x.shape[2] - 1)
    return jnp.take_along_axis(x, at.reshape(1, *at.shape, *[1] * (x.ndim - 3)), axis=2)


def _rows(places: Pairs, values: jax.Array) -> np.ndarray:
    """Where a pair has the place, with the axes of ``values`` (L, P, ..., B)."""
    count, batch = places.there.T.shape
    return places.there.T.reshape(1, count, *[1] * (values.ndim - 3), batch)


def _only_there(values: jax.Array, places: Pairs, each_row: bool) -> jax.Array:
    """Values (L, P, ..., B), NaN where a pair lacks the place; one score for all rows stays."""
    if not each_row or places.there.all():
        return values
    with jax.debug_nans(False):
        return jnp.where(_rows(places, values), values, jnp.nan)


def _clean_run(
    model: Gemma2, places: Pairs, sites: Sequence[str], heads: bool, of: Score
) -> tuple[RunResult, dict[str, dict[str, np.ndarray]]]:
    """The clean run, and by site the axes that are patched."""
    config, axes = model.config, {}
    as_pytree(of, config.vocab_size, len(places.there))  # refused before anything runs
    for site in (_site(name, heads) for name in sites):
        axes[site.name] = {
            "layer": np.arange(config.num_hidden_layers),
            "position": places.labels,
        } | ({"head": np.arange(site.shape(config.sizes)[2])} if heads else {})
    return run(model, places.prompts[0], capture=list(axes), logits=_logits(of)), axes


def _logits(of: Score) -> str:
    """Which logits a score is of: the last token's, where it does not say."""
    return getattr(of, "logits", "last")


def _site(name: str, heads: bool) -> Site:
    """The site of an address that can be patched layer by layer, token by token."""
    site, layer = parse(name)
    fits = [s for s in SITES if s.per_layer and s.sequence_axis == 1]
    fits = [s for s in fits if s.letters[2] in "NK"] if heads else fits
    if BY_NAME[site] not in fits or layer is not None:
        each = "token by token" + (", head by head" if heads else "")
        raise SiteError(
            f"{name!r} cannot be patched layer by layer, {each}; these sites can: "
            f"{', '.join(s.name for s in fits)}."
        )
    return BY_NAME[site]
