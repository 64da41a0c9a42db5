"""How well a transcoder explains: FVU, L0, density, loss. Streaming, in float64 on the host.

Several numbers go by the name "explained variance" in this field. This module's own is
:class:`FVU`, the dataset-mean convention; :func:`notebook_score` and :func:`relative_error` are
others, for comparison. Axis letters: ... leading axes (usually B T), D hidden, M features, V
vocabulary. Arrays may be JAX's, NumPy's or torch's, of any float dtype, bfloat16 included.

A ``mask`` (...), booleans, is true on the tokens that count. Give the result of the run in its
place, ``FVU().update(y, guess, result)``: then neither padding counts nor special tokens, since
transcoders are not trained on those and the norm of <bos> alone would swamp a sum of squares
(``result.mask`` puts them back). Where nothing is given all tokens count, as is right for rows of
tokens that were chosen before; a metric's ``left_out`` tells how many did not.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError
from jaxtc.helpers import explicit_transfers
from jaxtc.interchange import owned, plain
from jaxtc.transcoders.encoder import SparseFeatures

__all__ = [
    "FVU", "FeatureStatistics", "Loss", "Mean", "delta_loss", "loss_recovered", "next_token_loss",
    "notebook_score", "relative_error", "special_token_mask",
]  # fmt: skip


@explicit_transfers
def special_token_mask(ids: Any, special_ids: Iterable[int]) -> np.ndarray:
    """(...) booleans: which of ``ids`` (...) are special (BOS, EOS, padding), wherever they stand.

    None among ``special_ids``, of an absent token, is skipped. A tokenizer's output or a result may
    stand for its ids.

    Raises:
        InputError: an id that is not an integer.
    """
    special_ids = [index for index in special_ids if index is not None]
    try:
        special = [operator.index(index) for index in special_ids]
    except TypeError as error:
        raise InputError(
            f"special_ids are {special_ids!r}, expected whole numbers, such as [0, 1, 2]."
        ) from error
    return np.isin(_ids(ids), special)


@dataclasses.dataclass(eq=False)
class FVU:
    """Fraction of variance unexplained, over all batches given to :meth:`update`.

    FVU = Σ‖y − ŷ‖² / Σ‖y − ȳ‖², both sums over the unmasked tokens of the whole dataset and ȳ (D,)
    their mean vector (the dataset-mean convention; Gemma Scope, arXiv 2408.05147 §4, reports FVU).
    The denominator is built by merging the means and squared deviations of batches (Chan, Golub
    and LeVeque 1983): Σ‖y‖² − n‖ȳ‖² would lose every digit where the mean is large beside the
    spread. Any split into batches gives the same result up to float64 rounding.

    Attributes:
        tokens, mean: how many so far, and ȳ.
        deviation, residual: the denominator and the numerator.
        left_out: how many tokens masks left out, padding among them; not what edits left alone,
            which ``result.left_out`` shows.
    """

    tokens: int = 0
    mean: np.ndarray | float = 0.0
    deviation: float = 0.0
    residual: float = 0.0
    left_out: int = 0

    def update(self, target: Any, reconstruction: Any, mask: Any = None) -> "FVU":
        """Add tokens: ``target`` y and ``reconstruction`` ŷ, each (..., D); returns itself.

        ``mask`` is a result of :func:`jaxtc.run`, or booleans (...).

        Raises:
            InputError: shapes that differ from each other or from those of earlier batches.
        """
        y, guess = _rows(mask, target=target, reconstruction=reconstruction)
        if self.tokens and y.shape[1] != len(self.mean):
            raise InputError(f"Tokens of D={y.shape[1]} after tokens of D={len(self.mean)}.")
        self.left_out += _size(target) - len(y)
        if not len(y):
            return self
        mean = y.mean(0)
        deviation, residual = (float(np.square(y - around).sum()) for around in (mean, guess))
        return self.merge(FVU(len(y), mean, deviation, residual))

    def merge(self, other: "FVU") -> "FVU":
        """Add what another accumulator saw (another process, say); returns itself.

        Raises:
            InputError: not such an accumulator, or one of another D.
        """
        if not isinstance(other, FVU):
            raise InputError(f"merge takes another FVU, got {type(other).__name__}.")
        if self.tokens and other.tokens and np.shape(self.mean) != np.shape(other.mean):
            raise InputError(
                f"An FVU of tokens of D={len(other.mean)} cannot be merged into one of "
                f"D={len(self.mean)}."
            )
        total = self.tokens + other.tokens
        share = other.tokens / max(total, 1)
        step = other.mean - self.mean
        self.deviation += other.deviation + float(np.sum(step**2)) * self.tokens * share
        self.mean = self.mean + step * share
        self.residual += other.residual
        self.left_out += other.left_out
        self.tokens = total
        return self

    @property
    def fvu(self) -> float:
        """The fraction; NaN where the targets do not vary (no token, or only one)."""
        return self.residual / (self.deviation or math.nan)

    @property
    def explained_variance(self) -> float:
        """1 − FVU: 1 is perfect, 0 as good as always guessing the mean, below 0 worse."""
        return 1 - self.fvu


class FeatureStatistics:
    """L0, density and dead features of M ``features``, over all batches given to :meth:`update`.

    L0 is the mean count of active features per token, a feature's density the fraction of tokens on
    which it is active, and a dead feature one that is active on none of them (which says as much
    about the text as about the feature when the text is short). Active means above 0. ``left_out``
    is as of :class:`FVU`.
    """

    def __init__(self, features: int):
        self.tokens = self.left_out = 0
        self.counts = np.zeros(features, np.int64)

    def update(self, activations: Any, mask: Any = None) -> "FeatureStatistics":
        """Add (..., M) or :class:`jaxtc.transcoders.encoder.SparseFeatures`; returns itself.

        ``mask`` is as of :meth:`FVU.update`.

        Raises:
            InputError: another M than this accumulator's, or tokens whose sparse features
                overflowed their capacity.
        """
        M = len(self.counts)
        if isinstance(activations, SparseFeatures):
            values, ids = _rows(mask, values=activations.values, ids=activations.ids)
            if np.isnan(values).any():
                raise InputError("Some tokens have more active features than their capacity.")
            active = ids[values > 0].astype(np.int64)
            if active.max(initial=0) >= M:
                raise InputError(f"Feature {active.max()} of a transcoder of {M}.")
        else:
            (values,) = _rows(mask, activations=activations)
            if values.shape[1] != M:
                raise InputError(f"Expected M={M} features, got {values.shape[1]}.")
            active = np.nonzero(values > 0)[1]
        self.counts += np.bincount(active, minlength=M)
        self.tokens += len(values)
        given = activations.values if isinstance(activations, SparseFeatures) else activations
        self.left_out += _size(given) - len(values)
        return self

    @property
    def l0(self) -> float:
        """Mean count of active features per token; NaN before any token."""
        return float(self.counts.sum() / (self.tokens or math.nan))

    @property
    def density(self) -> np.ndarray:
        """(M,) float64, the fraction of tokens on which each feature is active."""
        return self.counts / (self.tokens or math.nan)

    @property
    def dead(self) -> np.ndarray:
        """(M,) booleans, features active on no token so far."""
        return self.counts == 0


@dataclasses.dataclass(eq=False)
class Mean:
    """A streaming mean of numbers, such as the losses of tokens.

    Attributes:
        tokens, total: how many so far, and their sum.
        left_out: as of :class:`FVU`.
    """

    tokens: int = 0
    total: float = 0.0
    left_out: int = 0

    def update(self, values: Any, mask: Any = None) -> "Mean":
        """Add (...) numbers, those of ``mask`` only (as of :meth:`FVU.update`); returns itself."""
        values = np.asarray(plain(values))[..., None]
        (rows,) = _rows(mask, values=values)
        self.tokens += len(rows)
        self.left_out += _size(values) - len(rows)
        self.total += float(rows.sum())
        return self

    @property
    def mean(self) -> float:
        """NaN before any number."""
        return self.total / (self.tokens or math.nan)


@dataclasses.dataclass(eq=False)
class Loss(Mean):
    """The mean next-token loss of prompts of any lengths, in nats: ``Loss().update(result).mean``.

    Padding never counts. The mean is over tokens: long prompts weigh more than short ones (for one
    number a prompt see :class:`jaxtc.scores.Loss`).

    Attributes:
        special_tokens: whether special tokens count as answers: ``<eos>``, or a ``<bos>`` that is
            not the first.
        tokens, total, mean: how many answers so far, their losses' sum, its mean.
        left_out: how many answers were special tokens; padding, which is no answer, is not counted
            here as :class:`FVU` counts it.
    """

    special_tokens: bool = dataclasses.field(default=False, kw_only=True)

    def update(self, result: Any) -> "Loss":
        """Add a run of :func:`jaxtc.run` with ``logits="all"``; returns itself.

        Raises:
            InputError: not such a run.
        """
        if np.ndim(getattr(result, "logits", None)) != 3:
            raise InputError(
                "A loss is of a run that kept the logits of all tokens: "
                "Loss().update(jaxtc.run(model, tokens))."
            )
        losses = np.asarray(next_token_loss(result.logits, result.tokens))
        every = np.asarray(result.answers(special_tokens=True))
        answers = np.asarray(result.answers(self.special_tokens))
        return super().update(losses[every], answers[every])


def relative_error(target: Any, reconstruction: Any) -> np.ndarray:
    """‖y − ŷ‖ / ‖y‖ of each token, (...) float64: 0 is perfect, 1 as bad as guessing nothing.

    ``target`` y and ``reconstruction`` ŷ are (..., D); NaN where y is zero.
    """
    target = plain(target)
    y, guess = _rows(None, target=target, reconstruction=reconstruction)
    size = np.linalg.norm(y, axis=1)
    missed = np.linalg.norm(y - guess, axis=1)
    ratio = np.divide(missed, size, out=np.full_like(size, math.nan), where=size > 0)
    return ratio.reshape(np.shape(target)[:-1])


def notebook_score(target: Any, reconstruction: Any) -> float:
    """The explained-variance score of Gemma Scope's tutorial notebook, number for number.

    ``1 - mean((ŷ − y)²) / var(y)`` over ``[0, :, 1:]``: that slice drops the first *coordinate* of
    every token (dropping the first token, <bos>, was meant), and ``var`` is one unbiased variance
    over all that is left, around a scalar mean rather than a mean vector. Kept for comparison
    with published runs; :class:`FVU` is the measure to quote. ``target`` y and ``reconstruction`` ŷ
    are (T, D) or (1, T, D).

    Raises:
        InputError: shapes that differ, or a batch of several prompts (the notebook reads one).
    """
    target = plain(target)
    if np.ndim(target) == 3 and np.shape(target)[0] != 1:
        raise InputError(f"The notebook scores one prompt, got a batch of {np.shape(target)[0]}.")
    y, guess = _rows(None, target=target, reconstruction=reconstruction)
    y, guess = y[:, 1:], guess[:, 1:]
    if y.size < 2 or not (variance := y.var(ddof=1)) > 0:
        return math.nan
    return float(1 - np.square(guess - y).mean() / variance)


@explicit_transfers
def next_token_loss(logits: Any, tokens: Any) -> jax.Array:
    """Cross entropy of each next token, in nats: −log softmax(logits[t])[tokens[t+1]].

    Of ``logits`` (B, T, V) and ``tokens`` (B, T) to (B, T−1) float32; entry t is the loss of token
    t+1. It says nothing where one of the two is padding: :class:`Loss` leaves that out. NaN for an
    id that does not exist.

    Raises:
        InputError: shapes that do not fit each other, or ids that are not whole numbers.
    """
    logits, tokens = plain(logits), _ids(tokens)
    if np.ndim(logits) != 3 or np.shape(logits)[:2] != np.shape(tokens):
        raise InputError(
            f"Logits {list(np.shape(logits))} and tokens {list(np.shape(tokens))} do not fit: they "
            "are (B, T, V) and (B, T). A run's are result.logits and result.tokens."
        )
    return _next_token_loss(*owned((logits, tokens)))


def _ids(given: Any) -> Any:
    """Ids as an array, also of a tokenizer's output or a result."""
    given = getattr(given, "tokens", given)
    ids = plain(given["input_ids"] if isinstance(given, Mapping) else given)
    try:
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    except ValueError:  # ragged
        ids = np.asarray(None)
    if ids.size and not (ids.dtype == bool or jnp.issubdtype(ids.dtype, jnp.integer)):
        raise InputError(f"Token ids are whole numbers in rows of one length, got {ids.dtype}.")
    return ids


@jax.jit
def _next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    given = logits[:, :-1].astype(jnp.float32)
    right = jnp.take_along_axis(given, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(given, axis=-1) - right


def delta_loss(clean: float, spliced: float) -> float:
    """``spliced − clean``: what the language model loses with a transcoder in its MLP's place.

    The primary measure of the Gemma Scope paper (arXiv 2408.05147 §4). Both are mean next-token
    losses, over the same tokens.
    """
    return spliced - clean


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """``(ablated − spliced) / (ablated − clean)``: 1 is no loss, 0 no better than a removed MLP.

    Losses as :func:`delta_loss` takes them; ``ablated`` is with zeros in place of the MLP's output,
    at the same positions as the splice. NaN where removing the MLP changes nothing.
    """
    return (ablated - spliced) / (ablated - clean or math.nan)


def _size(array: Any) -> int:
    """The number of tokens in (..., D)."""
    return math.prod(np.shape(array)[:-1])


@explicit_transfers
def _rows(mask: Any, **arrays: Any) -> list[np.ndarray]:
    """Each array as (tokens, last axis) in float64, unmasked tokens only.

    Raises:
        InputError: shapes that differ from each other, or from the mask's.
    """
    found = [np.asarray(plain(array)) for array in arrays.values()]
    *leading, _ = shape = found[0].shape or (None,)
    if any(array.shape != shape for array in found):
        given = ", ".join(f"{n} {list(x.shape)}" for n, x in zip(arrays, found, strict=True))
        raise InputError(f"These must have one shape, (..., D): {given}.")
    mask = getattr(mask, "counted", mask)  # of a run
    keep = np.ones(leading, bool) if mask is None else np.asarray(plain(mask))
    if keep.dtype == object:
        raise InputError(f"The mask is a {type(mask).__name__}: give booleans, or a run's result.")
    if keep.dtype != bool or keep.shape != (*leading,):
        raise InputError(
            f"The mask is {keep.dtype}{list(keep.shape)}, expected bool{leading}: true on the "
            "tokens that count."
        )
    return [array[keep].astype(np.float64) for array in found]
