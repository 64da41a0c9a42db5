"""Where a conversion takes a model from: Hugging Face's format or a converted checkpoint."""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtc.errors import ConfigError, WeightsError
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.checkpoints.read import Converted, open_model
from jaxtc.weights.files import arrays, local
from jaxtc.weights.files.model import check_tensors, open_checkpoint
from jaxtc.weights.files.safetensors import FLOATS
from jaxtc.weights.names import Name, parameter_names
from jaxtc.weights.sources import hub
from jaxtc.weights.sources.resolve import CONVERTED, Source
from jaxtc.weights.sources.verify import model_files, verify_files

# What is taken along as it is, beside the weights and config.json.
_KEPT = (*hub.TOKENIZER_FILES, "generation_config.json")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """An open model.

    Attributes:
        config: its sizes.
        config_json: the bytes of its ``config.json``.
        names: its parameters under both names, in the order of the forward pass.
        dtypes: the dtype that each parameter is stored in, by our name.
        kept: other files that go along, by name: the tokenizer's.
        revision: the commit, of a hub id or of what a converted checkpoint was made from.
        origin: where a converted checkpoint was made from; None of another source.
        state: changes when its files do.
        fetch: (name, dtype) -> a parameter in our shape; raises WeightsError when its values are
            not finite in this dtype.
    """

    config: Gemma2Config
    config_json: bytes
    names: list[Name]
    dtypes: Mapping[str, np.dtype]
    kept: Mapping[str, bytes]
    revision: str | None
    origin: str | None
    state: str
    fetch: Callable[[Name, np.dtype], np.ndarray]


@contextlib.contextmanager
def open_model_source(source: Source, *, verify: bool = False) -> Iterator[ModelSource]:
    """A model whose tensors are those of its config; none is read yet.

    Args:
        source: of a model.
        verify: hash all files first.

    Raises:
        SourceError, ConfigError, WeightsError: as :func:`jaxtc.load_model`.
    """
    folder = source.fetch()
    if source.format == CONVERTED:
        yield _from_converted(open_model(folder), verify)
        return
    if source.repo:  # have the tokenizer in the cache beside the weights
        for name in _KEPT:
            hub.download_if_there(source.repo, name, folder.name)
    kept = [folder / name for name in _KEPT if local.has(folder, name)]
    files = model_files(folder)
    if verify:
        verify_files([*files, *kept])
    config_json = (folder / "config.json").read_bytes()
    config = Gemma2Config.from_file(folder / "config.json")
    with open_checkpoint(folder) as checkpoint:
        check_tensors(checkpoint, config)

        def fetch(name: Name, dtype: np.dtype) -> np.ndarray:
            array, problem = checkpoint.files[name.hf].read(name.hf, dtype)
            return sound(array.reshape(name.shape), folder, name.hf, problem)

        names = parameter_names(config)
        yield ModelSource(
            config,
            config_json,
            names,
            {name.ours: FLOATS[checkpoint.entry(name.hf).dtype] for name in names},
            {path.name: path.read_bytes() for path in kept},
            folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None,
            None,
            state_of(files),
            fetch,
        )


def _from_converted(checkpoint: Converted, verify: bool) -> ModelSource:
    if verify:
        checkpoint.verify()
    sidecar = checkpoint.sidecar
    config = checkpoint.config()
    names = parameter_names(config)
    checkpoint.account({name.ours: name.shape for name in names})
    return ModelSource(
        config,
        checkpoint.content("config.json"),
        names,
        {name.ours: sidecar.arrays[name.ours].dtype for name in names},
        {file: checkpoint.content(file) for file in sidecar.files if file in _KEPT},
        sidecar.revision,
        sidecar.source,
        sidecar.content,
        lambda name, dtype: fetch_converted(checkpoint, name.ours, dtype),
    )


def fetch_converted(checkpoint: Converted, name: str, dtype: np.dtype) -> np.ndarray:
    """An array of a converted checkpoint, compared with its hash, and cast."""
    stored = checkpoint.fetch(name)
    problem = "" if arrays.all_finite(stored) else "holds NaN or infinity"
    array = stored
    if stored.dtype != dtype:
        array = arrays.empty(stored.shape, dtype)
        arrays.cast(stored, array)
        if not problem and not arrays.all_finite(array):
            problem = f"holds values too large for {dtype.name}"
    return sound(array, checkpoint.folder, name, problem)


def sound(array: np.ndarray, place: Any, name: str, problem: str) -> np.ndarray:
    """The array, if there is no problem with it. Raises WeightsError otherwise."""
    if problem:
        raise WeightsError(
            f"{place} cannot be used and was not converted: {name} {problem}. Fetch or train it "
            "again" + (", or convert to a wider dtype." if "too large" in problem else ".")
        )
    return array


def state_of(files: Sequence[Path]) -> str:
    """A hash that changes when one of these files is written again; they are not read."""
    seen = ((file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in files)
    return hashlib.sha256(json.dumps(list(seen)).encode()).hexdigest()


def with_dtype(config_json: bytes, dtype: np.dtype | None) -> tuple[bytes, dict[str, Any]]:
    """A ``config.json`` that names this dtype: its bytes as they were when it does, or for None.

    Returns:
        (the bytes, the parsed object).
    """
    try:
        raw = json.loads(config_json)
    except ValueError as error:
        raise ConfigError(f"The config.json is not JSON: {error}.") from error
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    if dtype is None or raw.get(key) == dtype.name:
        return config_json, raw
    raw[key] = dtype.name
    return (json.dumps(raw, indent=2) + "\n").encode(), raw
