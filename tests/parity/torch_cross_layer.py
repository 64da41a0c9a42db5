"""The reference cross-layer transcoder: circuit-tracer's formulas in plain PyTorch, by hooks.

``a_l = act(x_l W_encᵀ + b_enc)``; ``y_m = Σ_{l ≤ m} a_l W_dec_l[:, m − l] + b_dec_m``, and
``x_m W_skip_m`` where there are skip connections.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import safetensors.torch
import torch
from transformers import Gemma2ForCausalLM


class CrossLayer:
    """Read from a folder, in a dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.layers = []
        for layer in range(len([*folder.glob("W_enc_*.safetensors")])):
            held = {}
            for part in ("enc", "dec"):
                held |= safetensors.torch.load_file(folder / f"W_{part}_{layer}.safetensors")
            held = {key.removesuffix(f"_{layer}"): x.to(dtype) for key, x in held.items()}
            self.layers.append(held)

    def encode(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., M)."""
        held = self.layers[layer]
        z = torch.nn.functional.linear(x, held["W_enc"], held["b_enc"])
        return z.relu() if "threshold" not in held else z * (z > held["threshold"])

    def write(self, layer: int, at: int, a: torch.Tensor) -> torch.Tensor:
        """What features of a layer write at another, (..., M) to (..., D)."""
        return a @ self.layers[layer]["W_dec"][:, at - layer]

    def decode_at(self, at: int, a: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The reconstruction at a layer, which reads x there."""
        held = self.layers[at]
        y = sum(self.write(layer, at, a[layer]) for layer in range(at + 1)) + held["b_dec"]
        return y + x @ held["W_skip"] if "W_skip" in held else y


Change = Callable[[int, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def hooked(
    model: Gemma2ForCausalLM,
    whole: CrossLayer,
    reads: str,
    *,
    splice: Collection[int] = (),
    change: Change = lambda layer, a: a,
) -> Iterator[dict[int, torch.Tensor]]:
    """Reconstructions in the place of these layers' MLP outputs, and features changed.

    ``change(layer, activations)`` gives new activations; where a layer is not spliced, the MLP's
    own output moves by what the changes of all layers up to it write there. Keeps ``mlp_out``.
    """
    found, kept, handles = {}, {}, []

    def reader(layer):
        def read(module, args, out):
            x = args[0]
            rms = x.pow(2).mean(-1, keepdim=True).add(module.eps).sqrt()
            found[layer] = {"resid_mid": x, "mlp_in_normed": x / rms, "mlp_in": out}[reads]

        return read

    def writer(at):
        def write(module, args, out):
            a = [whole.encode(layer, found[layer]) for layer in range(at + 1)]
            new = [change(layer, a[layer]) for layer in range(at + 1)]
            if at in splice:
                out = whole.decode_at(at, a, found[at])
            for layer in range(at + 1):
                out = out + whole.write(layer, at, new[layer] - a[layer])
            kept[at] = out
            return out

        return write

    for layer, block in enumerate(model.model.layers):
        norms = block.pre_feedforward_layernorm, block.post_feedforward_layernorm
        handles.append(norms[0].register_forward_hook(reader(layer)))
        handles.append(norms[1].register_forward_hook(writer(layer)))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
