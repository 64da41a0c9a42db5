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
from jaxtc.experiments.sweep import sweep
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import prepare
from jaxtc.programs.call import RunResult
from jaxtc.programs.run import run
from jaxtc.tap.context import PerLayer
from jaxtc.tap.sites import BY_NAME, SITES, parse

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
        chunk: as for :func:`jaxtc.sweep`.
        progress: as for :func:`jaxtc.sweep`.

    Raises:
        InputError: prompts of different lengths, and as for :func:`jaxtc.run`.
        SiteError: a site that not every layer has, or heads where there are none.
    """
    site, count = _site(site), _lengths(model, clean, corrupted)
    config = model.config
    kept = run(model, clean, capture=site, logits="last")
    axes = {"layer": Over(range(config.num_hidden_layers)), "position": Over(range(count))}
    if heads:
        axes["head"] = Over(range(_heads(site, config)))
    patch = SetTo(PerLayer(kept.activations[site]), site=site, **axes)
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
        model: from :func:`jaxtc.load_model`.
        clean: prompt or prompts, as for :func:`jaxtc.run`.
        corrupted: prompts of the same lengths.
        of: the score, see :mod:`jaxtc.scores`.
        sites: one or several that every layer has, with an axis T.
        edits: of the corrupted run only.
        heads: keep heads apart, at sites with an axis N or K.

    Returns:
        By site, with the same axes as :func:`activation_patching` gives.

    Raises:
        InputError: prompts of different lengths, and as for :func:`jaxtc.run`.
        SiteError: a site that not every layer has, or heads where there are none.
    """
    names = [_site(site) for site in ([sites] if isinstance(sites, str) else sites)]
    count, config = _lengths(model, clean, corrupted), model.config
    kept = run(model, clean, capture=names, logits="last")
    slopes = gradients(model, corrupted, of, names, edits=edits)
    found = {}
    for name in names:
        there, here, slope = (
            group[name].astype(jnp.float32)
            for group in (kept.activations, slopes.activations, slopes.gradients)
        )
        # One term for each number; then summed to (L, T, ...), with B last.
        terms = slope * (there - here)
        axes = {"layer": np.arange(config.num_hidden_layers), "position": np.arange(count)}
        if heads:
            axes["head"] = np.arange(_heads(name, config))
        change = jnp.moveaxis(terms.sum(tuple(range(len(axes) + 1, terms.ndim))), 1, -1)
        change = change if jnp.ndim(slopes.score) else change.sum(-1)
        found[name] = Patching(slopes.score + change, axes, of(kept), slopes.score, name)
    return found


def _site(name: str) -> str:
    site, layer = parse(name)
    row = BY_NAME[site]
    if not row.per_layer or layer is not None or row.sequence_axis != 1:
        fitting = [s.name for s in BY_NAME.values() if s.per_layer and s.sequence_axis == 1]
        raise SiteError(
            f"{name!r} cannot be patched layer by layer and token by token; these sites can: "
            f"{', '.join(fitting)}."
        )
    return site


def _heads(site: str, config: Any) -> int:
    if BY_NAME[site].letters[2] not in "NK":
        *some, last = (s.name for s in SITES if s.sequence_axis == 1 and s.letters[2] in "NK")
        raise SiteError(f"{site!r} has no heads; {', '.join(some)} and {last} do.")
    return BY_NAME[site].shape(config.sizes)[2]


def _lengths(model: Gemma2, clean: Any, corrupted: Any) -> int:
    """T, when both have the same lengths; positions of one would mean nothing in the other."""
    sizes = [prepare(tokens, model.config).known_lengths.tolist() for tokens in (clean, corrupted)]
    if sizes[0] != sizes[1] or len(set(sizes[0])) > 1:
        raise InputError(
            f"The clean prompts have {sizes[0]} tokens and the corrupted ones {sizes[1]}; patching "
            "token by token wants all of one length. Choose words that are one token each."
        )
    return sizes[0][0]
