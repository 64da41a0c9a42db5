"""The files of other formats: safetensors of a model, Gemma Scope's and circuit-tracer's."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxtc.errors import SourceError
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.conversion.source import Content
from jaxtc.weights.files.circuit_tracer import CONFIG, TRANSCODER_SET, write_config
from jaxtc.weights.files.formats import BY_FORMAT
from jaxtc.weights.files.settings import HOOKS
from jaxtc.weights.files.write_transcoder import write_transcoder
from jaxtc.weights.save_model import weight_files
from jaxtc.weights.save_transcoder import check_savable

# By the file's name, its content, or what writes it to a path; one array is in memory at a time.
Files = dict[str, bytes | Callable[[Path], None]]
Fetch = Callable[[str], np.ndarray]

_TIER = re.compile(r"(?:^|/)(layer_\d+/width_[^/]+/average_l0_[^/]+)$")
# What circuit-tracer hooks, of vectors for each token and layer.
_HOOKS = {
    name: hook
    for name, hook in HOOKS.items()
    if BY_NAME[name].per_layer and BY_NAME[name].token_axes
}


def model_files(content: Content, fetch: Fetch, max_shard_size: int) -> Files:
    """A model in safetensors, in shards of at most so many bytes of tensors."""
    dtypes = {name: one.dtype for name, one in content.arrays.items()}
    files: Files = weight_files(content.config, dtypes, fetch, max_shard_size)
    config_last = sorted(content.files, key="config.json".__eq__)
    return files | {file: content.files[file] for file in config_last}


def transcoder_files(content: Content, fetch: Fetch, to: str, model_name: str | None) -> Files:
    """A file for each transcoder; ``to`` is "npz" or "circuit-tracer".

    Raises:
        SourceError: the format cannot hold them.
    """
    made = BY_FORMAT["gemma-scope" if to == "npz" else to]
    files: Files = {}
    for layer, one in content.transcoders.items():
        file = _npz_path(one) if to == "npz" else f"layer_{layer}.safetensors"
        check_savable(one, made)

        def own(name: str, layer: int = layer) -> np.ndarray:
            return fetch(f"layers.{layer}.{name}")

        files[file] = functools.partial(
            write_transcoder, made, declared=one, fetch=own, described=to == "circuit-tracer"
        )
    if to == "circuit-tracer":
        files[CONFIG] = _config_yaml(content, model_name)
    return files


def _npz_path(declared: Transcoder) -> str:
    """Where a transcoder goes below the folder: as it was in Gemma Scope, if it was."""
    tier = _TIER.search(declared.source)
    features = declared.features
    width = f"{features // 1024}k" if features % 1024 == 0 else str(features)
    place = f"layer_{declared.layer}/width_{width}/average_l0_unknown"
    return f"{tier[1] if tier else place}/params.npz"


def _config_yaml(content: Content, model_name: str | None) -> bytes:
    """circuit-tracer's description of a set of transcoders."""
    sites = {(one.input_site, one.output_site) for one in content.transcoders.values()}
    if len(sites) > 1:
        raise SourceError(
            f"These transcoders read and write different sites ({sorted(sites)}), and a set of "
            "circuit-tracer has one input and one output. Convert them apart, with layers=."
        )
    pair = sites.pop()
    missing = [site for site in pair if site not in _HOOKS]
    if missing:
        raise SourceError(
            f"circuit-tracer has no hook for {missing[0]}, which these transcoders read or write; "
            f"it knows {', '.join(_HOOKS)}."
        )
    scope = re.search(r"gemma-scope-(2b|9b|27b)-", content.source)
    if model_name is None and scope:
        model_name = f"google/gemma-2-{scope[1]}"
    others: dict[str, object] = {}
    activations = {one.activation for one in content.transcoders.values()}
    if any(one.settings for one in activations):
        if len(activations) > 1:
            raise SourceError(
                "These transcoders have several activations or values of k, and a set of "
                "circuit-tracer has one. Convert them apart, with layers=."
            )
        facts = activations.pop().facts()
        others = {"activation": facts.pop("name"), **facts}
    hooks = [_HOOKS[site] for site in pair]
    return write_config(TRANSCODER_SET, *hooks, model_name=model_name, **others)
