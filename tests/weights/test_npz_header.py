"""An npy header with one byte changed, every kind of byte at the places that hold it together.

Changes at random, of this and of every other format, are in :mod:`test_hostile_files`.
"""

import pytest

import jaxtc
from jaxtc.errors import WeightsError
from jaxtc.weights.files.npz import write_params
from tests.support.weights_files import params
from tests.weights.hostile.mutate import MARKS


@pytest.mark.parametrize("replaced", [b"}", b")", b"'", b","])
@pytest.mark.parametrize("mark", sorted(set(MARKS)))
def test_a_byte_of_an_npy_header_is_never_overlooked(tmp_path, replaced, mark):
    path, sites = tmp_path / "params.npz", {"input_site": "mlp_in", "output_site": "mlp_out"}
    write_params(path, params().items())
    raw = path.read_bytes()
    place = raw.rindex(replaced, 0, raw.index(b"\n"))  # in the header of the first array
    damaged = raw[:place] + bytes([mark]) + raw[place + 1 :]
    path.write_bytes(damaged)
    if damaged == raw:
        assert jaxtc.load_transcoder(path, **sites).features == 60
        return
    with pytest.raises(WeightsError, match="params.npz"):
        jaxtc.load_transcoder(path, **sites)
