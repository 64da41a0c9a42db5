"""The reference transcoder: JumpReLU as the tutorial notebook writes it, in plain PyTorch."""

from pathlib import Path

import numpy as np

from jaxtc.parity.torch_side import JumpReLU

__all__ = ["JumpReLU", "save_random"]


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
