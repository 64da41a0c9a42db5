"""Models from and to folders: exact round trips, and every damaged folder refused by name."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import jaxtc
from jaxtc.errors import ConfigError, JaxtcError, SourceError, WeightsError
from jaxtc.sharding.rules import variables
from jaxtc.weights.names import parameter_names
from jaxtc.weights.sources import resolve
from tests.support.weights_files import CONFIG, random_model, same

SMALL_SHARDS = 6000  # bytes: several files, of one tensor and of many


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def folder(model, tmp_path):
    return jaxtc.save_model(model, tmp_path / "model")


@pytest.fixture
def sharded(model, tmp_path):
    return jaxtc.save_model(model, tmp_path / "sharded", max_shard_size=SMALL_SHARDS)


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, values):
    safetensors.numpy.save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_a_shard_size_that_is_none_is_refused_before_anything_is_written(tmp_path, size):
    with pytest.raises(SourceError, match="max_shard_size is .* expected at least 1"):
        jaxtc.save_model(random_model(), tmp_path / "m", max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard", [10**9, SMALL_SHARDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(tmp_path, dtype, shard):
    model = random_model(jnp.dtype(dtype))
    folder = jaxtc.save_model(model, tmp_path / "m", max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) == 1 or shard == SMALL_SHARDS
    loaded = jaxtc.load_model(folder, dtype=dtype)
    assert same(model, loaded) and loaded.config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(jaxtc.Gemma2.abstract(CONFIG))


def test_what_was_loaded_runs(model, folder):
    tokens = jnp.asarray([[2, 5, 7]])
    logits = [jaxtc.run(m, tokens).logits for m in (model, jaxtc.load_model(folder))]
    assert (logits[0] == logits[1]).all()


@pytest.mark.parametrize("shard", [10**9, SMALL_SHARDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_what_we_write(tmp_path, dtype, shard):
    model = random_model(jnp.dtype(dtype))
    folder = jaxtc.save_model(model, tmp_path / "m", max_shard_size=shard)
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(folder)
    assert theirs.dtype == getattr(torch, dtype)
    state = {k: v.float().numpy() for k, v in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    leaves = dict(variables(model))
    names = parameter_names(CONFIG)
    assert {name.hf for name in names} == set(state)
    for name in names:
        ours = np.asarray(leaves[name.ours][...], np.float32).reshape(name.hf_shape)
        assert np.array_equal(ours, state[name.hf]), name
    config = jaxtc.Gemma2Config.from_dict(theirs.config.to_dict())
    assert config == CONFIG


@pytest.mark.parametrize("shard", ["1GB", "6KB"])
def test_we_read_what_transformers_writes(model, folder, tmp_path, shard):
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (shard == "6KB")
    assert same(model, jaxtc.load_model(tmp_path / "theirs", dtype="float32"))


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32"])
def test_casts_are_those_of_numpy(folder, monkeypatch, stored, wanted):
    # 7 elements or a row, so that tensors are read in many chunks.
    monkeypatch.setattr("jaxtc.weights.files.shards.CHUNK_BYTES", 7 * np.dtype(stored).itemsize)
    values = {k: v.astype(stored) for k, v in tensors(folder).items()}
    rewrite(folder, values)
    loaded = jaxtc.load_model(folder, dtype=wanted)
    embedding = np.asarray(loaded.embed.weight[...])
    assert embedding.dtype == wanted
    assert np.array_equal(embedding, values["model.embed_tokens.weight"].astype(wanted))


def test_default_dtype_is_float32_on_the_cpu(tmp_path):
    folder = jaxtc.save_model(random_model(jnp.bfloat16), tmp_path / "m")
    assert jaxtc.load_model(folder).dtype == (
        jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    )


@pytest.mark.parametrize("dtype", ["int8", "float31", "float64", "bool"])
def test_dtype_that_weights_cannot_have(folder, dtype):
    with pytest.raises(WeightsError, match=dtype):
        jaxtc.load_model(folder, dtype=dtype)


def test_progress_counts_every_byte(folder, model):
    calls = []
    jaxtc.load_model(folder, dtype="float32", progress=lambda *call: calls.append(call))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert calls[-1] == (total, total)
    done = [call[0] for call in calls]
    assert done == sorted(done) and len(done) == len(jax.tree.leaves(model))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (transformers.GemmaConfig(), "gemma"),
        (transformers.Gemma3TextConfig(), "gemma3_text"),
        (transformers.LlamaConfig(), "llama"),
    ],
)
def test_other_architectures_are_refused(folder, config, named):
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=f"'{named}'.*Gemma-2 only"):
        jaxtc.load_model(folder)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match="no config.json"):
        jaxtc.load_model(folder)


def test_folder_without_weights_says_what_is_there(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="neither model.safetensors.*pytorch_model.bin"):
        jaxtc.load_model(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "gemma", "/nowhere", "a/../b"])
def test_source_that_is_nothing(source, monkeypatch):
    monkeypatch.setattr("jaxtc.weights.sources.hub.hf_hub_download", None)  # the hub is never asked
    with pytest.raises(SourceError, match="folder"):
        jaxtc.load_model(source)


def test_file_instead_of_folder(folder):
    with pytest.raises(SourceError, match="is a file"):
        jaxtc.load_model(folder / "config.json")


def test_revision_of_a_folder(folder):
    with pytest.raises(SourceError, match="revision='main' applies to hub ids only"):
        jaxtc.load_model(folder, revision="main")


@pytest.mark.parametrize("kind", ["model", "transcoders"])
def test_embedded_that_is_not_there_says_how_to_make_it(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(resolve, "EMBEDDED_DATA", tmp_path)
    call = {"model": jaxtc.load_model, "transcoders": jaxtc.load_transcoders}[kind]
    with pytest.raises(SourceError, match="jaxtc embedded train"):
        call("embedded")


def test_missing_shards_are_named(sharded):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 3
    for name in shards[1:3]:
        (sharded / name).unlink()
    with pytest.raises(WeightsError) as error:
        jaxtc.load_model(sharded)
    assert all(name in str(error.value) for name in shards[1:3])
    assert shards[0] not in str(error.value)


def set_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "target",
    ["../stolen.safetensors", "/etc/x.safetensors", "..\\stolen.safetensors", "sub/x.safetensors",
     "C:\\x.safetensors", "model.bin", "", None, ["a"], "a\0.safetensors"],
)  # fmt: skip
def test_index_that_leaves_its_folder(sharded, target):
    (sharded.parent / "stolen.safetensors").write_bytes(b"")
    set_index(sharded, lambda shards: shards.update({"model.norm.weight": target}))
    with pytest.raises(WeightsError, match="in its own folder"):
        jaxtc.load_model(sharded)


def test_shard_that_is_a_link_out_of_the_folder(sharded):
    shard = min(sharded.glob("*.safetensors"))
    shard.rename(sharded.parent / "elsewhere.safetensors")
    shard.symlink_to(sharded.parent / "elsewhere.safetensors")
    with pytest.raises(WeightsError, match="a link to"):
        jaxtc.load_model(sharded)


def test_links_of_the_hub_cache_are_followed(model, sharded, tmp_path):
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert same(model, jaxtc.load_model(snapshot, dtype="float32"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_that_is_none(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="index"):
        jaxtc.load_model(sharded)


def test_index_and_shards_that_disagree(sharded):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))

    def change(entries):
        entries.pop("model.norm.weight")
        entries["model.embed_tokens.weight"] = shards[-1]

    set_index(sharded, change)
    with pytest.raises(WeightsError) as error:
        jaxtc.load_model(sharded)
    message = str(error.value)
    assert "model.norm.weight" in message and "not in the index" in message
    assert f"model.embed_tokens.weight is not in {shards[-1]}" in message


def test_tensor_in_two_shards(sharded):
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    both = {**safetensors.numpy.load_file(first), **safetensors.numpy.load_file(last)}
    safetensors.numpy.save_file(both, last)
    with pytest.raises(WeightsError, match=r"is in model-.* but in model-.* by the index"):
        jaxtc.load_model(sharded)


def test_all_that_is_wrong_with_the_tensors_is_one_error(folder):
    values = tensors(folder)
    q, k = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
    del values["model.norm.weight"], values["model.layers.0.mlp.up_proj.weight"]
    values["model.layers.2.input_layernorm.weight"] = np.zeros(24, np.float32)
    values[q] = np.ascontiguousarray(values[q].T)
    values[k] = values[k].astype(np.int8)
    rewrite(folder, values)
    with pytest.raises(WeightsError) as error:
        jaxtc.load_model(folder)
    message = str(error.value)
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.mlp.up_proj.weight is missing" in message
    assert "model.layers.2.input_layernorm.weight is not a tensor of this model" in message
    assert f"{q} has shape (24, 32), not (32, 24) (NH, D)" in message
    assert f"{k} has dtype I8" in message
    assert "\n" not in message


def test_config_of_another_size_is_a_mismatch_not_a_guess(folder):
    edit_config(folder, num_hidden_layers=3, layer_types=None, intermediate_size=48)
    with pytest.raises(WeightsError) as error:
        jaxtc.load_model(folder)
    assert "model.layers.2.self_attn.o_proj.weight is missing" in str(error.value)
    assert "has shape (40, 24), not (48, 24) (F, D)" in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite(folder, monkeypatch, bad, stored):
    monkeypatch.setattr("jaxtc.weights.files.shards.CHUNK_BYTES", 40)
    values = {k: v.astype(stored) for k, v in tensors(folder).items()}
    names = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    for name, place in zip(names, (0, -1), strict=True):  # in the first chunk, in the last
        values[name].reshape(-1)[place] = bad
    rewrite(folder, values)
    for dtype in ("float32", "bfloat16", "float16"):
        with pytest.raises(WeightsError) as error:
            jaxtc.load_model(folder, dtype=dtype)
        assert all(f"{name} holds NaN or infinity" in str(error.value) for name in names)
        assert "model.embed_tokens.weight" not in str(error.value)


def test_values_too_large_for_the_dtype(folder):
    values = tensors(folder)
    values["model.norm.weight"][3] = 1e6
    rewrite(folder, values)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight holds values too large for float"):
        jaxtc.load_model(folder, dtype="float16")
    assert jaxtc.load_model(folder, dtype="float32").final_norm.weight[3] == 1e6


def test_saving_replaces_an_earlier_checkpoint_and_nothing_else(model, sharded):
    other = jaxtc.Gemma2.abstract(CONFIG)
    other = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), other)
    jaxtc.save_model(other, sharded)
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in sharded.iterdir()) == names
    assert same(other, jaxtc.load_model(sharded, dtype="float32"))

    (sharded / "thesis.tex").write_text("years of work")
    with pytest.raises(SourceError, match="thesis.tex"):
        jaxtc.save_model(model, sharded)
    assert same(other, jaxtc.load_model(sharded, dtype="float32"))
    assert [p.name for p in sharded.parent.iterdir()] == [sharded.name]


class _Failing:
    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")


def test_saving_that_fails_leaves_what_was_there(model, folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(SourceError, match="No space left"):
        jaxtc.save_model(model, folder, tokenizer=_Failing())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_moving_that_fails_leaves_what_was_there(model, folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    rename = os.rename

    def fail_for_the_new_one(source, target):
        if target == folder and not str(source).endswith(".old"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    with pytest.raises(SourceError, match="Input/output error"):
        jaxtc.save_model(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_saving_onto_a_file(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="is a file"):
        jaxtc.save_model(model, tmp_path / "file")


def test_tokenizer_round_trip(model, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<bos>": 0, "<unk>": 1, "Texas": 2}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        bos_token="<bos>", unk_token="<unk>",
    )  # fmt: skip
    folder = jaxtc.save_model(model, tmp_path / "m", made)
    loaded = jaxtc.load_tokenizer(folder)
    assert loaded.convert_tokens_to_ids("Texas") == 2 and loaded.bos_token == "<bos>"
    assert same(model, jaxtc.load_model(folder, dtype="float32"))


def test_tokenizer_that_is_missing_or_damaged(folder):
    with pytest.raises(SourceError, match="no tokenizer"):
        jaxtc.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="cannot be loaded"):
        jaxtc.load_tokenizer(folder)


def test_tokenizer_code_in_a_folder_is_never_run(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}})
    )
    with pytest.raises(JaxtcError):
        jaxtc.load_tokenizer(folder)
    assert not (folder / "ran").exists()
