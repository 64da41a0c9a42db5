"""Safetensors files: sound ones read to the bit, each kind of damage refused with its reason."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtc.errors import WeightsError
from jaxtc.weights.files.safetensors import SafetensorsFile
from tests.support.weights_files import compose, parse

VALUES = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.float16),
    "c": np.array(2.5, np.float32),
    "d": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def path(tmp_path):
    safetensors.numpy.save_file(VALUES, tmp_path / "x.safetensors", metadata={"format": "np"})
    return tmp_path / "x.safetensors"


def refused(path, match):
    with pytest.raises(WeightsError, match=match) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_reads_what_the_safetensors_library_writes(path):
    with SafetensorsFile(path) as file:
        assert set(file.entries) == set(VALUES)
        for name, value in VALUES.items():
            array, problem = file.read(name, np.dtype(np.float32))
            assert problem == "" and np.array_equal(array, value.astype(np.float32))
            # 64: what XLA needs to take the array over without a copy.
            assert array.shape == value.shape and (array.size == 0 or array.ctypes.data % 64 == 0)


def test_truncated_anywhere(path):
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        refused(path, "not a sound safetensors file.*fetch the file again")


def test_bytes_too_many(path):
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "not fully covered")


def test_header_that_claims_more_than_the_limit(path):
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    refused(path, "header too large")


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_header_that_is_no_object(path, header):
    compose(path, header, b"")
    refused(path, "Error while deserializing header: invalid")


def test_name_given_twice(path):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    compose(path, f'{{"a": {entry}, "a": {entry}}}'.encode(), b"\0" * 4)
    refused(path, "names 'a' twice")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "F99"}, "unknown variant `F99`"),
        ({"dtype": ["F32"]}, "invalid JSON in header"),
        ({"shape": [4, 4]}, "invalid shape"),
        ({"shape": [-3, -4]}, "expected usize"),
        ({"shape": [3.0, 4.0]}, "expected usize"),
        ({"shape": [True, 12]}, "expected usize"),
        ({"shape": "34"}, "expected a sequence"),
        ({"shape": [3, 10**30]}, "expected usize"),
        ({"shape": [3, 4] + [1] * 70}, "of an array"),
        ({"data_offsets": [0]}, "expected a tuple of size 2"),
        ({"data_offsets": [-48, 0]}, "expected usize"),
        ({"data_offsets": [48, 0]}, "invalid offset for tensor `a`"),
        ({"data_offsets": [10**9, 10**9 + 48]}, "invalid offset for tensor `c`"),
        ({"more": 1}, "is not dtype, shape and data_offsets"),
    ],
)
def test_entry_that_does_not_add_up(path, change, reason):
    header, data = parse(path)
    header["a"].update(change)
    compose(path, header, data)
    refused(path, reason)


def test_tensors_that_share_bytes(path):
    header, data = parse(path)
    header["again"] = header["a"]
    compose(path, header, data)
    refused(path, "invalid offset for tensor")


def test_gap_between_tensors(path):
    header, data = parse(path)
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]
    compose(path, header, data + b"\0" * 4)
    refused(path, "invalid offset for tensor")


def test_file_that_shrinks_while_it_is_read(path):
    with SafetensorsFile(path) as file:
        path.write_bytes(path.read_bytes()[:-70])
        with pytest.raises(WeightsError, match="ended while it was being read"):
            for name in VALUES:
                file.read(name, np.dtype(np.float32))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_header_is_refused_or_still_describes_the_file(path, data):
    safetensors.numpy.save_file(VALUES, path)
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
    except WeightsError:
        return
    with file:
        # Whatever is accepted accounts for every byte once.
        assert sum(e.stop - e.start for e in file.entries.values()) == len(raw) - file._data_start
