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
from etils import epath

import jaxtc
from jaxtc.errors import ConfigError, JaxtcError, SourceError, WeightsError
from jaxtc.weights.checkpoints import save
from jaxtc.weights.checkpoints import tree as checkpoint_tree
from jaxtc.weights.checkpoints.sidecar import read_sidecar
from jaxtc.weights.load_model import load_tokenizer
from tests.support import tiny
from tests.support.weights_files import random_model, same

# Orbax gives up its other reads when one fails, and these then find its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CHUNK = "state/layers.1.attn.q/0.0.0"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "tree"
    return jaxtc.save_checkpoint(random_model(), folder, tiny.tokenizer())


@pytest.fixture
def tree(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "tree")


def load(folder):
    return jaxtc.load_model(folder, dtype="float32")


def rewrite(folder, change, seal=False):
    """A sidecar that was changed by hand; with ``seal``, so that its own hash fits."""
    raw = json.loads((folder / "jaxtc.json").read_bytes())
    raw = change(raw) or raw
    if seal:
        hashes = {name: one["sha256"] for name, one in raw["arrays"].items()} | raw["files"]
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
        raw["content_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    (folder / "jaxtc.json").write_text(json.dumps(raw))


def test_what_it_says(sound):
    sidecar = read_sidecar(sound)
    assert (sidecar.kind, sidecar.dtype) == ("model", "float32")
    assert (sidecar.source, sidecar.revision) == ("memory", None)
    assert sidecar.jaxtc == jaxtc.__version__
    assert len(sidecar.arrays) == 24
    raw = (sound / "jaxtc.json").read_bytes()
    assert sidecar.encode() == raw
    assert not re.search(rb"\d{10}\.\d|20\d\d-\d\d", raw)  # no time
    assert same(load(sound), random_model())


def test_a_flipped_bit_in_any_array_is_found(tree):
    chunks = [path for path in (tree / "state").rglob("*") if re.fullmatch(r"[\d.]+", path.name)]
    assert len(chunks) == 24
    for file in chunks[::4]:
        raw = file.read_bytes()
        flipped = bytearray(raw)
        flipped[len(raw) // 2] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(WeightsError, match=f"{file.parent.name} in .* is not what was written"):
            jaxtc.load_model(tree, dtype="float32", verify=True)
        with pytest.raises(WeightsError, match=f"{file.parent.name} in .* is not what was written"):
            jaxtc.convert(tree, tree.parent / "back", to="safetensors")
        shutil.rmtree(tree.parent / "back.partial")
        file.write_bytes(raw)
    assert same(jaxtc.load_model(tree, dtype="float32", verify=True), random_model())


def test_the_tokenizer_is_verified_too(tree):
    raw = (tree / "tokenizer.json").read_bytes()
    (tree / "tokenizer.json").write_bytes(raw.replace(b"texas", b"paris"))
    with pytest.raises(WeightsError, match=r"tokenizer.json in .* is not what was written"):
        load_tokenizer(tree)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: (t / CHUNK).unlink(), "cannot be read: .* is missing"),
        (lambda t: shutil.rmtree(t / "state/layers.0.attn.q"), "layers.0.attn.q"),
        (lambda t: shutil.rmtree(t / "state"), "cannot be read"),
        (lambda t: (t / "state/_METADATA").unlink(), "cannot be read"),
        (lambda t: (t / "state/_METADATA").write_text("{"), "cannot be read"),
        (lambda t: os.truncate(t / "state/_METADATA", 300), "cannot be read"),
        (lambda t: (t / "state/layers.0.attn.q/.zarray").write_text("{}"), "cannot be read"),
        (lambda t: os.truncate(t / CHUNK, 100), "cannot be read: .* Not enough data"),
        (
            lambda t: os.truncate(t / "config.json", 30),
            "config.json in .* is not what was",
        ),
        (lambda t: (t / "jaxtc.json").write_text("{"), "is not JSON"),
        (lambda t: (t / "jaxtc.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda t: (t / "jaxtc.json").write_text("[" * 100_000), "is not JSON"),
        (lambda t: (t / "jaxtc.json").write_text("[]"), "does not say that it is a"),
        (lambda t: os.truncate(t / "jaxtc.json", 3000), "is not JSON"),
        (lambda t: os.mkfifo(t / "state/pipe"), "state/pipe is not a plain file"),
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
    folder = tree / "state/layers.0.attn.q"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    with pytest.raises(WeightsError, match=r"state/layers.0.attn.q is a link"):
        load(tree)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a/b", "./a", "a/", "", "..", "a\\b", "C:x", "a\0b",
     "a\nb"],
)  # fmt: skip
def test_names_that_lead_outside_are_refused(tree, name):
    rewrite(tree, set_at("files", name, "0" * 64), seal=True)
    with pytest.raises(WeightsError, match="not one right in its folder"):
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
        (set_at("version", 3), "version 3 .* reads version 2; install a newer jaxtc"),
        (set_at("version", 1), "version 1 .* or run `jaxtc convert` on 'memory' again"),
        (set_at("format", "safetensors"), "does not say that it is a jaxtc-checkpoint"),
        (set_at("kind", "tokens"), "its kind is 'tokens'"),
        (set_at("source", 3), "source or revision is not text"),
        (set_at("files", []), "it has no files"),
        (set_at("arrays", None), "it has no arrays"),
        (set_at("config", None), "it has no config"),
        (set_at("content_sha256", "0" * 64), "content_sha256 is not that of its arrays"),
        (set_at("files", "config.json", "0" * 63), "the SHA-256 of config.json is"),
        (set_at("files", "config.json", 7), "the SHA-256 of config.json is 7"),
        (set_at("files", "config.json", "0" * 64), "config.json in .* is not what was written"),
        (set_at("arrays", "embed.weight", "sha256", "0" * 64), None),
        (set_at("arrays", "embed.weight", "dtype", "object"), "dtype 'object'"),
        (set_at("arrays", "embed.weight", "dtype", "int8"), "dtype 'int8'"),
        (set_at("arrays", "embed.weight", "dtype", []), r"dtype \[\]"),
        (set_at("arrays", "embed.weight", "dtype", "bfloat16"), "has float32 .* not bfloat16"),
        (set_at("arrays", "embed.weight", "shape", [1 << 60, 24]), "embed.weight has shape"),
        (set_at("arrays", "embed.weight", "shape", [-1, 24]), r"shape \[-1, 24\]"),
        (set_at("arrays", "embed.weight", "shape", [50.0, 24]), r"shape \[50.0, 24\]"),
        (set_at("arrays", "embed.weight", "shape", [True, 24]), r"shape \[True, 24\]"),
        (set_at("arrays", "embed.weight", "shape", []), r"shape \(\)"),
        (set_at("arrays", "../../x", {"shape": [1], "dtype": "float32", "sha256": "0" * 64}), "x'"),
        (
            set_at("arrays", "x", {"shape": [1], "dtype": "float32", "sha256": "0" * 64}),
            "x is not a",
        ),
        (set_at("arrays", {}), "embed.weight is missing"),
        (set_at("config", "hidden_size", 32), "does not hold the config.json"),
    ],
)
def test_sidecars_that_lie(tree, change, message):
    rewrite(tree, change, seal=message is None or not re.search("content|has no|SHA|'x'", message))
    with pytest.raises((WeightsError, ConfigError), match=message or "is not what was written"):
        jaxtc.load_model(tree, dtype="float32", verify=message is None)


def test_a_sidecar_that_fits_other_arrays(tree):
    """Even one whose hashes are right must describe the model of its config, and the tree."""

    def change(raw):
        raw["arrays"]["embed.weight"]["shape"] = [24, 50]
        raw["arrays"]["layers.0.attn.r"] = raw["arrays"].pop("layers.0.attn.q")

    honest = (tree / "jaxtc.json").read_bytes()
    rewrite(tree, change, seal=True)
    with pytest.raises(WeightsError) as caught:
        load(tree)
    for part in ("layers.0.attn.q is missing", "layers.0.attn.r is not a parameter",
                 "embed.weight has shape (24, 50), not (50, 24)"):  # fmt: skip
        assert part in str(caught.value)
    # The tree's own description of an array is compared before a byte of it is read.
    (tree / "jaxtc.json").write_bytes(honest)
    zarr = tree / "state/embed.weight/.zarray"
    told = json.loads(zarr.read_bytes())
    for key, value in (("shape", [1 << 50, 24]), ("shape", [24, 50]), ("dtype", "<f8")):
        zarr.write_text(json.dumps(told | {key: value}))
        with pytest.raises(WeightsError, match=r"embed.weight has float.*, not float32 \(50, 24\)"):
            load(tree)


def test_values_that_are_not_finite(tmp_path):
    model = random_model()
    model.layers[1].mlp.down[...] = model.layers[1].mlp.down[...].at[0, 0].set(np.inf)
    tree = jaxtc.save_checkpoint(model, tmp_path / "tree")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.down holds NaN or infinity"):
        load(tree)
    model.layers[1].mlp.down[...] = model.layers[1].mlp.down[...].at[0, 0].set(1e30)
    tree = jaxtc.save_checkpoint(model, tmp_path / "large")
    # Which of the two it is, also where it is read onto a mesh.
    model.layers[0].attn.q[...] = model.layers[0].attn.q[...].at[0, 0].set(np.nan)
    both = jaxtc.save_checkpoint(model, tmp_path / "both")
    for options in ({}, {"mesh": "model=1"}):
        with pytest.raises(WeightsError) as caught:
            jaxtc.load_model(both, dtype="float16", **options)
        assert "layers.1.mlp.down holds values too large for float16" in str(caught.value)
        assert "layers.0.attn.q holds NaN or infinity" in str(caught.value)
    with pytest.raises(WeightsError, match="down holds values too large for float16"):
        jaxtc.load_model(tree, dtype="float16")
    assert jaxtc.load_model(tree, dtype="bfloat16").layers[1].mlp.down[0, 0] > 9e29


def test_a_transcoder_that_is_only_named(tmp_path):
    transcoder = jaxtc.Transcoder.abstract(24, 60)
    made = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), transcoder)
    tree = jaxtc.save_checkpoint({3: made}, tmp_path / "tree")

    def change(raw):
        raw["transcoders"]["4"] = raw["transcoders"]["3"]

    rewrite(tree, change)
    with pytest.raises(WeightsError, match="layers.4.W_enc is missing"):
        jaxtc.load_transcoder(tree, 4)
    rewrite(tree, set_at("transcoders", "-3", {}))
    with pytest.raises(WeightsError, match="'-3' is not a layer"):
        jaxtc.load_transcoder(tree, 3)


def test_only_a_layer_is_read_at_a_time(tree, monkeypatch):
    read, real = [], checkpoint_tree.load
    monkeypatch.setattr(checkpoint_tree, "load", lambda f, w: read.append(set(w)) or real(f, w))
    told = []
    jaxtc.load_model(tree, dtype="float32", progress=lambda *now: told.append(now))
    assert sorted(len(names) for names in read) == [1, 1, 11, 11]
    assert len(told) == 4 and told[-1][0] == told[-1][1]


def test_a_bucket_is_left_to_orbax(tmp_path, monkeypatch):
    """A path with ``://`` reaches orbax as it is; folders cannot be moved there."""
    assert str(save._bucket("gs://bucket/deep/out")) == "gs://bucket/deep/out"
    monkeypatch.setattr(save, "_bucket", epath.Path)
    saved = jaxtc.save_checkpoint(random_model(), tmp_path / "out")
    assert saved == epath.Path(tmp_path / "out")
    assert same(load(tmp_path / "out"), random_model())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(SourceError, match="exists already"):
        jaxtc.save_checkpoint(random_model(), tmp_path / "out")
    with pytest.raises(SourceError, match="Convert to a folder here"):
        jaxtc.convert(tmp_path / "out", "gs://bucket/out")


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
    (partial / "files").mkdir(parents=True)
    (partial / "job.json").write_text(json.dumps({"saving": "from memory"}))
    (partial / "files/junk").write_text("")
    (partial / "writing.tmp").write_text("")
    jaxtc.save_checkpoint(random_model(), tmp_path / "new")
    assert same(load(tmp_path / "new"), random_model())
    assert not partial.exists()


@pytest.mark.parametrize("door", ["load", "convert"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ignore": "score.*"}, "ignore=.*a checkpoint of jaxtc's own"),
        ({"ignore": ["score.weight"]}, "ignore=.*a checkpoint of jaxtc's own"),
        ({"ignore": 3}, "ignore is 3, expected names"),
        ({"base": "nowhere"}, "base='nowhere' is for an adapter"),
        ({"config": "config.json"}, "config= is for a checkpoint that has none"),
    ],
)
def test_arguments_that_mean_nothing_for_it_are_refused(sound, tmp_path, door, given, message):
    with pytest.raises(SourceError, match=message):
        if door == "load":
            jaxtc.load_model(sound, **given)
        else:
            jaxtc.convert(sound, tmp_path / "out", "safetensors", **given)
    assert not list(tmp_path.iterdir())


def test_nothing_to_ignore_is_fine(sound):
    assert same(load(sound), jaxtc.load_model(sound, dtype="float32", ignore=[], base=None))
