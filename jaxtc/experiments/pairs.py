"""Pairs of prompts, clean and corrupted: which tokens of one stand for which of the other.

Axis letters: B pairs, P places along the prompts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtc.errors import InputError
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts, prepare
from jaxtc.tap.columns import returned
from jaxtc.tap.positions import Places, Token, is_traced, locate


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Places along pairs of prompts.

    Attributes:
        labels: (P,) what an axis calls them: positions, or the text of a :class:`jaxtc.Token`.
        clean, corrupted: (B, P) int32, where each is in the two prompts.
        there: (B, P) booleans, whether both prompts have it.
        prompts: the clean prompts from the first column on, and the corrupted ones as they were
            given, where edits stand.
    """

    labels: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray
    there: np.ndarray
    prompts: tuple[Prompts, Prompts]

    @property
    def masks(self) -> np.ndarray:
        """(P, B, T) booleans: each place in the corrupted prompts, nothing where it is missing."""
        at = np.where(self.there, self.corrupted, -1).T[..., None]
        given = self.prompts[1]
        return returned(at == np.arange(given.length), given.starts, 2, rows=1)


def pairs(
    config: Gemma2Config,
    clean: Any,
    corrupted: Any,
    positions: Sequence[Any] | None,
    tokenizer: Any = None,
) -> Pairs:
    """The places of ``positions``, by default each token of pairs that are equally long.

    Raises:
        InputError: numbers of prompts that differ; a pair of two lengths and no ``positions``; a
            position that is not one, or that no pair has.
    """
    both = [prepare(tokens, config, tokenizer=tokenizer) for tokens in (clean, corrupted)]
    if is_traced([prompts.lengths for prompts in both]):
        raise InputError("Patching compares lengths on the host: give prompts that are not traced.")
    sizes = [prompts.lengths.tolist() for prompts in both]
    if len(sizes[0]) != len(sizes[1]):
        raise InputError(
            f"There are {len(sizes[0])} clean prompts and {len(sizes[1])} corrupted ones; each "
            "clean one is patched into the corrupted one of the same row."
        )
    if positions is None:
        unlike = next((row for row, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b), None)
        if unlike is not None:
            raise InputError(
                f"The clean prompts have {sizes[0]} tokens and the corrupted ones {sizes[1]}: in "
                f"pair {unlike} no token stands for the other's. Choose words that are one token "
                "each, or say which places to patch: positions=[jaxtc.Token(id), -1] finds each in "
                "both prompts."
            )
        positions = range(max(sizes[0]))
    spelled = list(np.atleast_1d(positions) if np.ndim(positions) == 0 else positions)
    if not spelled:
        raise InputError("positions is empty: name at least one place to patch.")
    found = [[_located(one, prompts) for one in spelled] for prompts in both]
    at = [np.concatenate([places.at for places in side], 1) for side in found]
    there = np.ones(at[0].shape, bool)
    for side, prompts in zip(at, both, strict=True):
        there &= (side >= 0) & (side < prompts.lengths[:, None])
    for index in np.flatnonzero(~there.any(0))[:1]:
        raise InputError(
            f"No pair has the position {spelled[index]} in both of its prompts, of {sizes[0]} and "
            f"{sizes[1]} tokens."
        )
    tokens = any(isinstance(one, Token) for one in spelled)
    labels = np.array([str(one) for one in spelled] if tokens else spelled)
    return Pairs(labels, *at, there, (both[0].without_left_padding(), both[1]))


def _located(position: Any, prompts: Prompts) -> Places:
    """One place in each row, whether or not it is there."""
    if not isinstance(position, Token) and np.ndim(position):
        raise InputError(f"positions are whole numbers or jaxtc.Token, one by one; got {position}.")
    found = locate(position, prompts, what="positions")
    if not isinstance(found, Places):
        raise InputError(
            f"positions are whole numbers or jaxtc.Token, one by one; got {position!r}."
        )
    return found
