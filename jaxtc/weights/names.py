"""The one table of parameter names: ours and those of the published checkpoints.

A checkpoint's tensor is our parameter reshaped, never transposed: its axes are ours with some of
them merged. Axis letters: V vocabulary, D hidden, N query heads, K key/value heads, H head dim,
F MLP width.
"""

import dataclasses
import math
import re

from jaxtc.model.config import Gemma2Config

# Our name, its axes, the checkpoint's name, its axes; {l} is the layer.
_TABLE = (
    ("embed.weight", "V D", "model.embed_tokens.weight", "V D"),
    ("layers.{l}.attn_in_norm.weight", "D", "model.layers.{l}.input_layernorm.weight", "D"),
    ("layers.{l}.attn.q", "N H D", "model.layers.{l}.self_attn.q_proj.weight", "NH D"),
    ("layers.{l}.attn.k", "K H D", "model.layers.{l}.self_attn.k_proj.weight", "KH D"),
    ("layers.{l}.attn.v", "K H D", "model.layers.{l}.self_attn.v_proj.weight", "KH D"),
    ("layers.{l}.attn.o", "D N H", "model.layers.{l}.self_attn.o_proj.weight", "D NH"),
    ("layers.{l}.attn_out_norm.weight", "D",
     "model.layers.{l}.post_attention_layernorm.weight", "D"),
    ("layers.{l}.mlp_in_norm.weight", "D",
     "model.layers.{l}.pre_feedforward_layernorm.weight", "D"),
    ("layers.{l}.mlp.gate", "F D", "model.layers.{l}.mlp.gate_proj.weight", "F D"),
    ("layers.{l}.mlp.up", "F D", "model.layers.{l}.mlp.up_proj.weight", "F D"),
    ("layers.{l}.mlp.down", "D F", "model.layers.{l}.mlp.down_proj.weight", "D F"),
    ("layers.{l}.mlp_out_norm.weight", "D",
     "model.layers.{l}.post_feedforward_layernorm.weight", "D"),
    ("final_norm.weight", "D", "model.norm.weight", "D"),
)  # fmt: skip

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

    def name(row: tuple[str, str, str, str], layer: int | str = "") -> Name:
        ours, axes, hf, hf_axes = row
        return Name(ours.format(l=layer), shape(axes), hf.format(l=layer), shape(hf_axes), hf_axes)

    embedding, *layered, final_norm = _TABLE
    blocks = [name(row, layer) for layer in range(config.num_hidden_layers) for row in layered]
    return [name(embedding), *blocks, name(final_norm)]
