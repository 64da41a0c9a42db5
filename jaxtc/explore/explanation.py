"""The records :func:`jaxtc.explain` returns, and what each of their numbers means.

Axis letters: T tokens of the prompt, M features, V vocabulary.
"""

import dataclasses
from typing import Any

from jaxtc.helpers import for_json

#: What each number of an :class:`Explanation` means; part of its JSON.
CONVENTIONS = {
    "explained_variance": "1 - FVU, FVU = sum|y - yhat|^2 / sum|y - mean(y)|^2 with the mean "
    "vector over the prompt's unmasked tokens (dataset-mean convention)",
    "relative_error": "|y - yhat| / |y| of one token; of a layer, the mean over unmasked tokens",
    "l0": "number of active features; of a layer, the mean over unmasked tokens",
    "notebook_score": "1 - mean((yhat - y)^2) / var(y) over [0, :, 1:], the scalar variance of all "
    "elements but the first coordinate, all tokens included, the transcoder reading mlp_in: as the "
    "Gemma Scope tutorial computes it",
    "above_one": "number of features whose activation is above 1, as the tutorial counts them",
    "promotes": "tokens with the largest (W_dec[f] * (1 + w)) @ E^T, w the final norm's gain and E "
    "the embedding: direct logit attribution, its scale left out",
    "masked": "BOS, EOS and padding, by id, are left out of the layer's figures",
}


@dataclasses.dataclass(frozen=True)
class ActiveFeature:
    """A feature that is active on a token.

    Attributes:
        feature: its index, 0 to M−1.
        activation: how strongly it is active.
        promotes: pieces of the vocabulary its decoder direction pushes for, strongest first; empty
            when its transcoder does not write to the residual stream.
        url: its page on Neuronpedia, when there is one.
    """

    feature: int
    activation: float
    promotes: tuple[str, ...]
    url: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenReport:
    """One token at one layer.

    Attributes:
        position: its place in the prompt, from 0.
        id: its id.
        text: its piece of the vocabulary, ▁ for a space.
        masked: whether it is special and left out of the layer's figures.
        l0: how many features are active.
        above_one: how many have an activation above 1.
        relative_error: ‖y − ŷ‖ / ‖y‖.
        features: the strongest, strongest first.
    """

    position: int
    id: int
    text: str
    masked: bool
    l0: int
    above_one: int
    relative_error: float
    features: tuple[ActiveFeature, ...]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer; NaN where a figure is not defined (the variance of a single token, say).

    Attributes:
        layer: from 0.
        transcoder: where it was loaded from.
        width: M, its features.
        input_site: the site it read here.
        output_site: the site it imitates.
        fvu: fraction of variance unexplained, dataset-mean convention.
        explained_variance: 1 − FVU.
        l0: mean over unmasked tokens.
        relative_error: mean over unmasked tokens.
        notebook_score: :func:`jaxtc.metrics.notebook_score` with the transcoder reading
            ``mlp_in``, whatever ``input_site`` is; NaN for one that is not about an MLP.
        tokens: position by position.
    """

    layer: int
    transcoder: str
    width: int
    input_site: str
    output_site: str
    fvu: float
    explained_variance: float
    l0: float
    relative_error: float
    notebook_score: float
    tokens: tuple[TokenReport, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns.

    Attributes:
        prompt: the text.
        ids: of its tokens, T.
        tokens: their pieces, T.
        layers: a report for each transcoder, by layer.
        continuation: what the model says next, greedily.
        continuation_ids: its tokens' ids.
        warnings: what a reader should know before believing the rest.
    """

    prompt: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    continuation: str
    continuation_ids: tuple[int, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``json.dumps``, the conventions of its numbers included; NaN becomes None."""
        return for_json({**dataclasses.asdict(self), "conventions": CONVENTIONS})
