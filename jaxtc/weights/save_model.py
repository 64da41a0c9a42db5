"""Writing a model as ``transformers`` reads it: config, safetensors in one file or shards."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from jaxtc.errors import SourceError
from jaxtc.helpers import explicit_transfers
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.processes import check_here
from jaxtc.sharding.rules import variables
from jaxtc.weights.files import local
from jaxtc.weights.files.generation import GENERATION, generation_config
from jaxtc.weights.files.model import INDEX
from jaxtc.weights.files.safetensors import write_tensors
from jaxtc.weights.names import parameter_names

# What may be in a folder that is replaced.
_CHECKPOINT_FILES = (
    "config.json", GENERATION, "model*.safetensors", INDEX, "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


@explicit_transfers
def save_model(
    model: Gemma2, folder: str | Path, tokenizer: Any = None, *, max_shard_size: int = 5 * 10**9
) -> Path:
    """Write a model so that :func:`jaxtc.load_model` and ``transformers`` read it.

    Everything is written beside ``folder`` and moved there when whole. ``generation_config.json``
    has the model's stop tokens, and nothing else of an earlier one.

    Args:
        model: to be saved, in the dtype it has.
        folder: new or empty, or an earlier checkpoint, which is replaced.
        tokenizer: of ``transformers``, saved along when given.
        max_shard_size: most bytes of tensors in a file; a tensor is never cut.

    Returns:
        The folder.

    Raises:
        SourceError: the folder holds other things, or cannot be written; the model is spread over
            several processes.
    """
    check_here(model, "model")
    folder = local.expand(folder).resolve()
    if not 1 <= max_shard_size < math.inf:
        raise SourceError(f"max_shard_size is {max_shard_size} bytes, expected at least 1.")
    try:
        with local.replacing_folder(folder, _CHECKPOINT_FILES, "a checkpoint") as partial:
            _write(model, partial, tokenizer, max_shard_size)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


def _write(model: Gemma2, folder: Path, tokenizer: Any, max_shard_size: int) -> None:
    values = dict(zip((name for name, _ in variables(model)), jax.tree.leaves(model), strict=True))
    files = weight_files(
        model.config,
        {ours: np.dtype(value.dtype) for ours, value in values.items()},
        lambda ours: np.asarray(jax.device_get(values[ours])),
        max_shard_size,
    )
    for file, write in files.items():
        write(folder / file)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, content in config_files(model).items():
        (folder / name).write_bytes(content)


def config_files(model: Gemma2) -> dict[str, bytes]:
    """``generation_config.json`` and ``config.json`` of a model in memory."""
    config = {**model.config.to_dict(), "dtype": model.dtype.name}
    return {GENERATION: _json(generation_config(model.config)), "config.json": _json(config)}


def weight_files(
    config: Gemma2Config,
    dtypes: Mapping[str, np.dtype],
    fetch: Callable[[str], np.ndarray],
    max_shard_size: int,
) -> dict[str, Callable[[Path], Any]]:
    """What writes each file of a model's weights to a path, by the file's name.

    Args:
        config: of the model.
        dtypes: of its parameters, by our names.
        fetch: gives a parameter by our name; one is in memory at a time.
        max_shard_size: as in :func:`save_model`.
    """
    names = {name.hf: name for name in parameter_names(config)}
    parts = split_state_dict_into_shards_factory(
        names,
        get_storage_size=lambda name: math.prod(name.shape) * dtypes[name.ours].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )

    def write(tensors: Sequence[str], path: Path) -> None:
        part = [names[tensor] for tensor in tensors]
        claims = ((name.hf, dtypes[name.ours], name.hf_shape) for name in part)
        write_tensors(path, claims, (fetch(name.ours) for name in part))

    found = parts.filename_to_tensors.items()
    files = {file: functools.partial(write, tensors) for file, tensors in found}
    if parts.is_sharded:
        index = _json({"metadata": parts.metadata, "weight_map": parts.tensor_to_filename})
        files[INDEX] = lambda path: path.write_bytes(index)
    return files


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
