"""2 and 4 processes on this machine that share a mesh (gloo), against one device."""

import json
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtc
from jaxtc.sharding.rules import variables
from jaxtc.weights.checkpoints.sidecar import read_sidecar
from tests.scale import lab
from tests.scale.child import run_all

WORKER = str(Path(__file__).with_name("process.py"))
MB = 1e6

# processes: (devices of each, mesh, another to restore onto)
MESHES = {2: (2, "data=2,model=2", "model=4"), 4: (2, "data=2,model=4", "data=4,model=2")}
SETUPS = [2, 4]
pytestmark = pytest.mark.slow  # a shared mesh in one process is tested in test_mesh.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    [(status, output)] = run_all([[WORKER, "prepare", str(path)]], devices=1, seconds=300)
    assert status == 0, output[-4000:]
    return path


@pytest.fixture(scope="module")
def report(folder):
    """(number of processes) -> what each of them told."""
    held = {}

    def start(count):
        if count not in held:
            devices, mesh, other = MESHES[count]
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            commands = [
                [WORKER, str(i), str(count), str(port), str(folder), mesh, other]
                for i in range(count)
            ]
            told = run_all(commands, devices=devices, seconds=400)
            wrong = [
                f"process {i}: {out[-3000:]}" for i, (status, out) in enumerate(told) if status
            ]
            assert not wrong, "\n\n".join(wrong)
            held[count] = [
                json.loads((folder / f"report_{count}_{i}.json").read_text()) for i in range(count)
            ]
        return held[count]

    return start


@pytest.mark.parametrize("count", SETUPS)
def test_results_equal_one_devices(count, report):
    for told in report(count):
        assert told["devices"] == count * MESHES[count][0]
        for name in ("run_with_everything", "generation", "dictionary"):
            assert 0 <= told[name] <= lab.MOST
        print({name: f"{value:.1e}" for name, value in told.items() if isinstance(value, float)})


@pytest.mark.parametrize("count", SETUPS)
def test_each_process_reads_and_holds_its_share(count, report):
    for told in report(count):
        big = told["big"]
        print({name: f"{value / MB:.0f} MB" for name, value in big.items()})
        assert big["whole"] > 160 * MB
        assert big["share"] < 1.05 * big["whole"] / count
        assert big["share"] <= big["read"] < big["share"] + 2 * MB
        assert big["peak"] < big["share"] + 40 * MB


@pytest.mark.parametrize("count", SETUPS)
def test_when_one_cannot_load_all_raise(count, report):
    first, second, *others = (told["agreement"] for told in report(count))
    assert second.startswith("SourceError") and "nowhere" in second
    for told in (first, *others):
        assert told.startswith(f"OtherProcessError: Process 1 of {count} could not load the model")


@pytest.mark.parametrize("count", SETUPS)
def test_what_one_process_would_write_is_refused(count, report):
    for told in report(count):
        assert told["refused"].startswith(f"SourceError: This model is spread over {count}")
        assert "save_checkpoint" in told["refused"]


@pytest.mark.parametrize("count", SETUPS)
def test_what_many_saved_one_loads(count, report, folder, tmp_path):
    report(count)  # which restored it onto two meshes
    one, many = jaxtc.save_checkpoint(lab.model(), tmp_path / "one"), folder / f"saved_by_{count}"
    assert read_sidecar(many).encode() == read_sidecar(one).encode()
    found = jaxtc.load_model(many, verify=True)
    for (name, a), (_, b) in zip(variables(found), variables(lab.model()), strict=True):
        assert np.array_equal(a[...], b[...]), name
    again = jaxtc.load_transcoder(folder / f"saved_by_{count}.transcoders", 1)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(lab.transcoder())))
