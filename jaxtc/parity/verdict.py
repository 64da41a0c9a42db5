"""From figures to a verdict: what is over its tolerance, where it began, what was not tested."""

from collections.abc import Callable, Iterable
from typing import Any

from jaxtc.errors import some
from jaxtc.model.config import FULL, SLIDING, Gemma2Config
from jaxtc.parity.certificate import (
    KINDS,
    Certificate,
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
from jaxtc.tap.sites import Address


def certificate(tolerances: Tolerances, side: Any, **known: Any) -> Certificate:
    """The certificate of a finished comparison.

    Args:
        tolerances: of its dtype.
        side: a :class:`jaxtc.parity.ours.Comparison`.
        known: the other fields; ``config`` as a :class:`Gemma2Config`.
    """
    config, prompts = known.pop("config"), known["prompts"]
    rows = [row(tolerances, side, address) for address in side.accumulated]
    logits = side.predictions.result()
    truth = side.truth_rows()
    untested = side.features is not None and known["transcoder"] is None
    failures = [
        *(sentence for kind in KINDS for sentence in of_sites(rows, kind)),
        *of_truth(truth, tolerances),
        *of_logits(logits, tolerances),
        *of_generation(known["generation"], tolerances),
        *of_transcoder(known["transcoder"]),
    ]
    return Certificate(
        passed=not failures, failures=failures, logits=logits, sites=rows,
        first_jump=first(rows), truth=truth, dtype=tolerances.dtype,
        notes=notes(config, prompts, known["layers"], tolerances, untested), **known,
        config=config.to_dict(), tolerances=tolerances.to_dict(),
    )  # fmt: skip


def row(tolerances: Tolerances, side: Any, address: Address) -> SiteRow:
    """The figures of one address, judged."""
    whole, alone = side.accumulated[address], side.isolated.get(address)
    accumulated = whole.figures(tolerances, "accumulated")
    isolated = alone and alone.figures(tolerances, "isolated")
    return SiteRow(
        site=address.site, layer=address.layer, accumulated=accumulated, isolated=isolated,
        masks_differ=(alone or whole).masks_differ,
        passed=accumulated.passed and (isolated is None or isolated.passed),
    )  # fmt: skip


def over(rows: Iterable[SiteRow], kind: str) -> list[tuple[SiteRow, Figures]]:
    """The rows whose error of this kind is over its tolerance, with that error."""
    pairs = [(one, getattr(one, kind)) for one in rows]
    return [(one, figures) for one, figures in pairs if figures and not figures.passed]


def first(rows: list[SiteRow]) -> Jump | None:
    """See :class:`jaxtc.parity.certificate.Jump`."""
    for kind in KINDS:
        for one, figures in over(rows, kind):
            mean = not figures.relative <= figures.tolerance
            return Jump(
                str(Address(one.site, one.layer)), one.site, one.layer, kind,
                figures.relative if mean else figures.worst,
                figures.tolerance if mean else figures.worst_tolerance,
            )  # fmt: skip
    return None


def of_sites(rows: list[SiteRow], kind: str) -> list[str]:
    """One sentence for every site, about the first layer over tolerance."""
    found: dict[str, list[tuple[SiteRow, Figures]]] = {}
    for one, figures in over(rows, kind):
        found.setdefault(one.site, []).append((one, figures))
    return [_sentence(kind, over) for over in found.values()]


def _sentence(kind: str, found: list[tuple[SiteRow, Figures]]) -> str:
    (one, figures), others = found[0], [str(later.layer) for later, _ in found[1:]]
    where = one.site if one.layer is None else f"{one.site} at layer {one.layer}"
    if one.masks_differ:
        what = f"{one.masks_differ} scores are masked in one model only"
    elif figures.relative <= figures.tolerance:
        what = (
            f"{kind} error {figures.worst:.2e} at the worst token, tolerance "
            f"{figures.worst_tolerance:.1e}"
        )
    else:
        what = f"{kind} error {figures.relative:.2e}, tolerance {figures.tolerance:.1e}"
    rest = f" (and at layers {some(others, 50)})" if others else ""
    return f"{where}: {what}{rest}."


def of_logits(logits: Logits, tolerances: Tolerances) -> list[str]:
    """Sentences about the predictions."""
    found = []
    if not logits.kl_mean <= tolerances.kl_mean:
        found.append(
            f"logits: KL {logits.kl_mean:.2e} nats in the mean, tolerance {tolerances.kl_mean:.1e}."
        )
    if not logits.kl_max <= tolerances.kl_max:
        found.append(
            f"logits: KL {logits.kl_max:.2e} nats at one token, tolerance {tolerances.kl_max:.1e}."
        )
    if logits.loss_ours is not None:
        far = abs(logits.loss_ours - logits.loss_theirs)
        if not far <= tolerances.loss:
            found.append(f"logits: loss differs by {far:.2e}, tolerance {tolerances.loss:.1e}.")
    if logits.top1_unexplained:
        found.append(
            f"logits: {logits.top1_unexplained} tokens have another likeliest next token, though "
            f"the reference's leads by more than {tolerances.margin:g}."
        )
    return found


def of_generation(generation: Generation | None, tolerances: Tolerances) -> list[str]:
    """Sentences about continuations that part where the reference is sure."""
    return [
        f"generation: prompt {one.prompt + 1} parts after {one.step} new tokens, though the "
        f"reference's best logit leads by {one.margin:.2e}, tolerance {tolerances.margin:.1e}."
        for one in (generation.divergences if generation else ())
        if not one.margin <= tolerances.margin
    ]


def of_truth(rows: list[TruthRow] | None, tolerances: Tolerances) -> list[str]:
    """Sentences about sites where the reference is much nearer the truth."""
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
    where, failures = f"transcoder of layer {found.layer}", []
    for name in ("pre_activations", "reconstruction"):
        error = getattr(found, name)
        if not error <= found.tolerance:
            failures.append(
                f"{where}: {name.replace('_', '-')} from the same input differ by {error:.2e}, "
                f"tolerance {found.tolerance:.1e}."
            )
    odd = found.differing - found.near_threshold
    if odd:
        failures.append(
            f"{where}: {odd} features are active in one model only, farther from their threshold "
            "than rounding explains."
        )
    for name in ("fvu_ours", "fvu_theirs"):
        if found.fvu_reference is not None and getattr(found, name) is not None:
            far = abs(getattr(found, name) - found.fvu_reference)
            if not far <= found.fvu_tolerance:
                failures.append(
                    f"{where}: {name} differs from the reference's own by {far:.2e}, tolerance "
                    f"{found.fvu_tolerance:.1e}."
                )
    return failures


def notes(
    config: Gemma2Config,
    prompts: list[Prompt],
    layers: list[int],
    tolerances: Tolerances,
    untested: bool,
) -> list[str]:
    """What this run could not show."""
    found: list[str] = []
    add: Callable[[str], None] = found.append
    longest = max(prompt.tokens for prompt in prompts)
    if SLIDING in config.layer_types and longest <= config.sliding_window:
        both = FULL in config.layer_types
        add(
            f"No prompt is longer than the window of {config.sliding_window} tokens (the longest "
            f"has {longest}), so a wrong window{' or swapped layer types' if both else ''} could "
            "not show."
        )
    if tolerances.dtype == "bfloat16":
        add(
            "bfloat16 keeps 8 bits: a constant that is wrong by less than its rounding shows in "
            "float32 only. Run both."
        )
    if max(tolerances.accumulated.values()) > 0.5:
        add(
            "At this depth bfloat16 allows accumulated errors too large to tell much: here the "
            "isolated ones decide. float32 or --truth say more."
        )
    if len(layers) < config.num_hidden_layers:
        add(
            f"The sites of {len(layers)} of {config.num_hidden_layers} layers were compared; the "
            "final sites and the logits depend on all."
        )
    if untested:
        add(
            "The prompts have no tokens but special ones, which transcoders are not trained on, so "
            "the transcoder was not compared."
        )
    return found
