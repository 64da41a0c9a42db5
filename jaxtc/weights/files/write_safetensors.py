"""Writing safetensors files, as the pieces of bytes that follow one another in them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxtc.weights.files.safetensors import FLOATS

_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_PIECE_BYTES = 8 << 20


def header(
    tensors: Iterable[tuple[str, np.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The beginning of a file, up to the bytes of its first tensor.

    Args:
        tensors: (name, dtype, shape) of each, in the order of their bytes.
        metadata: free text; transformers insists on ``format``.
    """
    found, end = {"__metadata__": dict(metadata)}, 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        found[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    encoded = json.dumps(found, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order, however it lies in memory; few are copied at once."""
    step = max(1, _PIECE_BYTES * len(array) // max(array.nbytes, 1)) if array.ndim else 1
    rows = np.atleast_1d(array)
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        yield memoryview(part.reshape(-1).view(np.uint8))
