"""The numbers: two runs side by side, one prompt at a time, in float64 on the host."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxtc.parity.certificate import Divergence, Figures, Generation, Logits, Transcoder
from jaxtc.parity.tolerances import Tolerances
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.metrics import FVU, special_token_mask

# Rows of logits that are widened to float64 at once: a vocabulary is long.
_ROWS = 16
# NaN counts as infinitely far.
_worst = functools.partial(np.nan_to_num, nan=np.inf, posinf=np.inf)


def masked(x: np.ndarray) -> np.ndarray:
    """Which scores are masked: NaN in the reference's files, the least float32 in ours."""
    return np.isnan(x) | (x <= -1e38)


def relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(T,) ‖ours − theirs‖ / ‖theirs‖ of (T, n) float64; the numerator alone where theirs is 0."""
    far, size = np.linalg.norm(ours - theirs, axis=1), np.linalg.norm(theirs, axis=1)
    return np.divide(far, size, out=far, where=size > 0)


@dataclasses.dataclass
class Tally:
    """The error at one address, collected over prompts."""

    site: str
    total: float = 0.0
    tokens: int = 0
    worst: float = 0.0
    largest: float = 0.0
    masks_differ: int = 0  # scores masked in one model only

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Add one prompt's arrays, without batch axis; the axes of a token may be split differently
        in the two."""
        axis = BY_NAME[self.site].sequence_axis - 1
        a, b = (np.moveaxis(np.asarray(x, np.float64), axis, 0) for x in (ours, theirs))
        a, b = (x.reshape(len(x), -1) for x in (a, b))
        differ = np.zeros(a.shape, bool)
        if self.site == "attn_scores":
            here, there = masked(a), masked(b)
            differ = here != there
            a, b = (np.where(here | there, 0, x) for x in (a, b))
        with np.errstate(invalid="ignore"):  # infinity less infinity
            error, apart = relative(a, b), np.abs(a - b)
        error[differ.any(1) | np.isnan(error)] = np.inf  # NaN matches nothing, not even NaN
        self.masks_differ += int(differ.sum())
        self.total += float(error.sum())
        self.tokens += len(error)
        self.worst = max(self.worst, float(error.max()))
        self.largest = max(self.largest, float(_worst(apart).max()))

    @property
    def mean(self) -> float:
        """Relative error, mean over tokens."""
        return self.total / self.tokens

    def figures(self, tolerances: Tolerances, kind: str) -> Figures:
        """For the certificate; ``kind`` is "isolated" or "accumulated"."""
        limits = tolerances.limits(kind, self.site, self.tokens)
        return Figures(self.mean, self.worst, self.largest, *limits)


class Predictions:
    """Compares logits; see :class:`jaxtc.parity.certificate.Logits`."""

    def __init__(self, tolerances: Tolerances):
        self.margin = tolerances.margin
        self.kl: list[float] = []
        self.top1: list[bool] = []
        self.unexplained = 0
        self.top5: list[float] = []
        self.losses: list[tuple[float, float]] = []

    def add(self, ours: np.ndarray, theirs: np.ndarray, tokens: Sequence[int]) -> None:
        """Add one prompt's (T, V) logits, and its T ids."""
        for start in range(0, len(tokens), _ROWS):
            rows = slice(start, start + _ROWS)
            a, b = (np.asarray(x[rows], np.float64) for x in (ours, theirs))
            p, q = log_softmax(a), log_softmax(b)
            self.kl += np.sum(np.exp(q) * (q - p), axis=1).tolist()
            best_a, best_b = (np.argsort(-x, axis=1, kind="stable")[:, :5] for x in (a, b))
            same = best_a[:, 0] == best_b[:, 0]
            lead = np.take_along_axis(b, best_b[:, :2], axis=1)
            self.top1 += same.tolist()
            self.unexplained += int((~same & (lead[:, 0] - lead[:, -1] > self.margin)).sum())
            self.top5 += (best_a[:, :, None] == best_b[:, None]).any(1).mean(1).tolist()
            answers = np.asarray(tokens[start + 1 : start + 1 + _ROWS], np.int64)
            at = np.arange(len(answers)), answers
            self.losses += zip(-p[at], -q[at], strict=True)

    def result(self) -> Logits:
        """Over all prompts."""
        losses = _worst(np.mean(self.losses, axis=0)).tolist() if self.losses else [None, None]
        kl = _worst(self.kl)
        return Logits(
            tokens=len(kl), kl_mean=float(np.mean(kl)), kl_max=float(np.max(kl)),
            top1=float(np.mean(self.top1)), top1_unexplained=self.unexplained,
            top5=float(np.mean(self.top5)), loss_ours=losses[0], loss_theirs=losses[1],
        )  # fmt: skip


def log_softmax(x: np.ndarray) -> np.ndarray:
    """(T, V) log probabilities."""
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def generation(
    ours: Sequence[Sequence[int]], theirs: Sequence[dict], tokenizer
) -> Generation | None:
    """Compare the continuations token by token: ``ours`` has new ids of each prompt, ``theirs`` new
    "tokens" of each and the "margins" of the two best logits. ``tokenizer`` may be None."""
    if not ours[0]:
        return None
    text = tokenizer.decode if tokenizer else lambda token: ""
    found = []
    for prompt, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        pairs = zip(mine, reference["tokens"], reference["margins"], strict=True)
        for step, (a, b, margin) in enumerate(pairs):
            if a != b:
                found.append(Divergence(prompt, step, a, b, text(a), text(b), margin))
                break
    closest = min(min(reference["margins"]) for reference in theirs)
    return Generation(len(ours[0]), len(ours), len(ours) - len(found), found, closest)


class Features:
    """Compares the features of our transcoder; see :class:`jaxtc.parity.certificate.Transcoder`.

    Tokens with an id among ``special`` are left out.
    """

    def __init__(self, transcoder, tolerances: Tolerances, special: Iterable[int | None]):
        self.transcoder, self.tolerances, self.special = transcoder, tolerances, special
        self.columns = np.linalg.norm(np.asarray(transcoder.W_enc[...], np.float64), axis=0)
        self.threshold = np.maximum(np.asarray(transcoder.threshold[...], np.float64), 0)
        self.tokens = self.differing = self.near = 0
        self.active, self.overlap = np.zeros(2), 0.0
        self.fvu = [FVU() for _ in range(3)]
        self.errors = {"pre_activations": [], "reconstruction": []}

    def add(self, ours: dict, theirs: dict, tokens: Sequence[int]) -> None:
        """Add one prompt of T tokens: (T, D) "mlp_in_normed" and "mlp_out" of both, and of theirs
        "reconstruction" and (T, M) "pre_activations" and "activations"."""
        keep = ~special_token_mask(tokens, self.special)
        if not keep.any():
            return
        ours = {name: np.asarray(x, np.float32)[keep] for name, x in ours.items()}
        theirs = {name: np.asarray(x, np.float32)[keep] for name, x in theirs.items()}
        x, expected = ours["mlp_in_normed"], theirs["mlp_in_normed"]
        for name, got in (
            ("pre_activations", self.transcoder.pre_activations(expected)),
            ("reconstruction", self.transcoder.decode(theirs["activations"])),
        ):
            pair = (np.asarray(x, np.float64) for x in (got, theirs[name]))
            self.errors[name] += relative(*pair).tolist()
        a, b = np.asarray(self.transcoder.encode(x)) > 0, theirs["activations"] > 0
        both, either = (a & b).sum(1), (a | b).sum(1)
        self.tokens += len(x)
        self.active += a.sum(), b.sum()
        self.overlap += float(np.divide(both, either, out=np.ones(len(x)), where=either > 0).sum())
        token, feature = np.nonzero(a != b)
        moved = np.linalg.norm(x.astype(np.float64) - expected, axis=1)
        size = np.linalg.norm(expected.astype(np.float64), axis=1)
        # The Cauchy-Schwarz bound, and the rounding of the product itself.
        room = moved + self.tolerances.transcoder * size
        away = np.abs(theirs["pre_activations"][token, feature] - self.threshold[feature])
        self.differing += len(token)
        self.near += int((away <= room[token] * self.columns[feature]).sum())
        self.fvu[0].update(theirs["mlp_out"], self.transcoder(x))
        self.fvu[1].update(ours["mlp_out"], theirs["reconstruction"])
        self.fvu[2].update(theirs["mlp_out"], theirs["reconstruction"])

    def result(self, source: str, layer: int) -> Transcoder | None:
        """Over all prompts; None where no token counted."""
        if not self.tokens:
            return None
        fvu = [None if np.isnan(one.fvu) else one.fvu for one in self.fvu]
        l0 = (self.active / self.tokens).tolist()
        return Transcoder(
            source=source, layer=layer, features=self.transcoder.features, tokens=self.tokens,
            l0_ours=l0[0], l0_theirs=l0[1], overlap=self.overlap / self.tokens,
            differing=self.differing, near_threshold=self.near,
            **{name: float(np.mean(errors)) for name, errors in self.errors.items()},
            fvu_ours=fvu[0], fvu_theirs=fvu[1], fvu_reference=fvu[2],
            tolerance=self.tolerances.transcoder, fvu_tolerance=self.tolerances.fvu,
        )  # fmt: skip
