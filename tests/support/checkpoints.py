"""Checkpoints of a small random Gemma-2 as torch and transformers write them."""

import functools
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import jaxtc

IDS = [2, 5, 9, 33, 44, 12, 7, 8, 90, 11]

# No two of D, N*H, K*H, F and V are equal.
SIZES = dict(
    vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12,
    sliding_window=6, max_position_embeddings=64,
)  # fmt: skip


@functools.cache
def theirs(**changes) -> Gemma2ForCausalLM:
    """A random model, the norms too; an untied one has a matrix of its own."""
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES | changes, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
            # Blocks outweigh the embedding, or greedy text repeats one token.
            weight += 4.0 * ("post_" in name)
    return model.eval().requires_grad_(False)


def tensors(**changes) -> dict[str, torch.Tensor]:
    """Those of a tied model, the one matrix under the name of the embedding."""
    state = {k: v.clone() for k, v in theirs(**changes).state_dict().items()}
    if changes.get("tie_word_embeddings", True):
        state.pop("lm_head.weight")
    return state


def write(folder: Path, state: dict[str, torch.Tensor], metadata=None, **config) -> Path:
    """A folder with one file of these tensors, and a config with these changes."""
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors",
              {"format": "pt", **(metadata or {})})  # fmt: skip
    Gemma2Config(**SIZES | config).save_pretrained(folder)
    return folder


def expected(folder: Path) -> np.ndarray:
    """The logits that transformers computes of a folder, (T, V)."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def logits(model: jaxtc.Gemma2) -> np.ndarray:
    """Ours, (T, V)."""
    return np.asarray(jaxtc.run(model, IDS).logits)[0]
