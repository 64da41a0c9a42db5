"""The numbers: two runs side by side, one prompt at a time, in float64 on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxtc.parity.certificate import Divergence, Figures, Generation, Logits, Transcoder
from jaxtc.parity.tolerances import Tolerances
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.metrics import FVU

# Rows of logits that are widened to float64 at once: a vocabulary is long.
_ROWS = 16


def masked(x: np.ndarray) -> np.ndarray:
    """Which scores are masked: NaN in the reference's files, the least float32 in ours."""
    return np.isnan(x) | (x <= -1e38)


@dataclasses.dataclass
class Tally:
    """The error at one address, collected over prompts.

    Attributes:
        site: of the address.
        masks_differ: scores that one of the two masks and the other does not.
    """

    site: str
    total: float = 0.0
    tokens: int = 0
    worst: float = 0.0
    largest: float = 0.0
    masks_differ: int = 0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """One prompt's arrays at this address, without batch axis; their shapes past the token
        axis may be split differently."""
        axis = BY_NAME[self.site].sequence_axis - 1
        a, b = (np.moveaxis(np.asarray(x, np.float64), axis, 0) for x in (ours, theirs))
        a, b = (x.reshape(len(x), -1) for x in (a, b))
        differ = np.zeros(a.shape, bool)
        if self.site == "attn_scores":
            here, there = masked(a), masked(b)
            differ = here != there
            a, b = (np.where(here | there, 0, x) for x in (a, b))
        self.masks_differ += int(differ.sum())
        with np.errstate(invalid="ignore"):  # infinity less infinity
            apart = np.abs(a - b)
        size, far = np.linalg.norm(b, axis=1), np.linalg.norm(apart, axis=1)
        error = np.divide(far, size, out=far.copy(), where=size > 0)
        # What is not a number is no match for anything.
        error[differ.any(1) | np.isnan(error)] = np.inf
        self.total += float(error.sum())
        self.tokens += len(error)
        self.worst = max(self.worst, float(error.max()))
        self.largest = max(
            self.largest, float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
        )

    @property
    def mean(self) -> float:
        """Relative error, mean over tokens."""
        return self.total / self.tokens

    def figures(self, tolerances: Tolerances, kind: str) -> Figures:
        """As the certificate has them; ``kind`` is "isolated" or "accumulated"."""
        limits = tolerances.limits(kind, self.site, self.tokens)
        return Figures(self.mean, self.worst, self.largest, *limits)


class Predictions:
    """Compares logits; see :class:`jaxtc.parity.certificate.Logits`."""

    def __init__(self, tolerances: Tolerances):
        self.margin = tolerances.margin
        self.kl: list[float] = []
        self.top1: list[bool] = []
        self.sure: list[bool] = []
        self.top5: list[float] = []
        self.losses: list[tuple[float, float]] = []

    def add(self, ours: np.ndarray, theirs: np.ndarray, tokens: Sequence[int]) -> None:
        """One prompt's (T, V) logits, and its T ids."""
        for start in range(0, len(tokens), _ROWS):
            rows = slice(start, start + _ROWS)
            a, b = (np.asarray(x[rows], np.float64) for x in (ours, theirs))
            p, q = log_softmax(a), log_softmax(b)
            self.kl += np.sum(np.exp(q) * (q - p), axis=1).tolist()
            count = min(5, a.shape[1])
            best_a, best_b = (np.argsort(-x, axis=1, kind="stable")[:, :count] for x in (a, b))
            pairs = list(zip(best_a, best_b, strict=True))
            self.top1 += [i[0] == j[0] for i, j in pairs]
            self.top5 += [len(set(i) & set(j)) / count for i, j in pairs]
            ranked = np.sort(b, axis=1)[:, -2:]
            self.sure += (ranked[:, -1] - ranked[:, 0] > self.margin).tolist()
            answers = np.asarray(tokens[start + 1 : start + 1 + _ROWS], np.int64)
            at = np.arange(len(answers)), answers
            self.losses += list(zip(-p[at], -q[at], strict=True))

    def result(self) -> Logits:
        """Over all prompts."""
        losses = [None, None]
        if self.losses:
            losses = np.nan_to_num(np.mean(self.losses, axis=0), nan=np.inf, posinf=np.inf).tolist()
        wrong = sum(sure and not same for sure, same in zip(self.sure, self.top1, strict=True))
        kl = np.nan_to_num(self.kl, nan=np.inf, posinf=np.inf)
        return Logits(
            tokens=len(self.kl), kl_mean=float(np.mean(kl)), kl_max=float(np.max(kl)),
            top1=float(np.mean(self.top1)), top1_unexplained=wrong,
            top5=float(np.mean(self.top5)), loss_ours=losses[0], loss_theirs=losses[1],
        )  # fmt: skip


def log_softmax(x: np.ndarray) -> np.ndarray:
    """(T, V) log probabilities."""
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def generation(
    ours: Sequence[Sequence[int]], theirs: Sequence[dict], tokenizer
) -> Generation | None:
    """Continuations token by token.

    Args:
        ours: new ids of each prompt.
        theirs: of each prompt, new "tokens" and the "margins" of the two best logits at each.
        tokenizer: for the tokens' texts, or None.
    """
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
    """Compares a transcoder's features; see :class:`jaxtc.parity.certificate.Transcoder`.

    Args:
        transcoder: ours.
        tolerances: of the models' dtype.
        special: ids of tokens that do not count.
    """

    def __init__(self, transcoder, tolerances: Tolerances, special: Sequence[int]):
        self.transcoder, self.tolerances, self.special = transcoder, tolerances, special
        self.columns = np.linalg.norm(np.asarray(transcoder.W_enc[...], np.float64), axis=0)
        self.threshold = np.maximum(np.asarray(transcoder.threshold[...], np.float64), 0)
        self.tokens = self.differing = self.near = 0
        self.active, self.overlap = np.zeros(2), 0.0
        self.fvu = [FVU() for _ in range(3)]
        self.errors = {"pre_activations": [], "reconstruction": []}

    def add(self, ours: dict, theirs: dict, tokens: Sequence[int]) -> None:
        """One prompt.

        Args:
            ours: (T, D) "mlp_in_normed" and "mlp_out".
            theirs: the same, and (T, M) "pre_activations" and "activations", (T, D)
                "reconstruction".
            tokens: T ids.
        """
        keep = ~np.isin(tokens, self.special)
        if not keep.any():
            return
        ours = {name: np.asarray(x, np.float32)[keep] for name, x in ours.items()}
        theirs = {name: np.asarray(x, np.float32)[keep] for name, x in theirs.items()}
        x, expected = ours["mlp_in_normed"], theirs["mlp_in_normed"]
        for name, got in (
            ("pre_activations", self.transcoder.pre_activations(expected)),
            ("reconstruction", self.transcoder.decode(theirs["activations"])),
        ):
            far = np.linalg.norm(np.asarray(got, np.float64) - theirs[name], axis=1)
            size = np.linalg.norm(theirs[name].astype(np.float64), axis=1)
            # Without a bias, no active feature is a reconstruction of zeros.
            self.errors[name] += np.divide(far, size, out=far, where=size > 0).tolist()
        a, b = np.asarray(self.transcoder.encode(x)) > 0, theirs["activations"] > 0
        both, either = (a & b).sum(1), (a | b).sum(1)
        self.tokens += len(x)
        self.active += a.sum(), b.sum()
        self.overlap += float(np.divide(both, either, out=np.ones(len(x)), where=either > 0).sum())
        token, feature = np.nonzero(a != b)
        moved = np.linalg.norm(x.astype(np.float64) - expected, axis=1)
        size = np.linalg.norm(expected.astype(np.float64), axis=1)
        # By Cauchy and Schwarz, and the rounding of the product itself.
        room = moved + self.tolerances.transcoder * size
        away = np.abs(theirs["pre_activations"][token, feature] - self.threshold[feature])
        self.differing += len(token)
        self.near += int((away <= room[token] * self.columns[feature]).sum())
        mine = np.asarray(self.transcoder(x))
        self.fvu[0].update(theirs["mlp_out"], mine)
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
            pre_activations=float(np.mean(self.errors["pre_activations"])),
            reconstruction=float(np.mean(self.errors["reconstruction"])),
            fvu_ours=fvu[0], fvu_theirs=fvu[1], fvu_reference=fvu[2],
            tolerance=self.tolerances.transcoder, fvu_tolerance=self.tolerances.fvu,
        )  # fmt: skip
