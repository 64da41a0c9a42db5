"""Names of tensors as those who wrap or cut a Gemma-2 leave them, and what lies beside it."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
)

import jaxtc
from jaxtc.errors import SourceError, WeightsError
from jaxtc.parity import certify
from jaxtc.weights.names import parameter_names, published
from tests.support.checkpoints import IDS, SIZES, expected, logits, tensors, theirs, write
from tests.support.weights_files import same

CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("honest") / "m", tensors())
    return folder, jaxtc.load_model(folder, dtype="float32")


def inner(between: str):
    """Every module of a layer wrapped, as activation checkpointing and FSDP do."""
    return lambda name: ".".join(
        part + (f".{between}" if part.isdigit() or part == "self_attn" else "")
        for part in name.split(".")
    )


RENAMES = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled one": lambda name: f"module._orig_mod.{name}",
    "Lightning": lambda name: f"model.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "TRL": lambda name: f"pretrained_model.{name}",
    "images and text, transformers 4": lambda name: f"language_model.{name}",
    "images and text, transformers 5": lambda name: name.replace("model.", "model.language_model."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{inner('_fsdp_wrapped_module')(name)}",
    "activation checkpointing": inner("_checkpoint_wrapped_module"),
    "compiled layers": inner("_orig_mod"),
    "the backbone alone": lambda name: name.removeprefix("model."),
    "the backbone, compiled": lambda name: f"_orig_mod.{name.removeprefix('model.')}",
    "the backbone in a base_model": lambda name: f"base_model.{name.removeprefix('model.')}",
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", RENAMES)
def test_known_prefixes(honest, tmp_path, kind, sharded):
    source, model = honest
    rename = RENAMES[kind]
    assert all(published(rename(name.hf)) == name.hf for name in parameter_names(model.config))
    folder = shutil.copytree(source, tmp_path / "m")
    if sharded:
        jaxtc.save_model(model, folder, max_shard_size=6000)
        index = folder / "model.safetensors.index.json"
        raw = json.loads(index.read_text())
        raw["weight_map"] = {rename(k): v for k, v in raw["weight_map"].items()}
        index.write_text(json.dumps(raw))
    for file in folder.glob("*.safetensors"):
        save_file({rename(k): v for k, v in load_file(file).items()}, file)
    assert same(model, jaxtc.load_model(folder, dtype="float32"))
    # What is written has the usual names.
    back = jaxtc.convert(folder, tmp_path / "back", "safetensors")
    assert load_file(back / "model.safetensors").keys() == tensors().keys()


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_matrix_below_a_prefix(tmp_path, tied):
    state = {f"base_model.model.{k}": v for k, v in tensors().items()}
    head = theirs(tie_word_embeddings=False).lm_head.weight
    usual = write(
        tmp_path / "usual", tensors() | {"lm_head.weight": head}, tie_word_embeddings=tied
    )
    state["base_model.model.lm_head.weight"] = head
    folder = write(tmp_path / "m", state, tie_word_embeddings=tied)
    np.testing.assert_allclose(
        logits(jaxtc.load_model(folder, dtype="float32")), expected(usual), **CLOSE
    )


def test_a_backbone_that_transformers_saved(tmp_path):
    """As embedding models are published (Gemma2Model); AutoModelForCausalLM runs them too."""
    theirs().model.save_pretrained(tmp_path / "m", max_shard_size="9KB")
    model = jaxtc.load_model(tmp_path / "m", dtype="float32")
    np.testing.assert_allclose(logits(model), expected(tmp_path / "m"), **CLOSE)
    hidden = jaxtc.run(model, IDS, capture="final_norm", logits=None).activations["final_norm"]
    backbone = Gemma2Model.from_pretrained(tmp_path / "m", attn_implementation="eager")
    with torch.no_grad():
        right = backbone(torch.tensor([IDS])).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden, right, **CLOSE)
    assert certify(model=tmp_path / "m", prompts=[IDS], new_tokens=0).passed


@pytest.mark.parametrize("kind", [Gemma2ForSequenceClassification, Gemma2ForTokenClassification])
def test_another_head_is_named_and_left_out_on_request(tmp_path, kind):
    made = kind(theirs().config)
    made.model.load_state_dict(theirs().model.state_dict())
    made.save_pretrained(tmp_path / "m")
    with pytest.raises(WeightsError) as error:
        jaxtc.load_model(tmp_path / "m")
    assert "holds a Gemma-2, and beside it score." in str(error.value)
    assert "a head of a classifier or a reward model" in str(error.value)
    assert "ignore=['score." in str(error.value) and "--ignore" in str(error.value)
    model = jaxtc.load_model(tmp_path / "m", dtype="float32", ignore="score.*")
    with torch.no_grad():
        right = theirs()(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits(model), right, **CLOSE)
    with pytest.raises(WeightsError, match=r"score\.weight"):
        jaxtc.convert(tmp_path / "m", tmp_path / "refused")
    for to in ("safetensors", "orbax"):
        back = jaxtc.convert(tmp_path / "m", tmp_path / to, to, ignore=["score.*"])
        assert same(model, jaxtc.load_model(back, dtype="float32"))
    written = json.loads((tmp_path / "safetensors/config.json").read_text())
    assert written["architectures"] == ["Gemma2ForCausalLM"]
    with pytest.raises(WeightsError, match="score"):
        certify(model=tmp_path / "m", prompts=[IDS])


def test_a_value_head_of_trl(tmp_path):
    state = {f"pretrained_model.{k}": v for k, v in tensors().items()}
    state |= {"v_head.summary.weight": torch.ones(1, 24), "v_head.summary.bias": torch.ones(1)}
    folder = write(tmp_path / "m", state)
    with pytest.raises(WeightsError, match="v_head.summary.* a head of a value model"):
        jaxtc.load_model(folder)
    jaxtc.load_model(folder, ignore=("v_head.summary.bias", "v_head.*.weight"))


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.0.self_attn.q_proj.bias"])
def test_what_changes_the_numbers_is_not_offered_to_be_left_out(tmp_path, name):
    folder = write(tmp_path / "m", tensors() | {name: torch.ones(3)})
    with pytest.raises(WeightsError, match=f"{name} is not a tensor of this model") as error:
        jaxtc.load_model(folder)
    assert "ignore" not in str(error.value)


@pytest.mark.parametrize("ignore", [3, None, [None], {"score": 1}])
def test_ignore_takes_names(honest, tmp_path, ignore):
    for door in (jaxtc.load_model, lambda source, **k: jaxtc.convert(source, tmp_path / "x", **k)):
        with pytest.raises(SourceError, match="expected names of tensors"):
            door(honest[0], ignore=ignore)


def test_ignored_parameters_are_missing(honest):
    with pytest.raises(WeightsError, match="model.norm.weight is missing"):
        jaxtc.load_model(honest[0], ignore="model.norm.*")


def test_a_prefix_that_nobody_knows_is_named(tmp_path):
    folder = write(tmp_path / "m", {f"teacher.{k}": v for k, v in tensors().items()})
    with pytest.raises(WeightsError, match=r"names begin with 'teacher\.model\.'"):
        jaxtc.load_model(folder)


def test_two_models_in_one_file(tmp_path):
    state = tensors() | {f"module.{k}": v + 1 for k, v in tensors().items()}
    folder = write(tmp_path / "m", state)
    with pytest.raises(WeightsError, match="several tensors for one parameter.*module.model"):
        jaxtc.load_model(folder)
    model = jaxtc.load_model(folder, ignore="module.*", dtype="float32")
    with torch.no_grad():
        right = theirs()(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits(model), right, **CLOSE)


def test_parity_does_not_compare_with_random_weights(tmp_path):
    """transformers leaves what it does not find as it was drawn, with a note in its log."""
    folder = write(tmp_path / "m", {f"_orig_mod.{k}": v for k, v in tensors().items()})
    with pytest.raises(WeightsError, match="transformers does not find.*_orig_mod.model"):
        certify(model=folder, prompts=[IDS])


def test_parity_of_a_converted_one_says_what_to_do(honest, tmp_path):
    made = jaxtc.convert(honest[0], tmp_path / "orbax")
    with pytest.raises(SourceError, match="is a converted checkpoint, which transformers does not"):
        certify(model=made, prompts=[IDS])


def test_dtypes_mixed_in_one_file(tmp_path):
    """Norms in float32 beside matrices in bfloat16, a layer in float16: each as it is."""
    state = {
        k: v if "norm" in k else v.half() if ".1." in k else v.bfloat16()
        for k, v in tensors().items()
    }
    folder = write(tmp_path / "m", state)
    model = jaxtc.load_model(folder, dtype="float32")
    np.testing.assert_allclose(logits(model), expected(folder), **CLOSE)
    made = jaxtc.convert(folder, tmp_path / "orbax")
    assert same(model, jaxtc.load_model(made, dtype="float32"))
    back = jaxtc.convert(made, tmp_path / "back", "safetensors")
    for name, tensor in load_file(back / "model.safetensors").items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])


def test_sizes_that_no_prefix_explains(tmp_path):
    folder = write(tmp_path / "m", tensors(), num_hidden_layers=SIZES["num_hidden_layers"] + 1)
    with pytest.raises(WeightsError, match="layers.2.*is missing") as error:
        jaxtc.load_model(folder)
    assert "begin with" not in str(error.value)


def test_a_file_instead_of_the_folder_converted(honest):
    with pytest.raises(SourceError, match="give the folder that holds it"):
        jaxtc.convert(honest[0] / "model.safetensors", "nowhere")
