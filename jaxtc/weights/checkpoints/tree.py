"""Arrays by name in an orbax checkpoint: all use of orbax's checkpointer for weights is here.

``layers.3.attn.q`` is the leaf ``["layers"]["3"]["attn"]["q"]`` of a tree of dictionaries.

Each array is a zarr folder of uncompressed chunks. Orbax's default, one database around all
arrays (OCDBT), is not used: merging the databases of a partial save cannot be taken up again when
it is killed, while moving folders can. Weights hardly compress.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxtc.errors import WeightsError

# Arrays are cut along their longest axis into chunks of at most this. Those of large arrays are
# more than 32 MiB: glibc keeps smaller blocks when they are freed (mallopt(3), M_MMAP_THRESHOLD),
# and writing or reading such an array would take nearly twice its size.
CHUNK_BYTES, LARGE_CHUNK_BYTES = 16 << 20, 64 << 20


def parts(names: Iterable[str]) -> list[list[str]]:
    """The names of each layer, and each name outside of the layers, which are moved at a time."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.match(r"layers\.\d+|.*", name)[0], []).append(name)
    return list(found.values())


def save(folder: Any, arrays: Mapping[str, jax.Array]) -> None:
    """Save arrays, possibly sharded over many processes, which all call this."""
    with _orbax() as ocp:
        ocp.save(folder, unflatten_dict(arrays, sep="."), overwrite=True)


def save_part(folder: Any, arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """Save some of the arrays of a checkpoint, with notes; :func:`finalize` makes it whole."""
    large = max(array.nbytes for array in arrays.values()) > 2 * LARGE_CHUNK_BYTES
    with _orbax(large=large) as ocp:
        ocp.partial.save(folder, unflatten_dict(arrays, sep="."), custom_metadata=dict(notes))


def saved_notes(folder: Path) -> dict[str, str]:
    """The notes of all parts that were saved."""
    found: dict[str, str] = {}
    with _orbax() as ocp:
        # Orbax has no call for this, but each saved part is a checkpoint of its own.
        for part in folder.parent.glob(f"{folder.name}.partial_save/*.pending_*"):
            found |= ocp.metadata(part).custom_metadata
    return found


def finalize(folder: Path) -> None:
    """Merge the parts that were saved into the checkpoint ``folder``; if killed, call it again.

    Orbax removes and rewrites the merged metadata with each part, and a kill between the two loses
    it (tests/weights/killed_conversions.py). So the metadata of the parts is kept until the end.
    """
    partial, kept, new = (
        folder.with_name(f"{folder.name}.{suffix}")
        for suffix in ("partial_save", "metadata", "metadata.new")
    )
    if kept.exists():  # an earlier merge was cut short
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
            (partial / name).unlink(missing_ok=True)
        shutil.copytree(kept, partial, dirs_exist_ok=True)
    else:
        shutil.copytree(partial, new, ignore=_arrays_in, dirs_exist_ok=True)
        new.rename(kept)
    with _orbax() as ocp:
        ocp.partial.finalize(folder)
    shutil.rmtree(kept)


def _arrays_in(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder).name == "state" and name != "_METADATA"]


def stored(folder: Any) -> dict[str, Any]:
    """The ``shape`` and ``dtype`` of each array, none if orbax cannot tell. Raises WeightsError."""
    with _orbax(folder) as ocp:
        return flatten_dict(ocp.metadata(folder).metadata or {}, sep=".")


def load(folder: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Some of the arrays, of the ``shape`` and cast to the ``dtype`` that is wanted; what has a
    ``sharding`` lies on its devices, the rest is NumPy's.

    Raises:
        WeightsError: orbax cannot read them.
    """
    abstract = {
        # A NumPy array without memory stands for one on the host.
        name: one
        if getattr(one, "sharding", None)
        else np.broadcast_to(np.zeros((), one.dtype), one.shape)
        for name, one in wanted.items()
    }
    with _orbax(folder) as ocp:
        found = flatten_dict(ocp.load(folder, unflatten_dict(abstract, sep=".")), sep=".")
        wrong = [name for name, one in wanted.items() if found[name].shape != one.shape]
        if wrong:
            raise ValueError(f"{wrong[0]} has shape {found[wrong[0]].shape}")
        return found


@contextlib.contextmanager
def _orbax(reads: Any = None, large: bool = False) -> Iterator[Any]:
    """Orbax with our options; a folder is read by each process without waiting for the others."""
    import orbax.checkpoint.experimental.v1 as ocp  # slow to import

    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    saving.enable_write_sharding_file, saving.array_metadata_store = False, None
    saving.storage_options.chunk_byte_size = LARGE_CHUNK_BYTES if large else CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False
    context.pytree.loading.partial_load = True
    if reads is not None:
        process = jax.process_index()
        context.multiprocessing.primary_host = process
        context.multiprocessing.active_processes = {process}
        context.multiprocessing.barrier_sync_key_prefix = f"jaxtc_{process}"
    what = reads and f"The arrays in {reads}"
    with quiet(what, "copy or convert the checkpoint again"), context:
        yield ocp


@contextlib.contextmanager
def quiet(reads: str | None, remedy: str) -> Iterator[None]:
    """Orbax without its warnings, and with whatever a damaged file leads to as our error.

    Args:
        reads: what is read, for that error; None while writing, whose errors pass.
        remedy: what to do about it.
    """
    # Warnings that there is no database, that a tree names no sharding, that what a killed save has
    # left is removed, and of what becomes our errors.
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if reads is None or isinstance(error, WeightsError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise WeightsError(
            f"{reads} cannot be read: {reason}. A copy was cut short, or files were changed; "
            f"{remedy}."
        ) from error
    finally:
        absl.setLevel(level)
