"""Saving what is in memory, possibly spread over many processes, as a converted checkpoint."""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtc.errors import SourceError
from jaxtc.helpers import explicit_transfers
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.processes import agreed, whole
from jaxtc.sharding.rules import variables
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.job import Job
from jaxtc.weights.checkpoints.sidecar import SIDECAR, Array, describe, sha256
from jaxtc.weights.save_model import config_files


@explicit_transfers
def save_checkpoint(
    model: Gemma2 | Mapping[int, Transcoder], folder: str | Path, tokenizer: Any = None
) -> Path:
    """Write a model, or transcoders by layer, so that ``load_model`` or ``load_transcoder`` reads
    it onto any mesh, and orbax too.

    All processes call this with a folder that all of them see; each writes its own shards, and
    process 0 the rest. ``FOLDER.partial`` is written, and becomes the folder when it is whole.
    Arrays are hashed whole, so one that is spread over processes is gathered for it, one at a time.

    Args:
        model: in memory, in the dtype it has.
        folder: new or empty; or a new one in a bucket, such as ``gs://bucket/folder``, where orbax
            has what that needs.
        tokenizer: of ``transformers``, saved along with a model when given.

    Returns:
        The folder.

    Raises:
        SourceError: the folder exists, cannot be written, or the disk is full.
        OtherProcessError: another process failed.
    """
    values, files = _values(model), {}
    if isinstance(model, Gemma2):
        files |= config_files(model)
    first, everyone = jax.process_index() == 0, Mesh(np.array(jax.devices()), ("all",))
    needed = sum(x.nbytes for x in values.values())
    bucket = _bucket(folder)
    job = None if bucket else Job(folder, {"saving": "from memory"}, needed)
    target = bucket or job.files
    with contextlib.ExitStack() as stack:
        with agreed(everyone, f"begin to save to {folder}"):
            if first:
                files |= _tokenizer_files(tokenizer)
                if job:
                    stack.enter_context(job.begin(fresh=True))
                elif bucket.exists():
                    raise SourceError(f"{bucket} exists already and is not overwritten.")
        with agreed(everyone, f"find {folder}"):
            if job and not job.note.exists():
                raise SourceError(
                    f"Process {jax.process_index()} does not see {job.partial}, which process 0 "
                    "made. All processes must save to one folder on a file system that they share."
                )
        with agreed(everyone, f"write its part of {folder}"):
            tree.save(target, values)
            arrays = {
                name: Array(x.shape, np.dtype(x.dtype), sha256(whole(x)))
                for name, x in values.items()
            }
        with agreed(everyone, f"finish {folder}"):
            if first:
                sidecar = describe(arrays, files, None if isinstance(model, Gemma2) else model)
                for file, content in {**files, SIDECAR: sidecar.encode()}.items():
                    (target / file).write_bytes(content)
                if job:
                    job.finish()
    return bucket or job.out


def _bucket(folder: str | Path) -> Any:
    """A folder in a bucket, where none can be moved: it is complete when it has its sidecar."""
    if "://" in str(folder):
        from etils import epath

        return epath.Path(folder)
    return None


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer of ``transformers`` saves, by name."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _values(model: Gemma2 | Mapping[int, Transcoder]) -> dict[str, jax.Array | np.ndarray]:
    """The arrays by the names that they have in the tree."""
    many = jax.process_count() > 1
    if isinstance(model, Gemma2):
        modules = {"": model}
    elif isinstance(model, Mapping) and all(isinstance(t, Transcoder) for t in model.values()):
        modules = {f"layers.{layer}.": transcoder for layer, transcoder in model.items()}
    elif isinstance(model, CrossLayerTranscoder):
        raise SourceError(
            "A cross-layer transcoder is not kept in checkpoints: jaxtc.save_transcoder writes its "
            "own folder, which jaxtc.load_transcoders reads onto any mesh."
        )
    else:
        raise SourceError(
            f"A {type(model).__name__} cannot be saved; expected a Gemma2, or transcoders by "
            "layer: {20: transcoder}."
        )
    return {
        # Of what each process has all of, orbax lets the first write what is NumPy's.
        prefix + name: np.asarray(array) if many and array.is_fully_addressable else array
        for prefix, module in modules.items()
        for (name, _), array in zip(variables(module), jax.tree.leaves(module), strict=True)
    }
