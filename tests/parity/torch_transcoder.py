"""The reference transcoder: JumpReLU as the tutorial notebook writes it, in plain PyTorch.

And its variants: with a skip connection, with ReLU, in the files of circuit-tracer and of Gemma
Scope 2, and autoencoders; put into ``transformers``' model by hooks of their own.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from transformers import Gemma2ForCausalLM


def _top_k(z: torch.Tensor, k: int) -> torch.Tensor:
    kept = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, kept.indices, kept.values.relu())


# By name: pre-activations and what else the activation has, to activations.
ACTIVATE = {
    "jumprelu": lambda z, threshold: torch.where(z > threshold, z.relu(), 0),
    "relu": lambda z: z.relu(),
    "topk": _top_k,
    "batchtopk": lambda z, threshold: z.relu() * (z.relu() > threshold),
}


class JumpReLU(nn.Module):
    """``a = z · (z > threshold)`` where ``z > 0``, and ``y = a W_dec + b_dec``."""

    def __init__(self, **parameters: torch.Tensor):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.float(), requires_grad=False))

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., M)."""
        return x @ self.W_enc + self.b_enc

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., M)."""
        z = self.pre_activations(x)
        return (z > self.threshold) * torch.relu(z)

    def decode(self, a: torch.Tensor) -> torch.Tensor:
        """(..., M) to (..., D)."""
        return a @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        return self.decode(self.encode(x))

    @classmethod
    def load(cls, path: Path) -> "JumpReLU":
        """From a published ``params.npz``."""
        with np.load(path, allow_pickle=False) as held:
            return cls(**{name: torch.from_numpy(held[name]) for name in held.files})


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


def imitate(path: Path, x: torch.Tensor, changes: dict[int, float] | None = None) -> torch.Tensor:
    """What a stored transcoder makes of x, (..., D) to (..., D), some of its features set."""
    if path.suffix == ".npz":
        held = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    else:
        held = safetensors.torch.load_file(path)
    lower = "w_enc" in held
    if lower:
        z = x @ held["w_enc"] + held["b_enc"]
    elif path.suffix == ".npz":
        z = x @ held["W_enc"] + held["b_enc"]
    else:
        z = torch.nn.functional.linear(x, held["W_enc"], held["b_enc"])
    threshold = held.get("threshold", held.get("activation_function.threshold"))
    a = z.relu() if threshold is None else torch.where(z > threshold, z.relu(), 0)
    for feature, value in (changes or {}).items():
        a[..., feature] = value
    y = a @ held["w_dec" if lower else "W_dec"] + held["b_dec"]
    if "W_skip" in held:
        y = y + torch.nn.functional.linear(x, held["W_skip"])
    if "affine_skip_connection" in held:
        y = y + x @ held["affine_skip_connection"]
    return y


@contextlib.contextmanager
def spliced(
    model: Gemma2ForCausalLM, layer: int, reads: str, writes: str, call
) -> Iterator[dict[str, torch.Tensor]]:
    """``call(what is at reads)`` in the place of what is at writes; keeps both under their names.

    Args:
        model: in eager mode.
        layer: of the two sites.
        reads: mlp_in_normed or mlp_in; or the same as ``writes``.
        writes: mlp_out, resid_post or attn_heads (the heads in one axis).
        call: (B, T, D) to (B, T, D).
    """
    block, held = model.model.layers[layer], {}

    def read(module, args, out):
        x = args[0].float()
        rms = x.pow(2).mean(-1, keepdim=True).add(module.eps).sqrt()
        held[reads] = out if reads == "mlp_in" else x / rms

    def write(x):
        if reads == writes:
            held[reads] = x
        held["made"] = call(held[reads])
        return held["made"]

    handles = []
    if reads != writes:
        handles.append(block.pre_feedforward_layernorm.register_forward_hook(read))
    if writes == "attn_heads":
        before = lambda _, args: (write(args[0]),)  # noqa: E731
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(before))
    else:
        module = block if writes == "resid_post" else block.post_feedforward_layernorm
        handles.append(module.register_forward_hook(lambda _, args, out: write(out)))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()
