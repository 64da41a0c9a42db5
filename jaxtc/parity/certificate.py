"""What a comparison found, as plain data: everything the table, the JSON and the HTML report show.

"Ours" is jaxtc, "theirs" the reference, ``Gemma2ForCausalLM`` of ``transformers`` in PyTorch.
Errors are relative, ‖ours − theirs‖ / ‖theirs‖ of a token, unless they are called something else;
losses and KL divergences are in nats.
"""

import dataclasses
import types
import typing
from typing import Any

from jaxtc.helpers import for_json
from jaxtc.tap.sites import Address

VERSION = 1
# Of errors, the one that locates a fault first.
KINDS = ("isolated", "accumulated")


@dataclasses.dataclass(frozen=True)
class Figures:
    """The error at one address, over all tokens of all prompts, and its tolerances."""

    relative: float  # mean over tokens (absolute where theirs is 0); infinite where masks differ
    worst: float  # that of the worst token
    largest: float  # largest absolute difference of two numbers
    tolerance: float  # of ``relative``
    worst_tolerance: float  # of ``worst``

    @property
    def passed(self) -> bool:
        """Whether both are within their tolerances; NaN is not."""
        return self.relative <= self.tolerance and self.worst <= self.worst_tolerance

    @property
    def judged(self) -> tuple[float, float]:
        """(error, tolerance): the mean's, or the worst token's where the mean's is within."""
        within = self.relative <= self.tolerance
        return (self.worst, self.worst_tolerance) if within else (self.relative, self.tolerance)


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One address: a site, at a layer where the site has one.

    The accumulated error is that of our model run by itself, with the errors of all layers below.
    For the isolated one each half of each layer starts from the reference's own residual stream, so
    that an error shows only where it is made; the sites that are replaced that way (resid_pre,
    resid_mid, and the last layer's resid_post) have none.
    """

    site: str
    layer: int | None
    accumulated: Figures
    isolated: Figures | None
    masks_differ: int  # attention scores masked in one model only
    passed: bool  # whether both errors are within their tolerances

    @property
    def address(self) -> str:
        """Such as ``layers.3.attn_scores`` or ``embed``."""
        return str(Address(self.site, self.layer))


@dataclasses.dataclass(frozen=True)
class Jump:
    """The first address, in the order of computation, where the error is over its tolerance."""

    address: str
    site: str
    layer: int | None
    kind: str  # "accumulated" only where no isolated error is over its tolerance
    relative: float  # the mean, or the worst token's where the mean is within its tolerance
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Logits:
    """How the predictions of our model, run by itself, compare, over all tokens of all prompts."""

    tokens: int
    kl_mean: float  # KL(theirs ‖ ours), mean over tokens
    kl_max: float
    top1: float  # fraction of tokens with the same argmax
    top1_unexplained: int  # other argmax, though the reference's leads by more than the tolerance
    top5: float  # mean fraction of the reference's top five that are among ours
    loss_ours: float | None  # mean next-token loss; None where no prompt has a next token
    loss_theirs: float | None


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first token of a greedy continuation that differs."""

    prompt: int  # its index
    step: int  # new tokens that are equal before it
    ours: int  # token id
    theirs: int
    ours_text: str  # empty without a tokenizer
    theirs_text: str
    margin: float  # the reference's best logit minus its second best


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy continuations of every prompt, stop tokens ignored."""

    new_tokens: int  # per prompt
    prompts: int
    identical: int  # prompts whose continuations are equal
    divergences: list[Divergence]  # of the other prompts
    closest: float | None  # least margin of the reference at any step


@dataclasses.dataclass(frozen=True)
class Transcoder:
    """The features of a transcoder in both frameworks, special tokens left out by id.

    A difference of the two inputs can explain a feature active in one only when its pre-activation
    is no farther from the threshold than ‖Δx‖·‖encoder column‖ plus the rounding of a float32 dot
    product. FVU is that of the dataset-mean convention, None where the target does not vary.
    """

    source: str
    layer: int  # whose MLP it imitates
    features: int  # M
    tokens: int
    l0_ours: float
    l0_theirs: float
    overlap: float  # mean Jaccard index of the two sets of active features
    differing: int  # (token, feature) pairs active in one only
    near_threshold: int  # how many of those the inputs can explain
    pre_activations: float  # relative error of ours on the reference's input
    reconstruction: float  # relative error of ours on the reference's activations
    fvu_ours: float | None  # our reconstruction of the reference's mlp_out
    fvu_theirs: float | None  # the reference's reconstruction of our mlp_out
    fvu_reference: float | None  # the reference's reconstruction of its own mlp_out
    tolerance: float  # of ``pre_activations`` and ``reconstruction``
    fvu_tolerance: float  # of the distance of ``fvu_ours`` and ``fvu_theirs`` from the reference's


@dataclasses.dataclass(frozen=True)
class TruthRow:
    """Errors against a float64 run of the same (rounded) weights, at one site: a mean over tokens,
    prompts and layers."""

    site: str
    ours: float
    theirs: float
    ratio: float | None  # ours / theirs; None where neither has an error


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt; its text is None where token ids were given."""

    text: str | None
    tokens: int  # <bos> included


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The outcome of :func:`jaxtc.parity.certify`."""

    passed: bool  # whether everything is within its tolerance
    failures: list[str]  # one sentence each: the site, the layer, the figure and its tolerance
    notes: list[str]  # how prompts were tokenized, if oddly; what this run could not test
    first_jump: Jump | None  # None when every site passed
    model: str  # the source that was asked for
    dtype: str  # of both models' weights
    layers: list[int]  # which were compared
    config: dict[str, Any]  # sizes and constants, by the names of ``config.json``
    prompts: list[Prompt]  # in the order they were run
    sites: list[SiteRow]  # a row for every address, in the order of computation
    logits: Logits  # of our model by itself
    generation: Generation | None  # None when not asked for, as the two below
    transcoder: Transcoder | None
    truth: list[TruthRow] | None  # a row for every site
    tolerances: dict[str, Any]  # the table of this dtype, see :mod:`jaxtc.parity.tolerances`
    versions: dict[str, str]  # of jaxtc, jax, flax, numpy, transformers, torch and Python
    machine: dict[str, str]  # "platform", and the devices "ours" and "theirs" ran on
    seconds: dict[str, float]  # "theirs", "ours" and, where asked for, "truth"
    created: str  # ISO 8601, UTC
    format: int = VERSION  # of :meth:`to_dict`

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers it cannot hold are the strings "inf", "-inf" and "nan"."""
        return for_json(dataclasses.asdict(self), str)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Certificate":
        """The certificate that :meth:`to_dict` was called on.

        Raises:
            ValueError: of another format, or not a certificate.
        """
        if not isinstance(raw, dict) or raw.get("format") != VERSION:
            raise ValueError(f"Not a certificate of format {VERSION}, which this jaxtc reads.")
        try:
            return _build(cls, raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Not a certificate: {error}.") from error


def _build(kind: Any, raw: Any) -> Any:
    """``raw`` as the annotation ``kind`` says."""
    if isinstance(kind, types.UnionType):
        if raw is None:
            return None
        kind = typing.get_args(kind)[0]  # X of X | None
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hint, raw[name]) for name, hint in hints.items()})
    if typing.get_origin(kind) is list:
        return [_build(*typing.get_args(kind), one) for one in raw]
    return float(raw) if kind is float else raw
