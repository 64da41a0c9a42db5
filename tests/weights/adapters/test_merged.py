"""LoRA adapters merged at load: PEFT's own numbers, on one device and on a mesh."""

import contextlib
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxtc
from jaxtc.errors import SourceError
from jaxtc.sharding.rules import variables
from jaxtc.weights.load_model import load_config
from jaxtc.weights.names import parameter_names
from tests.weights.adapters.cases import CASES, DATA, DOUBLED, IDS, SIZES, base, merged, train

LINES = r"PeftModel\.from_pretrained.*merge_and_unload"


def write_base(folder, name="plain"):
    """The base model of a case in a folder."""
    folder.mkdir(parents=True)
    tied = name not in ("untied", "resized")
    config = jaxtc.Gemma2Config(**SIZES, tie_word_embeddings=tied).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = base(name)
    if name.startswith("bfloat16"):
        tensors = {hf: x.astype(ml_dtypes.bfloat16) for hf, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(name of a case) -> the folder of its base model."""
    made = {}
    root = tmp_path_factory.mktemp("bases")

    def get(name="plain"):
        key = name if name.startswith("bfloat16") else str(name in ("untied", "resized"))
        if key not in made:
            made[key] = write_base(root / key, name)
        return made[key]

    return get


def doubled(name):
    """What is told of a case whose embedding is its output matrix."""
    return pytest.warns(UserWarning, match="both") if name in DOUBLED else contextlib.nullcontext()


def same_logits(model, expected):
    ours = np.asarray(jaxtc.run(model, jnp.asarray([IDS])).logits[0])
    assert ours.shape == expected.shape
    assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("bfloat16")])
def test_logits_are_those_of_pefts_merge(name, bases):
    with doubled(name):
        model = jaxtc.load_model(DATA / name, base=bases(name), dtype="float32")
    same_logits(model, np.load(DATA / name / "merged.npz")["logits"])
    plain = jaxtc.load_model(bases(name), dtype="float32")
    plain = np.asarray(jaxtc.run(plain, jnp.asarray([IDS])).logits[0])
    theirs = np.load(DATA / name / "merged.npz")["logits"][:, : plain.shape[1]]
    assert np.abs(theirs - plain).max() > 0.1  # the adapter matters


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-dora"])
def test_bfloat16_is_rounded_as_peft_rounds_it(name, bases):
    model = jaxtc.load_model(DATA / name, base=bases(name), dtype="bfloat16")
    values = dict(variables(model))
    known = np.load(DATA / name / "merged.npz")
    checked = 0
    for one in parameter_names(model.config):
        if one.hf in known.files:
            theirs = known[one.hf].reshape(one.shape)
            ours = np.asarray(values[one.ours][...])
            # Sums in another order may fall on the other side of a tie.
            assert np.mean(ours == theirs) > 0.995, one.hf
            assert np.allclose(ours.astype(np.float32), theirs, rtol=2**-7)
            checked += len(one.shape) > 1
    assert checked == 8


def test_in_chunks_the_numbers_are_the_same(bases, monkeypatch):
    for name in ("plain", "dora", "dora-embedding"):
        with doubled(name):
            whole = jaxtc.load_model(DATA / name, base=bases(name), dtype="float32")
        monkeypatch.setattr("jaxtc.weights.adapters.merge.CHUNK_BYTES", 100)
        with doubled(name):
            chunks = jaxtc.load_model(DATA / name, base=bases(name), dtype="float32")
        monkeypatch.undo()
        for (path, a), (_, b) in zip(variables(whole), variables(chunks), strict=True):
            assert np.allclose(a[...], b[...], rtol=1e-6, atol=1e-7), path


@pytest.mark.parametrize("to", ["safetensors", "orbax"])
@pytest.mark.parametrize("name", ["plain", "saved-head", "resized"])
def test_converted_it_is_a_model_of_its_own(name, to, bases, tmp_path):
    expected = jaxtc.load_model(DATA / name, base=bases(name), dtype="float32")
    out = jaxtc.convert(DATA / name, tmp_path / "out", to=to, base=bases(name))
    loaded = jaxtc.load_model(out, dtype="float32")
    assert loaded.config == expected.config
    for (path, a), (_, b) in zip(variables(expected), variables(loaded), strict=True):
        assert np.array_equal(a[...], b[...]), path


def test_a_converted_base_is_read_too(bases, tmp_path):
    out = jaxtc.convert(bases(), tmp_path / "base", to="orbax")
    model = jaxtc.load_model(DATA / "plain", base=out, dtype="float32")
    same_logits(model, np.load(DATA / "plain" / "merged.npz")["logits"])


def copied(name, to, **settings):
    """An adapter's folder with other settings."""
    shutil.copytree(DATA / name, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return to


def rewrite(folder, change):
    """Change the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    return folder


@pytest.mark.parametrize("named", ["absolute", "../base", "base", "./base"])
def test_the_base_is_found_by_its_name(named, bases, tmp_path):
    folder = tmp_path / "adapter"
    said = str(tmp_path / "base") if named == "absolute" else named
    copied("plain", folder, base_model_name_or_path=said)
    shutil.copytree(
        bases(), tmp_path / "base" if named in ("absolute", "../base") else folder / said
    )
    model = jaxtc.load_model(folder, dtype="float32")
    same_logits(model, np.load(DATA / "plain" / "merged.npz")["logits"])
    assert load_config(folder) == model.config


def test_the_base_is_seen_from_here_first(bases, tmp_path, monkeypatch):
    shutil.copytree(bases(), tmp_path / "here/base")
    folder = copied("plain", tmp_path / "there/adapter", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path / "here")
    same_logits(
        jaxtc.load_model(folder, dtype="float32"), np.load(DATA / "plain" / "merged.npz")["logits"]
    )


def test_a_path_out_of_the_adapters_surroundings_is_not_followed(bases, tmp_path):
    shutil.copytree(bases(), tmp_path / "base")
    far = "../../base"
    folder = copied("plain", tmp_path / "one/adapter", base_model_name_or_path=far)
    with pytest.raises(SourceError, match="base="):
        jaxtc.load_model(folder)
    link = tmp_path / "one/linked"
    link.symlink_to(tmp_path / "base")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../linked"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match="base="):
        jaxtc.load_model(folder)


def test_the_merge_is_that_of_the_installed_peft(bases, tmp_path):
    """With peft installed, all cases anew."""
    pytest.importorskip("peft")
    import torch

    for name in CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(name, tmp_path / name)
            theirs = merged(name, tmp_path / name).float()
            with torch.no_grad():
                expected = theirs(torch.tensor([IDS])).logits[0].numpy()
            dtype = "bfloat16" if name.startswith("bfloat16") else "float32"
            ours = jaxtc.load_model(tmp_path / name, base=bases(name), dtype=dtype)
        if dtype == "bfloat16":
            ours = jax.tree.map(lambda x: x.astype(jnp.float32), ours)
            found = np.asarray(jaxtc.run(ours, jnp.asarray([IDS])).logits[0])
            assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
        else:
            same_logits(ours, expected)
