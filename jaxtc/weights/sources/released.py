"""The config of a source without its weights; those of the released models are here."""

from pathlib import Path

from jaxtc.model.config import Gemma2Config
from jaxtc.weights.files import local
from jaxtc.weights.sources.resolve import CONFIG, EMBEDDED, resolve

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


def load_config(source: str | Path = EMBEDDED, *, revision: str | None = None) -> Gemma2Config:
    """The config of a model; nothing is fetched but its ``config.json``.

    Args:
        source: a hub id, a local folder or ``"embedded"``, as :func:`jaxtc.load_model` takes it;
            or ``"2b"``, ``"9b"`` or ``"27b"``. Those and the hub ids of the released models
            (``google/gemma-2-2b``, ``google/gemma-2-2b-it``, ...) need no network, unless a
            revision is asked for.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError: nothing there, or no access to it.
        ConfigError: not a Gemma-2.
    """
    name = str(source).lower()
    size = name.removeprefix("google/gemma-2-").removeprefix("gemma-2-").removesuffix("-it")
    if size in RELEASED and revision is None and local.find(source) is None:
        return RELEASED[size]
    folder = resolve(source, CONFIG, revision=revision).fetch()
    return Gemma2Config.from_file(folder / "config.json")
