"""Writing a converted checkpoint a layer at a time; the layers of a killed conversion are kept."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxtc.errors import WeightsError
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.job import Job
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.checkpoints.sidecar import SIDECAR, Array, Sidecar, hash_array, hash_bytes

_HASHES = "hashes.json"


def write_orbax(
    job: Job,
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    fetch: Callable[[str], np.ndarray],
    files: Mapping[str, bytes],
    facts: Mapping[str, Any],
    told: Callable[[Iterable[str]], None],
) -> Any:
    """Write the checkpoint of a job, and compare what orbax wrote with what was fetched.

    Args:
        job: what it writes.
        arrays: shape and dtype of each array, by name.
        fetch: (name) -> the array; those of a layer are in memory together.
        files: the contents of other files, by name.
        facts: the other fields of the :class:`Sidecar`.
        told: called with the names of a layer when it is written.

    Returns:
        The folder.
    """
    if job.finished:
        return job.out
    with job.explained():
        hashes = json.loads(job.noted(_HASHES) or "null")
        if hashes is None:
            hashes = _write_parts(job, arrays, fetch, told)
            job.note(_HASHES, json.dumps(hashes))
        # All parts are there. A merge of them that was killed goes on where it stopped.
        if not job.files.exists():
            tree.finalize(job.files)
    said = {name: Array(*one, hashes[name]) for name, one in arrays.items()}
    contents = {name: hash_bytes(content) for name, content in files.items()}
    sidecar = Sidecar(arrays=said, files=contents, **facts)
    for name, content in {**files, SIDECAR: sidecar.encode()}.items():
        job.write(name, [content])
    try:
        Converted(job.files).verify()
    except WeightsError as error:
        raise WeightsError(
            f"What was written does not read back as it was: {error} Remove the folder that this "
            "is about, and convert again."
        ) from error
    return job.finish()


def _write_parts(
    job: Job,
    arrays: Mapping[str, Any],
    fetch: Callable[[str], np.ndarray],
    told: Callable[[Iterable[str]], None],
) -> dict[str, str]:
    """Save what an earlier run has not; the hash of each array."""
    hashes = tree.saved_notes(job.files)
    for names in tree.parts(arrays).values():
        if not hashes.keys() >= set(names):
            values = {name: fetch(name) for name in names}
            new = {name: hash_array(value) for name, value in values.items()}
            tree.save_part(job.files, values, new)
            del values  # before the next layer is fetched
            hashes |= new
        told(names)
    return hashes
