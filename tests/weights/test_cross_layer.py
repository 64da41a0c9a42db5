"""Folders of cross-layer transcoders: read as circuit-tracer writes them; written; refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml

import jaxtc
from jaxtc.errors import JaxtcError, SiteError, SourceError, WeightsError
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder, LayerFeatures
from jaxtc.weights.files import cross_layer as files
from tests.support import cross_layer
from tests.weights.test_hub import server  # noqa: F401

L, D, M = 3, 8, 12


def write(folder, reads="resid_mid", **options):
    return cross_layer.write(folder, cross_layer.arrays(L, D, M, **options), reads)


def change(folder, layer, part="enc", **arrays):
    """Arrays of a file replaced, or left out where they are None."""
    path = folder / f"W_{part}_{layer}.safetensors"
    held = safetensors.numpy.load_file(path) | {f"{k}_{layer}": v for k, v in arrays.items()}
    held = {key: value for key, value in held.items() if value is not None}
    safetensors.numpy.save_file(held, path)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


@pytest.mark.parametrize("options", [{}, {"threshold": False}, {"skip": True}])
def test_what_is_in_the_files(tmp_path, options):
    folder = write(tmp_path / "clt", **options)
    made = jaxtc.load_transcoders(folder)
    assert isinstance(made, CrossLayerTranscoder) and len(made.layers) == L
    kind = "jumprelu" if options.get("threshold", True) else "relu"
    for layer, (one, held) in enumerate(
        zip(made.layers, cross_layer.arrays(L, D, M, **options), strict=True)
    ):
        assert (one.layer, one.activation.name, one.source) == (layer, kind, str(folder))
        assert (one.input_site, one.output_site) == ("resid_mid", "mlp_out")
        found = {
            name: getattr(one, name)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
        }
        assert {name for name, value in found.items() if value is not None} == held.keys()
        for name, value in held.items():
            value = value.T if name in ("W_enc", "W_skip") else value
            np.testing.assert_array_equal(found[name][...], value)
        alone = jaxtc.load_transcoder(folder, layer)
        assert isinstance(alone, LayerFeatures)
        same(alone, one)
    named = jaxtc.load_transcoders(str(tmp_path / "clt") + "/")
    same(jax.tree.leaves(named), jax.tree.leaves(made))


def test_one_layer_opens_its_own_files_only(tmp_path, monkeypatch):
    folder, opened = write(tmp_path), []
    kept = files.SafetensorsFile

    def noted(path):
        opened.append(path.name)
        return kept(path)

    monkeypatch.setattr("jaxtc.weights.load_cross_layer.SafetensorsFile", noted)
    jaxtc.load_transcoder(folder, 1)
    assert opened == ["W_enc_1.safetensors", "W_dec_1.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{"skip": True}, {"threshold": False}])
def test_written_and_read_back(tmp_path, dtype, options):
    made = jaxtc.load_transcoders(write(tmp_path / "a", "mlp_in", **options), dtype=dtype)
    saved = jaxtc.save_transcoder(made, tmp_path / "b")
    again = jaxtc.load_transcoders(saved, dtype=dtype)
    assert again.input_site == "mlp_in"
    same(jax.tree.leaves(again), jax.tree.leaves(made))
    assert {path.name for path in saved.iterdir()} == {
        "config.yaml", *(f"W_{part}_{n}.safetensors" for part in ("enc", "dec") for n in range(L))
    }  # fmt: skip
    held = safetensors.numpy.load_file(saved / "W_dec_1.safetensors")
    assert [*held] == ["W_dec_1"] and held["W_dec_1"].shape == (M, 2, D)
    # An earlier one is replaced; anything else is not.
    jaxtc.save_transcoder(made, saved)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(SourceError, match="notes.txt"):
        jaxtc.save_transcoder(made, saved)
    assert (saved / "W_enc_0.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    made = jaxtc.load_transcoders(write(tmp_path / "a"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    real, calls = files.write_tensors, []

    def fails(path, *args, **facts):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(path, *args, **facts)

    monkeypatch.setattr(files, "write_tensors", fails)
    other = jax.tree.map(lambda x: x + 1, made)
    with pytest.raises(SourceError, match="No space left"):
        jaxtc.save_transcoder(other, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_activations_that_files_do_not_have(tmp_path):
    made = CrossLayerTranscoder.abstract(2, D, M, activation={"name": "topk", "k": 3})
    with pytest.raises(SourceError, match="no activation 'topk'"):
        jaxtc.save_transcoder(made, tmp_path / "a")
    # One threshold for all is written as one for each.
    made = CrossLayerTranscoder.abstract(2, D, M, activation="batchtopk")
    made = jax.tree.map(lambda x: jnp.full(x.shape, 0.25, x.dtype), made)
    again = jaxtc.load_transcoders(jaxtc.save_transcoder(made, tmp_path / "a"))
    assert (np.asarray(again.layers[1].threshold) == 0.25).all()
    x = np.random.default_rng(0).standard_normal((2, 5, D)).astype(np.float32)
    np.testing.assert_array_equal(again(x), made(x))
    with pytest.raises(SourceError, match="not 'gemma-scope'"):
        jaxtc.save_transcoder(again, tmp_path / "b", format="gemma-scope")
    with pytest.raises(SourceError, match="whose layers are saved together"):
        jaxtc.save_transcoder(again.layers[0], tmp_path / "b")
    with pytest.raises(SourceError, match="jaxtc.save_transcoder writes"):
        jaxtc.save_checkpoint(again, tmp_path / "b")


def test_sites_are_never_guessed(tmp_path):
    folder = write(tmp_path, reads=None)
    with pytest.raises(SiteError, match="input_site and output_site.*input_site='resid_mid'"):
        jaxtc.load_transcoders(folder)
    told = dict(input_site="mlp_in_normed", output_site="mlp_out")
    assert jaxtc.load_transcoders(folder, **told).input_site == "mlp_in_normed"
    write(tmp_path)
    made = jaxtc.load_transcoder(folder, 2, input_site="mlp_in")
    assert (made.input_site, made.output_site) == ("mlp_in", "mlp_out")


BROKEN = {
    "no decoder": (lambda f: (f / "W_dec_1.safetensors").unlink(), r"not W_dec_1.safetensors"),
    "no layer": (
        lambda f: [(f / f"W_{part}_1.safetensors").unlink() for part in ("enc", "dec")],
        "not W_enc_1.safetensors, W_dec_1.safetensors",
    ),
    "fewer layers": (
        lambda f: [(f / f"W_{part}_2.safetensors").unlink() for part in ("enc", "dec")],
        r"W_dec_0 writes at 3 layers, not at 2 \(layers 0 to 1\)",
    ),
    "a bias": (lambda f: change(f, 1, b_enc=None), "b_enc_1 is missing"),
    "a stranger": (lambda f: change(f, 1, W_more=np.ones(3, "f4")), "W_more_1 is not part of it"),
    "whole numbers": (lambda f: change(f, 0, b_enc=np.ones(M, "i4")), "b_enc_0 has dtype I32"),
    "transposed": (
        lambda f: change(f, 0, W_enc=np.ones((D, M), "f4")), r"b_enc_0 has shape \(12,\), not \(M\)"
    ),
    "decoder of two axes": (
        lambda f: change(f, 2, "dec", W_dec=np.ones((M, D), "f4")),
        r"W_dec_2 has shape \(12, 8\), not \(M, layers, D\)",
    ),
    "swapped axes": (
        lambda f: change(f, 1, "dec", W_dec=np.ones((2, M, D), "f4")), r"W_dec_1 has shape \(2, 12"
    ),
    "another width": (
        lambda f: change(
            f, 1, W_enc=np.ones((M + 1, D), "f4"), b_enc=np.ones(M + 1, "f4"),
            threshold=np.ones(M + 1, "f4"),
        ), r"W_dec_1 has shape \(12, 2, 8\)",
    ),
    "thresholds of one layer": (
        lambda f: change(f, 1, threshold=None), "only one of layers 0 and 1 has threshold"
    ),
    "below 0": (
        lambda f: change(f, 1, threshold=-np.ones(M, "f4")),
        "threshold_1 is below 0, where this format lets negative features through",
    ),
    "not finite": (
        lambda f: change(f, 1, "dec", W_dec=np.full((M, 2, D), np.nan, "f4")),
        "W_dec_1 holds NaN or infinity",
    ),
    "another kind": (
        lambda f: set_config(f, model_kind="transcoder_set"), "are those of a 'cross_layer_transc"
    ),
    "another activation": (lambda f: set_config(f, activation="relu"), "has thresholds"),
    "top k": (lambda f: set_config(f, activation="topk", k="4"), "are read with JumpReLU"),
    "a hook that is no site": (
        lambda f: set_config(f, feature_input_hook="hook_tokens"), "feature_input_hook"
    ),
    "an unknown setting": (lambda f: set_config(f, normalize="layer"), "normalize"),
    "cut short": (
        lambda f: (f / "W_dec_0.safetensors").write_bytes(
            (f / "W_dec_0.safetensors").read_bytes()[:-5]
        ), "not a sound safetensors file",
    ),
}  # fmt: skip


def set_config(folder, **changes):
    path = folder / "config.yaml"
    held = dict(line.split(": ") for line in path.read_text().splitlines()) | changes
    path.write_text("\n".join(f"{key}: {value}" for key, value in held.items()))


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders(tmp_path, what):
    folder = write(tmp_path / "clt")
    breaks, message = BROKEN[what]
    breaks(folder)
    with pytest.raises(JaxtcError, match=message) as error:
        jaxtc.load_transcoders(folder)
    assert "clt" in str(error.value)
    assert isinstance(error.value, WeightsError | SourceError | SiteError)


def test_a_threshold_of_one_row(tmp_path):
    folder = write(tmp_path)
    held = cross_layer.arrays(L, D, M)[0]["threshold"]
    change(folder, 0, threshold=held[None])
    np.testing.assert_array_equal(jaxtc.load_transcoders(folder).layers[0].threshold[...], held)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: jaxtc.load_transcoder(f), "load_transcoders.* gives the whole, layer=..."),
        (lambda f: jaxtc.load_transcoder(f, 3), "no transcoder for layer 3; it has layers 0, 1, 2"),
        (lambda f: jaxtc.load_transcoder(f, "1"), "layer is '1'"),
        (lambda f: jaxtc.load_transcoders(f, [0, 1]), r"layers is \[0, 1\], expected 'all'"),
        (lambda f: jaxtc.load_transcoders(f, "some"), "layers is 'some', expected 'all'"),
        (lambda f: jaxtc.load_transcoders(f, width="16k"), "leave width and l0 out"),
        (lambda f: jaxtc.load_transcoder(f, 1, l0=5), "leave width and l0 out"),
        (lambda f: jaxtc.load_transcoder(f / "W_enc_1.safetensors"), "give its folder, .*clt'"),
        (lambda f: jaxtc.load_transcoder(f / "W_dec_1.safetensors", 1), "give its folder, .*clt'"),
        (lambda f: jaxtc.load_transcoders(f / "W_dec_1.safetensors", [1]), "give its folder"),
        (lambda f: jaxtc.convert(f, f.parent / "to", to="orbax"), "takes transcoders of single"),
        (lambda f: jaxtc.convert(f, f.parent / "to", to="npz"), "takes transcoders of single"),
    ],
)  # fmt: skip
def test_what_is_not_one_is_named(tmp_path, call, message):
    folder = write(tmp_path / "clt")
    with pytest.raises(JaxtcError, match=message):
        call(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["clt"]


def test_all_layers_by_number_are_the_whole(tmp_path):
    folder = write(tmp_path)
    same(jaxtc.load_transcoders(folder, range(L)), jaxtc.load_transcoders(folder))


def test_from_the_hub(server, tmp_path):  # noqa: F811
    write(server.root / "someone/clt")
    write(server.root / "someone/many/gemma/clt-12", skip=True)
    whole = jaxtc.load_transcoders("someone/clt")
    assert whole.source == "someone/clt" and len(whole.layers) == L
    same(
        jax.tree.leaves(whole), jax.tree.leaves(jaxtc.load_transcoders(server.root / "someone/clt"))
    )
    sent = dict(server.sent)
    part = jaxtc.load_transcoder("someone/many/gemma/clt-12", 1)
    assert part.W_skip is not None and part.source == "someone/many/gemma/clt-12"
    new = {name for name in server.sent if server.sent[name] != sent.get(name)}
    assert {name.rpartition("/")[2] for name in new if name.endswith("safetensors")} <= {
        "W_enc_1.safetensors", "W_dec_1.safetensors"
    }  # fmt: skip
    found = jaxtc.load_transcoder("someone/many", 1, path="gemma/clt-12")
    same(jax.tree.leaves(found), jax.tree.leaves(part))


def test_memory_is_one_parameter_at_a_time(tmp_path, monkeypatch):
    """Largest first, each on its device before the next is read."""
    folder, live = write(tmp_path), []
    real = files.LayerFiles.read

    def read(self, name, dtype, sharding=None):
        array, problem = real(self, name, dtype, sharding)
        live.append(array.size)
        return array, problem

    monkeypatch.setattr(files.LayerFiles, "read", read)
    jaxtc.load_transcoders(folder)
    assert live == sorted(live, reverse=True) and len(live) == 5 * L


def test_its_config_is_circuit_tracer_s(tmp_path):
    saved = jaxtc.save_transcoder(jaxtc.load_transcoders(write(tmp_path / "a")), tmp_path / "b")
    assert yaml.safe_load((saved / "config.yaml").read_text()) == {
        "model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }  # fmt: skip
    # The framework that safetensors' readers look for.
    raw = (saved / "W_enc_0.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"]["format"] == "pt"
    assert re.fullmatch(r"\(12, 8\)", str(tuple(header["W_enc_0"]["shape"])))
