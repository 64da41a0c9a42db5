"""What PyTorch has at every site of the table, for prompts that are padded to one batch."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Gemma2ForCausalLM

from jaxtc.parity import torch_side
from jaxtc.parity.torch_side import rate, scores
from jaxtc.tap.sites import Address

__all__ = ["Captured", "addresses", "capture", "hook", "pad", "rate", "relative", "scores"]

# Per address, one unpadded array a prompt.
Captured = dict[Address, list[torch.Tensor]]


def pad(prompts: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and mask, padded with 0 on one side."""
    width = max(map(len, prompts))
    blank = [[0] * (width - len(row)) for row in prompts]
    masks = [[1] * len(row) for row in prompts]
    join = (lambda a, b: a + b) if side == "right" else (lambda a, b: b + a)
    ids = [join(list(row), gap) for row, gap in zip(prompts, blank, strict=True)]
    mask = [join(row, gap) for row, gap in zip(masks, blank, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def capture(model: Gemma2ForCausalLM, prompts: Sequence[Sequence[int]], side: str) -> Captured:
    """Every site of every layer, as PyTorch has it, without padding."""
    ids, mask = pad(prompts, side)
    kept: dict = {}
    torch_side.forward(model, ids, mask, kept.__setitem__)
    return {key: unpadded(key, value, mask) for key, value in kept.items()}


def hook(
    model: Gemma2ForCausalLM, where: str, keep: dict, key
) -> torch.utils.hooks.RemovableHandle:
    """Keep what passes at ``module.input``, ``module.output`` or ``module.output.1``."""
    return torch_side.hook(model, where, lambda x: keep.__setitem__(key, x))


def addresses(layers: int) -> list[Address]:
    """Every site of every layer."""
    return torch_side.addresses(range(layers))


def unpadded(key: Address, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The real tokens of each row."""
    square = key.site in ("attn_scores", "attn_pattern")
    rows = [(row, real.bool()) for row, real in zip(x, mask, strict=True)]
    return [row[:, real][:, :, real] if square else row[real] for row, real in rows]


def relative(ours: Sequence, theirs: Sequence) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over the real positions of all prompts, in float64.

    Entries where the reference has NaN (masked scores) are left out.
    """
    far = size = 0.0
    for a, b in zip(ours, theirs, strict=True):
        b = b.double().numpy()
        a = np.asarray(a, np.float64).reshape(b.shape)
        kept = ~np.isnan(b)
        far += np.sum((a[kept] - b[kept]) ** 2)
        size += np.sum(b[kept] ** 2)
    return float(np.sqrt(far / size))


def relative_by_token(site: str, ours, theirs) -> np.ndarray:
    """‖ours − theirs‖ / ‖theirs‖ of each token of one prompt, (T,)."""
    axis = 1 if site in ("attn_scores", "attn_pattern") else 0
    a, b = (np.moveaxis(np.asarray(x, np.float64), axis, 0) for x in (ours, theirs))
    a = a.reshape(b.shape[0], -1)
    b = b.reshape(a.shape)
    masked = np.isnan(b)
    a, b = (np.where(masked, 0, x) for x in (a, b))
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
