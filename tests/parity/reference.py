"""What both models have at every site of the table, for prompts that are padded to one batch."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Gemma2ForCausalLM

import jaxtc
from jaxtc.parity import torch_side
from jaxtc.tap.sites import BY_NAME, Address

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
    return {key: unpadded(key.site, value, mask.bool()) for key, value in kept.items()}


def ours(model: jaxtc.Gemma2, prompts: Sequence[Sequence[int]]) -> dict[Address, list[np.ndarray]]:
    """The same of our model, in float32."""
    wanted = torch_side.addresses(range(model.config.num_hidden_layers))
    found = jaxtc.run(model, prompts, capture=wanted)
    assert (found.activations[Address("logits")] == found.logits).all()
    mask = pad(prompts, "right")[1].bool().numpy()
    arrays = {key: np.asarray(found.activations[key], np.float32) for key in wanted}
    return {key: unpadded(key.site, x, mask) for key, x in arrays.items()}


def unpadded(site: str, x, mask) -> list:
    """The real tokens of each row of a (B, ...) array; ``mask`` (B, T) booleans."""
    rows = zip(x, mask, strict=True)
    if BY_NAME[site].kind == "pairs":
        return [row[:, real][:, :, real] for row, real in rows]
    return [row[real] for row, real in rows]


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
    axis = BY_NAME[site].sequence_axis - 1
    a, b = (np.moveaxis(np.asarray(x, np.float64), axis, 0) for x in (ours, theirs))
    a = a.reshape(b.shape[0], -1)
    b = b.reshape(a.shape)
    masked = np.isnan(b)
    a, b = (np.where(masked, 0, x) for x in (a, b))
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
