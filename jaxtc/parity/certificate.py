"""What a comparison found, as plain data: everything the table, the JSON and the HTML report show.

"Ours" is jaxtc, "theirs" the reference, ``Gemma2ForCausalLM`` of ``transformers`` in PyTorch.
Errors are relative, ‖ours − theirs‖ / ‖theirs‖ of a token, unless they are called something else.
"""

import dataclasses
import math
import types
import typing
from typing import Any

VERSION = 1
# Of errors, the one that says where a fault is before the other.
KINDS = ("isolated", "accumulated")


@dataclasses.dataclass(frozen=True)
class Figures:
    """The error at one address, over all tokens of all prompts, and what it may be.

    Attributes:
        relative: mean over tokens of ‖ours − theirs‖ / ‖theirs‖ (the numerator alone where theirs
            is 0). Infinite where the two mask different scores.
        worst: that of the worst token.
        largest: the largest absolute difference of two numbers.
        tolerance: what ``relative`` may be.
        worst_tolerance: what ``worst`` may be.
    """

    relative: float
    worst: float
    largest: float
    tolerance: float
    worst_tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both are within their tolerances; what is not a number is not."""
        return self.relative <= self.tolerance and self.worst <= self.worst_tolerance


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One address: a site, at a layer where the site has one.

    Attributes:
        site: of the table of sites.
        layer: None for a site that the model has once.
        accumulated: when our model runs by itself, with the errors of all layers below.
        isolated: when each half of each layer starts from the reference's own residual stream, so
            that an error shows where it is made only. None at the sites that are given that way
            (resid_pre, resid_mid, and the last layer's resid_post).
        masks_differ: attention scores that one of the two masks and the other does not.
        passed: whether both are within their tolerances.
    """

    site: str
    layer: int | None
    accumulated: Figures
    isolated: Figures | None
    masks_differ: int
    passed: bool


@dataclasses.dataclass(frozen=True)
class Jump:
    """The first address, in the order of computation, where the error is over its tolerance.

    Attributes:
        address: such as ``layers.3.attn_scores``.
        site: of the address.
        layer: of the address, None where the site has none.
        kind: "isolated", or "accumulated" when no isolated error is over its tolerance.
        relative: the error there: the mean, or the worst token's where the mean is within its
            tolerance.
        tolerance: what it may be.
    """

    address: str
    site: str
    layer: int | None
    kind: str
    relative: float
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Logits:
    """How the predictions compare, over all tokens of all prompts (our model by itself).

    Attributes:
        tokens: how many.
        kl_mean: KL(theirs ‖ ours) in nats, mean over tokens.
        kl_max: its largest.
        top1: fraction of tokens with the same likeliest next token.
        top1_unexplained: tokens where it differs though the reference is sure of its own: by a
            margin beyond the tolerance.
        top5: mean fraction of the reference's five likeliest that are among our five.
        loss_ours: mean next-token loss over the prompts, in nats; None where no prompt has a next
            token.
        loss_theirs: the same of the reference.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    top1_unexplained: int
    top5: float
    loss_ours: float | None
    loss_theirs: float | None


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first token of a greedy continuation that differs.

    Attributes:
        prompt: its index.
        step: how many new tokens are equal before it.
        ours: our token's id.
        theirs: the reference's.
        ours_text: our token as text, empty without a tokenizer.
        theirs_text: the reference's.
        margin: by how much the reference's best logit exceeds its second there.
    """

    prompt: int
    step: int
    ours: int
    theirs: int
    ours_text: str
    theirs_text: str
    margin: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy continuations of every prompt, stop tokens ignored.

    Attributes:
        new_tokens: how many a prompt.
        prompts: how many prompts.
        identical: how many of them have the same continuation.
        divergences: the first difference of each other one.
        closest: the least margin between the reference's two best logits at any step, None when
            nothing was generated.
    """

    new_tokens: int
    prompts: int
    identical: int
    divergences: list[Divergence]
    closest: float | None


@dataclasses.dataclass(frozen=True)
class Transcoder:
    """The features of a transcoder in both frameworks, special tokens left out by id.

    Attributes:
        source: what was loaded.
        layer: whose MLP it imitates.
        features: M.
        tokens: how many count.
        l0_ours: mean number of active features a token.
        l0_theirs: the same of the reference.
        overlap: mean over tokens of |both| / |either| of the sets of active features (Jaccard).
        differing: (token, feature) pairs that are active in one only.
        near_threshold: how many of those the difference of the two inputs can explain: the
            pre-activation is no farther from the threshold than ‖Δx‖·‖encoder column‖ plus the
            rounding of a float32 dot product.
        pre_activations: relative error of ours when fed the reference's own input.
        reconstruction: relative error of ours when decoding the reference's own activations.
        fvu_ours: fraction of variance unexplained by our reconstruction of the reference's
            ``mlp_out`` (dataset-mean convention); None where that does not vary.
        fvu_theirs: by the reference's reconstruction of our ``mlp_out``.
        fvu_reference: by the reference's reconstruction of its own ``mlp_out``.
        tolerance: what ``pre_activations`` and ``reconstruction`` may be.
        fvu_tolerance: what ``fvu_ours`` and ``fvu_theirs`` may differ from ``fvu_reference`` by.
    """

    source: str
    layer: int
    features: int
    tokens: int
    l0_ours: float
    l0_theirs: float
    overlap: float
    differing: int
    near_threshold: int
    pre_activations: float
    reconstruction: float
    fvu_ours: float | None
    fvu_theirs: float | None
    fvu_reference: float | None
    tolerance: float
    fvu_tolerance: float


@dataclasses.dataclass(frozen=True)
class TruthRow:
    """Who is nearer a float64 run of the same (rounded) weights, at one site.

    Attributes:
        site: of the table of sites.
        ours: our relative error against it, mean over tokens, prompts and layers.
        theirs: the reference's.
        ratio: ours / theirs; below 1 we are nearer. None where neither has an error.
    """

    site: str
    ours: float
    theirs: float
    ratio: float | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: None where token ids were given.
        tokens: how many, <bos> included.
    """

    text: str | None
    tokens: int


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The outcome of :func:`jaxtc.parity.certify`.

    Attributes:
        passed: whether everything is within its tolerance.
        failures: one sentence each: the site, the layer, the figure and its tolerance.
        notes: what this run could not test, one sentence each.
        first_jump: None when every site passed.
        model: the source that was asked for.
        dtype: of both models' weights.
        layers: which were compared.
        config: sizes and constants, by the names of ``config.json``.
        prompts: in the order they were run.
        sites: a row for every address, in the order of computation.
        logits: of our model by itself.
        generation: None when no tokens were asked for.
        transcoder: None when none was asked for.
        truth: a row for every site, None when it was not asked for.
        tolerances: the table of this dtype, see :mod:`jaxtc.parity.tolerances`.
        versions: of jaxtc, jax, flax, numpy, transformers, torch and Python.
        machine: "platform", and the devices "ours" and "theirs" ran on.
        seconds: "theirs", "ours" and, where asked for, "truth".
        created: when, ISO 8601 in UTC.
        format: of :meth:`to_dict`.
    """

    passed: bool
    failures: list[str]
    notes: list[str]
    first_jump: Jump | None
    model: str
    dtype: str
    layers: list[int]
    config: dict[str, Any]
    prompts: list[Prompt]
    sites: list[SiteRow]
    logits: Logits
    generation: Generation | None
    transcoder: Transcoder | None
    truth: list[TruthRow] | None
    tolerances: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    seconds: dict[str, float]
    created: str
    format: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; numbers JSON has no word for are the strings "inf", "-inf", "nan"."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Certificate":
        """The certificate that :meth:`to_dict` gave.

        Raises:
            ValueError: of another format, or not a certificate.
        """
        if not isinstance(raw, dict) or raw.get("format") != VERSION:
            raise ValueError(f"Not a certificate of format {VERSION}, which this jaxtc reads.")
        try:
            return _build(cls, raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Not a certificate: {error}.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _build(kind: Any, raw: Any) -> Any:
    """``raw`` as the annotation ``kind`` says."""
    if isinstance(kind, types.UnionType):
        if raw is None:
            return None
        [kind] = [option for option in typing.get_args(kind) if option is not types.NoneType]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hint, raw[name]) for name, hint in hints.items()})
    if typing.get_origin(kind) is list:
        [item] = typing.get_args(kind)
        return [_build(item, one) for one in raw]
    return float(raw) if kind is float else raw
