"""The reference transcoder: JumpReLU as the tutorial notebook writes it, in plain PyTorch."""

from pathlib import Path

import numpy as np
import torch
from torch import nn


class JumpReLU(nn.Module):
    """``a = z · (z > threshold)``, ``z > 0`` besides; ``y = a W_dec + b_dec``."""

    def __init__(self, d_in: int, features: int, d_out: int):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_in, features))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(torch.zeros(features, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.threshold = nn.Parameter(torch.zeros(features))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        z = x @ self.W_enc + self.b_enc
        return (z > self.threshold) * torch.relu(z)

    def decode(self, a: torch.Tensor) -> torch.Tensor:
        return a @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    @classmethod
    def load(cls, path: Path) -> "JumpReLU":
        """From a published ``params.npz``."""
        with np.load(path) as held:
            arrays = {key: torch.from_numpy(held[key]).float() for key in held.files}
        module = cls(*arrays["W_enc"].shape, arrays["W_dec"].shape[1])
        module.load_state_dict(arrays)
        return module.requires_grad_(False)


def save_random(path: Path, d: int, features: int, seed: int) -> Path:
    """A random transcoder in the published format: biases, thresholds of both signs, some zero."""
    draw = np.random.default_rng(seed).standard_normal
    arrays = {
        "W_enc": draw((d, features)) / d**0.5,
        "b_enc": draw(features) * 0.3,
        "W_dec": draw((features, d)) * 10 / features**0.5,  # as large as what it imitates
        "b_dec": draw(d) * 0.5,
        "threshold": 0.5 + draw(features) * 0.5,
    }
    arrays["threshold"][::7] = 0
    assert (arrays["threshold"] < 0).any()
    path.parent.mkdir(parents=True)
    np.savez(path, **{key: value.astype(np.float32) for key, value in arrays.items()})
    return path
