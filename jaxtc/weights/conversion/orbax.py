"""Writing a converted checkpoint a layer at a time; the layers of a killed conversion are kept."""

from collections.abc import Callable

import numpy as np

from jaxtc.errors import WeightsError
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.job import Job
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.checkpoints.sidecar import SIDECAR, Array, describe, sha256
from jaxtc.weights.conversion.source import Content


def write_orbax(job: Job, content: Content, fetch: Callable[[str], np.ndarray]) -> None:
    """Write the files of a job, and compare what orbax wrote with what was fetched."""
    kept = job.partial / SIDECAR  # there when all parts are
    if not kept.exists():
        hashes = tree.saved_notes(job.files)
        for names in tree.parts(content.arrays):
            if not hashes.keys() >= set(names):
                values = {name: fetch(name) for name in names}
                new = {name: sha256(value) for name, value in values.items()}
                tree.save_part(job.files, values, new)
                del values  # before the next layer is fetched
                hashes |= new
        arrays = {n: Array(x.shape, x.dtype, hashes[n]) for n, x in content.arrays.items()}
        origin = content.source, content.revision
        sidecar = describe(arrays, content.files, content.transcoders, *origin)
        job.write(kept, sidecar.encode())
    if not job.files.exists():
        tree.finalize(job.files)
    for name, raw in {**content.files, SIDECAR: kept.read_bytes()}.items():
        job.write(job.files / name, raw)
    try:
        Converted(job.files, verify=True)
    except WeightsError as error:
        raise WeightsError(
            f"What was written does not read back as it was: {error} Remove the folder that this "
            "is about, and convert again."
        ) from error
