"""Writing a model as ``transformers`` reads it: config, safetensors in one file or shards."""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import SourceError, some
from jaxtc.model import Gemma2
from jaxtc.weights import local
from jaxtc.weights.checkpoint import INDEX, SINGLE
from jaxtc.weights.load import parameter_path
from jaxtc.weights.names import Name, parameter_names

_DTYPE_NAMES = {
    np.dtype(jnp.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
}

# What may be in a folder that is replaced.
_CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


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
        SourceError: the folder holds other things, or cannot be written.
    """
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
    if folder.exists() and not folder.is_dir():
        raise SourceError(f"{folder} is a file; give a folder to save the model in.")
    if not folder.exists():
        return
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
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    values = {parameter_path(path): leaf for path, leaf in leaves}
    names = parameter_names(model.config)
    assert sorted(values) == sorted(name.ours for name in names)

    shards = _split(names, values, max_shard_size)
    files = [SINGLE]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        index = {
            "metadata": {"total_size": sum(value.nbytes for value in values.values())},
            "weight_map": {
                name.hf: file for file, shard in zip(files, shards, strict=True) for name in shard
            },
        }
        _write_json(folder / INDEX, index)
    for file, shard in zip(files, shards, strict=True):
        _write_safetensors(folder / file, shard, values)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _write_json(folder / "config.json", {**model.config.to_dict(), "dtype": model.dtype.name})


def _split(
    names: list[Name], values: dict[str, jax.Array], max_shard_size: int
) -> list[list[Name]]:
    shards, room = [], 0
    for name in names:
        size = values[name.ours].nbytes
        if not shards or size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    return shards


def _write_safetensors(path: Path, names: list[Name], values: dict[str, jax.Array]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers insists on a format
    for name in names:
        value = values[name.ours]
        start, end = end, end + value.nbytes
        header[name.hf] = {
            "dtype": _DTYPE_NAMES[np.dtype(value.dtype)],
            "shape": list(name.hf_shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            array = np.ascontiguousarray(jax.device_get(values[name.ours]))
            file.write(memoryview(array.reshape(-1).view(np.uint8)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
