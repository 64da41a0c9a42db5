"""Write a 2B-shaped Gemma-2 with random weights, in the hub's format: bf16 shards with an index.

    python -m tests.benchmarks.make_checkpoint FOLDER [--layers 26] [--seed 0]

Also FOLDER/transcoder/layer_20/width_16k/average_l0_11/params.npz, random, of Gemma Scope's shapes.
Nothing here is ever committed: 26 layers are 5.2 GB.
"""

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxtc.model.config import Gemma2Config

WIDTH, LAYER = 16384, 20


def tensors(config: Gemma2Config, group: int | None) -> dict[str, tuple[int, ...]]:
    """HF names and shapes of one layer, or of what belongs to no layer (``group`` None)."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    if group is None:
        return {"model.embed_tokens.weight": (config.vocab_size, D), "model.norm.weight": (D,)}
    shapes = {
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "pre_feedforward_layernorm": (D,),
        "post_feedforward_layernorm": (D,),
    }
    return {f"model.layers.{group}.{name}.weight": shape for name, shape in shapes.items()}


def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norm weights around 0 (gain 1 + w), matrices of unit gain."""
    scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
    return (rng.standard_normal(shape, np.float32) * scale).astype(ml_dtypes.bfloat16)


def write(folder: Path, config: Gemma2Config, seed: int) -> None:
    """The model's folder: config, index, and a shard for the embedding and every four layers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    groups = [[None]] + [
        list(range(config.num_hidden_layers))[i : i + 4]
        for i in range(0, config.num_hidden_layers, 4)
    ]
    index, total = {}, 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        arrays = {
            key: draw(rng, shape)
            for member in group
            for key, shape in tensors(config, member).items()
        }
        total += sum(array.nbytes for array in arrays.values())
        save_file(arrays, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(arrays, name)
        print(f"{name}: {len(arrays)} tensors", flush=True)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1))


def write_transcoder(folder: Path, config: Gemma2Config, seed: int) -> None:
    """A params.npz of Gemma Scope's shapes with a few dozen active features a token."""
    rng = np.random.default_rng(seed)
    D = config.hidden_size
    path = folder / f"layer_{LAYER}/width_16k/average_l0_11"
    path.mkdir(parents=True, exist_ok=True)
    np.savez(
        path / "params.npz",
        W_enc=rng.standard_normal((D, WIDTH), np.float32) * np.float32(D**-0.5),
        W_dec=rng.standard_normal((WIDTH, D), np.float32) * np.float32(D**-0.5),
        b_enc=np.zeros(WIDTH, np.float32),
        b_dec=np.zeros(D, np.float32),
        threshold=np.full(WIDTH, 3.0, np.float32),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = Gemma2Config(num_hidden_layers=given.layers)
    write(given.folder, sizes, given.seed)
    write_transcoder(given.folder / "transcoder", sizes, given.seed)
