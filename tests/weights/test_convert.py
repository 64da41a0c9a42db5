"""Conversions there and back give the same bits, and the tools they are for read the result."""

import hashlib
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
import pytest
from safetensors.numpy import load_file

import jaxtc
from jaxtc.errors import JaxtcError, SourceError, WeightsError
from jaxtc.weights.checkpoints.sidecar import read_sidecar, sha256
from jaxtc.weights.conversion.convert import convert
from jaxtc.weights.files.safetensors import SafetensorsFile
from jaxtc.weights.names import parameter_names
from tests.support import tiny
from tests.support.weights_files import (
    CONFIG,
    available_layers,
    params,
    random_model,
    same,
    write_tier,
)
from tests.weights.killed_conversions import contents


@pytest.fixture(params=["bfloat16", "float32", "float16"])
def hf(request, tmp_path):
    """A model with a tokenizer, in several files."""
    model = random_model(jnp.dtype(request.param))
    return jaxtc.save_model(model, tmp_path / "hf", tiny.tokenizer(), max_shard_size=9000)


def test_a_model_there_and_back(hf, tmp_path):
    tree = convert(hf, tmp_path / "tree")
    back = convert(tree, tmp_path / "back", to="safetensors", max_shard_size=9000)
    assert contents(back) == contents(hf)
    assert read_sidecar(convert(back, tmp_path / "again")).content == read_sidecar(tree).content
    for dtype in ("float32", "bfloat16"):
        assert same(jaxtc.load_model(tree, dtype=dtype), jaxtc.load_model(hf, dtype=dtype))
    assert jaxtc.load_tokenizer(tree).encode("the capital") == tiny.tokenizer().encode(
        "the capital"
    )


def test_contents_are_the_same_however_often_and_from_wherever(hf, tmp_path):
    first = read_sidecar(convert(hf, tmp_path / "a"))
    again = read_sidecar(convert(hf, tmp_path / "b"))
    assert again.encode() == first.encode()
    model = jaxtc.load_model(hf, dtype=json.loads((hf / "config.json").read_bytes())["dtype"])
    saved = jaxtc.save_checkpoint(model, tmp_path / "c", tiny.tokenizer())
    assert read_sidecar(saved).content == first.content


def test_the_hashes_are_of_the_elements_in_c_order(hf, tmp_path):
    tree = convert(hf, tmp_path / "tree")
    found = read_sidecar(tree).arrays
    for file in hf.glob("*.safetensors"):
        raw = load_file(file)
        for name in parameter_names(CONFIG):
            if name.hf in raw:
                digest = hashlib.sha256(raw[name.hf].tobytes()).hexdigest()
                assert found[name.ours].sha256 == digest
                turned = np.asfortranarray(raw[name.hf])
                assert sha256(turned) == digest


def test_orbax_restores_it(hf, tmp_path, caplog):
    tree = convert(hf, tmp_path / "tree")
    expected = {}
    for file in hf.glob("*.safetensors"):
        expected |= load_file(file)
    names = parameter_names(CONFIG)
    with caplog.at_level(logging.WARNING):
        for restored in (
            ocp.StandardCheckpointer().restore(tree / "state"),
            ocp.PyTreeCheckpointer().restore(tree / "state"),
            v1.load(tree),
        ):
            flat = flatten(restored)
            assert sorted(flat) == sorted(name.ours for name in names)
            for name in names:
                value = expected[name.hf].reshape(name.shape)
                assert flat[name.ours].dtype == value.dtype
                np.testing.assert_array_equal(flat[name.ours], value)
    assert not [record for record in caplog.records if record.name in ("orbax", "absl")]
    # Placed by a sharding, as jax's arrays.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), v1.load(tree)
    )
    placed = flatten(v1.load(tree, shapes))
    assert all(isinstance(x, jax.Array) and x.sharding == here for x in placed.values())
    np.testing.assert_array_equal(placed[names[0].ours], expected[names[0].hf])


def flatten(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def test_transformers_loads_what_came_back_with_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    def load(folder):
        return Gemma2ForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")

    given = Gemma2ForCausalLM._from_config(load_config(), dtype=torch.bfloat16)
    given.save_pretrained(tmp_path / "hf", max_shard_size="20kB")
    tiny.tokenizer().save_pretrained(tmp_path / "hf")
    tree = convert(tmp_path / "hf", tmp_path / "tree")
    back = convert(tree, tmp_path / "back", to="safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    tokens = torch.tensor([[2, 5, 9, 11, 3, 7]])
    before, after = (load(folder)(tokens).logits for folder in (tmp_path / "hf", back))
    assert before.dtype == torch.bfloat16
    assert torch.equal(before, after)
    assert AutoTokenizer.from_pretrained(back).encode("the city") == tiny.tokenizer().encode(
        "the city"
    )


def load_config():
    from transformers import Gemma2Config

    return Gemma2Config(**CONFIG.to_dict())


def test_another_dtype_is_said_in_the_config(hf, tmp_path):
    stored = json.loads((hf / "config.json").read_bytes())
    tree = convert(hf, tmp_path / "tree", dtype="float32")
    assert read_sidecar(tree).dtype == "float32"
    back = convert(tree, tmp_path / "back", to="safetensors", dtype="bfloat16")
    told = json.loads((back / "config.json").read_bytes())
    assert told == stored | {"dtype": "bfloat16"}
    with SafetensorsFile(back / "model.safetensors") as file:
        assert {entry.dtype for entry in file.entries.values()} == {jnp.dtype("bfloat16")}
    expected = jaxtc.load_model(hf, dtype="bfloat16")
    assert same(jaxtc.load_model(back, dtype="bfloat16"), expected)


def test_values_too_large_for_the_dtype_are_not_converted(tmp_path):
    model = random_model()
    model.layers[1].mlp.up[...] = model.layers[1].mlp.up[...].at[3, 3].set(1e6)
    jaxtc.save_model(model, tmp_path / "hf")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.up_proj.weight holds values too large"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="float16")
    model.layers[0].mlp.up[...] = model.layers[0].mlp.up[...].at[3, 3].set(np.nan)
    jaxtc.save_model(model, tmp_path / "hf")
    with pytest.raises(WeightsError, match=r"layers.0.mlp.up_proj.weight holds NaN"):
        convert(tmp_path / "hf", tmp_path / "nan")


@pytest.mark.parametrize("to", ["npz", "circuit-tracer"])
def test_transcoders_there_and_back(tmp_path, to):
    for layer in (0, 1, 2):
        given = params() | {"b_dec": np.full(24, layer, np.float32)}
        given["threshold"] = np.abs(given["threshold"])
        write_tier(
            tmp_path / "gemma-scope-2b-pt-transcoders",
            f"layer_{layer}/width_60/average_l0_{7 + layer}",
            given,
        )
    tree = convert(tmp_path / "gemma-scope-2b-pt-transcoders", tmp_path / "tree")
    assert available_layers(tree) == [0, 1, 2]
    out = convert(tree, tmp_path / "out", to=to)
    again = convert(out, tmp_path / "again")
    for source in (tree, out, again):
        found = jaxtc.load_transcoders(source)
        for layer, transcoder in jaxtc.load_transcoders(
            tmp_path / "gemma-scope-2b-pt-transcoders"
        ).items():
            found[layer].source = transcoder.source
            assert same(found[layer], transcoder)
    if to == "npz":
        for layer in (0, 1, 2):
            file = f"layer_{layer}/width_60/average_l0_{7 + layer}/params.npz"
            with (
                np.load(out / file) as back,
                np.load(tmp_path / "gemma-scope-2b-pt-transcoders" / file) as given,
            ):
                assert sorted(back) == sorted(given)
                assert all(np.array_equal(back[key], given[key]) for key in given)
        assert contents(convert(again, tmp_path / "third", to="npz")) == contents(out)
    else:
        direct = convert(out, tmp_path / "direct", to="npz")
        assert contents(direct) == contents(convert(again, tmp_path / "third", to="npz"))
        file = load_file(out / "layer_1.safetensors")
        with np.load(
            tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_60/average_l0_8/params.npz"
        ) as given:
            np.testing.assert_array_equal(file["W_enc"], given["W_enc"].T)
            np.testing.assert_array_equal(file["W_dec"], given["W_dec"])
            np.testing.assert_array_equal(file["activation_function.threshold"], given["threshold"])
        assert (out / "config.yaml").read_text().splitlines() == [
            'model_name: "google/gemma-2-2b"',
            'model_kind: "transcoder_set"',
            'feature_input_hook: "ln2.hook_normalized"',
            'feature_output_hook: "hook_mlp_out"',
        ]


def variant(dtype: str, **options) -> jaxtc.Transcoder:
    """A random transcoder of layer 3."""
    rng = np.random.default_rng(2)
    abstract = jaxtc.Transcoder.abstract(
        24, 60, dtype=jnp.dtype(dtype), layer=3, source="here", **options
    )
    return jax.tree.map(lambda x: jnp.asarray(np.abs(rng.normal(size=x.shape)), x.dtype), abstract)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_variants_keep_their_sites_and_their_bits(tmp_path, dtype, activation):
    given = variant(
        dtype, activation=activation, skip=True, input_site="mlp_in", output_site="mlp_out"
    )
    tree = jaxtc.save_checkpoint({3: given}, tmp_path / "tree")
    assert same(jaxtc.load_transcoder(tree, dtype=dtype), given)
    out = convert(tree, tmp_path / "out", to="circuit-tracer")
    assert 'feature_input_hook: "mlp.hook_in"' in (out / "config.yaml").read_text()
    back = convert(out, tmp_path / "back")
    assert read_sidecar(back).dtype == dtype
    found = jaxtc.load_transcoder(back, 3, dtype=dtype)
    found.source = "here"
    assert same(found, given)
    with pytest.raises(SourceError, match="has no skip connection"):
        convert(tree, tmp_path / "npz", to="npz")


def test_sites_of_an_npz(tmp_path):
    given = variant("float32", input_site="resid_post", output_site="resid_post")
    tree = jaxtc.save_checkpoint({3: given}, tmp_path / "tree")
    assert jaxtc.load_transcoder(tree).input_site == "resid_post"
    assert jaxtc.load_transcoder(tree, input_site="resid_pre").input_site == "resid_pre"
    out = convert(tree, tmp_path / "npz", to="npz")
    again = jaxtc.load_transcoder(out)
    again.source = given.source
    assert same(again, given)


def test_layers_and_their_errors(tmp_path):
    given = {layer: variant("float32") for layer in (3, 5)}
    tree = jaxtc.save_checkpoint(given, tmp_path / "tree")
    one = convert(tree, tmp_path / "one", layers=[5])
    assert available_layers(one) == [5]
    assert jaxtc.load_transcoder(one).layer == 5
    with pytest.raises(SourceError, match="say which layer"):
        jaxtc.load_transcoder(tree)
    with pytest.raises(SourceError, match="no transcoder for layer 4; it has layers 3, 5"):
        jaxtc.load_transcoder(tree, 4)
    with pytest.raises(SourceError, match="no transcoder for layer 4"):
        convert(tree, tmp_path / "none", layers=[4])
    with pytest.raises(SourceError, match="layers is empty"):
        convert(tree, tmp_path / "none", layers=[])
    with pytest.raises(SourceError, match="layers is '3', expected 'all'"):
        convert(tree, tmp_path / "none", layers="3")
    with pytest.raises(SourceError, match="layer is 'x', expected a whole number"):
        convert("embedded", tmp_path / "none", kind="transcoders", layers=["x"])
    found = convert("embedded", tmp_path / "numpy", kind="transcoders", layers=np.arange(2))
    assert available_layers(found) == [0, 1]
    with pytest.raises(SourceError, match="give layer only"):
        jaxtc.load_transcoder(tree, 3, l0=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "not converted to 'gguf'"),
        ({"to": "npz"}, "'npz' is not a format for a model"),
        ({"kind": "tokens"}, "kind is 'tokens'"),
        ({"dtype": "int8"}, "cannot be loaded as"),
        ({"layers": [3]}, "layers is for transcoders"),
        ({"revision": "main"}, "applies to hub ids only"),
        ({"max_shard_size": 0}, "expected at least 1"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    jaxtc.save_model(random_model(), tmp_path / "hf")
    with pytest.raises(JaxtcError, match=message):
        convert(tmp_path / "hf", tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_model_is_no_transcoder_and_the_other_way_round(tmp_path):
    model = jaxtc.save_checkpoint(random_model(), tmp_path / "model")
    transcoders = jaxtc.save_checkpoint({3: variant("float32")}, tmp_path / "transcoders")
    with pytest.raises(SourceError, match="holds transcoders, not a model"):
        jaxtc.load_model(transcoders)
    with pytest.raises(SourceError, match="holds a model, not transcoders"):
        jaxtc.load_transcoder(model)
    with pytest.raises(SourceError, match="is not a format for transcoders"):
        convert(transcoders, tmp_path / "out", to="safetensors")


def in_the_hubs_cache(folder, tmp_path):
    """A folder as the hub's client keeps it: links to blobs named by their hashes."""
    repo = tmp_path / "models--owner--model"
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    for place in (repo / "blobs", snapshot):
        place.mkdir(parents=True)
    for path in folder.iterdir():
        raw = path.read_bytes()
        git = hashlib.sha1(f"blob {len(raw)}\0".encode() + raw).hexdigest()
        name = hashlib.sha256(raw).hexdigest() if path.suffix == ".safetensors" else git
        shutil.copy(path, repo / "blobs" / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


@pytest.mark.parametrize("file", [None, "config.json", "model.safetensors"])
def test_the_hubs_own_hashes(tmp_path, file):
    plain = jaxtc.save_model(random_model(), tmp_path / "hf", tiny.tokenizer())
    for use in (jaxtc.load_model, lambda f, verify: convert(f, tmp_path / "out", verify=verify)):
        with pytest.raises(WeightsError, match="nothing says what the hub's hashes of config.json"):
            use(plain, verify=True)
    snapshot = in_the_hubs_cache(plain, tmp_path)
    if file is None:
        jaxtc.load_model(snapshot, verify=True)
        tree = convert(snapshot, tmp_path / "out", verify=True)
        assert read_sidecar(tree).revision == snapshot.name
        return
    raw = bytearray((snapshot / file).read_bytes())
    raw[-3] ^= 1
    (snapshot / file).resolve().write_bytes(raw)
    for use in (jaxtc.load_model, lambda f, verify: convert(f, tmp_path / "out", verify=verify)):
        with pytest.raises(WeightsError, match=f"{file} in .* is not what the Hugging Face hub"):
            use(snapshot, verify=True)


def test_the_hashes_of_a_folder_that_was_downloaded(tmp_path):
    folder = jaxtc.save_model(random_model(), tmp_path / "hf")
    kept = folder / ".cache/huggingface/download"
    kept.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (kept / f"{name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    jaxtc.load_model(folder, verify=True)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(WeightsError, match="model.safetensors in .* is not what"):
        jaxtc.load_model(folder, verify=True)
