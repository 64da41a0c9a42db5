"""Filling arrays that are spread over devices: each process holds, and reads, its own parts only.

An array's part on a device is a box: a range along each axis. What is read comes in blocks of whole
ranges of the first axis; each block is cast and checked once, and copied to the boxes it touches.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxtc.errors import WeightsError, some
from jaxtc.sharding.rules import variables
from jaxtc.weights.files.arrays import CHUNK_BYTES, all_finite, cast, empty, to_jax

_Module = TypeVar("_Module", bound=nnx.Module)

# (start, stop) along each axis.
Box = tuple[tuple[int, int], ...]

# Boxes that lie interleaved in the file are read together, so that it is read in long runs, while
# all of them take no more than this; otherwise one after another.
TOGETHER_BYTES = 256 << 20


def boxes_of(shape: Sequence[int], sharding: NamedSharding) -> dict[Box, list[jax.Device]]:
    """The boxes of this process's devices; several devices may hold the same one."""
    found: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        found.setdefault(box, []).append(device)
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Raw:
    """An array in a file: its elements in C order from the offset ``start`` on.

    ``read_at(offset, buffer)`` fills the buffer. A ``stream`` can only be read from the first byte
    to the last, once, and ignores offsets.
    """

    read_at: Callable[[int, memoryview], None]
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    stream: bool = False

    @property
    def whole(self) -> Box:
        """The box of all of it."""
        return tuple((0, size) for size in self.shape)


class Parts:
    """Host arrays for some boxes of an array, to be filled block by block."""

    def __init__(self, boxes: Iterable[Box], dtype: np.dtype):
        self.arrays = {box: empty(tuple(b - a for a, b in box), dtype) for box in boxes}
        self.dtype, self.finite, self.kept = dtype, True, True

    def take(self, block: np.ndarray, corner: Sequence[int]) -> None:
        """Copy a block, whose first element is at ``corner``, to the boxes that it touches."""
        self.finite &= all_finite(block)
        for box, array in self.arrays.items():
            theirs, ours = [], []
            for at, size, (start, stop) in zip(corner, block.shape, box, strict=True):
                low, high = max(at, start), min(at + size, stop)
                theirs.append(slice(low - at, max(high, low) - at))
                ours.append(slice(low - start, max(high, low) - start))
            source, target = block[tuple(theirs)], array[tuple(ours)]
            if not source.size:
                continue
            cast(source, target)
            if source.dtype != target.dtype:
                self.kept &= all_finite(target)

    def problem(self) -> str:
        """What is wrong with the values so far, or an empty string."""
        if not self.finite:
            return "holds NaN or infinity"
        return "" if self.kept else f"holds values too large for {self.dtype.name}"


def read(
    raw: Raw, dtype: np.dtype, sharding: NamedSharding | None = None, *, transposed: bool = False
) -> tuple[np.ndarray | jax.Array, str]:
    """An array from a file, on the host, or spread over devices when there is a sharding.

    Of a sharded array only the bytes of this process's shards are read, each once; a stream is read
    whole by every process.

    Args:
        raw: the array in the file.
        dtype: to cast to.
        sharding: of the array, after it was transposed.
        transposed: whether to reverse its axes; on the host that is a view.

    Returns (the array, what is wrong with the values read here or an empty string).
    """
    if not raw.shape:
        array, problem = read(dataclasses.replace(raw, shape=(1,)), dtype)
        array = array.reshape(())
        if sharding is None:
            return array, problem
        each = [jax.device_put(array, device) for device in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays((), sharding, each), problem
    if sharding is None:
        parts = read_parts(raw, dtype, [raw.whole])
        array = parts.arrays[raw.whole]
        return array.T if transposed else array, parts.problem()
    shape = raw.shape[::-1] if transposed else raw.shape
    boxes = boxes_of(shape, sharding)
    placed, problems = [], []
    for group in [list(boxes)] if raw.stream else _groups(list(boxes), dtype):
        parts = read_parts(raw, dtype, [box[::-1] for box in group] if transposed else group)
        problems.append(parts.problem())
        while parts.arrays:  # no longer there once it is on its devices
            box, array = parts.arrays.popitem()
            if transposed:
                box, array = box[::-1], np.ascontiguousarray(array.T)
            # Waiting keeps one host copy at a time where the devices have memory of their own.
            placed += jax.block_until_ready([jax.device_put(array, x) for x in boxes[box]])
    array = jax.make_array_from_single_device_arrays(shape, sharding, placed)
    return array, next(filter(None, problems), "")


def fill(
    declared: _Module,
    read: Callable[[str, np.dtype, NamedSharding | None], tuple[np.ndarray | jax.Array, str]],
    where: Path,
    places: Callable[[_Module], list[NamedSharding]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> _Module:
    """A module with its values; the largest are read first, while there is most room beside them.

    Args:
        declared: the module without its values.
        read: (name of a parameter, dtype, sharding) -> what :func:`read` returns.
        where: the file or folder, for messages.
        places: (declared) -> the sharding of each leaf; by default the default device.
        progress: called with (bytes loaded, bytes in all) after each parameter.

    Raises:
        WeightsError: values that cannot be used, those of all parameters at once.
    """
    names = [name for name, _ in variables(declared)]
    leaves, structure = jax.tree.flatten(declared)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    shardings = [None] * len(leaves) if places is None else places(declared)
    values, problems, done = {}, [], 0
    wanted = zip(sizes, names, leaves, shardings, strict=True)
    for size, name, leaf, sharding in sorted(wanted, key=lambda one: -one[0]):
        array, problem = read(name, np.dtype(leaf.dtype), sharding)
        values[name] = to_jax(array) if sharding is None else array
        problems += [problem] if problem else []
        done += size
        if progress:
            progress(done, sum(sizes))
    if problems:
        raise WeightsError(
            f"{where} cannot be used: {some(problems, 20)}. Whatever was computed with these "
            "values would be wrong; fetch them again, or train them again if they are yours."
        )
    return jax.tree.unflatten(structure, [values[name] for name in names])


def read_parts(raw: Raw, dtype: np.dtype, boxes: Sequence[Box]) -> Parts:
    """Some boxes of an array, on the host, cast to ``dtype``."""
    parts = Parts(boxes, dtype)
    box = raw.whole if raw.stream else hull(boxes)
    in_place = len(boxes) == 1 and box in parts.arrays and raw.dtype == dtype
    for block, corner in _blocks(raw, box, parts.arrays[box] if in_place else None):
        if in_place:
            parts.finite &= all_finite(block)
        else:
            parts.take(block, corner)
    return parts


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around several."""
    axes = zip(*boxes, strict=True)
    return tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in axes)


def _groups(boxes: list[Box], dtype: np.dtype) -> list[list[Box]]:
    """Boxes to be read together: all of one array, if they fill their hull and are not too much."""

    def volume(box: Box) -> int:
        return math.prod(b - a for a, b in box)

    whole = volume(hull(boxes))
    if whole == sum(map(volume, boxes)) and whole * dtype.itemsize <= TOGETHER_BYTES:
        return [boxes]
    return [[box] for box in boxes]


def _blocks(
    raw: Raw, box: Box, into: np.ndarray | None
) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """(block, its corner) for the parts of a box, read in the longest runs that hold nothing else.

    The first axis is cut into ranges; in each, what is left of the others is one block. With
    ``into``, an array for the box, blocks are ranges of it.
    """
    sizes, size = [b - a for a, b in box], raw.dtype.itemsize
    # Behind this axis all are whole, so a run is a range along it.
    last = max([axis for axis, n in enumerate(sizes) if n != raw.shape[axis]], default=0)
    row = math.prod(sizes[1:]) * size
    step = max(1, CHUNK_BYTES // max(row, 1))
    for low in range(0, sizes[0] if row else 0, step):
        high = min(low + step, sizes[0])
        block = np.empty((high - low, *sizes[1:]), raw.dtype) if into is None else into[low:high]
        ranges = [(box[0][0] + low, box[0][0] + high), *box[1:]]
        corner = tuple(start for start, _ in ranges)
        places = list(itertools.product(*(range(*bounds) for bounds in ranges[:last])))
        view = memoryview(block.reshape(-1).view(np.uint8))
        run = len(view) // len(places)
        for index, place in enumerate(places):
            element = np.ravel_multi_index((*place, *corner[last:]), raw.shape)
            raw.read_at(raw.start + int(element) * size, view[index * run : (index + 1) * run])
        yield block, corner
