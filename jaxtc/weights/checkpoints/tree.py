"""Orbax's layout of a tree of arrays: a zarr folder for each, without a database around them.

It is what orbax writes with ``use_ocdbt=False``, uncompressed, and what orbax restores. It is
written here, a chunk at a time, because orbax takes only whole arrays, starts anew when it was
killed, and puts the time into its files. An uncompressed zarr chunk is a file of its elements in
C order, so that a part of an array is read and checked without the rest.

Chunks depend on an array's shape and axes alone, never on a mesh: the axis that meshes divide
(heads, neurons, features, the vocabulary) is cut into up to 16 parts or more, so that a device of
a usual mesh reads whole chunks and no others.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jaxtc.sharding.rules import RULES

# The folder of the tree in a converted checkpoint.
TREE = "orbax"

# An array below this is one chunk.
SMALL_BYTES = 64 << 10
# No chunk is above this, save a single row of an enormous array.
MOST_BYTES = 16 << 20
PARTS = 16

# Chunks that are no rows lie interleaved elsewhere; a smaller array is read whole to write them.
TOGETHER_BYTES = 64 << 20

# The names of dtypes in zarr (version 2); bfloat16 is tensorstore's, which reads it for orbax.
ZARR_DTYPES = {
    np.dtype(jnp.bfloat16): "bfloat16",
    np.dtype("<f2"): "<f2",
    np.dtype("<f4"): "<f4",
    np.dtype("<f8"): "<f8",
}

Index = tuple[int, ...]
Region = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array of the tree.

    Attributes:
        name: its path in the tree, joined by dots, such as ``layers.3.attn.q``.
        shape: of the array.
        dtype: of its elements.
        chunks: shape of a chunk; the last ones along an axis are padded to it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many chunks lie along each axis."""
        return tuple(-(-size // c) for size, c in zip(self.shape, self.chunks, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """The size of each chunk's file."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """The size of all its chunks' files."""
        return self.chunk_bytes * math.prod(self.counts)

    @property
    def groups(self) -> list[list[Index]]:
        """Chunks to be read from elsewhere together, so that it is read in long runs."""
        found = list(self.indices())
        if self.is_rows or self.file_bytes > TOGETHER_BYTES:
            return [[index] for index in found]
        return [found]

    @property
    def is_rows(self) -> bool:
        """Whether each chunk is one stretch of the array in C order."""
        return self.counts[1:] == (1,) * (len(self.shape) - 1)

    def file(self, index: Index) -> str:
        """The file of a chunk, below the checkpoint's folder."""
        return f"{TREE}/{self.name}/{'.'.join(map(str, index))}"

    def region(self, index: Index) -> Region:
        """What a chunk covers of the array."""
        bounds = zip(index, self.chunks, self.shape, strict=True)
        return tuple(slice(i * c, min((i + 1) * c, size)) for i, c, size in bounds)

    def indices(self, where: Region | None = None) -> Iterator[Index]:
        """The chunks that a part of the array touches, or all."""
        where = tuple(slice(0, size) for size in self.shape) if where is None else where
        spans = (
            range(w.start // c, -(-w.stop // c)) for w, c in zip(where, self.chunks, strict=True)
        )
        return itertools.product(*spans)


def store(name: str, shape: Sequence[int], dtype: np.dtype, axes: Sequence[str]) -> Stored:
    """How an array with these logical axes is stored."""
    chunks = list(shape)

    def size() -> int:
        return math.prod(chunks) * dtype.itemsize

    divided = [i for i, axis in enumerate(axes) if RULES.get(axis) is not None]
    axis = divided[0] if divided else 0
    if size() > SMALL_BYTES:
        # A divisor: every device's share of a mesh of so many begins where a chunk does.
        parts = next(
            n for n in range(PARTS, 0, -1) if chunks[axis] % n == 0 and _is_power_of_two(n)
        )
        chunks[axis] //= parts
    for place in (axis, *range(len(chunks))):
        while size() > MOST_BYTES and chunks[place] > 1:
            chunks[place] = -(-chunks[place] // 2)
    return Stored(name, tuple(shape), dtype, tuple(chunks))


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def encode(part: np.ndarray, stored: Stored) -> memoryview:
    """The bytes of a chunk's file from the elements that it covers."""
    if part.shape != stored.chunks:
        whole = np.zeros(stored.chunks, stored.dtype)
        whole[tuple(map(slice, part.shape))] = part
        part = whole
    return memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8))


def decode(raw: bytes | memoryview, stored: Stored) -> np.ndarray:
    """A chunk from the bytes of its file, its padding included."""
    return np.frombuffer(raw, stored.dtype).reshape(stored.chunks)


def metadata(arrays: Iterable[Stored]) -> dict[str, bytes]:
    """The files beside the chunks, by name: orbax's description of the tree, zarr's of each array.

    Orbax is told that its leaves are NumPy arrays: those it restores without being given a
    sharding, and with one as jax's.
    """
    tree, files = {}, {}
    for stored in sorted(arrays, key=lambda one: one.name):
        keys = tuple(stored.name.split("."))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        files[f"{TREE}/{stored.name}/.zarray"] = _json({
            "chunks": list(stored.chunks),
            "compressor": None,
            "dimension_separator": ".",
            "dtype": ZARR_DTYPES[stored.dtype],
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(stored.shape),
            "zarr_format": 2,
        })  # fmt: skip
    files[f"{TREE}/_METADATA"] = _json({
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    })  # fmt: skip
    # Orbax would put the times of begin and end here.
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    files[f"{TREE}/_CHECKPOINT_METADATA"] = _json({
        "item_handlers": handler,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    })  # fmt: skip
    return files


def _json(value: dict) -> bytes:
    return json.dumps(value).encode()
