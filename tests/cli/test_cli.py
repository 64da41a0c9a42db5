"""The command line: what it prints, where, and how it fails."""

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.cells import cell_len
from rich.console import Console
from rich.status import Status

import jaxtc
from jaxtc.cli.explain import draw
from jaxtc.cli.options import STDOUT, write_json
from jaxtc.cli.runtime import make_private
from jaxtc.tap.sites import SITES
from tests.support import cross_layer, tiny

PROMPT = "the [bold] capital of texas is"


def options(folders):
    return ["--model", folders / "model", "--transcoder", folders / "transcoders"]


def in_process(*arguments, **settings):
    command = [sys.executable, "-c", "from jaxtc.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_shows_every_token_and_fits(cli_run, folders, columns):
    code, out, err = cli_run("explain", PROMPT, *options(folders), "--layer", 1, columns=columns)
    assert code == 0
    assert max(map(cell_len, out.splitlines())) <= columns
    found = jaxtc.explain(
        tiny.model(), tiny.tokenizer(), PROMPT, tiny.transcoder(1), top_features=3
    )
    (report,) = found.layers
    lines = out.splitlines()
    for token in report.tokens:
        (row,) = [line for line in lines if line.split()[:2] == [str(token.position), token.text]]
        strongest = token.features[0]
        assert (
            f"{strongest.feature}   {strongest.activation:.2f}  {strongest.promotes[0][:12]}" in row
        )
        assert f"{token.relative_error:.2f}" in row
    assert f"{report.explained_variance:.3f}" in out and f"{report.notebook_score:.3f}" in out
    assert "FVU" in out and "tutorial" in out  # the conventions of both
    assert (PROMPT + found.continuation) in out
    assert "Running the model" in err and "Running the model" not in out


def test_the_embedded_model_is_explained_without_any_option(cli_run):
    code, out, _ = cli_run("explain", "The capital of the state containing Dallas is")
    assert code == 0
    assert out.startswith("Layer 3") and "Dallas is Austin." in out


def test_all_layers_get_a_row_each(cli_run, folders):
    code, out, _ = cli_run("explain", PROMPT, *options(folders), "--layer", "all")
    assert code == 0
    assert max(map(cell_len, out.splitlines())) <= 80
    for layer in (0, 1):
        transcoder = tiny.transcoder(layer)
        (report,) = jaxtc.explain(tiny.model(), tiny.tokenizer(), PROMPT, transcoder).layers
        (row,) = [line for line in out.splitlines() if line.split()[:1] == [str(layer)]]
        figures = [report.explained_variance, report.relative_error, report.notebook_score]
        assert all(f"{figure:.3f}" in row for figure in figures)
        assert str(report.tokens[-1].features[0].feature) in row


def test_features_that_nobody_asked_for_are_not_called_inactive(cli_run, folders):
    for layer in (1, "all"):
        given = [*options(folders), "--layer", layer, "--top-features"]
        code, out, _ = cli_run("explain", PROMPT, *given, 0)
        assert code == 0 and "none active" not in out
        feature = re.compile(r"\d +\d+\.\d\d  [▁<]")
        assert feature.search(cli_run("explain", PROMPT, *given, 1)[1])
        assert not feature.search(out)


def test_a_token_without_active_features_says_so(cli_run, folders, tmp_path):
    silent = jaxtc.Transcoder(24, 50, rngs=nnx.Rngs(0))
    silent.threshold[...] = jnp.full((50,), 1e6)
    file = jaxtc.save_transcoder(silent, tmp_path / "layer_1")
    given = ["--model", folders / "model", "--transcoder", file, "--layer"]
    for layer in (1, "all"):  # one file of a known layer is all the layers there are
        code, out, _ = cli_run("explain", PROMPT, *given, layer)
        assert code == 0 and "none active" in out


def test_loading_shows_how_far_it_is_on_a_terminal_only(cli_run, folders, monkeypatch):
    shown = []
    monkeypatch.setattr(Status, "update", lambda self, text: shown.append(str(text)))
    _, _, err = cli_run("explain", PROMPT, *options(folders), "--layer", 1)
    assert not shown and "%" not in err and err.count("Loading") == 3
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, _ = cli_run("explain", PROMPT, *options(folders), "--layer", 1)
    assert code == 0
    loading = [text for text in shown if f"Loading {folders / 'model'} …" in text]
    percents = [int(text.split()[-1].removesuffix("%")) for text in loading if "%" in text]
    assert len(percents) > 10 and percents == sorted(percents) and percents[-1] == 100


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_in_a_source_are_not_markup(cli_run, folders, tmp_path, monkeypatch, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    place = tmp_path / "[/red][bold]" / "layer_1"
    jaxtc.save_transcoder(tiny.transcoder(1), place)
    given = ["--model", folders / "model", "--transcoder", place]
    code, out, err = cli_run("explain", PROMPT, *given, columns=300)
    assert code == 0 and str(place) in out
    assert terminal or f"Loading the transcoder from {place} …" in err
    code, out, err = cli_run("explain", PROMPT, *given[:3], "[/x]")
    assert code == 2 and "[/x]" in err


def test_json_is_all_that_stdout_gets(cli_run, folders):
    code, out, err = cli_run(
        "explain", PROMPT, *options(folders), "--layer", "all", "--top-features", 2, "--json"
    )
    found = json.loads(out)
    assert code == 0 and err
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    expected = jaxtc.explain(
        tiny.model(),
        tiny.tokenizer(),
        PROMPT,
        [tiny.transcoder(layer) for layer in (0, 1)],
        top_features=2,
    ).to_dict()
    for layer in (*found["layers"], *expected["layers"]):
        del layer["transcoder"]  # in memory it has another source than on disk
    assert found == expected


def test_the_notebooks_site_and_other_options_reach_the_library(cli_run, folders):
    site = ["--input-site", "mlp_in", "--max-new-tokens", 0, "--dtype", "bfloat16"]
    code, out, _ = cli_run("explain", PROMPT, *options(folders), "--layer", 1, *site, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["layers"][0]["input_site"] == "mlp_in" and found["continuation_ids"] == []
    exact = jaxtc.explain(
        tiny.model(), tiny.tokenizer(), PROMPT, tiny.transcoder(1), input_site="mlp_in"
    )
    rounded, right = found["layers"][0]["fvu"], exact.layers[0].fvu
    assert rounded != right and rounded == pytest.approx(right, rel=0.05)


def test_features_that_neuronpedia_has_are_linked(monkeypatch):
    scope = jax.tree.map(lambda leaf: leaf, tiny.transcoder(1))
    scope.source = "google/gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_65"
    found = jaxtc.explain(tiny.model(), tiny.tokenizer(), PROMPT, scope)
    page = "https://www.neuronpedia.org/gemma-2-2b/1-gemmascope-transcoder-16k/"
    strongest = found.layers[0].tokens[-1].features[0]
    assert strongest.url == f"{page}{strongest.feature}"
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    draw(console, found)
    shown = console.file.getvalue()
    assert f"{strongest.url}\x1b" in shown and f"{page}FEATURE" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "texas" + " texas" * 60}, "longer than this model's context of 40"),
        ({"--layer": "7"}, "no transcoder for layer 7; it has layers 0, 1"),
        ({"--layer": "first"}, "--layer is 'first', expected the number of a layer"),
        ({"--layer": "-1"}, "--layer is '-1', expected the number of a layer"),
        ({"--layer": None}, "say which layer"),
        ({"--model": "no/such/folder"}, "neither a local folder nor a hub id"),
        ({"--model": "/nowhere"}, "There is no folder /nowhere"),
        ({"--model": "LLAMA"}, "jaxtc runs Gemma-2 only"),
        ({"--transcoder": "NARROW"}, "D=16 at mlp_in_normed, where this model has D=24"),
        ({"--transcoder": "/nowhere"}, "There is no file or folder /nowhere"),
        ({"--transcoder": None}, "Give --transcoder"),
        ({"--input-site": "mlp_inn"}, "Did you mean 'mlp_in'"),
        ({"--sites": "mlp_in"}, "--sites is 'mlp_in', expected two"),
        ({"--sites": "mlp_in,mlp_outt"}, "Did you mean 'mlp_out'"),
        ({"--transcoder": "BARE FILE"}, "(`jaxtc explain` and `jaxtc generate` have --sites.)"),
        ({"--top-features": "51"}, "top_features is 51"),
        ({"--dtype": "int8"}, "int8"),
        ({"prompt": "caf\udce9 is"}, "not UTF-8"),
        ({"--model": "m" * 300}, "File name too long"),
        ({"--model": "~nosuchuser/m"}, "home directory"),
        ({"--transcoder": "~nosuchuser/m"}, "home directory"),
        ({"--transcoder": "dir/params.npz"}, "There is no file or folder dir/params.npz"),
        ({"--transcoder": "dir/params.npz", "--layer": "all"}, "There is no file or folder dir/"),
        ({"--transcoder": "NARROW FILE", "--layer": "all"}, "is one transcoder"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(cli_run, folders, tmp_path, changes, message):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 24}')
    known = {"LLAMA": tmp_path, "NARROW": folders / "narrow"}
    known["NARROW FILE"] = folders / "narrow" / "params.npz"
    known["BARE FILE"] = tmp_path / "params.npz"
    with np.load(known["NARROW FILE"]) as arrays:
        np.savez(known["BARE FILE"], **arrays)
    given = {
        "prompt": PROMPT,
        "--model": folders / "model",
        "--transcoder": folders / "transcoders",
        "--layer": "1",
    } | {name: known.get(value, value) for name, value in changes.items()}
    named = [(name, value) for name, value in given.items() if name != "prompt" and value]
    arguments = [part for pair in named for part in pair]
    code, out, err = cli_run("explain", given["prompt"], *arguments, "--json")
    assert (code, out) == (2, "")
    *progress, error = err.strip().splitlines()
    assert error.startswith("Error: ") and message in error
    assert all(line.endswith("…") for line in progress)


def test_bad_options_are_typers_own_errors(cli_run):
    code, out, err = cli_run("explain", PROMPT, "--top-features", "many")
    assert (code, out) == (2, "") and "--top-features" in err


def test_sites_lists_the_table_with_the_shapes_of_a_model(cli_run, folders, tmp_path):
    # config.json is all that is read.
    (tmp_path / "config.json").write_bytes((folders / "model" / "config.json").read_bytes())
    code, out, _ = cli_run("sites", "--model", tmp_path)
    assert code == 0 and max(map(cell_len, out.splitlines())) <= 80
    rows = [line.split()[0] for line in out.splitlines()[3:] if line[:1] == " " != line[1:2]]
    assert rows == [site.name for site in SITES]
    assert "B 4 T S" in out and "blocks.l.hook_mlp_out" in out and "refused" in out
    code, out, _ = cli_run("sites", "--model", tmp_path, "--json")
    rows = {row["site"]: row for row in json.loads(out)}
    assert rows["q"]["shape"] == ["B", "T", 4, 8]
    assert rows["mlp_out"]["hf"] == "model.layers.N.post_feedforward_layernorm.output"
    assert "tl" in rows["final_norm"]["refused"] and not rows["mlp_out"]["refused"]


@pytest.mark.parametrize("model", ["m" * 300, "~nosuchuser/m", "/nowhere"])
def test_sites_of_a_model_that_cannot_be_found(cli_run, model):
    code, out, err = cli_run("sites", "--model", model)
    assert (code, out) == (2, "") and err.startswith("Error: ") and err.count("\n") == 1


def test_version_and_the_commands_of_embedded(cli_run):
    code, out, _ = cli_run("--version")
    assert (code, out.split()) == (0, ["jaxtc", jaxtc.__version__])
    code, out, _ = cli_run("embedded", "--help")
    assert code == 0 and "train" in out and "report" in out


def test_a_whole_process_fails_without_a_traceback(folders):
    process = in_process("explain", PROMPT, *options(folders), "--layer", 9, "--json")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("Error: ")


def test_ctrl_c_is_130_without_a_traceback(folders):
    process = in_process("explain", PROMPT, *options(folders), "--layer", 1)
    assert process.stderr.readline().startswith("Starting")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_compiled_programs_are_kept_in_a_private_folder(folders, tmp_path):
    settings = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # any programs will do, soon
    settings.pop("JAX_COMPILATION_CACHE_DIR", None)
    process = in_process("explain", PROMPT, *options(folders), "--layer", 1, env=settings)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder,) = tmp_path.rglob("xla")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and list(folder.iterdir())
    # A second folder, of the user's choice, leaves that one alone.
    mine = tmp_path / "mine"
    before = sorted(folder.iterdir())
    settings["JAX_COMPILATION_CACHE_DIR"] = str(mine)
    process = in_process("explain", PROMPT, *options(folders), "--layer", 1, env=settings)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert sorted(folder.iterdir()) == before


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
class TestMakePrivate:
    def test_a_new_folder_is_0700_whatever_the_umask(self, tmp_path):
        before = os.umask(0)
        try:
            assert make_private(tmp_path / "a" / "b") is None
        finally:
            os.umask(before)
        for folder in (tmp_path / "a", tmp_path / "a" / "b"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_what_others_can_read_is_closed(self, tmp_path):
        folder = tmp_path / "open"
        folder.mkdir()
        folder.chmod(0o755)
        assert make_private(folder) is None
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
    def test_what_others_could_write_to_is_refused(self, tmp_path, mode):
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(mode)
        assert "others can write" in make_private(folder)

    def test_a_parent_that_others_could_write_to_is_refused_unless_sticky(self, tmp_path):
        tmp_path.chmod(0o777)
        assert "others can write" in make_private(tmp_path / "below")
        tmp_path.chmod(0o1777)
        assert make_private(tmp_path / "below") is None

    def test_a_link_is_refused(self, tmp_path):
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert "is a link" in make_private(tmp_path / "link")

    def test_a_file_in_the_way_is_refused(self, tmp_path):
        (tmp_path / "file").touch()
        assert "cannot be used" in make_private(tmp_path / "file" / "below")

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
    def test_a_folder_of_another_user_is_refused(self, tmp_path):
        folder = tmp_path / "theirs"
        folder.mkdir(mode=0o700)
        os.chown(folder, 12345, 12345)
        assert "belongs to another user" in make_private(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_is_valid_whatever_the_numbers_and_the_terminal(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    write_json(STDOUT, {"loss": float("nan"), "l0": (float("inf"), 1.5), "token": "▁Zürich"})
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert json.loads(text) == {"loss": None, "l0": [None, 1.5], "token": "▁Zürich"}
    assert ("▁Zürich" in text) == (encoding == "utf-8")


def test_a_cross_layer_transcoder(cli_run, folders, tmp_path):
    clt = cross_layer.write(tmp_path / "clt", cross_layer.arrays(3, 24, 50))
    given = ["--model", folders / "model", "--transcoder", clt]
    whole = jaxtc.load_transcoders(clt)
    found = jaxtc.explain(tiny.model(), tiny.tokenizer(), PROMPT, whole)
    code, out, _ = cli_run("explain", PROMPT, *given, "--layer", "all")
    assert code == 0
    for report in found.layers:
        (row,) = [line for line in out.splitlines() if line.split()[:1] == [str(report.layer)]]
        assert f"{report.explained_variance:.3f}" in row and f"{report.l0:.1f}" in row
    code, out, _ = cli_run("explain", PROMPT, *given, "--layer", 2, "--json")
    (layer,) = json.loads(out)["layers"]
    assert (layer["layer"], layer["width"], layer["notebook_score"]) == (2, 50, None)
    assert layer["fvu"] == pytest.approx(found.layers[2].fvu, rel=1e-4)
    code, _, err = cli_run("explain", PROMPT, *given)
    assert code == 2 and "is a cross-layer transcoder" in err.replace("\n", " ")
    code, _, err = cli_run("parity", folders / "model", "--transcoder", clt)
    assert code == 2 and "takes transcoders of single layers" in " ".join(err.split())
    steered = ["--steer", "4=30", "--layer", 0, "--max-new-tokens", 3, "--json"]
    code, out, _ = cli_run("generate", PROMPT, *given, *steered)
    edit = jaxtc.SetFeature(whole, 4, 30.0, layer=0, position=slice(1, None))
    ids = tiny.tokenizer()(PROMPT).input_ids
    new = jaxtc.generate(tiny.model(), ids, 3, edits=[edit]).tokens[0]
    assert json.loads(out)["new_ids"] == new
