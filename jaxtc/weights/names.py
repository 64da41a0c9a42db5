"""The one table of parameter names: ours and those of the published checkpoints.

A checkpoint's tensor is our parameter reshaped, never transposed: its axes are ours with some of
them merged. Axis letters: V vocabulary, D hidden, N query heads, K key/value heads, H head dim,
F MLP width.
"""

import dataclasses
import math
import re

from jaxtc.model.config import Gemma2Config

# Our name, its axes, the checkpoint's name, its axes; those of a layer are below ``layers.N``.
_EMBEDDING = ("embed.weight", "V D", "model.embed_tokens.weight", "V D")
_LAYER = (
    ("attn_in_norm.weight", "D", "input_layernorm.weight", "D"),
    ("attn.q", "N H D", "self_attn.q_proj.weight", "NH D"),
    ("attn.k", "K H D", "self_attn.k_proj.weight", "KH D"),
    ("attn.v", "K H D", "self_attn.v_proj.weight", "KH D"),
    ("attn.o", "D N H", "self_attn.o_proj.weight", "D NH"),
    ("attn_out_norm.weight", "D", "post_attention_layernorm.weight", "D"),
    ("mlp_in_norm.weight", "D", "pre_feedforward_layernorm.weight", "D"),
    ("mlp.gate", "F D", "mlp.gate_proj.weight", "F D"),
    ("mlp.up", "F D", "mlp.up_proj.weight", "F D"),
    ("mlp.down", "D F", "mlp.down_proj.weight", "D F"),
    ("mlp_out_norm.weight", "D", "post_feedforward_layernorm.weight", "D"),
)
_FINAL_NORM = ("final_norm.weight", "D", "model.norm.weight", "D")
_HEAD = ("head.weight", "V D", "lm_head.weight", "V D")  # where it is not the embedding

# Tensors that checkpoints may hold beside the parameters: frequencies computed from the config.
BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
HEAD, EMBEDDING = _HEAD[2], _EMBEDDING[2]

# Below the module that holds the layers; everything else in a checkpoint lies beside it.
_BACKBONE = ("layers", "embed_tokens", "norm", "rotary_emb")
# What modules around a model put before the names of its tensors: the attribute that holds it. In
# transformers ("model"; "base_model", whose backbone is called that by PEFT and by others;
# "language_model" in models of images and text), TRL ("pretrained_model"), DDP ("module").
_AROUND = ("model", "base_model", "language_model", "text_model", "pretrained_model", "module")
# The same around each module of it: torch.compile, FSDP, activation checkpointing, DeepSpeed.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def published(tensor: str) -> str:
    """A tensor's name as the released checkpoints have it, whatever wrote the file.

    ``_orig_mod.model.norm.weight``, ``language_model.model.norm.weight`` and ``norm.weight`` (of a
    backbone saved alone) are ``model.norm.weight``. Names that are nobody's stay themselves, but
    for what is around them: ``base_model.model.score.weight`` is ``score.weight``.
    """
    parts = [part for part in tensor.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _AROUND:
        parts = parts[1:]
    return ".".join(["model", *parts] if parts and parts[0] in _BACKBONE else parts)


@dataclasses.dataclass(frozen=True)
class Name:
    """One parameter: its path in the tree of :class:`jaxtc.Gemma2` (``layers.3.attn.q``) and shape,
    and the tensor's name in a checkpoint, shape and axis letters (``NH D``: N and H are merged).
    """

    ours: str
    shape: tuple[int, ...]
    hf: str
    hf_shape: tuple[int, ...]
    hf_axes: str


def parameter_names(config: Gemma2Config) -> list[Name]:
    """Every parameter of a Gemma-2 of these sizes, in the order of the forward pass."""
    sizes = config.sizes

    def shape(axes: str) -> tuple[int, ...]:
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())

    def name(row: tuple[str, str, str, str], below: str = "") -> Name:
        ours, axes, hf, hf_axes = row
        hf = f"model.{below}{hf}" if below else hf
        return Name(below + ours, shape(axes), hf, shape(hf_axes), hf_axes)

    layers = range(config.num_hidden_layers)
    blocks = [name(row, f"layers.{layer}.") for layer in layers for row in _LAYER]
    head = [] if config.tie_word_embeddings else [name(_HEAD)]
    return [name(_EMBEDDING), *blocks, name(_FINAL_NORM), *head]
