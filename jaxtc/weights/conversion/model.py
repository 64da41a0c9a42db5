"""Converting a model, a layer or a tensor at a time: that is the most that is in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxtc.helpers import JAXTC_VERSION
from jaxtc.weights.checkpoints.job import FILE_BYTES, Job
from jaxtc.weights.checkpoints.sidecar import MODEL
from jaxtc.weights.conversion.orbax import write_orbax
from jaxtc.weights.conversion.source import open_model_source, with_dtype
from jaxtc.weights.files.model import INDEX
from jaxtc.weights.files.safetensors import pieces
from jaxtc.weights.load_model import Progress
from jaxtc.weights.names import Name
from jaxtc.weights.save_model import begin, index, size_of, split
from jaxtc.weights.sources.resolve import Source


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
        sizes = {name.ours: size_of(name, dtypes) for name in model.names}
        total, done = sum(sizes.values()), 0
        needed = total + FILE_BYTES * len(sizes)

        def written(names: Iterable[str]) -> None:
            nonlocal done
            done += sum(sizes[name] for name in names)
            if progress:
                progress(done, total)

        if to == "orbax":
            names = {name.ours: name for name in model.names}
            arrays = {ours: (name.shape, dtypes[ours]) for ours, name in names.items()}
            facts = {"kind": MODEL, "source": what["source"], "revision": model.revision}
            facts["config"] = config
            with Job(out, what, needed) as job:
                return write_orbax(
                    job, arrays, lambda ours: model.fetch(names[ours], dtypes[ours]), small,
                    facts, written,
                )  # fmt: skip
        what["max_shard_size"] = max_shard_size
        shards = split(model.names, dtypes, max_shard_size)
        if len(shards) > 1:
            small[INDEX] = index(shards, dtypes)

        def safetensors(shard: list[Name]) -> Iterator[bytes | memoryview]:
            """A file, piece by piece; the checkpoint's tensors are ours, reshaped."""
            yield begin(shard, dtypes)
            for name in shard:
                yield from pieces(model.fetch(name, dtypes[name.ours]))
                written([name.ours])

        with Job(out, what, needed) as job:
            if not job.finished:
                for file, shard in shards.items():
                    job.write(file, safetensors(shard))
                for file in sorted(small, key="config.json".__eq__):  # which is written last
                    job.write(file, [small[file]])
                job.finish()
            return job.out
