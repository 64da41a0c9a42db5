"""Small adapters that PEFT wrote, and the model that PEFT makes of each.

``python -m tests.weights.adapters.cases``, with peft installed, writes them anew below ``data/``:
``NAME/`` is what ``save_pretrained`` wrote (peft 0.21.2), and ``merged.npz`` holds the logits of
``merge_and_unload()`` on :data:`IDS`, in float32 and, for the bfloat16 cases, its tensors' bits.
The base model is made from a seed, in NumPy, by :func:`base`.
"""

import json
import warnings
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
IDS = [2, 5, 9, 33, 44, 12, 7, 8, 40, 11]

SIZES = dict(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=10,
    sliding_window=4, max_position_embeddings=64,
)  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# By name: settings of a LoraConfig; r is 2 and alpha 3 where they do not say.
CASES = {
    "plain": dict(target_modules=LINEAR),
    "rslora": dict(target_modules=["q_proj", "down_proj"], r=3, use_rslora=True),
    "patterns": dict(
        target_modules=LINEAR, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 1},
        alpha_pattern={r"layers\.\d\.self_attn\.v_proj": 7, "model.layers.2.mlp.down_proj": 0.5},
    ),
    "regexp": dict(target_modules=r".*\.(0|2)\.(self_attn\.[qk]_proj|mlp\.down_proj)"),
    "all-linear": dict(target_modules="all-linear", exclude_modules=["gate_proj"]),
    "layers": dict(target_modules=["o_proj", "up_proj"], layers_to_transform=[1]),
    "dora": dict(target_modules=LINEAR, use_dora=True),
    "dora-embedding": dict(target_modules=["embed_tokens", "v_proj"], use_dora=True),
    "norms": dict(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
    "saved-embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved-head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved-both": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "saved-tied": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "embedding": dict(target_modules=["embed_tokens", "k_proj"]),
    "head": dict(target_modules=["lm_head", "k_proj"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 40]),
    "untied": dict(target_modules=["embed_tokens", "lm_head", "o_proj"]),
    "resized": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "backbone": dict(target_modules=["q_proj", "down_proj"], task_type="FEATURE_EXTRACTION"),
    "bfloat16": dict(target_modules=LINEAR),
    "bfloat16-dora": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
}  # fmt: skip
# Where PEFT adds to one matrix what was trained on one side of it.
DOUBLED = ("embedding", "head", "dora-embedding")
NEW_TOKENS = 3  # of "resized"


def base(name: str = "plain") -> dict[str, np.ndarray]:
    """Tensors of the base model of a case, by HF's names, float32 (bfloat16's numbers there)."""
    import ml_dtypes

    from jaxtc.model.config import Gemma2Config
    from jaxtc.weights.names import parameter_names

    config = Gemma2Config(**SIZES, tie_word_embeddings=name not in ("untied", "resized"))
    rng = np.random.default_rng(5)
    found = {x.hf: rng.normal(size=x.hf_shape) * 0.3 for x in parameter_names(config)}
    found = {hf: array.astype(np.float32) for hf, array in found.items()}
    if name.startswith("bfloat16"):
        found = {hf: x.astype(ml_dtypes.bfloat16).astype(np.float32) for hf, x in found.items()}
    return found


def torch_base(name: str = "plain"):
    """The base model of a case in torch, of the class that its adapter was trained on."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tied = name not in ("untied", "resized")
    config = Gemma2Config(**SIZES, attn_implementation="eager", tie_word_embeddings=tied)
    model = Gemma2ForCausalLM(config).eval()
    state = {hf: torch.from_numpy(array) for hf, array in base(name).items()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}
    return model.to(torch.bfloat16) if name.startswith("bfloat16") else model


def train(name: str, folder: Path) -> None:
    """Write the adapter of a case; random numbers stand for what training would give."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(sorted(CASES).index(name))
    model = torch_base(name)
    if name == "resized":
        model.resize_token_embeddings(SIZES["vocab_size"] + NEW_TOKENS, mean_resizing=False)
    settings = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, **CASES[name]}
    wrapped = model.model if name == "backbone" else model
    adapted = get_peft_model(wrapped, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(folder)


def merged(name: str, folder: Path):
    """What PEFT's merge makes of the adapter in a folder."""
    from peft import PeftModel

    model = torch_base(name)
    if name == "resized":
        model.resize_token_embeddings(SIZES["vocab_size"] + NEW_TOKENS, mean_resizing=False)
    if name == "backbone":
        model.model = PeftModel.from_pretrained(model.model, folder).eval().merge_and_unload()
        return model
    return PeftModel.from_pretrained(model, folder).eval().merge_and_unload()


def outcome(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The logits of the merged model, (T, V), and in bfloat16 the bits of its tensors."""
    import torch

    model = merged(name, folder)
    with torch.no_grad():
        logits = model.float() if name.startswith("bfloat16") else model
        bits = {}
        if name.startswith("bfloat16"):
            bits = {
                hf: tensor.numpy()
                for hf, tensor in model.state_dict().items()
                if "layers.1." in hf or "layers.2.mlp.down" in hf
            }
        return {"logits": logits(torch.tensor([IDS])).logits[0].numpy(), **bits}


def main() -> None:
    """Write them all."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    for name in CASES:
        folder = DATA / name
        train(name, folder)
        (folder / "README.md").unlink()
        path = folder / "adapter_config.json"
        settings = {key: value for key, value in json.loads(path.read_text()).items() if value}
        path.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        np.savez_compressed(folder / "merged.npz", **outcome(name, folder))


if __name__ == "__main__":
    main()
