"""``certify``: right models pass, and each way of being wrong is caught where it begins.

Ours alone is made wrong: the reference reads the folder as it is.
"""

import dataclasses
import functools
import importlib
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch

import jaxtc
from jaxtc import cli
from jaxtc.model.config import SLIDING
from jaxtc.model.gemma2 import Embedder
from jaxtc.parity import Certificate, certify, job, torch_side
from jaxtc.parity.texts import EMBEDDED_TEXTS
from jaxtc.parity.tolerances import tolerances
from jaxtc.tap.sites import SITES
from jaxtc.weights.sources.resolve import EMBEDDED_DATA
from tests.parity import oracles
from tests.parity.wrong import CODE, CONSTANTS, changed, scaled_twice


@pytest.fixture(autouse=True)
def reference(request, monkeypatch):
    """In this process, which has torch already: what the command starts takes seconds to import.

    Tests marked ``usefixtures("another_process")`` run it as users do.
    """
    if "another_process" in request.fixturenames:
        return

    def run(work, say):
        path = Path(work.root) / "job.json"
        path.write_text(json.dumps(dataclasses.asdict(work)))
        before = torch.is_grad_enabled()
        try:
            torch_side.main(str(path))
        finally:
            torch.set_grad_enabled(before)
        return json.loads(work.report.read_text())

    monkeypatch.setattr(job, "run", run)


@pytest.fixture
def another_process():
    """See :func:`reference`."""


@pytest.fixture
def jax_forgets():
    """Programs compiled from patched functions must not outlive the patch, nor earlier ones it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """``(shape, layers)`` to a perturbed model's folder; few layers, as what takes long is to
    compile them."""

    @functools.cache
    def make(name, layers=2):
        folder = tmp_path_factory.mktemp(name)
        oracles.perturbed(name, num_hidden_layers=layers).save_pretrained(folder)
        return folder

    return make


def rows_of(name, *lengths):
    return oracles.random_prompts(oracles.SHAPES[name]["vocab_size"], lengths, seed=1)


def checked(folder, dtype, load=jaxtc.load_model, **options) -> Certificate:
    """One prompt, longer than the window, is enough to tell."""
    vocab = jaxtc.Gemma2Config.from_file(folder / "config.json").vocab_size
    rows = oracles.random_prompts(vocab, (21,), seed=1)
    return certify(folder, prompts=rows, dtype=dtype, load=load, new_tokens=0, **options)


# Lengths past the window, and past 256 tokens, where bfloat16 can no longer count; new tokens.
RIGHT = [
    ("2b", "float32", (21,), 8),
    ("9b", "float32", (13, 277), 0),
    ("27b", "float32", (21,), 0),
    ("9b", "bfloat16", (13, 277), 0),
]


@pytest.mark.parametrize(("name", "dtype", "lengths", "new"), RIGHT)
def test_a_right_model_passes(folder_of, name, dtype, lengths, new):
    rows = rows_of(name, *lengths)
    found = certify(folder_of(name), prompts=rows, dtype=dtype, new_tokens=new)
    assert found.passed, found.failures
    assert found.first_jump is None and not any(row.masks_differ for row in found.sites)
    assert found.generation is None if not new else found.generation.identical == len(rows)
    assert found.logits.tokens == sum(lengths)
    layers = found.config["num_hidden_layers"]
    rows = {(row.site, row.layer) for row in found.sites}
    assert rows == {
        (site.name, layer)
        for site in SITES
        for layer in (range(layers) if site.per_layer else [None])
    }
    given = {(row.site, row.layer) for row in found.sites if row.isolated is None}
    stream = {(site, layer) for site in ("resid_pre", "resid_mid") for layer in range(layers)}
    assert given == stream | {("resid_post", layers - 1)}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("another_process")
def test_the_embedded_model(dtype):
    narrow = dtype == "bfloat16"
    found = certify(
        prompts=EMBEDDED_TEXTS[::3] if narrow else EMBEDDED_TEXTS[:1],
        dtype=dtype,
        transcoder="embedded",
        transcoder_layer=3,
        truth=narrow,
        new_tokens=0 if narrow else 16,
    )
    assert found.passed, found.failures
    held = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Certificate.from_dict(held) == found
    assert narrow or found.generation.identical == found.generation.prompts == 1
    transcoder = found.transcoder
    assert transcoder.differing == transcoder.near_threshold
    assert 5 < transcoder.l0_theirs < 50 and transcoder.overlap > 0.9
    assert (found.truth is not None) == narrow
    if narrow:
        ratios = [row.ratio for row in found.truth]
        assert sum(ratios) / len(ratios) <= 1 and max(ratios) <= 1.1
        assert min(row.theirs for row in found.truth) > 1e-4


@pytest.mark.parametrize("wrong", CONSTANTS)
def test_wrong_constants_are_caught(folder_of, wrong):
    changes, name, where = CONSTANTS[wrong]
    found = checked(folder_of(name), "float32", changed(**changes))
    caught(found, where, "isolated")
    masks = {row.layer for row in found.sites if row.masks_differ}
    kinds = found.config["layer_types"]
    assert masks == {
        "layer types swapped": {0, 1},
        "window": {layer for layer, kind in enumerate(kinds) if kind == SLIDING},
    }.get(wrong, set())


def caught(found: Certificate, where: str, kind: str) -> None:
    """The certificate says no, and that it begins at this address."""
    assert not found.passed
    jump = found.first_jump
    assert (jump.address, jump.kind) == (where, kind)
    assert jump.relative > jump.tolerance
    site = where.rsplit(".", 1)[-1]
    assert found.failures[0].startswith(site)
    assert jump.layer is None or f"at layer {jump.layer}" in found.failures[0]
    assert Certificate.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("wrong", CODE)
def test_wrong_code_is_caught(folder_of, monkeypatch, jax_forgets, wrong):
    kind, name, code, dtype, where = CODE[wrong]
    monkeypatch.setattr(kind, name, code)
    # D = 56, whose root no bfloat16 is.
    found = checked(folder_of("9b"), dtype)
    caught(found, where, "isolated")


def test_an_error_in_one_layer_is_found_there(folder_of):
    """Beyond it every accumulated error is large; the isolated ones are not."""

    def load(folder, dtype):
        model = jaxtc.load_model(folder, dtype=dtype)
        gain = model.layers[1].mlp_in_norm.weight
        gain.set_value(gain[...] + 1e-3)
        return model

    found = checked(folder_of("2b", layers=3), "float32", load)
    caught(found, "layers.1.mlp_in", "isolated")
    over = {
        (row.site, row.layer)
        for row in found.sites
        if row.isolated and not row.isolated.relative <= row.isolated.tolerance
    }
    assert {layer for _, layer in over} == {1}
    after = [row for row in found.sites if row.layer == 2]
    assert after and all(row.accumulated.relative > 1e-5 for row in after)


def test_nan_is_caught(folder_of):
    def load(folder, dtype):
        model = jaxtc.load_model(folder, dtype=dtype)
        weight = model.layers[1].mlp.gate
        weight.set_value(weight[...].at[0, 0].set(jnp.nan))
        return model

    found = checked(folder_of("9b"), "float32", load)
    caught(found, "layers.1.mlp_gate", "isolated")
    assert math.isinf(found.first_jump.relative)


def test_layers_and_notes(folder_of):
    found = certify(folder_of("2b"), prompts=rows_of("2b", 5), layers=[-1, 1], new_tokens=0)
    assert found.passed, found.failures
    assert found.layers == [1] and found.generation is None
    assert {row.layer for row in found.sites} == {None, 1}
    assert any("window of 7" in note for note in found.notes)
    assert any("1 of 2 layers" in note for note in found.notes)


def test_one_token(folder_of):
    found = certify(folder_of("2b"), prompts=[[2]], new_tokens=1)
    assert found.passed, found.failures
    assert found.logits.loss_ours is None and found.logits.tokens == 1
    assert Certificate.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_one_layer_at_a_time_gives_the_same(folder_of, monkeypatch):
    """What long prompts make it do."""
    whole = checked(folder_of("9b"), "float32")
    monkeypatch.setattr(importlib.import_module("jaxtc.parity.ours"), "_CAPTURED", 1)
    parts = checked(folder_of("9b"), "float32")
    assert [(row.site, row.layer) for row in parts.sites] == [
        (row.site, row.layer) for row in whole.sites
    ]
    for one, other in zip(parts.sites, whole.sites, strict=True):
        # XLA may order sums otherwise in another program.
        assert one.accumulated.relative == pytest.approx(other.accumulated.relative, abs=2e-6)
        assert (one.isolated is None) == (other.isolated is None)
    assert parts.passed and whole.passed


def test_a_transcoder_of_a_random_model(make_oracle, transcoder_file):
    """Of a layer that was not asked for; thresholds of both signs, some zero."""
    oracle = make_oracle("27b")
    layer, file = transcoder_file(oracle)
    found = checked(oracle.folder, "float32", transcoder=file.parents[3], layers=[0])
    assert found.passed, found.failures
    assert found.layers == [0, layer] and found.transcoder.layer == layer
    assert found.transcoder.tokens == found.logits.tokens - 1  # without <bos>
    assert found.transcoder.pre_activations < tolerances("float32").transcoder


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A perturbed model that has a tokenizer, as the command needs one."""
    folder = tmp_path_factory.mktemp("worded")
    embedded = EMBEDDED_DATA / "model"
    vocab = json.loads((embedded / "config.json").read_text())["vocab_size"]
    oracles.perturbed("9b", vocab_size=vocab, num_hidden_layers=2).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(embedded / name, folder)
    return folder


def test_the_exit_codes_of_the_command(worded, tmp_path, monkeypatch, capsys, jax_forgets):
    runtime = importlib.import_module("jaxtc.cli.runtime")
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda console: None)
    monkeypatch.setattr(runtime, "quiet", lambda: None)
    monkeypatch.setenv("COLUMNS", "100")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of the state containing Dallas is\n")
    where, report = tmp_path / "parity.json", tmp_path / "parity.html"
    arguments = ["parity", worded, "--prompts", prompts, "--json", where, "--report", report]
    arguments += ["--new-tokens", 2]

    def command() -> tuple[int, str, Certificate]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        held = Certificate.from_dict(json.loads(where.read_text()))
        return exit_.value.code, capsys.readouterr().out, held

    code, out, held = command()
    assert code == 0 and held.passed and "PASSED" in out
    assert len(held.prompts) == 1 and "layers.0" not in out
    assert "<html" in report.read_text()

    monkeypatch.setattr(Embedder, "encode", scaled_twice)
    jax.clear_caches()
    code, out, held = command()
    assert code == 1 and not held.passed and "FAILED" in out
    assert "The error begins at embed" in out
    assert "embed" in report.read_text()
