"""The records that :func:`jaxtc.explain` returns: what their numbers mean, links to features.

Axis letters: T tokens of the prompt, M features, V vocabulary.
"""

import dataclasses
from typing import Any

from jaxtc.helpers import for_json
from jaxtc.weights.files.layout import GEMMA_SCOPE_2B, PARAMS, tiers_of

#: What each number of an :class:`Explanation` means; part of its JSON.
CONVENTIONS = {
    "explained_variance": "1 - FVU, FVU = sum|y - yhat|^2 / sum|y - mean(y)|^2 with the mean "
    "vector over the prompt's unmasked tokens (dataset-mean convention)",
    "cross_layer": "of a cross-layer transcoder yhat at a layer is the sum that the features of "
    "that and all earlier layers write there, each reading the model's own run; notebook_score is "
    "not defined",
    "relative_error": "|y - yhat| / |y| of one token; of a layer, the mean over unmasked tokens",
    "l0": "number of active features; of a layer, the mean over unmasked tokens",
    "notebook_score": "1 - mean((yhat - y)^2) / var(y) over [0, :, 1:], the scalar variance of all "
    "elements but the first coordinate, all tokens included, the transcoder reading mlp_in: as the "
    "Gemma Scope tutorial computes it",
    "above_one": "number of features whose activation is above 1, as the tutorial counts them",
    "promotes": "tokens with the largest (W_dec[f] * (1 + w)) @ E^T, w the final norm's gain and E "
    "the embedding: direct logit attribution, its scale left out; of a cross-layer transcoder "
    "W_dec[f] is the sum of the feature's rows for all layers",
    "masked": "BOS, EOS and padding, by id, are left out of the layer's figures",
}


@dataclasses.dataclass(frozen=True)
class ActiveFeature:
    """A feature that is active on a token."""

    feature: int  #: its index, 0 to M−1
    activation: float  #: how strongly it is active
    #: Pieces of the vocabulary its decoder row promotes, strongest first; empty when its transcoder
    #: does not write to the residual stream.
    promotes: tuple[str, ...]
    url: str | None = None  #: its page on Neuronpedia, when there is one


@dataclasses.dataclass(frozen=True)
class TokenReport:
    """One token at one layer."""

    position: int  #: from 0
    id: int  #: its id
    text: str  #: its piece of the vocabulary, ▁ for a space
    masked: bool  #: whether it is special and left out of the layer's figures
    l0: int  #: how many features are active
    above_one: int  #: how many have an activation above 1
    relative_error: float  #: ‖y − ŷ‖ / ‖y‖
    features: tuple[ActiveFeature, ...]  #: the strongest, strongest first


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer; NaN where a figure is not defined (the variance of a single token, say)."""

    layer: int  #: from 0
    transcoder: str  #: where it was loaded from
    width: int  #: M, its features
    input_site: str  #: the site it read here
    output_site: str  #: the site it imitates
    fvu: float  #: fraction of variance unexplained, dataset-mean convention
    explained_variance: float  #: 1 − FVU
    l0: float  #: mean over unmasked tokens
    relative_error: float  #: mean over unmasked tokens
    #: :func:`jaxtc.metrics.notebook_score` with the transcoder reading ``mlp_in``, whatever
    #: ``input_site`` is; NaN for one that does not imitate an MLP, and for a cross-layer one.
    notebook_score: float
    tokens: tuple[TokenReport, ...]  #: by position


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`jaxtc.explain` returns."""

    prompt: str  #: the text
    ids: tuple[int, ...]  #: T token ids
    tokens: tuple[str, ...]  #: their pieces, T
    layers: tuple[LayerReport, ...]  #: one for each transcoder, by layer
    continuation: str  #: the model's greedy continuation
    continuation_ids: tuple[int, ...]  #: its token ids
    warnings: tuple[str, ...]  #: what a reader should know before trusting the rest

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``json.dumps``, the conventions of its numbers included; NaN becomes None."""
        return for_json({**dataclasses.asdict(self), "conventions": CONVENTIONS})


def feature_url(source: str, feature: int | str) -> str | None:
    """The page of a feature on Neuronpedia, or None when it has none.

    ``source`` is the transcoder's. Pages exist for those of
    ``google/gemma-scope-2b-pt-transcoders``, 16k wide, at each layer's default L0; the denser tiers
    have none.
    """
    repo, slash, place = source.partition(GEMMA_SCOPE_2B + "/")
    tiers = [] if repo or not slash else tiers_of([f"{place}/{PARAMS}"])
    if not tiers or not tiers[0].is_default:
        return None
    layer = tiers[0].layer
    return f"https://www.neuronpedia.org/gemma-2-2b/{layer}-gemmascope-transcoder-16k/{feature}"
