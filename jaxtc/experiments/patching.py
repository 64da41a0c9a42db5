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
from jaxtc.experiments.scores import as_pytree
from jaxtc.experiments.sweep import sweep
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import prepare
from jaxtc.programs.call import RunResult
from jaxtc.programs.run import run
from jaxtc.tap.context import PerLayer
from jaxtc.tap.sites import BY_NAME, SITES, Site, parse

Score = Callable[[RunResult], jax.Array]


@dataclasses.dataclass(frozen=True)
class Patching:
    """Scores of a corrupted run in which one place at a time is as in the clean run.

    Attributes:
        values: (L, T) or (L, T, N), and B behind where ``of`` gives one score a row.
        axes: names and values of the axes in front: "layer", "position", perhaps "head".
        clean: score of the clean run.
        corrupted: score of the corrupted run.
        site: the site that was patched.
    """

    values: jax.Array
    axes: dict[str, np.ndarray]
    clean: jax.Array
    corrupted: jax.Array
    site: str

    @property
    def recovered(self) -> jax.Array:
        """The share of the difference that each place brings back: 0 none, 1 all of it."""
        return (self.values - self.corrupted) / (self.clean - self.corrupted)


def activation_patching(
    model: Gemma2,
    clean: Any,
    corrupted: Any,
    of: Score,
    site: str = "resid_pre",
    *,
    edits: Sequence[Edit] = (),
    heads: bool = False,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Patching:
    """Put the clean run's activations into the corrupted run, at each layer and position in turn.

    The causal tracing of Meng et al. (2022, arXiv 2202.05262, §2): give the clean prompt twice and
    ``edits=[Noise(0, scale, site="embed", position=...)]`` to corrupt it. With two prompts it is
    the interchange of Vig et al. (2020, arXiv 2004.12265).

    Args:
        model: from :func:`jaxtc.load_model`.
        clean: prompt or prompts, as for :func:`jaxtc.run`.
        corrupted: prompts of the same lengths.
        of: the score, see :mod:`jaxtc.scores`.
        site: a site that every layer has, with an axis T.
        edits: of the corrupted runs only.
        heads: patch each head by itself, at a site with an axis N or K.
        chunk, progress: as for :func:`jaxtc.sweep`.

    Raises:
        InputError: prompts of different lengths, and as for :func:`jaxtc.run`.
        SiteError: a site that not every layer has, or heads where there are none.
    """
    kept, axes = _clean_run(model, clean, corrupted, [site], heads, of)
    ((site, along),) = axes.items()
    swept = {name: Over(values) for name, values in along.items()}
    patch = SetTo(PerLayer(kept.activations[site]), site=site, **swept)
    found = sweep(model, corrupted, [*edits, patch], of=of, chunk=chunk, progress=progress)
    bad = run(model, corrupted, edits=edits, logits="last")
    return Patching(found.values, found.axes, of(kept), of(bad), site)


def attribution_patching(
    model: Gemma2,
    clean: Any,
    corrupted: Any,
    of: Score,
    sites: str | Sequence[str] = "resid_pre",
    *,
    edits: Sequence[Edit] = (),
    heads: bool = False,
) -> dict[str, Patching]:
    """Estimate what :func:`activation_patching` measures, for all sites in one pass there and back.

    The first-order estimate: the corrupted score plus the gradient in the corrupted run times
    (clean − corrupted) (Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv 2310.10348).
    Cheap enough for every site; wrong where the model is far from linear in between, so check the
    places that matter.

    Args:
        model, clean, corrupted, of, edits: as for :func:`activation_patching`.
        sites: one or several that every layer has, with an axis T.
        heads: keep heads apart, at sites with an axis N or K.

    Returns:
        By site, with the same axes as :func:`activation_patching` gives.

    Raises:
        InputError, SiteError: as :func:`activation_patching`.
    """
    names = [sites] if isinstance(sites, str) else sites
    kept, axes = _clean_run(model, clean, corrupted, names, heads, of)
    slopes = gradients(model, corrupted, of, list(axes), edits=edits)
    found = {}
    for name, along in axes.items():
        there, here, slope = (
            group[name].astype(jnp.float32)
            for group in (kept.activations, slopes.activations, slopes.gradients)
        )
        # One term for each number; then summed to (L, T, ...), with B last.
        terms = slope * (there - here)
        change = jnp.moveaxis(terms.sum(tuple(range(len(along) + 1, terms.ndim))), 1, -1)
        change = change if jnp.ndim(slopes.score) else change.sum(-1)
        found[name] = Patching(slopes.score + change, along, of(kept), slopes.score, name)
    return found


def _clean_run(
    model: Gemma2, clean: Any, corrupted: Any, sites: Sequence[str], heads: bool, of: Score
) -> tuple[RunResult, dict[str, dict[str, np.ndarray]]]:
    """The clean run, and by site the axes along which it is patched."""
    config = model.config
    # Positions of one prompt mean nothing in a prompt of another length.
    sizes = [prepare(tokens, config).lengths.tolist() for tokens in (clean, corrupted)]
    if sizes[0] != sizes[1] or len(set(sizes[0])) > 1:
        raise InputError(
            f"The clean prompts have {sizes[0]} tokens and the corrupted ones {sizes[1]}; patching "
            "token by token wants all of one length. Choose words that are one token each."
        )
    as_pytree(of, config.vocab_size, len(sizes[0]))  # refused before anything runs
    axes = {}
    for site in (_site(name, heads) for name in sites):
        counts = {"layer": config.num_hidden_layers, "position": sizes[0][0]}
        counts |= {"head": site.shape(config.sizes)[2]} if heads else {}
        axes[site.name] = {name: np.arange(count) for name, count in counts.items()}
    return run(model, clean, capture=list(axes), logits="last"), axes


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
