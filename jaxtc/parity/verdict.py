"""From figures to a verdict: what is over its tolerance, where it began, what was not tested."""

from collections.abc import Callable
from typing import Any

from jaxtc.config import FULL, SLIDING, Gemma2Config
from jaxtc.errors import some
from jaxtc.parity.certificate import (
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
from jaxtc.sites import Address


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
    kinds = ("isolated", "accumulated")
    isolated, accumulated = (Over(rows, kind, tolerances, logits.tokens) for kind in kinds)
    truth = side.truth_rows()
    failures = [
        *isolated.sentences(),
        *accumulated.sentences(),
        *of_truth(truth, tolerances),
        *of_logits(logits, tolerances),
        *of_generation(known["generation"], tolerances),
        *of_transcoder(known["transcoder"]),
    ]
    return Certificate(
        passed=not failures, failures=failures, logits=logits, sites=rows,
        first_jump=isolated.first() or accumulated.first(), truth=truth, dtype=tolerances.dtype,
        notes=notes(config, prompts, known["layers"], tolerances), config=config.to_dict(),
        tolerances=tolerances.to_dict(), **known,
    )  # fmt: skip


def row(tolerances: Tolerances, side: Any, address: Address) -> SiteRow:
    """The figures of one address, judged."""
    whole, alone = side.accumulated[address], side.isolated.get(address)
    limits = {
        kind: tolerances.limits(kind, address.site, whole.tokens)
        for kind in ("accumulated", "isolated")
    }
    fine = within(whole.figures(), limits["accumulated"])
    if alone:
        fine = fine and within(alone.figures(), limits["isolated"])
    return SiteRow(
        site=address.site, layer=address.layer, accumulated=whole.figures(),
        isolated=alone and alone.figures(), accumulated_tolerance=limits["accumulated"][0],
        isolated_tolerance=limits["isolated"][0] if alone else None,
        masks_differ=(alone or whole).masks_differ, passed=fine,
    )  # fmt: skip


def within(figures: Figures, limits: tuple[float, float]) -> bool:
    """Whether the mean and the worst token are; what is not a number is not."""
    return figures.relative <= limits[0] and figures.worst <= limits[1]


class Over:
    """The rows whose error is over tolerance, of one kind.

    Args:
        rows: all of them, in the order of computation.
        kind: "isolated" or "accumulated".
        tolerances: of the dtype.
        tokens: over how many the means are.
    """

    def __init__(self, rows: list[SiteRow], kind: str, tolerances: Tolerances, tokens: int):
        self.kind, self.tolerances, self.tokens = kind, tolerances, tokens
        self.rows = [one for one in rows if self._is_over(one)]

    def _limits(self, one: SiteRow) -> tuple[float, float]:
        return self.tolerances.limits(self.kind, one.site, self.tokens)

    def _is_over(self, one: SiteRow) -> bool:
        figures = getattr(one, self.kind)
        return figures is not None and not within(figures, self._limits(one))

    def first(self) -> Jump | None:
        """See :class:`jaxtc.parity.certificate.Jump`."""
        if not self.rows:
            return None
        one = self.rows[0]
        figures, limits = getattr(one, self.kind), self._limits(one)
        mean = not figures.relative <= limits[0]
        return Jump(
            str(Address(one.site, one.layer)), one.site, one.layer, self.kind,
            figures.relative if mean else figures.worst, limits[0] if mean else limits[1],
        )  # fmt: skip

    def sentences(self) -> list[str]:
        """One for every site, about the first such layer."""
        found: dict[str, list[SiteRow]] = {}
        for one in self.rows:
            found.setdefault(one.site, []).append(one)
        return [self._sentence(site, over) for site, over in found.items()]

    def _sentence(self, site: str, over: list[SiteRow]) -> str:
        first, others = over[0], [str(one.layer) for one in over[1:]]
        figures, (mean, worst) = getattr(first, self.kind), self._limits(first)
        where = site if first.layer is None else f"{site} at layer {first.layer}"
        rest = f" (and at layers {some(others, 50)})" if others else ""
        if first.masks_differ:
            what = f"{first.masks_differ} scores are masked in one model only"
        elif figures.relative <= mean:
            what = (
                f"{self.kind} error {figures.worst:.2e} at the worst token, tolerance {worst:.1e}"
            )
        else:
            what = f"{self.kind} error {figures.relative:.2e}, tolerance {mean:.1e}"
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
    config: Gemma2Config, prompts: list[Prompt], layers: list[int], tolerances: Tolerances
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
    return found
