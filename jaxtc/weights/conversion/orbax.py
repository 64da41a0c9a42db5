"""Writing a converted checkpoint a layer at a time; the layers of a killed conversion are kept."""

from collections.abc import Callable

import numpy as np

from jaxtc.errors import WeightsError
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.job import Job
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.checkpoints.sidecar import SIDECAR, Array, describe, hash_array
from jaxtc.weights.conversion.source import Content


def write_orbax(
    job: Job,
    content: Content,
    fetch: Callable[[str], np.ndarray],
    skipped: Callable[[str], None],
) -> None:
    """Write the files of a job, and compare what orbax wrote with what was fetched.

    Args:
        job: what it writes.
        content: what is converted.
        fetch: (name) -> the array; those of a layer are in memory together.
        skipped: called with the name of each array that an earlier run has saved.
    """
    sidecar = job.partial / SIDECAR
    if not sidecar.exists():
        hashes = tree.saved_notes(job.files)
        for names in tree.parts(content.arrays):
            if hashes.keys() >= set(names):
                for name in names:
                    skipped(name)
                continue
            values = {name: fetch(name) for name in names}
            new = {name: hash_array(value) for name, value in values.items()}
            tree.save_part(job.files, values, new)
            del values  # before the next layer is fetched
            hashes |= new
        arrays = {n: Array(x.shape, x.dtype, hashes[n]) for n, x in content.arrays.items()}
        made = describe(
            arrays, content.files, content.transcoders, content.source, content.revision
        )
        job.write(sidecar, made.encode())
    # All parts are there. A merge of them that was killed goes on where it stopped.
    if not job.files.exists():
        tree.finalize(job.files)
    for name, raw in {**content.files, SIDECAR: sidecar.read_bytes()}.items():
        job.write(job.files / name, raw)
    try:
        Converted(job.files).verify()
    except WeightsError as error:
        raise WeightsError(
            f"What was written does not read back as it was: {error} Remove the folder that this "
            "is about, and convert again."
        ) from error
