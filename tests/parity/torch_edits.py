"""The kinds of edits in plain PyTorch, written from what each is said to do.

Each gives the new value of a whole site, of which :class:`tests.parity.torch_hooks.Where` says what
is used.
"""

from collections.abc import Callable
from typing import Any

import torch

from tests.parity.torch_hooks import Change, Now


def here(value: Any, now: Now) -> Any:
    """``value``, or this layer's of a list of them."""
    return value[now.layer] if isinstance(value, list) else value


def add(value) -> Change:
    return lambda x, now: x + here(value, now)


def set_to(value) -> Change:
    return lambda x, now: here(value, now).expand(x.shape)


def zero(x, now):
    return torch.zeros_like(x)


def scale(factor) -> Change:
    return lambda x, now: x * here(factor, now)


def interpolate(end, weight, start=None) -> Change:
    """A part ``weight`` of the way from ``start`` (what is there) to ``end``."""

    def change(x, now):
        begin = x if start is None else start
        return ((1 - weight) * begin + weight * end).expand(x.shape)

    return change


def tokens_first(change: Change) -> Change:
    """``change`` on (B, T, ...), whichever axis of the site runs over the tokens."""

    def moved(x, now):
        return change(x.movedim(now.axis, 1), now).movedim(1, now.axis)

    return moved


@tokens_first
def mean_of_batch(x, now):
    """The mean over every token of every prompt."""
    return x[now.real].mean(0).expand(x.shape)


@tokens_first
def mean_of_prompt(x, now):
    """Each prompt's own mean over its tokens."""
    means = [row[:n].mean(0, keepdim=True) for row, n in zip(x, now.lengths, strict=True)]
    return torch.stack(means).expand(x.shape)


@tokens_first
def mean_of_rows(x, now):
    """At each position the mean over the prompts that have it."""
    width = max(now.lengths)
    having = [[row for row, n in zip(x, now.lengths, strict=True) if n > t] for t in range(width)]
    means = [torch.stack([row[t] for row in rows]).mean(0) for t, rows in enumerate(having)]
    return torch.stack(means)[None].expand(x.shape)


def project_out(directions: torch.Tensor) -> Change:
    """What is left after the least-squares fit by the directions, (K, D)."""
    basis = torch.linalg.qr(directions.double().T).Q.T

    def change(x, now):
        wide = x.double()
        return (wide - (wide @ basis.T) @ basis).to(x.dtype)

    return change


def copy(source: Callable[[int, int], tuple[int, int]]) -> Change:
    """``source(row, position)`` says which row and position each token's value comes from."""

    @tokens_first
    def change(x, now):
        new = x.clone()
        for row, n in enumerate(now.lengths):
            for position in range(n):
                new[row, position] = x[source(row, position)]
        return new

    return change


def detach(x, now):
    return x.detach()


def freeze(stored) -> Change:
    return lambda x, now: here(stored, now).detach()


def splice(transcoder, error: bool = False) -> Change:
    """The transcoder's output in place of the MLP's; with its error, which has no gradient."""

    def change(x, now):
        made = here(transcoder, now)(now.read["mlp_in_normed"])
        return made + (x - made).detach() if error else made

    return change


def feature(transcoder, index: int, change: Callable) -> Change:
    """The output with one feature's activation changed: its decoder row, as much more of it."""

    def edit(x, now):
        coder = here(transcoder, now)
        a = coder.encode(now.read["mlp_in_normed"])[..., index]
        return x + (change(a) - a)[..., None] * coder.W_dec[index]

    return edit
