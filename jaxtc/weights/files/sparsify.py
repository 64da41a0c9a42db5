"""EleutherAI's sparsify: ``layers.N.mlp/cfg.json`` beside ``sae.safetensors``.

The folder's name is the module that was read: an autoencoder's site is that module's output; a
transcoder (``transcode``) reads its input and writes its output.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jaxtc.transcoders.activations import TopK
from jaxtc.weights.files.description import Description
from jaxtc.weights.files.formats import BY_FORMAT, SITES
from jaxtc.weights.files.settings import read_json

CONFIG = "cfg.json"
_OURS = ("num_latents", "expansion_factor", "transcode", "multi_topk", "normalize_decoder")

# Modules of a layer of transformers' Gemma-2: what they read, what they give.
_MODULES: Mapping[str, tuple[str, str]] = {
    "": ("resid_pre", "resid_post"),
    "input_layernorm": ("resid_pre", "attn_in"),
    "self_attn": ("attn_in", "attn_proj"),
    "attn": ("attn_in", "attn_proj"),
    "self_attn.o_proj": ("attn_heads", "attn_proj"),
    "post_attention_layernorm": ("attn_proj", "attn_out"),
    "pre_feedforward_layernorm": ("resid_mid", "mlp_in"),
    "mlp": ("mlp_in", "mlp_proj"),
    "mlp.down_proj": ("mlp_act", "mlp_proj"),
    "post_feedforward_layernorm": ("mlp_proj", "mlp_out"),
}
_HOOKPOINT = re.compile(r"(?:model\.)?layers\.(?P<layer>\d{1,5})(?:\.(?P<module>[\w.]+))?")
_EMBEDDING = re.compile(r"(?:model\.)?embed_tokens")
_HARMLESS = (
    "expansion_factor", "normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash",
)  # fmt: skip


def describe(path: Path) -> Description | None:
    """What ``cfg.json`` and the folder's name say of the weights; None if it is not sparsify's.

    Raises WeightsError as :func:`jaxtc.weights.files.beside.describe`.
    """
    config = read_json(path.parent / CONFIG)
    if not any(map(config.has, _OURS)):
        return None
    kind = config.get("activation", "text", "topk")
    if kind != "topk":
        raise config.wrong(f"its activation is {kind!r:.100}; of sparsify's, only 'topk' is read")
    k = config.get("k", "count")
    if k is None:
        raise config.wrong("it does not say k, how many features a token has")
    config.refuse("signed", "negative activations are kept, and jaxtc's features have none")
    for key in ("embed_skip", "gram_lookup"):
        config.refuse(key, "its output depends on more than what it reads, so it is not read")
    transcode = config.get("transcode", "switch", False)
    skip = config.get("skip_connection", "switch", False)
    width, latents = config.get("d_in", "count"), config.get("num_latents", "index")
    if not latents and width and config.has("expansion_factor"):
        latents = width * config.get("expansion_factor", "count")
    config.finish(_HARMLESS)
    layer, sites = _place(path, transcode)
    sizes = {"I": width, "M": latents or None}
    return Description(
        config, BY_FORMAT["sparsify"], sites, layer=layer, activation=TopK(k), skip=skip,
        subtract_b_dec=not transcode,
        sizes={axis: size for axis, size in sizes.items() if size is not None},
    )  # fmt: skip


def _place(path: Path, transcode: bool) -> tuple[int | None, dict[str, str]]:
    """(layer, sites) that the folder's name tells; one for each seed may lie in between."""
    for folder in list(path.absolute().parents)[:2]:
        if _EMBEDDING.fullmatch(folder.name) and not transcode:
            return None, dict.fromkeys(SITES, "embed")
        match = _HOOKPOINT.fullmatch(folder.name)
        if match:
            pair = _MODULES.get(match["module"] or "")
            pair = pair and (pair if transcode else (pair[1], pair[1]))
            return int(match["layer"]), dict(zip(SITES, pair or (), strict=bool(pair)))
    return None, {}
