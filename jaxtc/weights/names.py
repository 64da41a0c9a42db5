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

# Tensors that checkpoints may hold beside the parameters: frequencies computed from the config.
BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# The output matrix is the embedding; some writers store it a second time.
TIED = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


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
    return [name(_EMBEDDING), *blocks, name(_FINAL_NORM)]
