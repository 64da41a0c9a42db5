"""A converted checkpoint is taken only as it was written: nothing in it is trusted."""

import hashlib
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtc.weights.checkpoints.manifest import read_manifest

import jaxtc
from jaxtc.errors import ConfigError, JaxtcError, SourceError, WeightsError
from jaxtc.weights.checkpoints import tree as orbax_tree
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.load_model import load_tokenizer
from tests.support import tiny
from tests.support.weights_files import random_model, same

CHUNK = "orbax/layers.1.attn.q/0.0.0"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "tree"
    return jaxtc.save_checkpoint(random_model(), folder, tiny.tokenizer())


@pytest.fixture
def tree(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "tree")


def load(folder):
    return jaxtc.load_model(folder, dtype="float32")


def rewrite(folder, change):
    """A manifest that was changed by hand, its own hash made to fit."""
    raw = json.loads((folder / "jaxtc.json").read_bytes())
    raw = change(raw) or raw
    (folder / "jaxtc.json").write_text(json.dumps(raw))


def test_what_it_says(sound):
    manifest = read_manifest(sound)
    assert (manifest.kind, manifest.dtype) == ("model", "float32")
    assert (manifest.source, manifest.revision) == ("memory", None)
    assert manifest.jaxtc == jaxtc.__version__
    assert len(manifest.arrays) == 24
    raw = (sound / "jaxtc.json").read_bytes()
    assert manifest.encode() == raw
    assert not re.search(rb"\d{10}\.\d|20\d\d-\d\d", raw)  # no time
    assert same(load(sound), random_model())


def test_a_flipped_bit_anywhere_is_found(tree):
    for file in sorted(path for path in (tree / "orbax").rglob("*") if path.is_file()):
        raw = file.read_bytes()
        flipped = bytearray(raw)
        flipped[len(raw) // 2] ^= 1
        file.write_bytes(flipped)
        used = re.fullmatch(r"[\d.]+", file.name)
        with pytest.raises(WeightsError, match=f"{re.escape(file.name)} is not the file that was"):
            jaxtc.load_model(tree, dtype="float32", verify=not used)
        file.write_bytes(raw)
    assert same(load(tree), random_model())


def test_the_tokenizer_is_verified_too(tree):
    raw = (tree / "tokenizer.json").read_bytes()
    (tree / "tokenizer.json").write_bytes(raw.replace(b"texas", b"paris"))
    with pytest.raises(WeightsError, match=r"tokenizer.json is not the file that was written"):
        load_tokenizer(tree)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: (t / CHUNK).unlink(), f"{CHUNK} is missing"),
        (lambda t: shutil.rmtree(t / "orbax/layers.0.attn.q"), r"layers.0.attn.q/.* is missing"),
        (lambda t: shutil.rmtree(t / "orbax"), "is missing"),
        (lambda t: os.truncate(t / CHUNK, 100), f"{CHUNK} has 100 bytes, not 3072"),
        (lambda t: (t / CHUNK).write_bytes(b"x" * 9999), f"{CHUNK} has 9999 bytes, not 3072"),
        (lambda t: (t / "orbax/extra").write_text(""), "orbax/extra is not in jaxtc.json"),
        (lambda t: (t / "model.safetensors").write_text(""), "model.safetensors is not in"),
        (lambda t: (t / "jaxtc.json").write_text("{"), "is not JSON"),
        (lambda t: (t / "jaxtc.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda t: (t / "jaxtc.json").write_text("[" * 100_000), "is not JSON"),
        (lambda t: (t / "jaxtc.json").write_text("[]"), "does not say that it is a"),
        (lambda t: os.truncate(t / "jaxtc.json", 3000), "is not JSON"),
        (lambda t: os.mkfifo(t / "orbax/pipe"), "orbax/pipe is not a plain file"),
    ],
)
def test_half_written_folders(tree, damage, message):
    damage(tree)
    with pytest.raises(WeightsError, match=message):
        load(tree)


def test_links_are_refused(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tree / CHUNK, elsewhere)
    (tree / CHUNK).symlink_to(elsewhere)
    with pytest.raises(WeightsError, match=f"{CHUNK} is a link"):
        load(tree)
    (tree / CHUNK).unlink()
    shutil.move(elsewhere, tree / CHUNK)
    folder = tree / "orbax/layers.0.attn.q"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    with pytest.raises(WeightsError, match=r"orbax/layers.0.attn.q is a link"):
        load(tree)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a/", "", "..", "a\\b", "C:x", "a\0b",
     "a\nb"],
)  # fmt: skip
def test_names_that_lead_outside_are_refused(tree, name):
    def change(raw):
        raw["files"][name] = {"size": 1, "sha256": "0" * 64}

    rewrite(tree, change)
    with pytest.raises(WeightsError, match="not one inside its folder"):
        load(tree)


def set_at(*path_and_value):
    *path, last, value = path_and_value

    def change(raw):
        for key in path:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("version", 2), "version 2 .* reads version 1; install a newer one"),
        (set_at("format", "safetensors"), "does not say that it is a jaxtc-checkpoint"),
        (set_at("kind", "tokens"), "its kind is 'tokens'"),
        (set_at("source", 3), "source or revision is not a text"),
        (set_at("files", []), "it has no files"),
        (set_at("arrays", None), "it has no arrays"),
        (set_at("config", None), "it has no config"),
        (set_at("content_sha256", "0" * 64), "content_sha256 is not that of its files"),
        (set_at("files", CHUNK, "size", -1), f"does not give size and sha256 of {CHUNK}"),
        (set_at("files", CHUNK, "size", 3073), f"{CHUNK} has 3073 bytes, and a chunk"),
        (set_at("files", CHUNK, "sha256", "0" * 63), "does not give size and sha256"),
        (set_at("files", CHUNK, "sha256", "0" * 64), "content_sha256 is not"),
        (set_at("files", CHUNK, 7), "does not give size and sha256"),
        (set_at("arrays", "embed.weight", "dtype", "object"), "dtype 'object'"),
        (set_at("arrays", "embed.weight", "dtype", "int8"), "dtype 'int8'"),
        (set_at("arrays", "embed.weight", "dtype", []), r"dtype \[\]"),
        (set_at("arrays", "embed.weight", "shape", [1 << 60, 24]), "more chunks than there are"),
        (set_at("arrays", "embed.weight", "shape", [-1, 24]), r"shape \[-1, 24\]"),
        (set_at("arrays", "embed.weight", "shape", [50.0, 24]), r"shape \[50.0, 24\]"),
        (set_at("arrays", "embed.weight", "shape", [True, 24]), r"shape \[True, 24\]"),
        (set_at("arrays", "embed.weight", "shape", []), r"shape \[\]"),
        (set_at("arrays", "embed.weight", "chunks", [0, 24]), r"chunks \[0, 24\]"),
        (set_at("arrays", "embed.weight", "chunks", [24]), r"chunks \[24\]"),
        (set_at("arrays", "embed.weight", "chunks", [1 << 60, 24]), "larger than its shape"),
        (set_at("arrays", "embed.weight", "chunks", [25, 24]), "bytes, and a chunk"),
        (set_at("arrays", "../../x", {"shape": [1], "dtype": "float32", "chunks": [1]}), "x'"),
        (set_at("arrays", "x", {"shape": [1], "dtype": "float32", "chunks": [1]}), "has None byt"),
        (set_at("arrays", {}), "embed.weight is missing"),
        (set_at("config", "hidden_size", 32), "does not hold the config.json"),
    ],
)
def test_manifests_that_lie(tree, change, message):
    rewrite(tree, change)
    with pytest.raises((WeightsError, ConfigError), match=message):
        load(tree)


def test_a_manifest_that_fits_other_arrays(tree):
    """Even one whose hashes are right must describe the model of its config."""
    shutil.rmtree(tree)
    model = random_model()
    jaxtc.save_checkpoint(model, tree)
    raw = json.loads((tree / "jaxtc.json").read_bytes())
    raw["arrays"]["embed.weight"]["shape"] = [24, 50]
    raw["arrays"]["embed.weight"]["chunks"] = [24, 50]
    raw["arrays"]["layers.0.attn.r"] = raw["arrays"].pop("layers.0.attn.q")
    for file in list(raw["files"]):
        if file.startswith("orbax/layers.0.attn.q/"):
            name = file.replace("attn.q", "attn.r")
            raw["files"][name] = raw["files"].pop(file)
    shutil.move(tree / "orbax/layers.0.attn.q", tree / "orbax/layers.0.attn.r")
    (tree / "jaxtc.json").write_text(json.dumps(raw))
    made = "".join(f"{one['sha256']}  {file}\n" for file, one in sorted(raw["files"].items()))
    raw["content_sha256"] = hashlib.sha256(made.encode()).hexdigest()
    (tree / "jaxtc.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError) as caught:
        load(tree)
    for part in ("layers.0.attn.q is missing", "layers.0.attn.r is not a parameter",
                 "embed.weight has shape (24, 50), not (50, 24)"):  # fmt: skip
        assert part in str(caught.value)


def test_values_that_are_not_finite(tmp_path):
    model = random_model()
    model.layers[1].mlp.down[...] = model.layers[1].mlp.down[...].at[0, 0].set(np.inf)
    tree = jaxtc.save_checkpoint(model, tmp_path / "tree")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.down holds NaN or infinity"):
        load(tree)
    model.layers[1].mlp.down[...] = model.layers[1].mlp.down[...].at[0, 0].set(1e30)
    tree = jaxtc.save_checkpoint(model, tmp_path / "large")
    with pytest.raises(WeightsError, match="holds values too large for float16"):
        jaxtc.load_model(tree, dtype="float16")


def test_a_transcoder_that_is_only_named(tmp_path):
    transcoder = jaxtc.Transcoder.abstract(24, 60)
    made = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), transcoder)
    tree = jaxtc.save_checkpoint({3: made}, tmp_path / "tree")

    def change(raw):
        raw["transcoders"]["4"] = raw["transcoders"]["3"]

    rewrite(tree, change)
    with pytest.raises(WeightsError, match="no W_enc .* for layer 4"):
        jaxtc.load_transcoder(tree, 4)
    rewrite(tree, set_at("transcoders", "-3", {}))
    with pytest.raises(WeightsError, match="'-3' is not a layer"):
        jaxtc.load_transcoder(tree, 3)


def test_only_the_chunks_that_are_needed_are_read(tree, monkeypatch):
    read = []
    real = Converted.content
    monkeypatch.setattr(Converted, "content", lambda s, f: read.append(f) or real(s, f))
    load(tree)
    chunks = [file for file in read if file.startswith("orbax/")]
    assert len(chunks) == len(set(chunks))
    assert not [file for file in chunks if file.endswith((".zarray", "METADATA"))]


def test_a_part_of_an_array_takes_only_its_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_tree, "SMALL_BYTES", 1000)
    tree = Converted(jaxtc.save_checkpoint(random_model(), tmp_path / "tree"))
    stored = tree.manifest.arrays["layers.0.mlp.down"]  # (D, F) = (24, 40), F in 8 chunks
    assert stored.chunks == (24, 5)
    read = []
    real = Converted.content
    monkeypatch.setattr(Converted, "content", lambda s, f: read.append(f) or real(s, f))
    box = ((0, 24), (20, 30))
    found = tree.parts(stored, [box], np.dtype(np.float32)).arrays[box]
    np.testing.assert_array_equal(found, random_model().layers[0].mlp.down[:, 20:30])
    assert read == [stored.file((0, 4)), stored.file((0, 5))]


@pytest.mark.parametrize("what", ["text", 3, {"a": 1}, {3: "x"}])
def test_only_models_and_transcoders_are_saved(tmp_path, what):
    with pytest.raises(SourceError, match="cannot be saved; expected a Gemma2"):
        jaxtc.save_checkpoint(what, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_saving_does_not_write_over(tree, tmp_path):
    with pytest.raises(JaxtcError, match="exists already"):
        jaxtc.save_checkpoint(random_model(), tree)
    # What a save that was killed has left is ours to replace.
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / "job.json").write_text(json.dumps({"saving": "model", "arrays": 3}))
    (partial / "files").mkdir()
    (partial / "files/junk").write_text("")
    (partial / "writing.0").write_text("")
    jaxtc.save_checkpoint(random_model(), tmp_path / "new")
    assert same(load(tmp_path / "new"), random_model())
    assert not partial.exists()
