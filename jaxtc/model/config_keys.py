"""What a ``config.json`` may say beside the sizes: keys that would change the numbers, read or
refused, and how a config that is not a Gemma-2's is recognised.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxtc.errors import ConfigError
from jaxtc.helpers import is_whole

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_THETA = 10000.0  # where nothing says it

# Keys that would change the numbers and that no field reads: what each may be.
_FIXED: dict[str, tuple] = {
    # Only hidden_activation counts: transformers does not read hidden_act for Gemma-2.
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "attention_bias": (None, False), "mlp_bias": (None, False), "use_qk_norm": (None, False),
    "use_bidirectional_attention": (None, False), "is_causal": (None, True),
    "is_encoder_decoder": (None, False), "add_cross_attention": (None, False),
    "pruned_heads": (None, {}), "num_experts": (None, 0), "num_local_experts": (None, 0),
    # Names that other models have for what layer_types says.
    "use_sliding_window": (None, True), "sliding_window_pattern": (None, 2),
    "_sliding_window_pattern": (None, 2),
    "rope_local_base_freq": (None,), "partial_rotary_factor": (None, 1),
}  # fmt: skip
# The same inside rope_parameters and rope_scaling; there is no scaling.
_ROPE: dict[str, tuple] = {
    "rope_type": (None, "default"), "type": (None, "default"), "factor": (None, 1),
    "partial_rotary_factor": (None, 1), "attention_factor": (None, 1),
}  # fmt: skip
_ROPE_READ = ("rope_theta", "original_max_position_embeddings")  # the latter is scaling's

# What other models are, by model_type.
_OTHERS = {
    "gemma": "a Gemma 1", "gemma3": "a Gemma 3 for images and text", "gemma3_text": "a Gemma 3",
    "gemma3n": "a Gemma 3n for images, sound and text", "gemma3n_text": "a Gemma 3n",
    "recurrent_gemma": "a RecurrentGemma", "t5gemma": "a T5Gemma", "paligemma": "a PaliGemma",
    "colpali": "a ColPali", "llama": "a Llama", "mistral": "a Mistral", "qwen2": "a Qwen2",
    "qwen3": "a Qwen3", "gpt2": "a GPT-2", "gpt_neox": "a GPT-NeoX (such as Pythia)",
}  # fmt: skip

# Where writers put it: most of them; MLX; older releases of compressed-tensors.
_QUANTISED = ("quantization_config", "quantization", "compression_config")


def quantisation(raw: Mapping[str, Any]) -> str:
    """How a ``config.json`` says that the weights are quantised: ``"gptq, 4 bits"``, or ""."""
    found = next(filter(None, map(raw.get, _QUANTISED)), None)
    if found is None:
        return ""
    said = found if isinstance(found, Mapping) else {}
    known = [said.get(key) for key in ("quant_method", "quant_algo", "format")]
    # MLX writes no name of a method.
    name = next((x for x in known if isinstance(x, str)), "MLX" if "group_size" in said else "")
    bits = next((n for n in (4, 8) if said.get(f"load_in_{n}bit") is True), said.get("bits"))
    size = f"{bits} bits" if is_whole(bits, 1) else ""
    return ", ".join(filter(None, (name[:40], size))) or "by an unnamed method"


def made_from(raw: Mapping[str, Any]) -> str:
    """`` (google/gemma-2-2b-it)``, where the config names a checkpoint of the hub."""
    name = raw.get("_name_or_path")
    known = isinstance(name, str) and re.fullmatch(r"google/gemma-2-[\w-]{1,40}", name)
    return f" ({name})" if known else ", such as google/gemma-2-2b-it"


def another(raw: Mapping[str, Any]) -> str:
    """What a ``config.json`` describes that is no Gemma-2, and what to give."""
    kind, inner = raw.get("model_type"), raw.get("text_config")
    what = (
        _OTHERS.get(kind, "another model")
        if isinstance(kind, str)
        else "something without a model_type"
    )
    if raw.keys() & {"registered_name", "class_name", "keras_version"}:
        what = "a model of Keras"
    elif raw.keys() & {"hook_name", "hook_point", "hf_hook_point_in", "d_sae", "expansion_factor"}:
        what = "a transcoder or autoencoder (load_transcoder reads those)"
    advice = (
        "Give a Gemma-2 checkpoint, for example google/gemma-2-2b, google/gemma-2-9b or "
        "google/gemma-2-27b."
    )
    if isinstance(inner, Mapping) and inner.get("model_type") == "gemma2":
        what = f"{what} with a Gemma-2 inside, beside other parts"
        advice = (
            "Save the Gemma-2 alone: in transformers, load all of it, copy its language model and "
            "lm_head into a Gemma2ForCausalLM(config.text_config), and save_pretrained that."
        )
    architectures = raw.get("architectures")
    return (
        f"{what} (model_type {kind!r}, architectures: {architectures}), but jaxtc runs Gemma-2 "
        f"only (model_type 'gemma2'). {advice}"
    )


def unlike(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """(``rope_theta`` where an object says it, what is asked for and not implemented).

    As in transformers 5, what ``rope_scaling`` or ``rope_parameters`` says goes before the
    ``rope_theta`` beside them; they may say it for each type of layer, but all must say the same.

    Raises ConfigError where one of them is not an object.
    """
    odd = [f"{k} = {raw[k]!r}" for k, fine in _FIXED.items() if raw.get(k) not in fine]
    bases = []
    for name in ("rope_scaling", "rope_parameters"):
        given = _object(raw.get(name), f"{where}: {name}")
        nested = given.keys() & {SLIDING, FULL}
        parts = {
            f"{name}.{k}": _object(given.get(k), f"{where}: {name}.{k}") for k in (SLIDING, FULL)
        }
        flat = {name: {k: v for k, v in given.items() if k not in nested}}
        parts = {k: v for k, v in flat.items() if v} | (parts if nested else {})
        for part, said in parts.items():
            bases.append(said.get("rope_theta", raw.get("rope_theta", ROPE_THETA)))
            odd += [
                f"{part}.{k} = {v!r}"
                for k, v in said.items()
                if k not in _ROPE_READ and v not in _ROPE.get(k, (None,))
            ]
    if any(base != bases[0] for base in bases):
        several = dict.fromkeys(map(str, bases))
        odd.append(f"several rope_theta in one model ({', '.join(several)})")
    return ({"rope_theta": bases[0]} if bases else {}), odd


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{what} is {value!r}, expected an object or null.")
    return value or {}
