"""``jaxtc convert`` as a user calls it, and the scripts in conversion/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxtc
from jaxtc.cli import main
from jaxtc.weights.checkpoints import tree as checkpoint_tree
from jaxtc.weights.sources.resolve import EMBEDDED_DATA
from tests.support.weights_files import params, random_model, same, write_tier
from tests.weights.killed_conversions import contents

ROOT = Path(__file__).parents[2]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        main([*map(str, arguments)])
    except SystemExit as error:
        code = error.code or 0
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_embedded_model_there_and_back(capsys, tmp_path):
    tree, back = tmp_path / "tree", tmp_path / "back"
    code, out, _ = run(capsys, "convert", "embedded", tree)
    assert code == 0
    assert out.startswith(f"{tree}: 4.6")
    assert "model in float32, content " in out
    assert run(capsys, "convert", tree, back, "--to", "safetensors")[0] == 0
    for path in (EMBEDDED_DATA / "model").iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    code, out, err = run(capsys, "convert", tree, back)
    assert (code, out) == (2, "")
    assert "exists already and is not overwritten" in err


def test_the_embedded_transcoders_there_and_back(capsys, tmp_path):
    tree, back = tmp_path / "tree", tmp_path / "back"
    code, out, _ = run(capsys, "convert", "embedded", tree, "--kind", "transcoders")
    assert (code, "transcoders in float32" in out) == (0, True)
    assert run(capsys, "convert", tree, back, "--to", "npz")[0] == 0
    given = contents(EMBEDDED_DATA / "transcoders")
    assert contents(back) == {name: raw for name, raw in given.items() if name.endswith(".npz")}
    code, _, err = run(capsys, "convert", tree, tmp_path / "ct", "--to", "circuit-tracer")
    assert (code, "every layer from 0 on" in err) == (0, False)
    options = ["--to", "circuit-tracer", "--layers", "1,3"]
    code, _, err = run(capsys, "convert", tree, tmp_path / "some", *options)
    assert (code, "every layer from 0 on" in err) == (0, True)
    names = sorted(path.name for path in (tmp_path / "some").iterdir())
    assert names == ["config.yaml", "layer_1.safetensors", "layer_3.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "There is no folder nowhere"),
        (["embedded", "out", "--to", "gguf"], "not converted to 'gguf'"),
        (["embedded", "out", "--to", "npz", "--kind", "model"], "not a format for a model"),
        (["embedded", "out", "--dtype", "int8"], "cannot be loaded as 'int8'"),
        (["embedded", "out", "--kind", "transcoders", "--layers", "9"], "it has layers 0, 1, 2, 3"),
        (["embedded", "out", "--to", "npz", "--dtype", "bfloat16"], "params.npz is float32"),
        (["embedded", "out", "--verify"], "nothing says what the hub's hashes"),
        (["embedded", "out", "--max-shard-size", "0"], "expected at least 1"),
        (["embedded", "out", "--max-shard-size", "nan"], "expected at least 1"),
        (["embedded", "out", "--to", "circuit-tracer", "--model-name", 'a"b'], "model_name is"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "convert", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.splitlines()[-1].startswith("Error: ")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_tree, "save_part", interrupted)
        code, _, err = run(capsys, "convert", "embedded", tmp_path / "out")
    assert (code, "same command again to go on" in err) == (130, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert run(capsys, "convert", "embedded", tmp_path / "out")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def script(name: str, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "conversion" / name, *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts(tmp_path):
    model = random_model()
    jaxtc.save_model(model, tmp_path / "hf")
    script("hf_to_orbax.py", tmp_path / "hf", tmp_path / "tree")
    assert same(jaxtc.load_model(tmp_path / "tree", dtype="float32"), model)
    script("orbax_to_hf.py", tmp_path / "tree", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")

    given = params() | {"threshold": np.abs(params()["threshold"])}
    file = write_tier(
        tmp_path / "gemma-scope-2b-pt-transcoders", "layer_0/width_60/average_l0_5", given
    )
    script("npz_to_orbax.py", tmp_path / "gemma-scope-2b-pt-transcoders", tmp_path / "all")
    script("npz_to_orbax.py", file, tmp_path / "one")
    script("orbax_to_npz.py", tmp_path / "all", tmp_path / "npz")
    script("transcoders_to_circuit_tracer.py", tmp_path / "all", tmp_path / "ct")
    for source in ("all", "one", "npz", "ct"):
        found = jaxtc.load_transcoder(tmp_path / source, 0)
        assert all(np.array_equal(getattr(found, key)[...], given[key]) for key in given), source
    sidecar = json.loads((tmp_path / "all/jaxtc.json").read_bytes())
    assert sidecar["transcoders"]["0"]["input_site"] == "mlp_in_normed"
