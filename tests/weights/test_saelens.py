"""SAELens' folders: read as SAELens computes them, written as SAELens reads them, or refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jaxtc
from jaxtc.errors import JaxtcError, SiteError, SourceError, WeightsError
from jaxtc.transcoders.activations import TopK
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.conversion.convert import convert
from tests.weights.saelens import make

MADE = Path(__file__).parent / "saelens"
# What each folder is: variant, whether b_dec is taken off, (layer, read, written), TopK's k.
RESID = (1, "resid_post", "resid_post")
BETWEEN = (2, "mlp_in_normed", "mlp_out")
KINDS = {
    "standard": ("sae+relu", True, RESID),
    "standard_not_centred": ("sae+relu", False, RESID),
    "standard_heads": ("sae+relu", True, (2, "attn_heads", "attn_heads")),
    "jumprelu": ("sae", True, (0, "mlp_out", "mlp_out")),
    "topk": ("sae+topk", True, RESID),
    "topk_rescaled": ("sae+topk", True, RESID),
    "topk_training": ("sae+topk", True, RESID),
    "topk_inference": ("sae+topk", True, RESID),
    "batchtopk_training": ("sae+batchtopk", True, RESID),
    "batchtopk_inference": ("sae", True, RESID),
    "matryoshka_batchtopk_training": ("sae+batchtopk", True, RESID),
    "matryoshka_batchtopk_inference": ("sae", True, RESID),
    "transcoder": ("transcoder+relu", False, BETWEEN),
    "skip_transcoder": ("transcoder+skip+relu", False, BETWEEN),
    "jumprelu_transcoder": ("transcoder", False, BETWEEN),
    "jumprelu_skip_transcoder": ("transcoder+skip", False, BETWEEN),
    "scaled": ("sae+relu", True, RESID),
    "old_standard": ("sae+relu", True, (2, "resid_post", "resid_post")),
    "old_run": ("sae+relu", True, (1, "mlp_out", "mlp_out")),
    "old_topk": ("sae+topk", False, (0, "attn_heads", "attn_heads")),
}


def expected(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz") as found:
        return dict(found)


def compare(transcoder, said, rtol=1e-5):
    """In float32, to 1e-5 of the largest."""
    for name, got in (("a", transcoder.encode(said["x"])), ("y", transcoder(said["x"]))):
        should = said[name]
        np.testing.assert_allclose(got, should, rtol=rtol, atol=rtol * np.abs(should).max())
        assert ((np.asarray(got) == 0) == (should == 0)).all()


@pytest.mark.parametrize("name", KINDS)
def test_read_as_saelens_computes_them(name):
    variant, centred, (layer, reads, writes) = KINDS[name]
    loaded = jaxtc.load_transcoder(MADE / name)
    assert (loaded.variant, loaded.subtract_b_dec, loaded.layer) == (variant, centred, layer)
    assert (loaded.input_site, loaded.output_site) == (reads, writes)
    compare(loaded, expected(MADE / name))
    given = jaxtc.load_transcoder(MADE / name / "sae_weights.safetensors", input_site="mlp_in")
    assert (given.input_site, given.output_site, given.layer) == ("mlp_in", writes, layer)
    assert list(jaxtc.load_transcoders(MADE / name)) == [layer]


@pytest.mark.parametrize("name", KINDS)
def test_every_path_of_features_takes_b_dec_off(name):
    loaded, x = jaxtc.load_transcoder(MADE / name), expected(MADE / name)["x"]
    a = np.asarray(loaded.encode(x))
    ids = jnp.arange(0, loaded.features, 3)
    np.testing.assert_allclose(loaded.encode_features(x, ids), a[..., ::3], rtol=1e-5, atol=1e-5)
    sparse = loaded.encode_sparse(x, loaded.features)
    np.testing.assert_allclose(loaded.decode_sparse(sparse, x), loaded(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda t, x: t.encode(x))(loaded, x), a, atol=1e-5)
    mesh = jaxtc.load_transcoder(MADE / name, mesh="model=1")
    np.testing.assert_allclose(mesh.encode(x), a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_written_and_read_again(name, tmp_path):
    loaded = jaxtc.load_transcoder(MADE / name)
    file = jaxtc.save_transcoder(loaded, tmp_path / "mine", format="saelens")
    assert sorted(p.name for p in file.parent.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    again = jaxtc.load_transcoder(tmp_path / "mine")
    facts = {**loaded.facts(), "source": again.source}
    if "batchtopk" in loaded.variant:  # as SAELens itself keeps them after training
        facts["activation"] = {"name": "jumprelu"}
        compare(again, expected(MADE / name))
    assert again.facts() == facts
    for one in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
        pair = [getattr(t, one) for t in (loaded, again)]
        assert pair[0] is pair[1] is None or np.array_equal(pair[0][...], pair[1][...])
    # Converted: every fact and every bit.
    tree = convert(MADE / name, tmp_path / "tree")
    back = jaxtc.load_transcoder(tree)
    assert back.facts() == {**loaded.facts(), "source": back.source}
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(back), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert "subtract_b_dec" in Converted(tree).sidecar.transcoders[loaded.layer]


@pytest.mark.parametrize("name", ["standard", "topk_rescaled", "scaled", "skip_transcoder"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_folded_in_float32_whatever_is_asked_for(name, dtype):
    wide, narrow = (
        jaxtc.load_transcoder(MADE / name),
        jaxtc.load_transcoder(MADE / name, dtype=dtype),
    )
    for one in ("W_enc", "W_dec", "b_enc", "b_dec"):
        should = np.asarray(getattr(wide, one)[...]).astype(dtype)
        assert np.array_equal(getattr(narrow, one)[...], should), one


def test_other_formats_do_not_lose_that_b_dec_is_taken_off(tmp_path):
    loaded = jaxtc.load_transcoder(MADE / "jumprelu")
    for format in ("gemma-scope", "circuit-tracer", "gemma-scope-2"):
        with pytest.raises(SourceError, match="takes b_dec off its input.*format='saelens'"):
            jaxtc.save_transcoder(loaded, tmp_path, format=format)
    for to in ("npz", "circuit-tracer"):
        with pytest.raises(SourceError, match="takes b_dec off its input"):
            convert(MADE / "jumprelu", tmp_path / to, to)
    assert not list(tmp_path.iterdir())
    skip = jaxtc.Transcoder(8, 24, skip=True, layer=1, activation=TopK(3), rngs=nnx.Rngs(0))
    with pytest.raises(SourceError, match="no architecture for 'transcoder.skip.topk'"):
        jaxtc.save_transcoder(skip, tmp_path / "x", format="saelens")
    with pytest.raises(SourceError, match="does not know its layer"):
        jaxtc.save_transcoder(
            jaxtc.Transcoder(8, 24, rngs=nnx.Rngs(0)), tmp_path / "x", format="saelens"
        )
    with pytest.raises(JaxtcError, match="only a dictionary that reads as many"):
        jaxtc.Transcoder(8, 24, 6, subtract_b_dec=True, rngs=nnx.Rngs(0))


def changed(tmp_path: Path, name: str, drop=(), arrays=None, **changes) -> Path:
    """A copy with another ``cfg.json``; names with a dot are below ``metadata``."""
    folder = tmp_path / name
    shutil.copytree(MADE / name, folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    for key, value in changes.items():
        cfg[key] = value
    for key in drop:
        del cfg[key]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    if arrays:
        held = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
        safetensors.numpy.save_file({**held, **arrays}, folder / "sae_weights.safetensors")
    return folder


META = {"hook_name": "blocks.1.hook_resid_post"}


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("gated", {}, "architecture is 'gated': a gated autoencoder decides.*not read"),
        ("standard", {"architecture": "temporal"}, "'temporal'"),
        ("standard", {"architecture": "abstopk"}, "negative activations"),
        ("standard", {"architecture": "standrad"}, "expected 'standard'.*Did you mean 'standard'"),
        ("standard", {"normalize_activations": "layer_norm"}, "'layer_norm', so SAELens changes"),
        ("standard", {"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale'"),
        ("standard", {"normalize_activations": "expected_average_only_in"},
         "no activation_scaler.json here tells.*fold_activation_norm_scaling_factor"),
        ("standard", {"normalize_activations": True}, "no activation_scaler.json"),
        ("standard", {"normalize_activations": "unit_ball"}, "does not know this normalisation"),
        ("transcoder", {"normalize_activations": "expected_average_only_in"}, "transcoders"),
        ("standard", {"some_new_scale": 2.0}, "what some_new_scale = 2.0 does"),
        ("standard", {"apply_b_dec_to_input": "yes"}, "expected true or false"),
        ("transcoder", {"apply_b_dec_to_input": True}, "b_dec belongs to what it writes"),
        ("standard", {"d_in": 9}, "its axis D is 8, .* says 9"),
        ("standard", {"d_sae": 25}, "its axis M is 24, .* says 25"),
        ("transcoder", {"d_out": 8}, "its axis D is 6, .* says 8"),
        ("standard", {"architecture": "jumprelu"}, "threshold is missing: .* jumprelu"),
        ("jumprelu", {"architecture": "standard"}, "threshold is not part of it: .* relu"),
        ("jumprelu", {"architecture": "topk", "k": 3}, "threshold is not part of it: .* topk"),
        ("transcoder", {"architecture": "skip_transcoder"}, "no W_skip, .* a skip connection"),
        ("skip_transcoder", {"architecture": "transcoder"}, "a W_skip, .* no skip connection"),
        ("topk", {"k": 25}, "k is 25, but the transcoder has 24"),
        ("topk", {"k": 2.5}, "expected a whole number"),
        ("topk", {"k": None}, "is TopK and its k is not given"),
        ("topk", {"activation_fn_kwargs": {"k": 9}}, r"its k is \[4, 9\]"),
        ("old_topk", {"activation_fn_kwargs": {"k": 4, "signed": True}}, "negative activations"),
        ("old_topk", {"activation_fn_kwargs": {"k": 4, "gain": 3}}, "what gain = 3 does"),
        ("old_standard", {"activation_fn_str": "tanh-relu"}, "'tanh-relu' in the architecture"),
        ("old_standard", {"hook_head_index": 3}, "autoencoder of a single head"),
        ("old_standard", {"hook_layer": 3}, "hook_layer is 3, but its hook is of layer 2"),
        ("old_standard", {"hook_name_out": "blocks.2.hook_mlp_out"}, "another place"),
        ("standard", {"metadata": {**META, "hook_head_index": 1}}, "a single head"),
        ("standard", {"metadata": {**META, "hook_head_index": 0}}, "a single head"),
        ("standard", {"reshape_activations": "hook_z"}, "joins heads .* at 'blocks.1.hook_resid"),
        ("transcoder", {"metadata": {"hook_name": "blocks.2.hook_resid_mid",
                                     "hook_name_out": "blocks.3.hook_mlp_out"}}, "layer 2 and"),
        ("standard", {"metadata": [1]}, "its metadata is a list of 1, expected an object"),
        ("standard", {"architecture": 3}, "its architecture is 3, expected text"),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path, name, changes, match):
    folder = changed(tmp_path, name, **changes)
    with pytest.raises(WeightsError, match=match) as error:
        jaxtc.load_transcoder(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("hook", "near"),
    [("blocks.1.hook_mlp_inn", "'mlp_in'|hook_mlp_out"),
     ("blocks.1.hook_resid_posst", "resid_post"),
     ("blocks.1.ln1.hook_normalized", "cannot read from"),
     ("blocks.1.ln2.hook_scale", "not an alias"),
     ("transformer.h.1", "no site called")],
)  # fmt: skip
def test_hooks_that_are_no_sites(tmp_path, hook, near):
    folder = changed(tmp_path, "standard", metadata={"hook_name": hook})
    with pytest.raises(SiteError, match=near) as error:
        jaxtc.load_transcoder(folder)
    assert "cfg.json" in str(error.value) and hook.split(".", 2)[-1] in str(error.value)
    sites = {"input_site": "resid_mid", "output_site": "resid_mid"}
    given = jaxtc.load_transcoder(folder, **sites)
    assert given.input_site == "resid_mid"
    assert given.layer == (1 if hook.startswith("blocks") else None)


def test_no_hook_is_asked_for(tmp_path):
    folder = changed(tmp_path, "standard", metadata={})
    with pytest.raises(SiteError, match="Give input_site and output_site"):
        jaxtc.load_transcoder(folder)
    folder = changed(tmp_path, "transcoder", metadata={"hook_name": "blocks.2.hook_resid_mid"})
    with pytest.raises(SiteError, match="Give output_site"):
        jaxtc.load_transcoder(folder)


def test_a_module_of_transformers_goes_before_a_hook(tmp_path):
    metadata = {"hook_name": "blocks.2.hook_mlp_in", "hook_name_out": "blocks.2.hook_mlp_out",
                "hf_hook_name": "model.layers.2.pre_feedforward_layernorm.output",
                "hf_hook_name_out": "model.layers.2.post_feedforward_layernorm.output"}  # fmt: skip
    loaded = jaxtc.load_transcoder(changed(tmp_path, "transcoder", metadata=metadata))
    assert (loaded.input_site, loaded.output_site, loaded.layer) == ("mlp_in", "mlp_out", 2)


def test_what_is_off_or_describes_training_is_no_obstacle(tmp_path):
    off = {"new_switch": False, "other": None, "more": "none", "list": []}
    training = {"lr": 3.0, "lp_norm": 1.0, "scale_sparsity_penalty_by_decoder_norm": True}
    folder = changed(tmp_path, "standard", **off, **training)
    compare(jaxtc.load_transcoder(folder), expected(folder))


def test_scaling_factors_of_features(tmp_path):
    """SAELens 3 multiplied activations with them before decoding; 6 reads only those that are 1."""
    gain = np.linspace(0.5, 2, make.M, dtype=np.float32)
    said, ones = expected(MADE / "old_standard"), np.ones(make.M, np.float32)
    folder = changed(
        tmp_path, "old_standard", arrays={"scaling_factor": gain}, finetuning_scaling_factor=True
    )
    loaded = jaxtc.load_transcoder(folder)
    np.testing.assert_allclose(loaded.encode(said["x"]), said["a"], rtol=1e-5, atol=1e-5)
    arrays = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
    should = (said["a"] * gain) @ arrays["W_dec"] + arrays["b_dec"]
    np.testing.assert_allclose(loaded(said["x"]), should, rtol=1e-4, atol=1e-4)
    for name, array in (("gain", gain), ("ones", ones)):
        folder = changed(tmp_path / name, "old_standard", arrays={"scaling_factor": array})
        if name == "ones":
            compare(jaxtc.load_transcoder(folder), said)
        else:
            with pytest.raises(WeightsError, match="scaling_factor other than 1, but the cfg.json"):
                jaxtc.load_transcoder(folder)
    folder = changed(tmp_path / "short", "old_standard", arrays={"scaling_factor": ones[:3]})
    with pytest.raises(WeightsError, match="scaling_factor is not part of a transcoder"):
        jaxtc.load_transcoder(folder)


@pytest.mark.parametrize(
    ("scaler", "match"),
    [({"scaling_factor": None}, "not a number above 0"), ({"scaling_factor": 0}, "not a number"),
     ({"scaling_factor": "2"}, "not a number"), ({"scaling_factor": float("nan")}, "not a number"),
     ({"scaling_factor": 2.0, "has_whitening": True}, "whitened inputs"), ({}, "not a number"),
     ({"scaling_factor": 2.0, "shift": 3}, "what shift = 3 does"), ([], "not a JSON object")],
)  # fmt: skip
def test_a_scale_that_is_none(tmp_path, scaler, match):
    folder = changed(tmp_path, "scaled")
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    with pytest.raises(WeightsError, match=match):
        jaxtc.load_transcoder(folder)


def test_a_decoder_row_of_zeros_is_silent(tmp_path):
    arrays = safetensors.numpy.load_file(MADE / "topk_rescaled/sae_weights.safetensors")
    arrays["W_dec"][3] = 0
    folder = changed(tmp_path, "topk_rescaled", arrays={"W_dec": arrays["W_dec"]})
    loaded = jaxtc.load_transcoder(folder)
    y = np.asarray(loaded(expected(folder)["x"]))
    assert (
        np.isfinite(y).all()
        and np.abs(np.asarray(loaded.encode(expected(folder)["x"]))[:, 3]).max() < 1e-6
    )


def test_without_its_config_it_is_nobodys(tmp_path):
    for name in ("standard", "jumprelu", "skip_transcoder"):
        folder = changed(tmp_path, name)
        (folder / "cfg.json").unlink()
        sites = {"input_site": "resid_post", "output_site": "resid_post", "layer": 1}
        with pytest.raises(WeightsError, match="cfg.json"):
            jaxtc.load_transcoder(folder, **sites)
        with pytest.raises(WeightsError, match=r"no cfg.json|W_dec has shape"):
            jaxtc.load_transcoder(folder, format="saelens", **sites)
        with pytest.raises(WeightsError, match="is neither SAELens' nor sparsify's"):
            (folder / "cfg.json").write_text("{}")
            jaxtc.load_transcoder(folder, **sites)


def test_a_square_matrix_is_not_transposed_by_a_guess(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (8, 8), "W_dec": (8, 8), "b_enc": (8,), "b_dec": (8,)}
    arrays = {k: rng.normal(size=s).astype("f4") for k, s in shapes.items()}
    x = rng.normal(size=(5, 8)).astype("f4")
    file = tmp_path / "layer_1.safetensors"
    safetensors.numpy.save_file(arrays, file)
    sites = {"input_site": "resid_post", "output_site": "resid_post"}
    with pytest.raises(WeightsError, match="Nothing says whose arrays.*format='circuit-tracer'"):
        jaxtc.load_transcoder(file, **sites)
    told = jaxtc.load_transcoder(file, format="circuit-tracer", **sites)
    np.testing.assert_allclose(
        told.pre_activations(x), x @ arrays["W_enc"].T + arrays["b_enc"], rtol=1e-4, atol=1e-5
    )
    cfg = {"architecture": "standard", "d_in": 8, "d_sae": 8, "apply_b_dec_to_input": True,
           "metadata": {"hook_name": "blocks.1.hook_resid_post"}}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    loaded = jaxtc.load_transcoder(file)
    should = (x - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    np.testing.assert_allclose(loaded.pre_activations(x), should, rtol=1e-4, atol=1e-5)
    with pytest.raises(SourceError, match="is of the format 'saelens', not 'circuit-tracer'"):
        jaxtc.load_transcoder(file, format="circuit-tracer")
    shutil.copytree(MADE / "standard", tmp_path / "layer_3")
    with pytest.raises(SourceError, match="is of layer 1 by .*cfg.json.* layer 3"):
        jaxtc.load_transcoder(tmp_path / "layer_3")


def test_a_release_of_them(tmp_path):
    for layer in (0, 2, 11):
        folder = tmp_path / f"blocks.{layer}.hook_resid_post"
        meta = {"hook_name": f"blocks.{layer}.hook_resid_post"}
        changed(tmp_path, "standard", metadata=meta).rename(folder)
    loaded = jaxtc.load_transcoders(tmp_path)
    assert {n: t.layer for n, t in loaded.items()} == {0: 0, 2: 2, 11: 11}
    assert jaxtc.load_transcoder(tmp_path, 11).source.endswith("blocks.11.hook_resid_post")
    odd = tmp_path / "my" / "l2"
    odd.parent.mkdir()
    (tmp_path / "blocks.2.hook_resid_post").rename(odd)
    assert jaxtc.load_transcoder(tmp_path, path="my/l2").layer == 2
    with pytest.raises(SourceError, match="of layer 2 by .* layer 5"):
        jaxtc.load_transcoder(odd, layer=5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saelens_itself_agrees(tmp_path):
    """Where SAELens is installed: the folders made anew, and what jaxtc writes."""
    lens = pytest.importorskip("sae_lens")
    import torch

    make.make(tmp_path / "made")
    for name in KINDS:
        compare(jaxtc.load_transcoder(tmp_path / "made" / name), expected(tmp_path / "made" / name))
        loaded = jaxtc.load_transcoder(MADE / name)
        folder = jaxtc.save_transcoder(loaded, tmp_path / name, format="saelens").parent
        sae = lens.SAE.load_from_disk(folder)
        x = torch.tensor(expected(MADE / name)["x"])
        read = x.reshape(len(x), 2, -1) if sae.cfg.reshape_activations == "hook_z" else x
        with torch.no_grad():
            a, y = sae.encode(read).numpy(), sae(read).reshape(len(x), -1).numpy()
        compare(loaded, {"x": x.numpy(), "a": a, "y": y})
        assert sae.cfg.metadata.hook_name.startswith(f"blocks.{loaded.layer}.")
