"""The config of a source without its weights; of the released models it is known by heart."""

from pathlib import Path

from jaxtc.errors import SourceError, did_you_mean
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.files import local
from jaxtc.weights.load_model import EMBEDDED, model_folder
from jaxtc.weights.sources import hub

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

_NAMES = {
    name: size
    for size in RELEASED
    for name in (size, f"gemma-2-{size}", f"google/gemma-2-{size}", f"google/gemma-2-{size}-it")
}


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
    there = source != EMBEDDED and local.find(source) is not None
    name = str(source).lower()
    if name in _NAMES and revision is None and not there:
        return RELEASED[_NAMES[name]]
    repo = hub.split_id(source) if isinstance(source, str) else None
    if source != EMBEDDED and repo and not repo[1] and not there:
        return Gemma2Config.from_file(hub.download(repo[0], "config.json", revision))
    if source != EMBEDDED and not repo and not there:
        raise SourceError(
            f"There is no folder {source}, and it is neither a hub id such as google/gemma-2-2b "
            f"nor one of {', '.join(RELEASED)}.{did_you_mean(name, _NAMES)}"
        )
    return Gemma2Config.from_file(model_folder(source, revision) / "config.json")
