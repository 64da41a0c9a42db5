"""Safetensors files: a header is checked whole before anything is allocated.

The format: 8 bytes, the header's length as a little-endian integer; the header, a JSON object
that gives each tensor's dtype, shape and the range of its bytes; the bytes.
"""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open

from jaxtc.errors import WeightsError, first_line
from jaxtc.weights.files import local, shards
from jaxtc.weights.files.arrays import CHUNK_BYTES
from jaxtc.weights.files.shards import Raw

_MOST_AXES = 64  # of a NumPy array

# The dtypes that weights are read from.
FLOATS = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()} | {np.dtype("<i8"): "I64"}
_QUANTISED = " (is it quantised? give the weights that it was made from)"
# Of single numbers that are settings.
_NUMBERS = FLOATS | {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"),
                     "U8": np.dtype("u1")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the header says of one tensor, and its bytes, ``start`` to ``stop``.

    ``fault`` is why it cannot be read as weights, or ""; then ``dtype`` is None. ``code`` is how
    the header names the dtype.
    """

    code: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    fault: str
    start: int
    stop: int


class SafetensorsFile(local.PlainFile):
    """An open safetensors file, see :class:`~jaxtc.weights.files.local.PlainFile`.

    Attributes:
        entries: what the header says, by tensor name.
        metadata: the header's free text, by key.
    """

    format = "safetensors"

    def read_header(self) -> None:
        """Have the header checked by the library, then read it: the library hides the offsets."""
        try:
            with safe_open(self.path, "numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise self.unsound(first_line(error)) from error
        length = bytearray(8)
        self._read_at(0, memoryview(length))
        header = bytearray(int.from_bytes(length, "little"))
        self._read_at(8, memoryview(header))
        raw = json.loads(header.decode(), object_pairs_hook=self._unique)
        self.metadata: dict[str, str] = raw.pop("__metadata__", {})
        if self.metadata is None:
            raise self.unsound("its __metadata__ is null")
        self.entries = {name: self._entry(name, claim) for name, claim in raw.items()}
        self._data_start = 8 + len(header)

    def read(
        self,
        name: str,
        dtype: np.dtype,
        sharding: NamedSharding | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        transposed: bool = False,
    ) -> tuple[np.ndarray | jax.Array, str]:
        """A tensor without a fault, perhaps with its axes split or merged (``shape``), as
        :func:`~jaxtc.weights.files.shards.read` has it.

        Raises WeightsError when the file ends or fails while it is read.
        """
        entry = self.entries[name]
        start = self._data_start + entry.start
        raw = Raw(self._read_at, start, entry.dtype, shape or entry.shape)
        return shards.read(raw, dtype, sharding, transposed=transposed)

    def whole_number(self, name: str) -> int:
        """A tensor that is one whole number. Raises WeightsError for any other."""
        entry = self.entries[name]
        kind, value = _NUMBERS.get(entry.code), None
        if kind is not None and math.prod(entry.shape) == 1:
            raw = bytearray(kind.itemsize)
            self._read_at(self._data_start + entry.start, memoryview(raw))
            value = np.frombuffer(raw, kind)[0].item()
        if value is None or not float(value).is_integer():
            raise WeightsError(
                f"{self.path}: {name} is "
                f"{f'{entry.code} of shape {entry.shape}' if value is None else value}, "
                "expected one whole number."
            )
        return int(value)

    def _read_at(self, offset: int, view: memoryview) -> None:
        # Not through a memory map, where a file that shrinks or a failing disk kills the process.
        while view:
            try:
                count = os.preadv(self.file.fileno(), [view], offset)
            except OSError as error:
                raise WeightsError(f"{self.path} cannot be read: {error.strerror}.") from error
            if not count:
                raise self.unsound("it ended while it was being read")
            view, offset = view[count:], offset + count

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):  # of which the library silently takes one
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise self.unsound(f"its header names {twice!r} twice")
        return found

    def _entry(self, name: str, claim: Any) -> Entry:
        # The library also takes a list of the three, more fields, and more axes than NumPy has.
        exact = isinstance(claim, dict) and claim.keys() == {"dtype", "shape", "data_offsets"}
        if not exact or len(claim["shape"]) > _MOST_AXES:
            raise self.unsound(
                f"the entry of {name!r} is not dtype, shape and data_offsets of an array"
            )
        dtype, shape = FLOATS.get(claim["dtype"]), tuple(claim["shape"])
        fault = "" if dtype else f"has dtype {claim['dtype']}, not one of {', '.join(FLOATS)}"
        if fault and claim["dtype"][:1] in "IUF":  # integers, and floats of few bits
            fault += _QUANTISED
        return Entry(claim["dtype"], dtype, shape, fault, *claim["data_offsets"])


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order, however it lies in memory; few are copied at once."""
    step = max(1, CHUNK_BYTES * len(array) // max(array.nbytes, 1)) if array.ndim else 1
    rows = np.atleast_1d(array)
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        yield memoryview(part.reshape(-1).view(np.uint8))


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, np.dtype, Sequence[int]]],
    arrays: Iterable[np.ndarray],
    **metadata: str,
) -> None:
    """Write a file, whole or not at all; each array is asked for when its turn comes.

    Tensors are (name, dtype, shape) in the order of the arrays.
    """
    # transformers insists on the format, which is its word for the framework.
    found, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        found[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    header = json.dumps(found, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with local.replacing(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in arrays:
            file.writelines(pieces(array))
            del array  # before the next one is made
