"""What is converted: a model or transcoders, in files of others or in a converted checkpoint."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtc.errors import SourceError, WeightsError
from jaxtc.model.config import Gemma2Config
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.read import Converted, named
from jaxtc.weights.checkpoints.sidecar import sha256
from jaxtc.weights.files import local
from jaxtc.weights.files.generation import GENERATION
from jaxtc.weights.files.transcoder import open_transcoder
from jaxtc.weights.load_transcoder import declared
from jaxtc.weights.names import parameter_names
from jaxtc.weights.opening import open_weights, refuse_unfit
from jaxtc.weights.sources import hub
from jaxtc.weights.sources.cross_layer import refuse_cross_layer
from jaxtc.weights.sources.resolve import CONVERTED, MODEL, TRANSCODERS, Source

# What is written beside the weights of a model.
_KEPT = ("config.json", *hub.TOKENIZER_FILES, GENERATION)


@dataclasses.dataclass(frozen=True)
class Content:
    """An open model, or transcoders, of which no array is read yet."""

    source: str  # what it was made from in the first place
    revision: str | None  # the commit of that on the hub
    state: str  # changes when its files do
    arrays: Mapping[str, jax.ShapeDtypeStruct]  # as they will be, by name in the tree
    # (name in the tree, dtype) -> (the array, what is wrong with its values or an empty string)
    read: Callable[[str, np.dtype], tuple[np.ndarray, str]]
    config: Gemma2Config | None = None  # of a model
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # beside the weights
    transcoders: Mapping[int, Transcoder] | None = None  # by layer, without their values

    def fetch(self, name: str) -> np.ndarray:
        """An array. Raises WeightsError for values that are not finite, or too large."""
        array, problem = self.read(name, self.arrays[name].dtype)
        if problem:
            raise WeightsError(
                f"{self.source} cannot be used and was not converted: {problem}. Fetch or train it "
                "again" + (", or convert to a wider dtype." if "too large" in problem else ".")
            )
        return array


@contextlib.contextmanager
def open_model(
    source: Source,
    dtype: np.dtype | None,
    verify: bool,
    ignore: Sequence[str] = (),
    base: str | Path | None = None,
    config: Gemma2Config | str | Path | None = None,
) -> Iterator[Content]:
    """A model whose tensors are those of its config; ``dtype`` None keeps that of each.

    ``ignore``, ``base`` and ``config`` are as in :func:`jaxtc.load_model`.

    Raises:
        SourceError, ConfigError, WeightsError: as :func:`jaxtc.load_model`.
    """
    with contextlib.ExitStack() as stack:
        if source.format == CONVERTED:
            refuse_unfit(source.name, source.format, base=base, config=config, ignore=ignore)
            checkpoint = Converted(source.path, MODEL, verify)
            config, sidecar = checkpoint.model().config, checkpoint.sidecar
            files = {name: checkpoint.content(name) for name in _KEPT if name in sidecar.files}
            stored, read = {k: x.dtype for k, x in sidecar.arrays.items()}, checkpoint.read
            origin = sidecar.source, sidecar.revision, sidecar.content
        else:
            opened = stack.enter_context(
                open_weights(
                    source, base=base, config=config, ignore=ignore, verify=verify, beside=_KEPT
                )
            )
            kept = {
                name: folder / name
                for folder in reversed(opened.folders)
                for name in _KEPT
                if local.has(folder, name)
            }
            if verify:
                hub.verify_files(dict.fromkeys(kept.values()))
            files = {name: path.read_bytes() for name, path in kept.items()}
            files["config.json"] = _json(opened.settings)
            config, stored, read = opened.config, opened.dtypes, opened.read
            said = f"{_state(opened.weights)} {json.dumps(config.to_dict())}"
            origin = source.name, _commit(opened.where), sha256(said.encode())

        raw = json.loads(files["config.json"])
        key = "torch_dtype" if "torch_dtype" in raw else "dtype"
        new = {} if dtype is None else {key: dtype.name}
        if config.tie_word_embeddings != raw.get("tie_word_embeddings", True):
            new["tie_word_embeddings"] = config.tie_word_embeddings
        # A backbone, or a model with another head, is written as what it is then.
        new["architectures"] = ["Gemma2ForCausalLM"]
        if any(raw.get(key) != value for key, value in new.items()):
            files["config.json"] = _json(raw | new)
        arrays = {
            name.ours: jax.ShapeDtypeStruct(name.shape, dtype or stored[name.ours])
            for name in parameter_names(config)
        }
        yield Content(*origin, arrays, read, config, files)


def open_transcoders(
    source: Source,
    dtype: np.dtype | None,
    verify: bool,
    layers: str | Iterable[int],
    tier: tuple[str | None, Any],
    sites: Mapping[str, str | None],
    format: str | None = None,
) -> Content:
    """Transcoders, of which only headers are read; see :func:`jaxtc.convert` for the arguments.

    Raises:
        SourceError, SiteError, WeightsError: as :func:`jaxtc.load_transcoders`.
    """
    checkpoint = None
    if source.format == CONVERTED:
        checkpoint = Converted(source.path, TRANSCODERS, verify)
    files: dict[int, Source] = {}
    found: dict[int, Transcoder] = {}
    refuse_cross_layer(source)
    for layer, one in source.each(layers, *tier):
        layer = int(layer)  # JSON knows no integers of NumPy
        if checkpoint:
            found[layer] = checkpoint.transcoder(layer, dtype, sites)
            continue
        files[layer] = one
        with open_transcoder(one.file, format, one.told) as opened:
            if opened.dtype == np.float64 and dtype is None:
                raise WeightsError(
                    f"{one.file} holds float64; give dtype='float32', which is enough."
                )
            found[layer] = declared(opened, dtype or opened.dtype, one, sites)
        if found[layer].layer is None:
            raise SourceError(
                f"{one.name} is of {found[layer].input_site!r}, which the model has once; a "
                "converted checkpoint keeps transcoders by layer. Load it from its file."
            )
    if not found:
        raise SourceError("layers is empty, so there is nothing to convert.")
    found = dict(sorted(found.items()))
    arrays = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
        for one in found.values()
        for name, leaf in named(one).items()
    }
    if checkpoint:
        sidecar, read = checkpoint.sidecar, checkpoint.read
        origin = sidecar.source, sidecar.revision, sidecar.content
    else:
        paths = [one.file for one in files.values()]
        if verify:
            hub.verify_files(paths)
        origin = source.name, _commit(paths[0]), _state(paths)

        def read(full: str, dtype: np.dtype) -> tuple[np.ndarray, str]:
            _, layer, name = full.split(".")
            one = files[int(layer)]
            with open_transcoder(one.file, format, one.told) as opened:
                array, problem = opened.reader(found[int(layer)].input_site)(name, dtype)
            return array, problem and f"{problem} ({opened.path})"

    return Content(*origin, arrays, read, transcoders=found)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _commit(path: Path) -> str | None:
    """The commit of a file or folder in the hub's cache."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(?![^/])", path.absolute().as_posix())
    return found and found[1]


def _state(files: Iterable[Path]) -> str:
    """A hash that changes when one of these files is written again; they are not read."""
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256(json.dumps(seen).encode())
