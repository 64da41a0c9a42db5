"""Safetensors files: every claim of a header is checked before anything is allocated.

The format: 8 bytes, the header's length as a little-endian integer; the header, a JSON object
that gives each tensor's dtype, shape and the range of its bytes; the bytes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import WeightsError
from jaxtc.weights.files import local, shards
from jaxtc.weights.files.shards import Raw

MAX_HEADER_BYTES = 100_000_000

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

# NumPy's own limit.
_MOST_AXES = 64

_PIECE_BYTES = 8 << 20

# The dtypes that weights are read from.
FLOATS = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the header says of one tensor: dtype name, shape, and bytes ``start`` to ``stop``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def fault(self) -> str:
        """Why it cannot be read as weights, or empty."""
        if self.dtype in FLOATS:
            return ""
        return f"has dtype {self.dtype}, not one of {', '.join(FLOATS)}"


class SafetensorsFile:
    """An open safetensors file, to be used in a ``with`` statement.

    Attributes:
        path: of the file.
        entries: what the header says, by tensor name.
        metadata: the header's free text, by key.

    Raises:
        WeightsError: the file is truncated, or its header is not sound.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = local.open_plain(path)
        try:
            self.metadata: dict[str, str] = {}
            self._data_start, self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def raw(self, name: str, shape: tuple[int, ...] | None = None) -> Raw:
        """A tensor whose dtype is in :data:`FLOATS`, perhaps with its axes split or merged."""
        entry = self.entries[name]
        start = self._data_start + entry.start
        return Raw(self._read_at, start, FLOATS[entry.dtype], shape or entry.shape)

    def read(
        self,
        name: str,
        dtype: np.dtype,
        sharding: NamedSharding | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        transposed: bool = False,
    ) -> tuple[np.ndarray | jax.Array, str]:
        """A tensor as :func:`~jaxtc.weights.files.shards.read` has it.

        Raises:
            WeightsError: the file ended or failed while it was read.
        """
        return shards.read(self.raw(name, shape), dtype, sharding, transposed=transposed)

    def _read_at(self, offset: int, view: memoryview) -> None:
        while view:
            try:
                count = os.preadv(self._file.fileno(), [view], offset)
            except OSError as error:
                raise WeightsError(f"{self.path} cannot be read: {error.strerror}.") from error
            if not count:
                raise self._unsound("it ended while it was being read")
            view, offset = view[count:], offset + count

    def _unsound(self, problem: str) -> WeightsError:
        return WeightsError(
            f"{self.path} is not a sound safetensors file: {problem}. Most likely a download or "
            "copy was cut short or damaged; fetch the file again."
        )

    def _read_header(self) -> tuple[int, dict[str, Entry]]:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self._unsound(f"it has {size} bytes, not even the 8 of the header's length")
        prefix = bytearray(8)
        self._read_at(0, memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise self._unsound(
                f"its first 8 bytes claim a header of {length} bytes (at most {MAX_HEADER_BYTES})"
            )
        if 8 + length > size:
            raise self._unsound(f"its header should take {length} bytes, the file has {size - 8}")
        header = bytearray(length)
        self._read_at(8, memoryview(header))
        try:
            raw = json.loads(header.decode("utf-8"), object_pairs_hook=self._unique)
        except WeightsError:
            raise
        # ValueError: also integers too long to convert; RecursionError: brackets nested too deep.
        except (ValueError, RecursionError) as error:
            raise self._unsound(f"its header is not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise self._unsound("its header is not a JSON object")
        self.metadata = raw.pop("__metadata__", {})
        texts = isinstance(self.metadata, dict) and self.metadata.values()
        if texts is False or not all(isinstance(text, str) for text in texts):
            raise self._unsound("its __metadata__ is not an object of texts")
        entries = {name: self._entry(name, claim) for name, claim in raw.items()}
        self._check_ranges(entries, size - 8 - length)
        return 8 + length, entries

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise self._unsound(f"its header names {twice!r} twice")
        return found

    def _entry(self, name: str, claim: Any) -> Entry:
        def whole(values: Any) -> bool:
            return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

        if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
            raise self._unsound(f"the entry of {name!r} is not dtype, shape and data_offsets")
        dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._unsound(f"{name!r} has the unknown dtype {dtype!r}")
        if not whole(shape) or len(shape) > _MOST_AXES or not whole(offsets) or len(offsets) != 2:
            raise self._unsound(f"{name!r} has shape {shape!r} and data_offsets {offsets!r}")
        start, stop = offsets
        if (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise self._unsound(
                f"{name!r} is {dtype} {shape}, which does not fill its {stop - start} bytes"
            )
        return Entry(dtype, tuple(shape), start, stop)

    def _check_ranges(self, entries: dict[str, Entry], size: int) -> None:
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                fault = "overlap with another tensor" if entry.start < end else "leave a gap before"
                raise self._unsound(f"the bytes of {name!r} {fault} (at {entry.start})")
            end = entry.stop
        if end != size:
            raise self._unsound(f"its tensors take {end} bytes, the file holds {size} of them")


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


def write_tensors(
    path: Path,
    tensors: Sequence[tuple[str, np.dtype, Sequence[int]]],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file, whole or not at all; each array is asked for when its turn comes."""
    with local.replacing(path) as partial, partial.open("wb") as file:
        file.write(header(tensors, metadata))
        for _, array in arrays:
            file.writelines(pieces(array))
            del array  # before the next one is made
