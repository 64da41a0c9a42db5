"""Converting a model, a piece at a time: never more in memory than a few chunks of one tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxtc.errors import WeightsError
from jaxtc.helpers import JAXTC_VERSION
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.rules import variables
from jaxtc.weights.checkpoints.job import Job, room_for
from jaxtc.weights.checkpoints.manifest import MANIFEST, MODEL, Manifest
from jaxtc.weights.checkpoints.tree import Region, Stored, encode, metadata, store
from jaxtc.weights.conversion.source import ModelSource, open_model_source, with_dtype
from jaxtc.weights.files.model import INDEX
from jaxtc.weights.files.shards import Box
from jaxtc.weights.files.write_safetensors import pieces
from jaxtc.weights.load_model import Progress
from jaxtc.weights.names import Name
from jaxtc.weights.save_model import begin, index, size_of, split
from jaxtc.weights.sources.resolve import Source

# A tensor whose chunks are no rows is read whole to be written as rows, unless it is above this.
_WHOLE_BYTES = 256 << 20


def convert_model(
    source: Source,
    out: str | Path,
    to: str,
    *,
    dtype: np.dtype | None = None,
    verify: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Path:
    """See :func:`jaxtc.convert`; ``to`` is ``"orbax"`` or ``"safetensors"``."""
    with open_model_source(source, verify=verify) as model:
        dtypes = {ours: dtype or stored for ours, stored in model.dtypes.items()}
        config_json, config = with_dtype(model.config_json, dtype)
        what = {
            "source": model.origin or source.name,
            "to": to,
            "dtype": dtype.name if dtype else None,
            "revision": model.revision,
            "state of its files": model.state,
            "jaxtc": JAXTC_VERSION,
        }
        small = {"config.json": config_json, **model.kept}
        told = _Told(progress, sum(size_of(name, dtypes) for name in model.names))
        if to == "orbax":
            arrays = _arrays(model, dtypes)
            small |= metadata(arrays)
            sizes = [one.chunk_bytes for one in arrays for _ in one.indices()]
            with Job(out, what, room_for([*sizes, *map(len, small.values())])) as job:
                if not job.finished:
                    _write_tree(job, model, arrays, small, told)
                    manifest = Manifest(
                        MODEL,
                        what["source"],
                        model.revision,
                        {one.name: one for one in arrays},
                        job.done,
                        config=config,
                    )
                    job.finish(MANIFEST, manifest.encode())
                return job.out
        shards = split(model.names, dtypes, max_shard_size)
        what["max_shard_size"] = max_shard_size
        if len(shards) > 1:
            small[INDEX] = index(shards, dtypes)
        sizes = [sum(size_of(name, dtypes) for name in shard) for shard in shards.values()]
        with Job(out, what, room_for([*sizes, *map(len, small.values())])) as job:
            if not job.finished:
                for file, shard in shards.items():
                    job.write(file, _safetensors(model, shard, dtypes, told))
                last = small.pop("config.json")
                for file, content in small.items():
                    job.write(file, [content])
                job.finish("config.json", last)
            return job.out


class _Told:
    """Reports how many bytes of the result are there."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def more(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)


def _arrays(model: ModelSource, dtypes: dict[str, np.dtype]) -> list[Stored]:
    axes = {name: one.logical_axes for name, one in variables(Gemma2.abstract(model.config))}
    return [
        store(name.ours, name.shape, dtypes[name.ours], axes[name.ours]) for name in model.names
    ]


def _write_tree(
    job: Job, model: ModelSource, arrays: list[Stored], small: dict[str, bytes], told: _Told
) -> None:
    for name, one in zip(model.names, arrays, strict=True):
        for group in one.groups:
            wanted = [i for i in group if one.file(i) not in job.done]
            if wanted:
                boxes = {i: _box(one.region(i)) for i in wanted}
                parts = _sound(name, model.parts(name, list(boxes.values()), one.dtype))
                for i, box in boxes.items():
                    job.write(one.file(i), [encode(parts.arrays.pop(box), one)])
        told.more(size_of(name, {one.name: one.dtype}))
    for file, content in small.items():
        job.write(file, [content])


def _safetensors(
    model: ModelSource, names: list[Name], dtypes: dict[str, np.dtype], told: _Told
) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece; the checkpoint's tensors are ours, reshaped."""
    yield begin(names, dtypes)
    axes = {name: one.logical_axes for name, one in variables(Gemma2.abstract(model.config))}
    for name in names:
        dtype = dtypes[name.ours]
        for box in _rows(store(name.ours, name.shape, dtype, axes[name.ours])):
            array = _sound(name, model.parts(name, [box], dtype)).arrays[box]
            yield from pieces(array)
        told.more(size_of(name, dtypes))


def _rows(one: Stored) -> Iterator[Box]:
    """An array in boxes of whole rows, in order; those of its chunks when these are rows."""
    if one.is_rows:
        yield from (_box(one.region(i)) for i in one.indices())
        return
    rest = tuple((0, size) for size in one.shape[1:])
    parts = -(-one.file_bytes // _WHOLE_BYTES)
    step = -(-one.shape[0] // parts)
    for start in range(0, one.shape[0], step):
        yield ((start, min(start + step, one.shape[0])), *rest)


def _box(region: Region) -> Box:
    return tuple((part.start, part.stop) for part in region)


def _sound(name: Name, parts: Any) -> Any:
    problem = parts.problem()
    if problem:
        raise WeightsError(
            f"{name.hf} {problem}, so the checkpoint cannot be used and was not converted. Fetch "
            "it again" + (", or convert to a wider dtype." if "too large" in problem else ".")
        )
    return parts
