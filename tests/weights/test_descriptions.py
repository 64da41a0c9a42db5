"""sparsify's folders, circuit-tracer's config.yaml and Gemma Scope 2's config.json are obeyed."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from flax import nnx

import jaxtc
from jaxtc.errors import SiteError, SourceError, WeightsError
from jaxtc.transcoders.activations import TopK
from jaxtc.weights.conversion.convert import convert
from tests.support.weights_files import params, write_tier

D, M, K = 8, 24, 5
X = np.random.default_rng(7).standard_normal((9, D)).astype(np.float32)


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def close(got, should):
    np.testing.assert_allclose(got, should, rtol=1e-5, atol=1e-5 * np.abs(should).max())


def top_k(z, k=K):
    """In torch, as sparsify and SAELens have it: ReLU, then the largest."""
    z = torch.relu(z)
    values, ids = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, ids, values)


def write(path, arrays, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, path, metadata=metadata or None)
    return path


# sparsify

CODER = {
    "encoder.weight": draw(M, D),
    "encoder.bias": draw(M),
    "W_dec": draw(M, D) + 1,
    "b_dec": draw(D),
}
CFG = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": M,
       "k": K, "multi_topk": False, "skip_connection": False, "transcode": False,
       "d_in": D}  # fmt: skip


def sparsify(folder, drop=(), arrays=None, **changes):
    arrays = dict(CODER if arrays is None else arrays)
    if changes.get("skip_connection") and "W_skip" not in arrays:
        arrays["W_skip"] = draw(D, D)
    write(folder / "sae.safetensors", arrays)
    cfg = {key: value for key, value in {**CFG, **changes}.items() if key not in drop}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def as_sparsify_computes(x, arrays, cfg):
    x, t = torch.tensor(x), {key: torch.tensor(value) for key, value in arrays.items()}
    read = x if cfg.get("transcode") else x - t["b_dec"]
    a = top_k(read @ t["encoder.weight"].T + t["encoder.bias"], cfg["k"])
    y = a @ t["W_dec"] + t["b_dec"]
    return a.numpy(), (y + x @ t["W_skip"].T if "W_skip" in t else y).numpy()


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(tmp_path, transcode, skip):
    folder = sparsify(tmp_path / "layers.3.mlp", transcode=transcode, skip_connection=skip)
    loaded = jaxtc.load_transcoder(folder)
    assert loaded.activation == TopK(K) and loaded.layer == 3
    assert loaded.subtract_b_dec == (not transcode) and (loaded.W_skip is not None) == skip
    assert loaded.input_site == ("mlp_in" if transcode else "mlp_proj")
    assert loaded.output_site == "mlp_proj"
    arrays = safetensors.numpy.load_file(folder / "sae.safetensors")
    a, y = as_sparsify_computes(X, arrays, {**CFG, "transcode": transcode})
    close(loaded.encode(X), a)
    close(loaded(X), y)
    assert ((np.asarray(loaded.encode(X)) > 0).sum(-1) <= K).all()
    for source in (tmp_path, folder / "sae.safetensors"):
        close(jaxtc.load_transcoder(source)(X), y)
    back = jaxtc.load_transcoder(convert(tmp_path, tmp_path / "tree"))
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(back), strict=True)
    assert back.facts() == {**loaded.facts(), "source": back.source}
    assert all(np.array_equal(one, two) for one, two in pairs)


@pytest.mark.parametrize(
    ("name", "transcode", "layer", "sites"),
    [
        ("layers.7", False, 7, ("resid_post", "resid_post")),
        ("layers.7", True, 7, ("resid_pre", "resid_post")),
        ("model.layers.0.self_attn", False, 0, ("attn_proj", "attn_proj")),
        ("layers.11.attn", True, 11, ("attn_in", "attn_proj")),
        ("layers.2.post_feedforward_layernorm", False, 2, ("mlp_out", "mlp_out")),
        ("layers.2.pre_feedforward_layernorm", False, 2, ("mlp_in", "mlp_in")),
        ("layers.4.mlp/seed1", True, 4, ("mlp_in", "mlp_proj")),
        ("embed_tokens", False, None, ("embed", "embed")),
    ],
)
def test_hookpoints_of_sparsify(tmp_path, name, transcode, layer, sites):
    loaded = jaxtc.load_transcoder(sparsify(tmp_path / name, transcode=transcode))
    assert (loaded.layer, loaded.input_site, loaded.output_site) == (layer, *sites)


@pytest.mark.parametrize("name", ["h.3", "layers.3.mlp.act_fn", "mlp", "layers.x.mlp"])
def test_hookpoints_that_are_no_sites_are_asked_for(tmp_path, name):
    folder = sparsify(tmp_path / name)
    with pytest.raises(SiteError, match="Give input_site and output_site"):
        jaxtc.load_transcoder(folder)
    given = jaxtc.load_transcoder(folder, 3, input_site="mlp_act", output_site="mlp_act")
    assert given.layer == 3


def test_a_release_of_sparsify(tmp_path):
    for layer in (0, 1, 10):
        sparsify(tmp_path / f"layers.{layer}.mlp", transcode=True, skip_connection=True)
    assert list(jaxtc.load_transcoders(tmp_path)) == [0, 1, 10]
    assert jaxtc.load_transcoder(tmp_path, layer=10).layer == 10
    sparsify(tmp_path / "layers.1")
    with pytest.raises(SourceError, match="has 2 transcoders for layer 1; choose one by its path"):
        jaxtc.load_transcoder(tmp_path, 1)
    assert jaxtc.load_transcoder(tmp_path, path="layers.1").input_site == "resid_post"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'"),
        ({"signed": True}, "negative activations"),
        ({"embed_skip": True}, "embed_skip is True.*depends on more"),
        ({"gram_lookup": True}, "gram_lookup is True"),
        ({"k": None}, "does not say k"),
        ({"k": 0}, "expected a whole number from 1"),
        ({"k": M + 1}, f"k is {M + 1}, but"),
        ({"new": 2}, "what new = 2 does"),
        ({"d_in": D + 1}, f"its axis D is {D}, .* says {D + 1}"),
        ({"num_latents": 7}, f"its axis M is {M}, .* says 7"),
        ({"num_latents": 0}, f"its axis M is {M}, .* says {D * 32}"),
        ({"arrays": {**CODER, "W_skip": draw(D, D)}}, "a W_skip, .* no skip connection"),
        ({"transcode": "yes"}, "expected true or false"),
        ({"arrays": {k: v for k, v in CODER.items() if k != "b_dec"}}, "b_dec is missing"),
    ],
)
def test_sparsifys_that_are_refused(tmp_path, changes, match):
    folder = sparsify(tmp_path / "layers.1.mlp", **changes)
    with pytest.raises(WeightsError, match=match) as error:
        jaxtc.load_transcoder(folder)
    assert str(folder) in str(error.value)


def test_sparsifys_without_a_config(tmp_path):
    folder = sparsify(tmp_path / "layers.1.mlp")
    (folder / "cfg.json").unlink()
    with pytest.raises(WeightsError, match="'sparsify', but no cfg.json is beside it"):
        jaxtc.load_transcoder(folder)
    with pytest.raises(SourceError, match="no format called 'sparsify' to write"):
        jaxtc.save_transcoder(
            jaxtc.Transcoder(4, 8, rngs=nnx.Rngs(0)), tmp_path / "x", format="sparsify"
        )


# circuit-tracer

SET = {"W_enc": draw(M, D), "W_dec": draw(M, D) + 1, "b_enc": draw(M), "b_dec": draw(D)}
YAML = """model_name: google/gemma-2-2b
model_kind: transcoder_set
feature_input_hook: {}
feature_output_hook: {}
"""


def tracer(folder, hooks=("ln2.hook_normalized", "hook_mlp_out"), more="", layers=(0, 1), **arrays):
    for layer in layers:
        write(folder / f"layer_{layer}.safetensors", {**SET, **arrays})
    (folder / "config.yaml").write_text(YAML.format(*hooks) + more)
    return folder


@pytest.mark.parametrize(
    ("hooks", "sites"),
    [
        (("ln2.hook_normalized", "hook_mlp_out"), ("mlp_in_normed", "mlp_out")),
        (("hook_resid_mid", "hook_mlp_out"), ("resid_mid", "mlp_out")),
        (("mlp.hook_in", "mlp.hook_out"), ("mlp_in", "mlp_proj")),
        (("hook_resid_post", "hook_resid_post"), ("resid_post", "resid_post")),
    ],
)
def test_a_config_yaml_names_the_hooks(tmp_path, hooks, sites):
    folder = tracer(tmp_path, hooks)
    for layer, loaded in jaxtc.load_transcoders(folder).items():
        assert (loaded.layer, loaded.input_site, loaded.output_site) == (layer, *sites)
        assert loaded.activation.name == "relu" and not loaded.subtract_b_dec
        z = torch.tensor(X) @ torch.tensor(SET["W_enc"]).T + torch.tensor(SET["b_enc"])
        close(loaded.encode(X), torch.relu(z).numpy())
    file = folder / "layer_1.safetensors"
    assert jaxtc.load_transcoder(file).input_site == sites[0]
    assert jaxtc.load_transcoder(file, input_site="mlp_in").input_site == "mlp_in"


@pytest.mark.parametrize("how", ["config", "array", "int32", "both"])
def test_top_k_of_circuit_tracer(tmp_path, how):
    number = {"array": np.array(K), "int32": np.array([K], np.int32), "both": np.array(K)}.get(how)
    arrays = {} if number is None else {"k": number}
    more = f"activation: topk\nk: {K}\n" if how in ("config", "both") else ""
    source = tracer(tmp_path / "ct", more=more, **arrays)
    loaded = jaxtc.load_transcoder(source, 1)
    assert loaded.activation == TopK(K) and loaded.layer == 1
    z = torch.tensor(X) @ torch.tensor(SET["W_enc"]).T + torch.tensor(SET["b_enc"])
    close(loaded.encode(X), top_k(z).numpy())
    # Alone in a file, which then says k itself; as a set, whose config.yaml does.
    file = jaxtc.save_transcoder(loaded, tmp_path / "one", format="circuit-tracer")
    assert safetensors.numpy.load_file(file)["k"] == K
    out = convert(source, tmp_path / "set", "circuit-tracer")
    assert "k" not in safetensors.numpy.load_file(out / "layer_1.safetensors")
    said = yaml.safe_load((out / "config.yaml").read_text())
    assert (said["activation"], said["k"]) == ("topk", K)
    for source in (file, out):
        again = jaxtc.load_transcoder(source, 1)
        assert again.facts() == {**loaded.facts(), "source": again.source}
        assert np.array_equal(again.W_enc[...], loaded.W_enc[...])
    (out / "config.yaml").unlink()  # ours say it themselves
    assert jaxtc.load_transcoder(out, 1).activation == TopK(K)


@pytest.mark.parametrize(
    ("more", "arrays", "match"),
    [
        ("activation: topk\n", {}, "activation 'topk' and k None do not belong together"),
        ("activation: relu\nk: 3\n", {}, "'relu' and k 3"),
        ("activation: gelu\n", {}, "its activation is 'gelu', expected 'topk'"),
        ("k: 99\n", {}, "k is 99, but the transcoder has 24"),
        ("k: -1\n", {}, "expected a whole number from 1"),
        ("k: 3\n", {"k": np.array(4)}, "says .*'k': 3"),
        (
            "activation: relu\n",
            {"activation_function.threshold": draw(M) ** 2},
            "is not part of it",
        ),
        ("activation: jump_relu\n", {}, "threshold is missing"),
        ("gain: 2\n", {}, "what gain = 2 does"),
        ("", {"k": np.array(0)}, "k is 0"),
        ("", {"k": np.array([1, 2])}, "k is I64 of shape .2,., expected one whole number"),
        ("", {"k": np.array(2.5, np.float32)}, "k is 2.5, expected one whole number"),
        (
            "",
            {"k": np.array(3), "activation_function.threshold": draw(M) ** 2},
            "both thresholds and k",
        ),
        ("transcoders:\n- ../x\n", {}, "neither a path below the folder"),
    ],
)
def test_sets_that_are_refused(tmp_path, more, arrays, match):
    folder = tracer(tmp_path, more=more, layers=(0,), **arrays)
    with pytest.raises(WeightsError, match=match) as error:
        jaxtc.load_transcoder(folder, 0)
    assert str(folder) in str(error.value)


def test_hooks_of_a_set_that_are_no_sites(tmp_path):
    folder = tracer(tmp_path, ("hook_mlp_inn", "hook_mlp_out"))
    with pytest.raises(
        SiteError, match="feature_input_hook is 'hook_mlp_inn'.*mlp_in.*input_site="
    ):
        jaxtc.load_transcoder(folder, 0)
    assert jaxtc.load_transcoder(folder, 0, input_site="resid_mid").input_site == "resid_mid"
    (folder / "config.yaml").write_text("model_kind: transcoder_set\n")
    with pytest.raises(SiteError, match="Give input_site and output_site"):
        jaxtc.load_transcoder(folder, 0)
    tracer(folder, ("blocks.0.hook_resid_mid", "hook_mlp_out"))
    with pytest.raises(WeightsError, match="names a layer"):
        jaxtc.load_transcoder(folder, 0)


def test_a_set_that_lists_its_files(tmp_path):
    """As circuit-tracer's sets that lie elsewhere do."""
    places = [f"scope/layer_{n}/width_16k/average_l0_{9 + n}" for n in range(3)]
    for n, place in enumerate(places):
        write_tier(tmp_path, place, {**params(), "b_dec": np.full(24, n, np.float32)})
    lines = "".join(f"- {place}/params.npz\n" for place in places)
    (tmp_path / "config.yaml").write_text(
        YAML.format("ln2.hook_normalized", "hook_mlp_out") + f"transcoders:\n{lines}"
    )
    loaded = jaxtc.load_transcoders(tmp_path)
    assert {n: (t.layer, float(t.b_dec[0])) for n, t in loaded.items()} == {
        0: (0, 0), 1: (1, 1), 2: (2, 2)
    }  # fmt: skip
    assert loaded[1].input_site == "mlp_in_normed" and loaded[2].source.endswith(
        places[2] + "/params.npz"
    )
    with pytest.raises(SourceError, match="no transcoder for layer 3; it has layers 0, 1, 2"):
        jaxtc.load_transcoder(tmp_path, 3)
    with pytest.raises(SourceError, match="say which layer"):
        jaxtc.load_transcoder(tmp_path)
    with pytest.raises(SourceError, match="not width or l0"):
        jaxtc.load_transcoder(tmp_path, 0, l0=9)
    assert sorted(jaxtc.load_transcoders(convert(tmp_path, tmp_path / "tree"))) == [0, 1, 2]
    (tmp_path / "scope").rename(tmp_path / "away")
    with pytest.raises(WeightsError, match="cannot be opened: No such file"):
        jaxtc.load_transcoder(tmp_path, 0)


def test_what_the_file_and_its_config_say_differently(tmp_path):
    made = jaxtc.Transcoder(D, M, layer=0, input_site="mlp_in", rngs=nnx.Rngs(0))
    jaxtc.save_transcoder(made, tmp_path, format="circuit-tracer")
    assert jaxtc.load_transcoder(tmp_path).input_site == "mlp_in"
    (tmp_path / "config.yaml").write_text(YAML.format("hook_resid_mid", "hook_mlp_out"))
    with pytest.raises(WeightsError, match="input_site is 'mlp_in', and .*config.yaml 'resid_mid'"):
        jaxtc.load_transcoder(tmp_path)


def test_a_cross_layer_set_is_no_transcoder(tmp_path):
    folder = tracer(tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("transcoder_set", "cross_layer_transcoder"))
    with pytest.raises(WeightsError, match="cross-layer transcoder"):
        jaxtc.load_transcoder(folder, 0)
    (folder / "config.yaml").write_text(text.replace("transcoder_set", "something"))
    with pytest.raises(WeightsError, match="its model_kind is 'something', expected"):
        jaxtc.load_transcoder(folder, 0)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not a YAML object"), ("- 1", "not a YAML object"), ("1: 2", "not a YAML object"),
        ("a: &x [1]\nb: *x", "alias"), ("a: 1\na: 2", "says 'a' twice"),
        ("x: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("[" * 30_000, "not YAML"), ("a: 2001-99-99", "month must be"),
        ("a: b: c", "not allowed here"),
        ("model_name: x", "does not say model_kind"), ("? [1]\n: 2", "unhashable"),
        ("a" * 500_000, "has more than"), ("a: \x00", "special characters"),
    ],
)  # fmt: skip
def test_yaml_that_is_none_of_circuit_tracers(tmp_path, text, match):
    folder = tracer(tmp_path)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(WeightsError, match=match):
        jaxtc.load_transcoder(folder, 0)


# Gemma Scope 2

SECOND = {
    "w_enc": draw(D, M),
    "w_dec": draw(M, D) + 1,
    "b_enc": draw(M),
    "b_dec": draw(D),
    "threshold": draw(M),
}
LAYER = "model.layers.17"
HOOKS = {
    "resid_post": (f"{LAYER}.output", f"{LAYER}.output", "resid_post", "resid_post"),
    "mlp_out": (f"{LAYER}.post_feedforward_layernorm.output",) * 2 + ("mlp_out", "mlp_out"),
    "attn_out": (f"{LAYER}.self_attn.o_proj.input",) * 2 + ("attn_heads", "attn_heads"),
    "transcoder": (f"{LAYER}.pre_feedforward_layernorm.output",
                   f"{LAYER}.post_feedforward_layernorm.output", "mlp_in", "mlp_out"),
}  # fmt: skip


def second(folder, kind, skip=False, **changes):
    arrays = {**SECOND, "affine_skip_connection": draw(D, D)} if skip else SECOND
    write(folder / "params.safetensors", arrays)
    read, written, *_ = HOOKS[kind]
    cfg = {"hf_hook_point_in": read, "hf_hook_point_out": written, "width": M, "l0": 150,
           "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu",
           "affine_connection": skip, "type": "sae"}  # fmt: skip
    cfg["type"] = "transcoder" if kind == "transcoder" else "sae"
    cfg = {key: value for key, value in {**cfg, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("told", ["config", "folder"])
def test_gemma_scope_2(tmp_path, kind, told):
    name = "layer_17_width_16k_l0_big"
    folder = second(tmp_path / (f"{kind}_all" if told == "folder" else "mine") / name, kind)
    if told == "folder":
        (folder / "config.json").unlink()
    loaded = jaxtc.load_transcoder(folder)
    assert (loaded.layer, loaded.input_site, loaded.output_site) == (17, *HOOKS[kind][2:])
    z = X @ SECOND["w_enc"] + SECOND["b_enc"]
    a = np.where((z > SECOND["threshold"]) & (z > 0), z, 0)
    close(loaded.encode(X), a)
    close(loaded(X), a @ SECOND["w_dec"] + SECOND["b_dec"])
    assert jaxtc.load_transcoder(folder.parent, 17, l0="big").layer == 17


def test_gemma_scope_2_that_nothing_describes(tmp_path):
    folder = second(tmp_path / "mine", "resid_post")
    (folder / "config.json").unlink()
    with pytest.raises(SiteError, match="Give input_site and output_site"):
        jaxtc.load_transcoder(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "topk"}, "its architecture is 'topk'"),
        ({"type": "crosscoder"}, "it is a crosscoder"),
        ({"type": "clt"}, "it is a clt"),
        ({"affine_connection": True}, "no affine_skip_connection"),
        ({"scale": 2}, "what scale = 2 does"),
        ({"hf_hook_point_out": "model.layers.18.output"}, "reads layer 17 and writes layer 18"),
        ({"hf_hook_point_out": f"{LAYER}.mlp.output"}, "autoencoder .* different places"),
    ],
)
def test_gemma_scope_2s_that_are_refused(tmp_path, changes, match):
    folder = second(tmp_path / "layer_17_width_16k_l0_big", "resid_post", **changes)
    with pytest.raises(WeightsError, match=match):
        jaxtc.load_transcoder(folder)


def test_gemma_scope_2s_layers(tmp_path):
    folder = second(tmp_path / "layer_5_width_16k_l0_big", "resid_post")
    with pytest.raises(SourceError, match="is of layer 17 by .*config.json.* layer 5"):
        jaxtc.load_transcoder(folder)
    loaded = jaxtc.load_transcoder(second(tmp_path / "x", "transcoder", skip=True))
    assert loaded.W_skip is not None and loaded.layer == 17
    hook = second(
        tmp_path / "y", "resid_post", hf_hook_point_in="vision.encoder", hf_hook_point_out=None
    )
    with pytest.raises(SiteError, match="hf_hook_point_in is 'vision.encoder'"):
        jaxtc.load_transcoder(hook)
    # A folder of its own, with a config.json: not a model's.
    assert jaxtc.load_transcoder(convert(tmp_path / "x", tmp_path / "tree")).layer == 17


# Gemma Scope's embedding, its canonical ones, and l0 by layer


@pytest.mark.parametrize("d", [24, 9])
def test_autoencoders_of_the_embedding(tmp_path, d):
    arrays = params(d, 60)
    place = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    file = write_tier(tmp_path, place, arrays)
    t = {key: torch.tensor(value, dtype=torch.float64) for key, value in arrays.items()}
    rows = torch.tensor(np.random.default_rng(3).standard_normal((6, d)))
    z = rows @ t["W_enc"] + t["b_enc"]
    a = z * (z > t["threshold"]) * (z > 0)
    y = a @ t["W_dec"] + t["b_dec"]
    site = (rows * d**0.5).numpy().astype(np.float32)
    root = tmp_path / "gemma-scope-2b-pt-res"
    own = {"input_site": "embed", "output_site": "embed"}
    moved = tmp_path / "mine" / "params.npz"
    moved.parent.mkdir()
    shutil.copy(file, moved)
    for load in (
        lambda: jaxtc.load_transcoder(root, path="embedding/width_4k/average_l0_6"),
        lambda: jaxtc.load_transcoder(file),
        lambda: jaxtc.load_transcoder(file, **own),
        lambda: jaxtc.load_transcoder(moved, **own),
        lambda: jaxtc.load_transcoder(file, mesh="model=1"),
    ):
        loaded = load()
        assert (loaded.input_site, loaded.output_site, loaded.layer) == ("embed", "embed", None)
        close(loaded.encode(site), a.numpy())
        close(loaded(site), y.numpy() * d**0.5)
    # Written, it acts on the site, and says so.
    again = jaxtc.load_transcoder(jaxtc.save_transcoder(loaded, root / "embedding" / "mine"))
    assert again.facts() == {**loaded.facts(), "source": again.source}
    for one in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert np.array_equal(getattr(again, one)[...], getattr(loaded, one)[...])
    with pytest.raises(SourceError, match="keeps transcoders by layer"):
        convert(file, tmp_path / "tree", layers=[0])


def test_canonical_and_l0_by_layer(tmp_path):
    root = tmp_path / "gemma-scope-9b-pt-att"
    tiers = {0: (20, 90, 115), 3: (64, 136), 7: (99,)}
    for layer, l0s in tiers.items():
        for l0 in l0s:
            write_tier(root, f"layer_{layer}/width_16k/average_l0_{l0}")
        write_tier(root, f"layer_{layer}/width_131k/average_l0_5")
    write_tier(root, "layer_7/width_65k/canonical")

    def l0s(*args, **kwargs):
        found = jaxtc.load_transcoders(root, *args, **kwargs)
        return {n: t.source.partition("width_")[2] for n, t in found.items()}

    assert l0s([0, 3], l0="canonical") == {0: "16k/average_l0_90", 3: "16k/average_l0_64"}
    assert l0s(l0="canonical", width="131k")[3] == "131k/average_l0_5"
    assert l0s([7], l0="canonical") == {7: "65k/canonical"}
    picked = {0: "16k/average_l0_20", 3: "16k/average_l0_64", 7: "16k/average_l0_99"}
    assert l0s(l0={0: 20, 3: 64, 7: "average_l0_99"}) == picked
    assert l0s(l0=[20, "64", 99]) == picked
    assert l0s([3, 0], l0=np.array([64, 20])) == {3: picked[3], 0: picked[0]}
    assert l0s([0, 3], l0=["canonical", 64]) == {0: "16k/average_l0_90", 3: picked[3]}
    tree = convert(root, tmp_path / "tree", layers=[0, 3], l0={0: 20, 3: 64})
    assert sorted(jaxtc.load_transcoders(tree)) == [0, 3]
    for given, match in [
        ({0: 20, 3: 64}, "l0 lacks 7; give one for each of the layers 0, 3, 7"),
        ({0: 20, 3: 64, 7: 99, 8: 1}, "l0 also has 8"),
        ([20, 64], "l0 is 2 values, expected one, one for each of the 3 layers"),
        (2.5, "l0 is None|l0 is 2.5"),
        ({0: 20, 3: 65, 7: 99}, "l0='65' for layer 3; there is '136', '5', '64'"),
    ]:
        with pytest.raises(SourceError, match=match):
            jaxtc.load_transcoders(root, l0=given)
    scope = tmp_path / "gemma-scope-2b-pt-transcoders"
    for l0 in (11, 117, 99):
        write_tier(scope, f"layer_20/width_16k/average_l0_{l0}")
    assert jaxtc.load_transcoder(scope, 20, l0="canonical").source.endswith("l0_11")


# Named, not mistaken


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("sae.pt", None, "pickle.*weights_only=True.*safetensors"),
        ("ae.bin", b"anything", "PyTorch.*pickle|pickle of PyTorch"),
        ("ae.pth", b"", "PyTorch.*pickle|pickle of PyTorch"),
        ("params.npz", None, "PyTorch.*pickle|pickle of PyTorch"),
        ("layer_1.safetensors", None, "PyTorch.*pickle|pickle of PyTorch"),
        ("old.safetensors", b"\x80\x02}q\x00(X", "PyTorch.*pickle|pickle of PyTorch"),
        ("model.gguf", b"GGUF\x03", "GGUF"),
        ("layer_1.safetensors", b"GGUF\x03\0\0\0", "is quantised weights of llama"),
        ("x.msgpack", b"..", "Flax"), ("x.npy", b"\x93NUMPY", "a single array of NumPy"),
    ],
)  # fmt: skip
def test_other_files_are_named(tmp_path, name, content, match):
    path = tmp_path / name
    if content is None:
        torch.save({key: torch.tensor(value) for key, value in SET.items()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises((SourceError, WeightsError), match=match) as error:
        jaxtc.load_transcoder(path, 1, input_site="mlp_in", output_site="mlp_out")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_pickles_is_named(tmp_path):
    for layer in range(3):
        torch.save({}, tmp_path / f"layer_{layer}.pt")
    with pytest.raises(SourceError, match=r"layer_0\.pt.*pickle of PyTorch"):
        jaxtc.load_transcoders(tmp_path)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_quantised_arrays_are_named(tmp_path, dtype):
    path = write(tmp_path / "layer_1.safetensors", {**SET, "W_enc": SET["W_enc"].astype(dtype)})
    with pytest.raises(WeightsError, match="W_enc has dtype [IU].*quantised"):
        jaxtc.load_transcoder(
            path, format="circuit-tracer", input_site="mlp_in", output_site="mlp_out"
        )
