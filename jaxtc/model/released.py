"""The configs of the released models, which are known without a source."""

from jaxtc.model.config import Gemma2Config

# What the config.json of the released checkpoints say; everything else in them is the default of
# Gemma2Config. Base and instruction-tuned models share sizes.
RELEASED: dict[str, Gemma2Config] = {
    "2b": Gemma2Config(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
    ),
    "9b": Gemma2Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
    ),
    "27b": Gemma2Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
        num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144,
    ),
}  # fmt: skip
