"""What people have that is not a Gemma-2 in safetensors: named, with what to give instead."""

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from jaxtc.errors import SourceError, WeightsError
from jaxtc.weights.files import local

# By the suffix of a file: what it is, and what to give.
_TO_SAFETENSORS = (
    "transformers reads it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)"
)
_PICKLE = (
    f"a pickle of PyTorch, which can run code and is never read; {_TO_SAFETENSORS}; or load it in "
    "PyTorch with weights_only=True and write it with safetensors.torch.save_file"
)
_GGUF = "quantised weights of llama.cpp (GGUF); give the checkpoint that they were made from"
_KINDS = {
    ".gguf": _GGUF, ".ggml": _GGUF,
    ".bin": _PICKLE, ".pt": _PICKLE, ".pth": _PICKLE, ".ckpt": _PICKLE, ".pkl": _PICKLE,
    ".pickle": _PICKLE,
    ".npy": "a single array of NumPy; give all arrays, as safetensors or npz",
    ".distcp": "a part of a distributed checkpoint of PyTorch; give the checkpoint in safetensors",
    ".h5": "weights of Keras or TensorFlow; give the checkpoint in safetensors",
    ".keras": "a model of Keras; give the checkpoint in safetensors",
    ".msgpack": "weights of Flax Linen; give the checkpoint in safetensors",
    ".index": "a checkpoint of TensorFlow; give the checkpoint in safetensors",
    ".onnx": "a program of ONNX; give the checkpoint that it was made from",
    ".tflite": "a program of TensorFlow Lite; give the checkpoint that it was made from",
    ".task": "a bundle of MediaPipe; give the checkpoint that it was made from",
    ".sbs": "weights of gemma.cpp; give the checkpoint in safetensors",
    ".npz": "a file of arrays, not a model's folder; load_transcoder reads a transcoder's",
    ".safetensors": "one file of a checkpoint; give the folder that holds it and config.json",
    ".model": "a tokenizer of SentencePiece; give the folder of the model",
}  # fmt: skip

# By the end of a tensor's name: the method that quantised the matrix beside it.
_QUANTISED = {
    r"\.(quant_state\..+|absmax|quant_map|nested_absmax|nested_quant_map)": "bitsandbytes, 4 bits",
    r"\.(SCB|weight_format)": "bitsandbytes, 8 bits",
    r"\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r"\.(weight_packed|weight_shape|weight_zero_point|weight_global_scale)": "compressed-tensors",
    r"\.(weight_scale|weight_scale_inv|input_scale|input_scale_ub)": "FP8 or INT8",
    r"\.(W_q|meta)": "HQQ",
    r"\.weight\._(data|scale|shift)": "Quanto",
    r"\.(scales|biases)": "MLX",
}

# What else a checkpoint may hold beside a Gemma-2, by the first part of its tensors' names.
_BESIDE = {
    "score": "a head of a classifier or a reward model",
    **dict.fromkeys(("classifier", "classification_head"), "a head of a classifier"),
    **dict.fromkeys(("reward_head", "regression_head", "rm_head"), "a head of a reward model"),
    **dict.fromkeys(("v_head", "value_head"), "a head of a value model (TRL)"),
    "qa_outputs": "a head for question answering",
    **dict.fromkeys(("vision_tower", "multi_modal_projector", "vision_model"), "parts for images"),
    "audio_tower": "parts for sound",
}

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


TRANSCODERS = "transcoders or autoencoders; load_transcoder reads those"


def file_kind(path: str | Path) -> str:
    """What a file is by its name, and what to give: ``"quantised weights …; give …"``, or ""."""
    return _KINDS.get(Path(path).suffix.lower(), "")


def folder_kind(files: Collection[str]) -> str:
    """What the names of the files in a folder without a model's say that it is, or ""."""
    names = sorted(files)
    if "config.json" in names and any(name.startswith("model") for name in names):
        return "it is a model's folder, which load_model reads"
    if "adapter_config.json" in names:
        return "a LoRA adapter, which changes a model"
    known = {"cfg.json", "sae_weights.safetensors"}
    if known & set(names) or any(x.endswith(".npz") or x.startswith("layer_") for x in names):
        return TRANSCODERS
    for suffix, kind in _KINDS.items():
        found = [name for name in names if name.lower().endswith(suffix)]
        if found and suffix not in (".npz", ".safetensors", ".model"):
            return f"{found[0]} is {kind}"
    if any(name in names for name in _TOKENIZER):
        return "it holds a tokenizer only, which load_tokenizer reads"
    return ""


def quantised_by(tensors: Iterable[str]) -> tuple[str, str]:
    """(The method that the names of tensors give away, one of them), or ("", "")."""
    for tensor in tensors:
        for pattern, method in _QUANTISED.items():
            if re.search(pattern + r"\Z", tensor):
                return method, tensor
    return "", ""


def beside(tensor: str) -> str:
    """What a tensor of this (published) name is a part of, beside a Gemma-2, or ""."""
    return _BESIDE.get(tensor.split(".")[0], "")


def prefix_of(tensors: Iterable[str]) -> str:
    """What stands before the names of a Gemma-2's tensors in a checkpoint, ``"teacher.model."``."""
    end = "layers.0.pre_feedforward_layernorm.weight"
    return next((t.removesuffix(end) for t in tensors if t.endswith(end)), "")


def refuse(path: Path) -> None:
    """Raise WeightsError for a file that jaxtc never reads, by its content or its name."""
    with local.open_plain(path) as file:
        try:
            start = os.pread(file.fileno(), 256, 0)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    what = _no_transcoder(path)
    # Of safetensors, the first 8 bytes are a length, so of zeros from the third on.
    bare = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[2:8].strip(b"\0")
    if bare or (start[:2] == b"PK" and b"data.pkl" in start):
        what = _PICKLE
    elif start[:4] == b"GGUF":
        what = _GGUF
    if what:
        raise WeightsError(f"{path} is {what}.")


def refuse_below(folder: Path) -> None:
    """Raise SourceError for a folder that has no transcoders but files that jaxtc never reads."""
    found = sorted(path for path in folder.rglob("*") if _no_transcoder(path))
    if found:
        raise SourceError(
            f"{folder} holds no transcoders that jaxtc reads; {found[0].relative_to(folder)} is "
            f"{_no_transcoder(found[0])}."
        )


def _no_transcoder(path: Path) -> str:
    """What a file that never holds transcoders is by its name, or ""."""
    return "" if path.suffix.lower() in (".npz", ".safetensors") else file_kind(path)
