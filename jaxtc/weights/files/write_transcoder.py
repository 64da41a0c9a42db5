"""Transcoders' files in the formats of :mod:`jaxtc.weights.files.formats`, written."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files import local, saelens
from jaxtc.weights.files.formats import SITES, Format
from jaxtc.weights.files.npz import write_params
from jaxtc.weights.files.safetensors import write_tensors


def write_transcoder(
    format: Format,
    path: Path,
    declared: Transcoder,
    fetch: Callable[[str], np.ndarray],
    described: bool = False,
) -> None:
    """Write the file, whole or not at all; one parameter, as ``fetch`` gives it, is in memory.

    A safetensors file has the transcoder's dtype; an npz is float32. Both say its layer and its
    sites: in the header, and in the zip's comment. Of ``declared`` no values are read.
    ``described`` is whether another file will say the activation's settings.
    """
    npz, dtype = format.suffix == ".npz", np.dtype(declared.W_enc.dtype)
    activation = declared.activation
    made = {} if format.name in activation.files else {"threshold"}
    names = [name for name in format.keys if name in made or getattr(declared, name) is not None]

    def value_of(name: str) -> np.ndarray:
        if name in made:
            own = {parameter: fetch(parameter) for parameter in activation.parameters}
            value = np.broadcast_to(activation.as_threshold(own), declared.features).astype(dtype)
        else:
            value = fetch(name)
        if name == "threshold" and not format.negative:
            value = np.maximum(value, 0)  # which has no effect on what it computes
        value = value.T if format.transposed(name) else value
        # NumPy would write a transposed view in the order that it has in memory.
        return np.ascontiguousarray(value, np.float32) if npz else value

    facts = {key: str(getattr(declared, key)) for key in ("variant", *SITES, "layer")}
    if declared.layer is None:
        del facts["layer"]
    if npz:
        arrays = ((format.keys[name][0], value_of(name)) for name in names)
        return write_params(path, arrays, json.dumps(facts))
    sizes = {"I": declared.d_in, "M": declared.features, "O": declared.d_out}
    tensors = [
        (key, dtype, [sizes[axis] for axis in axes.split()])
        for key, axes in map(format.keys.get, names)
    ]
    settings = activation.settings.get(format.name, {})
    facts |= {key: str(getattr(activation, name)) for name, key in settings.items()}
    numbers = {} if described else {key: getattr(activation, n) for n, key in settings.items()}
    tensors += [(key, np.dtype(np.int64), []) for key in numbers]
    values = itertools.chain(map(value_of, names), map(np.int64, numbers.values()))
    config = saelens.config_of(declared) if format.name == "saelens" else b""
    if config:  # the one that is there would describe other weights
        (path.parent / saelens.CONFIG).unlink(missing_ok=True)
    write_tensors(path, tensors, values, **facts)
    if config:
        with local.replacing(path.parent / saelens.CONFIG) as partial:
            partial.write_bytes(config)
