"""Files with one byte changed, a few hundred of each kind: they load or are refused by name."""

import numpy as np
import pytest

import jaxtc
from jaxtc.errors import WeightsError
from jaxtc.weights.npz import write_params
from tests.unit.weights_files import params, random_model

# What the formats are written in, so that a damaged header often still parses as something else.
MARKS = b" \n\\'\"{}[]():,.-0129LeF\x00\xff"


def changes(raw: bytes, places, count: int, seed: int):
    """``count`` copies of a file's bytes, in each another byte at one of ``places``."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        damaged = bytearray(raw)
        place = int(rng.choice(places))
        others = [mark for mark in MARKS if mark != raw[place]]
        damaged[place] = rng.choice(others)
        yield bytes(damaged)


def outcomes(path, contents, load) -> dict[bool, int]:
    """How many of the contents loaded and how many were refused; anything else escapes."""
    counts = {True: 0, False: 0}
    for content in contents:
        path.write_bytes(content)
        try:
            load()
            counts[True] += 1
        except WeightsError as error:
            assert str(path) in str(error) or str(path.parent) in str(error)
            counts[False] += 1
    return counts


@pytest.mark.parametrize("seed", range(2))
def test_a_byte_of_an_npz(tmp_path, seed):
    path = tmp_path / "params.npz"
    # So large that its header is parsed before its checksum is known.
    write_params(path, params())
    raw = path.read_bytes()
    places = [*range(200), *range(raw.index(b"PK\1\2"), len(raw))]  # first header, directory
    damaged = changes(raw, places, 400, seed)
    counts = outcomes(path, damaged, lambda: jaxtc.load_transcoder(path))
    assert counts[False] > 200 and counts[True] > 0  # a zip's dates, for one, mean nothing


@pytest.mark.parametrize("replaced", [b"}", b")", b"'", b","])
@pytest.mark.parametrize("mark", MARKS)
def test_a_byte_of_an_npy_header_is_never_overlooked(tmp_path, replaced, mark):
    path = tmp_path / "params.npz"
    write_params(path, params())
    raw = path.read_bytes()
    place = raw.rindex(replaced, 0, raw.index(b"\n"))  # in the header of the first array
    damaged = raw[:place] + bytes([mark]) + raw[place + 1 :]
    assert outcomes(path, [damaged], lambda: jaxtc.load_transcoder(path))[True] == (damaged == raw)


def test_a_byte_of_a_safetensors_header(tmp_path):
    jaxtc.save_model(random_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    damaged = changes(raw, range(size), 300, 0)
    counts = outcomes(path, damaged, lambda: jaxtc.load_model(tmp_path))
    assert counts[False] > 200


def test_a_byte_of_a_config_or_an_index(tmp_path):
    model = random_model()
    jaxtc.save_model(model, tmp_path, max_shard_size=20_000)
    for name in ("model.safetensors.index.json", "config.json"):
        raw = (tmp_path / name).read_bytes()
        for content in changes(raw, range(len(raw)), 150, 1):
            (tmp_path / name).write_bytes(content)
            try:
                jaxtc.load_model(tmp_path)
            except jaxtc.JaxtcError:
                continue
        (tmp_path / name).write_bytes(raw)
    assert jaxtc.load_model(tmp_path).config == model.config
