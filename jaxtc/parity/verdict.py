"""From figures to a verdict: what is over its tolerance, where it began, what was not tested."""

from collections.abc import Iterable

from jaxtc.errors import some
from jaxtc.model.config import FULL, SLIDING, Gemma2Config
from jaxtc.parity.certificate import (
    KINDS,
    Figures,
    Generation,
    Jump,
    Logits,
    Prompt,
    SiteRow,
    Transcoder,
    TruthRow,
)
from jaxtc.parity.tolerances import Tolerances


def over(rows: Iterable[SiteRow], kind: str) -> list[tuple[SiteRow, Figures]]:
    """The rows whose error of this kind is over its tolerance, with that error."""
    pairs = [(one, getattr(one, kind)) for one in rows]
    return [(one, figures) for one, figures in pairs if figures and not figures.passed]


def first(rows: list[SiteRow]) -> Jump | None:
    """See :class:`jaxtc.parity.certificate.Jump`."""
    found = ((kind, *pair) for kind in KINDS for pair in over(rows, kind))
    kind, one, figures = next(found, (None,) * 3)
    return one and Jump(one.address, one.site, one.layer, kind, *figures.judged)


def of_sites(rows: list[SiteRow]) -> list[str]:
    """One sentence for every kind of error and site, about the first layer over tolerance."""
    found: dict[tuple[str, str], list[tuple[SiteRow, Figures]]] = {}
    for kind in KINDS:
        for pair in over(rows, kind):
            found.setdefault((kind, pair[0].site), []).append(pair)
    sentences = []
    for (kind, site), [(one, figures), *later] in found.items():
        error, tolerance = figures.judged
        token = " at the worst token" if figures.relative <= figures.tolerance else ""
        what = f"{kind} error {error:.2e}{token}, tolerance {tolerance:.1e}"
        if one.masks_differ:
            what = f"{one.masks_differ} scores are masked in one model only"
        where = site if one.layer is None else f"{site} at layer {one.layer}"
        others = some([str(other.layer) for other, _ in later], 50)
        sentences.append(f"{where}: {what}{f' (and at layers {others})' if later else ''}.")
    return sentences


def _beyond(where: str, *checks: tuple[str, float | None, float]) -> list[str]:
    """A sentence for each (what, figure, tolerance) out of tolerance; NaN is, None is not."""
    return [
        f"{where}: {what} {figure:.2e}, tolerance {tolerance:.1e}."
        for what, figure, tolerance in checks
        if figure is not None and not figure <= tolerance
    ]


def _apart(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else abs(one - other)


def of_logits(logits: Logits, tolerances: Tolerances) -> list[str]:
    """Sentences about the predictions."""
    found = _beyond(
        "logits",
        ("mean KL, in nats,", logits.kl_mean, tolerances.kl_mean),
        ("KL, in nats, at the worst token", logits.kl_max, tolerances.kl_max),
        ("loss differs by", _apart(logits.loss_ours, logits.loss_theirs), tolerances.loss),
    )
    if logits.top1_unexplained:
        found.append(
            f"logits: {logits.top1_unexplained} tokens have another argmax, though the reference's "
            f"leads by more than {tolerances.margin:g}."
        )
    return found


def of_generation(generation: Generation | None, tolerances: Tolerances) -> list[str]:
    """Sentences about continuations that diverge where the reference's margin is large."""
    return [
        f"generation: prompt {one.prompt + 1} diverges after {one.step} new tokens, though the "
        f"reference's best logit leads by {one.margin:.2e}, tolerance {tolerances.margin:.1e}."
        for one in (generation.divergences if generation else ())
        if not one.margin <= tolerances.margin
    ]


def of_truth(rows: list[TruthRow] | None, tolerances: Tolerances) -> list[str]:
    """Sentences about sites where the reference is much nearer float64."""
    return [
        f"{one.site}: our error against float64 is {one.ratio:.2f} times the reference's, "
        f"tolerance {tolerances.truth:g}."
        for one in rows or ()
        if one.ratio is not None and not one.ratio <= tolerances.truth
    ]


def of_transcoder(found: Transcoder | None) -> list[str]:
    """Sentences about features."""
    if found is None:
        return []
    where, odd = f"transcoder of layer {found.layer}", found.differing - found.near_threshold
    own = "differs from the reference's own by"
    failures = _beyond(
        where,
        ("pre-activations from the same input differ by", found.pre_activations, found.tolerance),
        ("reconstruction from the same input differs by", found.reconstruction, found.tolerance),
        (f"fvu_ours {own}", _apart(found.fvu_ours, found.fvu_reference), found.fvu_tolerance),
        (f"fvu_theirs {own}", _apart(found.fvu_theirs, found.fvu_reference), found.fvu_tolerance),
    )
    if odd:
        failures.append(
            f"{where}: {odd} features are active in one model only, farther from their threshold "
            "than rounding explains."
        )
    return failures


def notes(
    config: Gemma2Config,
    prompts: list[Prompt],
    layers: list[int],
    tolerances: Tolerances,
    untested: bool,
) -> list[str]:
    """What this run could not test."""
    longest, count = max(prompt.tokens for prompt in prompts), config.num_hidden_layers
    both = " or swapped layer types" if FULL in config.layer_types else ""
    window = SLIDING in config.layer_types and longest <= config.sliding_window
    deep = max(tolerances.accumulated.values()) > 0.5
    candidates = [
        (window, f"No prompt is longer than the window of {config.sliding_window} tokens (the "
         f"longest has {longest}), so a wrong window{both} could not show."),
        (tolerances.dtype == "bfloat16", "bfloat16 keeps 8 bits: a constant that is wrong by less "
         "than its rounding shows in float32 only. Run both."),
        (deep, "At this depth bfloat16 allows accumulated errors too large to mean much: here the "
         "isolated ones decide. float32 or --truth say more."),
        (len(layers) < count, f"The sites of {len(layers)} of {count} layers were compared; the "
         "final sites and the logits depend on all."),
        (untested, "The prompts have only special tokens, which transcoders are not trained on, so "
         "the transcoder was not compared."),
    ]  # fmt: skip
    return [note for applies, note in candidates if applies]
