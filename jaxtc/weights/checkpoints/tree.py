"""Arrays by name in an orbax checkpoint: all use of orbax's checkpointer for weights is here.

``layers.3.attn.q`` is the leaf ``["layers"]["3"]["attn"]["q"]`` of a tree of dictionaries.

Each array is a zarr folder of uncompressed chunks. Orbax's default, one database around all
arrays (OCDBT), is not used: merging the databases of a partial save cannot be taken up again when
it is killed, while moving folders can. Weights hardly compress.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxtc.errors import WeightsError

# Arrays are cut along their longest axis into chunks of at most this.
CHUNK_BYTES = 16 << 20

# That there is no database; that what a killed save has left is removed; what we raise.
_EXPECTED = (
    "Skipping merge of OCDBT",
    "Attempted to create temporary directory",
    "Failed to get metadata",
)


def part_of(name: str) -> str:
    """The part of a model, or of a set of transcoders, that is saved and loaded at a time."""
    first, second, *_ = (*name.split("."), "")
    return f"layers.{second}" if first == "layers" else first


def parts(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of each part, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return found


def save(folder: Any, arrays: Mapping[str, jax.Array]) -> None:
    """Save arrays, possibly sharded over many processes, which all call this."""
    with _orbax() as ocp:
        ocp.save(folder, _nested(arrays), overwrite=True)


def save_part(folder: Any, arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """Save some of the arrays of a checkpoint, with notes; :func:`finalize` makes it whole."""
    with _orbax() as ocp:
        ocp.partial.save(folder, _nested(arrays), custom_metadata=dict(notes))


def saved_notes(folder: Any) -> dict[str, str]:
    """The notes of all parts that were saved."""
    found: dict[str, str] = {}
    with _orbax() as ocp:
        # Orbax has no call for this, but each saved part is a checkpoint of its own.
        for part in folder.parent.glob(f"{folder.name}.partial_save/*.pending_*"):
            found |= ocp.metadata(part).custom_metadata
    return found


def finalize(folder: Any) -> None:
    """Merge the parts that were saved into the checkpoint ``folder``; if killed, call it again.

    Orbax removes and rewrites the merged metadata with each part, and a kill between the two loses
    it (tests/weights/killed_conversions.py). So the metadata of the parts is kept until the end.
    """
    from etils import epath

    partial, kept, new = (
        epath.Path(folder.parent) / f"{folder.name}.{suffix}"
        for suffix in ("partial_save", "metadata", "metadata.new")
    )
    if kept.exists():  # an earlier merge was cut short
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
            (partial / name).unlink(missing_ok=True)
        _copy_metadata(kept, partial)
    else:
        _copy_metadata(partial, new)
        new.rename(kept)
    with _orbax() as ocp:
        ocp.partial.finalize(folder)
    kept.rmtree()


def _copy_metadata(source: Any, target: Any) -> None:
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
        for path in source.glob(f"*.pending_*/{name}"):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            path.copy(copy, overwrite=True)


def stored(folder: Any) -> dict[str, Any]:
    """The ``shape`` and ``dtype`` of each array, by name. Raises WeightsError as :func:`load`."""
    with _orbax(alone=True) as ocp, _explained(folder):
        return _flat(ocp.metadata(folder).metadata or {})  # None: orbax cannot tell


def load(folder: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Some of the arrays, cast; what has a sharding lies on its devices, the rest is NumPy's.

    Raises:
        WeightsError: orbax cannot read them.
    """
    abstract = {
        # A NumPy array without memory stands for one on the host.
        name: one if one.sharding else np.broadcast_to(np.zeros((), one.dtype), one.shape)
        for name, one in wanted.items()
    }
    with _orbax(alone=True) as ocp, _explained(folder):
        found = _flat(ocp.load(folder, _nested(abstract)))
        wrong = [name for name, one in wanted.items() if found[name].shape != one.shape]
        if wrong:
            raise ValueError(f"{wrong[0]} has shape {found[wrong[0]].shape}")
        return found


@contextlib.contextmanager
def _orbax(*, alone: bool = False) -> Iterator[Any]:
    """Orbax with our options; ``alone``: each process for itself, without waiting for others."""
    import orbax.checkpoint.experimental.v1 as ocp  # slow to import

    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    saving.enable_write_sharding_file, saving.array_metadata_store = False, None
    saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False
    context.pytree.loading.partial_load = True
    if alone:
        process = jax.process_index()
        context.multiprocessing.primary_host = process
        context.multiprocessing.active_processes = {process}
        context.multiprocessing.barrier_sync_key_prefix = f"jaxtc_{process}"
    absl = logging.getLogger("absl")
    absl.addFilter(_is_news)
    try:
        with context:
            yield ocp
    finally:
        absl.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of orbax's does not warn of what we mean to do."""
    return not any(text in str(record.msg) for text in _EXPECTED)


@contextlib.contextmanager
def _explained(folder: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax raises whatever a damaged file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise WeightsError(
            f"The arrays in {folder} cannot be read: {reason}. A copy was cut short, or files were "
            "changed; copy or convert the checkpoint again."
        ) from error


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[last] = array
    return tree


def _flat(tree: Any, below: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{below}{key}.") if nested else {f"{below}{key}": value}
    return found
