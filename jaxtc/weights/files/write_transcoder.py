"""A transcoder's file in one of the formats, written array by array."""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files.npz import write_params
from jaxtc.weights.files.transcoder import AXES, Format
from jaxtc.weights.files.write_safetensors import header, pieces


def write_transcoder(
    format: Format, path: Path, declared: Transcoder, fetch: Callable[[str], np.ndarray]
) -> None:
    """Write the file, whole or not at all; one parameter is in memory at a time.

    A safetensors file has the transcoder's dtype and says its layer and its sites; an npz is
    float32.

    Args:
        format: one that has all of the transcoder's parameters.
        path: the file.
        declared: the transcoder, with or without its values.
        fetch: a parameter's values by its name.
    """
    npz = format.suffix == ".npz"
    activation = declared.activation
    converted = format.name not in activation.files
    names = [
        name
        for name in format.keys
        if getattr(declared, name) is not None or (converted and name == "threshold")
    ]

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            key, axes = format.keys[name]
            if converted and name == "threshold":
                own = {parameter: fetch(parameter) for parameter in activation.parameters}
                value = np.broadcast_to(activation.as_threshold(own), declared.features)
                value = value.astype(declared.W_enc.dtype)
            else:
                value = fetch(name)
            if name == "threshold" and not format.negative:
                value = np.maximum(value, 0)  # which has no effect on what it computes
            value = value if axes == AXES[name] else value.T
            # NumPy would write a transposed view in the order that it has in memory.
            yield key, np.ascontiguousarray(value, np.float32) if npz else value
            del value  # before the next one is fetched

    if npz:
        return write_params(path, arrays())
    tensors = []
    for name in names:
        (key, axes), param = format.keys[name], getattr(declared, name)
        shape = (declared.features,) if axes == "M" else param.shape
        shape = shape if axes == AXES[name] else shape[::-1]
        tensors.append((key, np.dtype(declared.W_enc.dtype), shape))
    told = {"format": "pt", "input_site": declared.input_site}
    told |= {"output_site": declared.output_site, "variant": declared.variant}
    told |= {} if declared.layer is None else {"layer": str(declared.layer)}
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            file.write(header(tensors, told))
            for _, array in arrays():
                file.writelines(pieces(array))
                del array
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
