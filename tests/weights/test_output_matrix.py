"""Where the output matrix is: the embedding under either name, or a matrix of its own."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_model
from safetensors.numpy import load_file
from safetensors.torch import save_model
from transformers import Gemma2ForCausalLM

import jaxtc
from jaxtc.errors import WeightsError
from jaxtc.memory.parts import count_parameters
from jaxtc.parity import certify
from jaxtc.sharding.rules import partition, variables
from jaxtc.transcoders.promoted import promoted_tokens
from jaxtc.weights.files import shards
from jaxtc.weights.load_model import load_config
from tests.support import tiny
from tests.support.checkpoints import IDS, SIZES, expected, logits, tensors, theirs, write
from tests.support.weights_files import same

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CLOSE = dict(rtol=1e-5, atol=1e-5)


def own() -> torch.Tensor:
    """Another matrix than the embedding."""
    return theirs(tie_word_embeddings=False).lm_head.weight.clone()


def kinds():
    """(stored tensors, tie_word_embeddings, whether ours has a head of its own), by name."""
    state = tensors()
    copy, half = state[EMBEDDING].clone(), state[EMBEDDING].bfloat16()
    return {
        "tied": (state, True, False),
        "tied, stored twice": ({**state, HEAD: copy}, True, False),
        "tied, a bfloat16 copy": ({**state, HEAD: half}, True, True),
        "tied, two bfloat16": ({**state, EMBEDDING: half, HEAD: half.clone()}, True, False),
        "tied, half and its float32": ({**state, EMBEDDING: half, HEAD: half.float()}, True, False),
        "tied, but another": ({**state, HEAD: own()}, True, True),
        "tied, one row another": ({**state, HEAD: torch.cat([copy[:-1], copy[:1]])}, True, True),
        "untied": ({**state, HEAD: own()}, False, True),
        "untied, equal": ({**state, HEAD: copy}, False, True),
        "as lm_head only": (
            {HEAD if k == EMBEDDING else k: v for k, v in state.items()}, True, False
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_logits_are_those_of_transformers(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)  # compared in many parts
    state, tied, head = kinds()[kind]
    folder = write(tmp_path / "m", state, tie_word_embeddings=tied)
    model = jaxtc.load_model(folder, dtype="float32")
    assert model.config.tie_word_embeddings == (not head)
    assert hasattr(model, "head") == head
    np.testing.assert_allclose(logits(model), expected(folder), **CLOSE)
    # Written and read: the same model, here and there.
    again = jaxtc.save_model(model, tmp_path / "again")
    assert same(model, jaxtc.load_model(again, dtype="float32"))
    np.testing.assert_allclose(expected(again), expected(folder), rtol=0, atol=0)


def test_a_tied_matrix_that_safetensors_saved_once(tmp_path):
    """``save_model`` keeps the name lm_head.weight, and says in the metadata what shares it."""
    model = theirs()
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        save_model(model, str(folder / "model.safetensors"))
        config = model.config.to_dict() | {"tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(config))
        assert EMBEDDING not in load_file(folder / "model.safetensors")
        ours = jaxtc.load_model(folder, dtype="float32")
        # Untied by the config, it is the same matrix twice.
        assert hasattr(ours, "head") == (not tied)
        with torch.no_grad():
            right = model(torch.tensor([IDS])).logits[0].numpy()
        np.testing.assert_allclose(logits(ours), right, **CLOSE)


@pytest.mark.parametrize("size", ["1GB", "9KB"])
def test_shards_of_a_tied_matrix_that_was_saved_once(tmp_path, size):
    """The same from ``save_torch_model`` of huggingface_hub, whose index has the metadata too."""
    save_torch_model(theirs(), tmp_path, max_shard_size=size)
    theirs().config.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "9KB")
    model = jaxtc.load_model(tmp_path, dtype="float32")
    with torch.no_grad():
        right = theirs()(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits(model), right, **CLOSE)


def test_metadata_gives_no_other_parameter_a_value(tmp_path):
    state = tensors()
    norm = state.pop("model.norm.weight")
    other = "model.layers.0.input_layernorm.weight"
    assert norm.shape == state[other].shape
    folder = write(tmp_path / "m", state, {"model.norm.weight": other})
    with pytest.raises(WeightsError, match="model.norm.weight is missing"):
        jaxtc.load_model(folder)


@pytest.mark.parametrize(
    ("changes", "tied", "message"),
    [
        ({EMBEDDING: None}, True, "embed_tokens.weight is missing"),
        (
            {EMBEDDING: None, HEAD: own()}, False,
            "embed_tokens.weight is missing.*if it is, change that to true",
        ),
        ({}, False, "lm_head.weight is missing.*tie_word_embeddings = false"),
        ({HEAD: own()[:-1]}, True, r"lm_head.weight has shape \(95, 24\), not \(96, 24\) \(V, D\)"),
        ({HEAD: own()[:, :-1]}, False, r"lm_head.weight has shape \(96, 23\), not \(96, 24\)"),
        ({HEAD: own().to(torch.int8)}, True, "lm_head.weight has dtype I8"),
        ({HEAD: own() * torch.nan}, True, "lm_head.weight holds NaN"),
        ({HEAD: own(), "lm_head.bias": torch.ones(96)}, False, "lm_head.bias is not a tensor of"),
    ],
)  # fmt: skip
def test_refused(tmp_path, changes, tied, message):
    state = {k: v for k, v in (tensors() | changes).items() if v is not None}
    folder = write(tmp_path / "m", state, tie_word_embeddings=tied)
    with pytest.raises(WeightsError, match=message):
        jaxtc.load_model(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_config_that_unties_them_is_said_to(tmp_path, tied):
    state = tensors()
    state[HEAD] = state.pop(EMBEDDING)
    del state["model.norm.weight"]
    folder = write(tmp_path / "m", state, tie_word_embeddings=tied)
    with pytest.raises(WeightsError, match="model.norm.weight is missing") as raised:
        jaxtc.load_model(folder)
    assert ("tie_word_embeddings = false" in str(raised.value)) == (not tied)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The folder of a model with a matrix of its own, which its config does not know."""
    return write(tmp_path_factory.mktemp("untied") / "m", {**tensors(), HEAD: own()})


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_converted(untied, tmp_path, to):
    model = jaxtc.load_model(untied, dtype="float32")
    made = jaxtc.convert(untied, tmp_path / to, to)
    assert same(model, jaxtc.load_model(made, dtype="float32", verify=to == "orbax"))
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    back = jaxtc.convert(made, tmp_path / "back", "safetensors", max_shard_size=5000)
    assert same(model, jaxtc.load_model(back, dtype="float32"))
    np.testing.assert_array_equal(expected(back), expected(untied))
    assert load_config(back) == model.config


def test_saved_as_an_orbax_checkpoint(untied, tmp_path):
    model = jaxtc.load_model(untied, dtype="float32")
    made = jaxtc.save_checkpoint(model, tmp_path / "orbax")
    assert same(model, jaxtc.load_model(made, dtype="float32"))


def test_on_a_mesh(untied):
    alone = jaxtc.load_model(untied, dtype="float32")
    spread = jaxtc.load_model(untied, dtype="float32", mesh="data=1,model=1")
    mesh, leaves = {"data": 1, "model": 4}, dict(variables(spread))
    for name in ("head.weight", "embed.weight"):
        spec = partition(leaves[name].logical_axes, leaves[name].shape, mesh)
        assert spec == jax.sharding.PartitionSpec("model")
    np.testing.assert_allclose(logits(spread), logits(alone), **CLOSE)


def test_estimates_count_it():
    tied = jaxtc.Gemma2Config(**SIZES)
    own = dataclasses.replace(tied, tie_word_embeddings=False)
    extra = tied.vocab_size * tied.hidden_size
    assert count_parameters(own) - count_parameters(tied) == extra
    weights = [jaxtc.plan(c, "model=2", length=8)["weights"] for c in (own, tied)]
    assert weights[0].total - weights[1].total == 2 * extra
    assert weights[0].per_device - weights[1].per_device == extra


def test_promoted_tokens_are_those_of_the_output_matrix(untied):
    model = jaxtc.load_model(untied, dtype="float32")
    transcoder = tiny.transcoder(1, width=model.config.hidden_size)
    found = promoted_tokens(model, transcoder, range(6), 4)
    gain = 1 + np.asarray(model.final_norm.weight[...], np.float64)
    rows = np.asarray(transcoder.W_dec[...], np.float64)[:6] * gain
    by = {k: np.argsort(-rows @ m.numpy().astype(np.float64).T)[:, :4]
          for k, m in (("own", own()), ("embedding", tensors()[EMBEDDING]))}  # fmt: skip
    np.testing.assert_array_equal(found, by["own"])
    assert (by["own"] != by["embedding"]).any()


def test_gradients_and_generation_use_it(untied):
    model = jaxtc.load_model(untied, dtype="float32")
    with torch.no_grad():
        hf = Gemma2ForCausalLM.from_pretrained(untied, attn_implementation="eager")
        new = hf.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False, eos_token_id=None,
                          pad_token_id=0)[0, len(IDS) :].tolist()  # fmt: skip
    assert jaxtc.generate(model, IDS, 6, stop=()).tokens[0] == new

    def loss(model):
        return jaxtc.run(model, IDS).logits[0, -1, 7]

    gradient = jax.grad(loss)(model)
    hf = Gemma2ForCausalLM.from_pretrained(untied, attn_implementation="eager")
    hf(torch.tensor([IDS])).logits[0, -1, 7].backward()
    for ours, right in ((gradient.head, hf.lm_head), (gradient.embed, hf.model.embed_tokens)):
        np.testing.assert_allclose(ours.weight[...], right.weight.grad.numpy(), **CLOSE)


def test_parity_passes(untied):
    found = certify(str(untied), prompts=[IDS], new_tokens=3)
    assert found.passed
