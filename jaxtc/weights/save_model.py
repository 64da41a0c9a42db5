"""Writing a model as ``transformers`` reads it: config, safetensors in one file or shards."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtc.errors import SourceError, some
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.processes import check_here
from jaxtc.sharding.rules import variables
from jaxtc.weights.files import local
from jaxtc.weights.files.model import INDEX, SINGLE
from jaxtc.weights.files.safetensors import header, write_tensors
from jaxtc.weights.names import Name, parameter_names

# What may be in a folder that is replaced.
_CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", INDEX, "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def save_model(
    model: Gemma2, folder: str | Path, tokenizer: Any = None, *, max_shard_size: int = 5 * 10**9
) -> Path:
    """Write a model so that :func:`jaxtc.load_model` and ``transformers`` read it.

    Everything is written beside ``folder`` and moved there when whole.

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
    if max_shard_size < 1:
        raise SourceError(f"max_shard_size is {max_shard_size} bytes, expected at least 1.")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        _check_replaceable(folder)
        partial.mkdir(parents=True)
        _write(model, partial, tokenizer, max_shard_size)
        _replace(folder, partial)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SourceError(f"{folder} is a file; give a folder to save the model in.")
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() or not any(path.match(pattern) for pattern in _CHECKPOINT_FILES)
    )
    if others:
        raise SourceError(
            f"{folder} holds other things than a checkpoint ({some(others)}). Saving replaces the "
            "whole folder, so give a new one."
        )


def _replace(folder: Path, partial: Path) -> None:
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(model: Gemma2, folder: Path, tokenizer: Any, max_shard_size: int) -> None:
    values = dict(zip((name for name, _ in variables(model)), jax.tree.leaves(model), strict=True))
    names = parameter_names(model.config)
    dtypes = {ours: np.dtype(value.dtype) for ours, value in values.items()}
    shards = split(names, dtypes, max_shard_size)
    if len(shards) > 1:
        (folder / INDEX).write_bytes(index(shards, dtypes))
    for file, shard in shards.items():
        write_shard(
            shard, dtypes, lambda ours: np.asarray(jax.device_get(values[ours])), folder / file
        )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = {**model.config.to_dict(), "dtype": model.dtype.name}
    (folder / "config.json").write_bytes(_json(config))


def split(
    names: Sequence[Name], dtypes: Mapping[str, np.dtype], max_shard_size: int
) -> dict[str, list[Name]]:
    """The tensors of each file of a model, by the file's name; a tensor is never cut."""
    shards, room = [], 0
    for name in names:
        size = size_of(name, dtypes)
        if not shards or size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    count = len(shards)
    if count == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(shards, 1)}


def size_of(name: Name, dtypes: Mapping[str, np.dtype]) -> int:
    """The bytes of a parameter."""
    return math.prod(name.shape) * dtypes[name.ours].itemsize


def index(shards: Mapping[str, Sequence[Name]], dtypes: Mapping[str, np.dtype]) -> bytes:
    """The index of a model in several files."""
    total = sum(size_of(name, dtypes) for shard in shards.values() for name in shard)
    return _json({
        "metadata": {"total_size": total},
        "weight_map": {name.hf: file for file, shard in shards.items() for name in shard},
    })  # fmt: skip


def write_shard(
    names: Sequence[Name],
    dtypes: Mapping[str, np.dtype],
    fetch: Callable[[str], np.ndarray],
    path: Path,
) -> None:
    """Write some parameters as a safetensors file; ``fetch`` gives each by our name."""
    tensors = ((name.hf, dtypes[name.ours], name.hf_shape) for name in names)
    arrays = (fetch(name.ours) for name in names)
    write_tensors(path, header(tensors, {"format": "pt"}), arrays)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
