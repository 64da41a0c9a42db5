"""Parts of arrays read from a file: the right ones, and no other byte."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtc.weights.files import shards
from jaxtc.weights.files.shards import Parts, Raw, read_parts

DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


class File:
    """Bytes that count how often each of them was read."""

    def __init__(self, array: np.ndarray, start: int):
        self.raw = np.frombuffer(bytes(start) + array.tobytes(), np.uint8)
        self.reads = np.zeros(len(self.raw), int)
        self.calls = 0

    def read_at(self, offset: int, view: memoryview) -> None:
        view[:] = self.raw[offset : offset + len(view)].data
        self.reads[offset : offset + len(view)] += 1
        self.calls += 1


def random_boxes(rng: np.random.Generator, shape: tuple[int, ...]) -> list[shards.Box]:
    """Some boxes of a grid that divides the array, as devices of one process hold them."""
    parts = [int(rng.choice([n for n in range(1, size + 1) if size % n == 0])) for size in shape]
    grid = [
        tuple(
            (size // n * at, size // n * (at + 1))
            for size, n, at in zip(shape, parts, index, strict=True)
        )
        for index in np.ndindex(*parts)
    ]
    chosen = rng.permutation(len(grid))[: rng.integers(1, len(grid) + 1)]
    return [grid[i] for i in sorted(chosen)]


def cut(array: np.ndarray, box: shards.Box) -> np.ndarray:
    return array[tuple(slice(*bounds) for bounds in box)]


@pytest.mark.parametrize("seed", range(60))
def test_any_boxes_of_any_array(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.choice([1, 2, 6, 12], size=rng.integers(1, 4)).tolist())
    stored, dtype = DTYPES[seed % 2], DTYPES[seed // 2 % 2]
    array = rng.normal(size=shape).astype(stored)
    # Also blocks of a single row, and boxes read one after another.
    monkeypatch.setattr(shards, "CHUNK_BYTES", int(rng.choice([1, 64, 1 << 20])))
    monkeypatch.setattr(shards, "TOGETHER_BYTES", int(rng.choice([0, 1 << 20])))
    file, boxes = File(array, start=24), random_boxes(rng, shape)
    raw = Raw(file.read_at, 24, stored, shape)
    for group in shards._groups(boxes, dtype):
        parts = read_parts(raw, dtype, group)
        assert list(parts.arrays) == group and not parts.problem()
        for box, found in parts.arrays.items():
            assert found.dtype == dtype
            assert np.array_equal(found, cut(array, box).astype(dtype))
    wanted = np.zeros(shape, bool)
    for box in boxes:
        cut(wanted, box)[...] = True
    assert np.array_equal(file.reads[24:], np.repeat(wanted.reshape(-1), stored.itemsize))
    assert not file.reads[:24].any()


def test_whole_rows_are_read_in_one_piece():
    array = np.arange(4096, dtype=np.float32).reshape(64, 64)
    file = File(array, start=0)
    raw = Raw(file.read_at, 0, array.dtype, array.shape)
    read_parts(raw, array.dtype, [((8, 16), (0, 64))])
    assert file.calls == 1
    halves = [((0, 64), (0, 32)), ((0, 64), (32, 64))]
    assert shards._groups(halves, array.dtype) == [halves]
    read_parts(raw, array.dtype, halves)
    assert file.calls == 2  # interleaved boxes: one run all the same


@pytest.mark.parametrize("other", DTYPES)
def test_equal_compares_numbers_of_any_dtypes(other, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 40)
    array = np.random.default_rng(0).integers(-9, 9, (30, 7)).astype(np.float32)
    for change in (None, (0, 0), (29, 6), (14, 3)):
        changed = array.copy()
        if change is not None:
            changed[change] += 1
        files = [File(x, start=8) for x in (array, changed.astype(other))]
        one, two = (
            Raw(file.read_at, 8, np.dtype(x), array.shape)
            for file, x in zip(files, (np.float32, other), strict=True)
        )
        assert shards.equal(one, two) == (change is None) == shards.equal(two, one)
    nan = np.full((2, 2), np.nan, np.float32)
    raw = Raw(File(nan, start=0).read_at, 0, nan.dtype, nan.shape)
    assert not shards.equal(raw, raw)


def test_equal_holds_few_rows_in_memory():
    array = np.ones((2000, 4096), np.float16)  # 16 MB, 33 as float32
    wide = array.astype(np.float32)
    raws = [Raw(File(x, start=0).read_at, 0, x.dtype, x.shape) for x in (array, wide)]
    tracemalloc.start()
    try:
        assert shards.equal(*raws)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * shards.CHUNK_BYTES < wide.nbytes * 2, peak / 2**20


def test_what_is_wrong_with_the_values_is_told():
    for value, dtype, told in ((np.nan, "f4", "NaN"), (1e30, "f2", "too large for float16")):
        parts = Parts([((0, 2),)], np.dtype(dtype))
        parts.take(np.array([1.0, value], np.float32), (0,))
        assert told in parts.problem()
    parts = Parts([((0, 2),)], np.dtype(np.float32))
    parts.take(np.array([np.inf], np.float32), (1,))
    assert "infinity" in parts.problem()


def test_the_other_order_of_axes():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    raw = Raw(File(array, start=0).read_at, 0, array.dtype, array.shape)
    mesh = jax.make_mesh((len(jax.devices()[:2]),), ("model",), devices=jax.devices()[:2])
    for spec in (P(None, "model"), P("model", None)):
        for stream in (False, True):
            at = dataclasses.replace(raw, stream=stream)
            found, problem = shards.read(
                at, array.dtype, NamedSharding(mesh, spec), transposed=True
            )
            assert not problem and found.sharding.spec == spec
            assert np.array_equal(found, array.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stream_is_read_once_from_its_beginning(dtype, transposed, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 40)
    array, at = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), 0

    def read_at(_, view):
        nonlocal at
        view[:] = array.tobytes()[at : at + len(view)]
        at += len(view)

    raw = Raw(read_at, 0, array.dtype, array.shape, stream=True)
    found, problem = shards.read(raw, dtype, transposed=transposed)
    assert not problem and at == array.nbytes and found.dtype == dtype
    assert np.array_equal(found, (array.T if transposed else array).astype(dtype))
