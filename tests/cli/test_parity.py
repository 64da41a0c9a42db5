"""``jaxtc parity``: its options, its errors, its table, and what it leaves behind."""

import collections
import dataclasses
import importlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

import jaxtc
from jaxtc.cli.options import parse_layers
from jaxtc.cli.parity import draw
from jaxtc.errors import CapacityError, InputError, JaxtcError, SourceError
from jaxtc.parity import certify, job
from jaxtc.parity.certificate import (
    Certificate,
    Divergence,
    Figures,
    Generation,
    Jump,
    Logits,
    Prompt,
    SiteRow,
    Transcoder,
    TruthRow,
)
from jaxtc.parity.job import addresses
from jaxtc.parity.texts import EMBEDDED_TEXTS, TEXTS, read_prompts
from tests.support import tiny


@pytest.fixture(scope="module")
def folder(folders):
    """The tiny model and transcoders, and some that lack something."""
    jaxtc.save_model(tiny.model(), folders / "mute")
    jaxtc.save_transcoder(tiny.transcoder(1), folders / "bare" / "params.npz")
    thin = folders / "thin" / "layer_1" / "params.npz"
    jaxtc.save_transcoder(tiny.transcoder(1, width=16), thin)
    return folders


@pytest.fixture
def command(cli_run, monkeypatch):
    """``jaxtc parity``, which must not begin the work: (code, out, err)."""
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("the work has begun"))
    return lambda *arguments: cli_run("parity", *arguments)


# Options, with folders' names in braces, and what the error says.
ERRORS = {
    "unknown model": ("{root}/nothing", "There is no folder"),
    "unknown dtype": ("{root}/model --dtype bfloat61", "expected 'float32' or 'bfloat16'"),
    "no such layer": ("{root}/model --layers 0,7", "this model has 3 layers: 0 to 2"),
    "no layers": ("{root}/model --layers 3-1", "such as 0,5,10-12"),
    "no prompts file": ("{root}/model --prompts {root}/none.txt", "There is no prompts file"),
    "empty prompts file": ("{root}/model --prompts {root}/empty.txt", "has no prompt in it"),
    "binary prompts file": ("{root}/model --prompts {root}/binary.txt", "is not UTF-8 text"),
    "folder of prompts": ("{root}/model --prompts {root}", "cannot be read"),
    "long prompt": ("{root}/model --prompts {root}/long.txt", "Prompt 2 of 2: A prompt of"),
    "too many new tokens": ("{root}/model --new-tokens 99999", "longer than this model's context"),
    "no tokenizer": ("{root}/mute", "has no tokenizer"),
    "whose transcoder": (
        "{root}/model --transcoder {root}/transcoders",
        "has transcoders for layers 0, 1; say which with --transcoder-layer 0",
    ),
    "layer without transcoder": ("{root}/model --transcoder-layer 1", "but no transcoder"),
    "bare file": ("{root}/model --transcoder {root}/bare/params.npz", "--transcoder-layer"),
    "narrow": ("{root}/model --transcoder {root}/thin/layer_1/params.npz", "another model"),
    "no such transcoder": ("{root}/model --transcoder {root}/none.npz", "There is no file"),
    "report in no folder": ("{root}/model --report {root}/none/a.html", "there is no folder"),
    "report is a folder": ("{root}/model --report {root}", "name a file in it"),
    "json in no folder": ("{root}/model --json {root}/none/a.json", "there is no folder"),
    "one file for both": ("{root}/model --json {root}/a --report {root}/./a", "are both"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_teach_before_any_work(command, folder, case):
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "long.txt").write_text("the capital\n" + "the capital " * 1000)
    options, says = ERRORS[case]
    code, out, err = command(*options.format(root=folder).split())
    assert code == 2 and not out
    assert says in " ".join(err.split())


def test_without_torch(command, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    code, _, err = command(folder / "model")
    assert code == 2
    assert "pip install 'jaxtc[parity]'" in " ".join(err.split())


def test_what_is_slow_to_import_is_imported_when_needed():
    """torch by the other process only; orbax and training by the commands that use them."""
    code = (
        "import sys, jaxtc, jaxtc.cli, jaxtc.parity\n"
        "slow = {'torch', 'transformers', 'orbax.checkpoint', 'jaxtc.training.loop'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", [0]), ("0,5,10-12", [0, 5, 10, 11, 12]), (" 3 - 4 , 1", [3, 4, 1]), ("2-2", [2])],
)
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "-1", "1,", "1--2", "5-3", "0-99999", "١", "1.5"])
def test_no_layers(text):
    with pytest.raises(InputError, match="such as 0,5,10-12"):
        parse_layers(text)


@pytest.mark.parametrize("prompts", [[], "the capital", 7, [[]], [[1, -1]], [["a"]]])
def test_prompts_that_are_none(folder, prompts):
    with pytest.raises(InputError):
        certify(folder / "model", prompts=prompts)


@pytest.mark.parametrize("count", [-1, True, 1.5, "2"])
def test_new_tokens_that_are_none(folder, count):
    with pytest.raises(InputError, match="new_tokens"):
        certify(folder / "model", new_tokens=count)


@pytest.mark.parametrize("layers", [[], ["1"], [1.5]])
def test_layers_that_are_none(folder, layers):
    with pytest.raises(InputError, match="layers is"):
        certify(folder / "model", layers=layers)


def test_arrays_are_taken(folder, monkeypatch):
    """Of layers and of prompts; the work that the other process reads is JSON."""
    seen = []

    def run(work, say):
        seen.append(json.loads(json.dumps(dataclasses.asdict(work))))
        raise JaxtcError("enough")

    monkeypatch.setattr(job, "run", run)
    with pytest.raises(JaxtcError, match="enough"):
        certify(folder / "model", prompts=np.array([[2, 3]]), layers=np.array([2, -3]))
    assert seen[0]["layers"] == [0, 2] and seen[0]["prompts"] == [[2, 3]]


def test_no_room(folder, monkeypatch):
    """Twice the bytes for float64, three times in all; nothing has begun."""
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("the work has begun"))
    model, rows = tiny.model(), [[2, 3, 4], [2, 5]]
    need = sum(
        np.asarray(x, np.float32).nbytes
        for row in rows
        for x in jaxtc.run(model, [row], capture=addresses(range(3))).activations.values()
    )
    usage = collections.namedtuple("usage", "free")
    for factor, truth in ((1, False), (3, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=factor: usage(n * need - 1))
        with pytest.raises(CapacityError, match="TMPDIR"):
            certify(folder / "model", prompts=rows, truth=truth)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=factor: usage(n * need))
        with pytest.raises(pytest.fail.Exception, match="begun"):
            certify(folder / "model", prompts=rows, truth=truth)


def test_read_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffFirst – one\r\n\r\n  second\n\fthird\u2028line".encode())
    assert read_prompts(file) == ["First – one", "  second", "\fthird\u2028line"]
    with pytest.raises(SourceError):
        read_prompts(tmp_path / "none.txt")


def test_the_built_in_texts_differ_in_length():
    for texts in (TEXTS, EMBEDDED_TEXTS):
        lengths = sorted(map(len, texts))
        assert lengths[-1] > 4 * lengths[0]


def test_the_other_process_fails(folder, tmp_path):
    work = job.Job(
        name="float32", root=str(tmp_path), model=str(folder / "none"), dtype="float32",
        truth=False, prompts=[[1, 2]], layers=[0],
    )  # fmt: skip
    steps = []
    with pytest.raises(JaxtcError, match="PyTorch half of the comparison failed") as error:
        job.run(work, steps.append)
    assert "none" in str(error.value) and "Traceback" not in str(error.value)
    assert steps == ["Loading the PyTorch model"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "name", ["SIGINT", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGTERM", "SIGKILL"))]
)
def test_ctrl_c_leaves_nothing_behind(folder, tmp_path, name):
    """Nor does being told to end, and no end leaves the other process; nor can others read what is
    there meanwhile."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the capital of texas is")
    process = subprocess.Popen(
        [sys.executable, "-c", "from jaxtc.cli import main; main()", "parity", folder / "model",
         "--prompts", prompts],
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not list(tmp_path.glob("jaxtc-parity-*/float32.stderr")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    [place] = tmp_path.glob("jaxtc-parity-*")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert not out and b"Traceback" not in err
    if name != "SIGKILL":
        assert process.returncode == 130
        assert not list(tmp_path.glob("jaxtc-parity-*"))
    end = time.monotonic() + 60
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def certificate(layers: int, passed: bool = True) -> Certificate:
    """One with every part in it."""
    rows = []
    for address in addresses(range(layers)):
        given = address.site in ("resid_pre", "resid_mid")
        error = 1.5e-7 if passed or address.layer != 1 else float("inf")
        error = 0.0 if address.site == "embed" else error
        alone = None if given else Figures(error, 1e-6, 1e-5, 1e-6, 1e-5)
        whole = Figures(2e-6, 1e-5, 1e-3, 1e-4, 1e-3)
        rows.append(SiteRow(address.site, address.layer, whole, alone, 0, error < 1))
    return Certificate(
        passed=passed,
        failures=[] if passed else [f"mlp_in at layer 1: [bold] {n}." for n in range(30)],
        notes=["A note."],
        first_jump=None
        if passed
        else Jump("layers.1.attn_in_scale", "attn_in_scale", 1, "isolated", float("inf"), 1e-6),
        model="some/[red]model",
        dtype="float32",
        layers=list(range(layers)),
        config={"num_hidden_layers": layers},
        prompts=[Prompt("one", 3), Prompt(None, 4)],
        sites=rows,
        logits=Logits(7, 1e-9, 1e-8, 1.0, 0, 0.98, 2.5, 2.4),
        generation=Generation(4, 2, 1, [Divergence(1, 2, 5, 6, " a\n", " b", 0.1)], 0.1),
        transcoder=Transcoder(
            "x", 1, 50, 5, 3.5, 3.25, 0.9, 2, 1, 1e-7, 1e-7, 0.25, 0.26, 0.27, 1e-6, 0.1
        ),
        truth=[TruthRow("embed", 0.0, 0.0, None), TruthRow("q", 1e-3, 2e-3, 0.5)],
        tolerances={},
        versions={"jaxtc": "1", "transformers": "5", "torch": "2"},
        machine={},
        seconds={},
        created="",
    )


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize(("layers", "columns"), [(4, 80), (26, 80), (46, 80), (46, 130)])
def test_the_table(layers, columns, passed, capsys):
    console = Console(width=columns, highlight=False)
    draw(console, certificate(layers, passed))
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= columns
    text = " ".join(out.split())
    for site in jaxtc.parity.ours.SITES:
        assert f" {site.name} " in text
    assert "some/[red]model" in text
    assert "1 of 2 continuations" in text and "L0 3.50 (theirs 3.25)" in text
    assert "2 features differ, 1 of them" in text and "0.50" in text
    [line] = [line for line in out.splitlines() if line.startswith(" attn_in ")]
    if columns > 80 or layers == 4:
        assert ("6" * layers if passed else "6!" + "6" * (layers - 2)) in line
    if not passed:
        assert "FAILED" in text and "begins at layers.1.attn_in_scale" in text
        assert "[bold] 11." in text and "[bold] 12." not in text and "and 18 more" in text


def test_json_to_stdout(command, folder, monkeypatch):
    flow = importlib.import_module("jaxtc.parity.flow")
    held = certificate(2, passed=False)
    monkeypatch.setattr(flow, "certify", lambda *_, **__: held)
    code, out, err = command(folder / "model", "--json", "-")
    assert code == 1
    assert Certificate.from_dict(json.loads(out)) == held
    assert "FAILED" in err


def test_files_are_written_whole(command, folder, tmp_path, monkeypatch):
    """What was found is shown even where no file can be written."""
    flow = importlib.import_module("jaxtc.parity.flow")
    held = dataclasses.replace(certificate(2), model="\udcff")  # a name that is not UTF-8
    monkeypatch.setattr(flow, "certify", lambda *_, **__: held)
    where, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(where)
    where.write_text("before")
    code, _, _ = command(folder / "model", "--json", link)
    assert code == 0 and link.is_symlink() and sorted(tmp_path.iterdir()) == [where, link]
    assert Certificate.from_dict(json.loads(where.read_text())) == held
    code, out, _ = command(folder / "model", "--json", os.devnull)
    assert code == 0 and not Path(os.devnull).is_file()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    code, out, err = command(folder / "model", "--json", where)
    assert code == 2 and "PASSED" in out and "No space left" in err
    assert Certificate.from_dict(json.loads(where.read_text())) == held
    assert sorted(tmp_path.iterdir()) == [where, link]


def test_a_certificate_of_another_format():
    held = certificate(1).to_dict()
    for wrong in ({**held, "format": 0}, {}, [], {"format": 1}, {**held, "sites": [3]}):
        with pytest.raises(ValueError, match="certificate"):
            Certificate.from_dict(wrong)
    assert dataclasses.is_dataclass(Certificate.from_dict(held))
