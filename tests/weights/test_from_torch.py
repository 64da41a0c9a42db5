"""Models of transformers that are in memory: the same numbers, and nothing shared unasked."""

import gc
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxtc
from jaxtc.errors import ConfigError, InputError, WeightsError
from jaxtc.sharding.rules import variables
from tests.programs.test_guards import GUARDS
from tests.weights.test_google_tree import CONFIG, IDS, SIZES, same_logits, torch_model


def logits(model):
    return np.asarray(jaxtc.run(model, jnp.asarray([IDS])).logits[0])


@pytest.mark.parametrize("share", [False, True])
def test_logits_are_those_of_the_model_in_torch(share):
    theirs = torch_model()
    model = jaxtc.from_torch(theirs, share=share)
    assert model.config == CONFIG and model.dtype == jnp.float32
    same_logits(model, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("share", [False, True])
def test_a_backbone_an_untied_model_and_one_under_compile(share):
    backbone = torch_model()
    same_logits(jaxtc.from_torch(backbone.model, share=share), backbone)
    untied = torch_model(tie_word_embeddings=False)
    made = jaxtc.from_torch(untied, share=share)
    assert not made.config.tie_word_embeddings
    same_logits(made, untied)
    apart = torch_model()
    apart.lm_head.weight = torch.nn.Parameter(torch.randn_like(apart.lm_head.weight))
    made = jaxtc.from_torch(apart, share=share)
    assert not made.config.tie_word_embeddings
    same_logits(made, apart)
    same_logits(jaxtc.from_torch(torch.compile(backbone), share=share), backbone)


def test_what_torch_changes_later_does_not_reach_a_copy():
    theirs = torch_model()
    model = jaxtc.from_torch(theirs)
    before = logits(model)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3)
    assert np.array_equal(logits(model), before)
    del theirs
    gc.collect()
    assert np.array_equal(logits(model), before)


def test_shared_memory_is_torchs_and_outlives_its_model():
    theirs = torch_model()
    own = {tensor.data_ptr() for tensor in theirs.parameters()}
    model = jaxtc.from_torch(theirs, share=True)
    before = logits(model)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)]
    aligned = {pointer for pointer in own if pointer % 64 == 0}
    assert aligned and aligned <= set(places)
    copies = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(jaxtc.from_torch(theirs))]
    assert not own & set(copies)
    del theirs
    gc.collect()
    assert np.array_equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    theirs = torch_model().to(dtype)
    name = str(dtype).removeprefix("torch.")
    for share in (False, True):
        assert jaxtc.from_torch(theirs, share=share).dtype == name
    wide = jaxtc.from_torch(theirs, dtype="float32")
    fresh = torch_model()  # whose angles were never rounded
    fresh.load_state_dict(theirs.state_dict())
    same_logits(wide, fresh)
    mixed = torch_model().to(dtype)
    mixed.model.norm.float()
    made = jaxtc.from_torch(mixed)
    assert made.dtype == jnp.float32
    assert np.array_equal(made.final_norm.weight[...], mixed.model.norm.weight.detach())


def test_on_a_mesh():
    theirs = torch_model()
    model = jaxtc.from_torch(theirs, mesh="model=1")
    same_logits(model, theirs)
    for (_, a), (_, b) in zip(variables(model), variables(jaxtc.from_torch(theirs)), strict=True):
        assert np.array_equal(a[...], b[...])


def test_stop_tokens_of_both_configs():
    theirs = torch_model(eos_token_id=1)
    theirs.generation_config.eos_token_id = [1, 7]
    assert jaxtc.from_torch(theirs).config.eos_token_id == (1, 7)


def refused(model, error, match, **options):
    with pytest.raises(error, match=match) as raised:
        jaxtc.from_torch(model, **options)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_taken_is_named(tmp_path):
    refused("google/gemma-2-2b", InputError, "load_model")
    refused(torch.nn.Linear(2, 2), InputError, "no config")
    llama = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    refused(transformers.LlamaForCausalLM(llama), ConfigError, "llama")
    config = transformers.Gemma2Config(**SIZES, num_labels=2)
    classifier = transformers.Gemma2ForSequenceClassification(config)
    refused(classifier, WeightsError, r"score.weight.*from_torch\(model\.model\)")
    jaxtc.from_torch(classifier.model)
    untied = torch_model(tie_word_embeddings=False)
    refused(untied.model, WeightsError, "with its head")
    with torch.device("meta"):
        refused(transformers.Gemma2ForCausalLM(config), InputError, "meta")
    packed = torch_model()
    weight = packed.model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(torch.zeros(24, 8, dtype=torch.uint8), requires_grad=False)
    refused(packed, WeightsError, "quantised")
    broken = torch_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    for share in (False, True):
        refused(broken, WeightsError, "norm.weight holds NaN", share=share)
    refused(torch_model(), WeightsError, "int8", dtype="int8")


def test_an_adapter_in_the_model_is_named():
    theirs = torch_model()
    layer = theirs.model.layers[0].self_attn
    inner = layer.q_proj
    layer.q_proj = torch.nn.Module()  # as PEFT nests it
    layer.q_proj.base_layer = inner
    layer.q_proj.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(16, 2, bias=False)})
    refused(theirs, InputError, r"merge_and_unload\(\)")


def test_pefts_models(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(torch_model(), peft.LoraConfig(target_modules=["q_proj"]))
    refused(theirs, InputError, "merge_and_unload")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    merged = theirs.merge_and_unload()
    same_logits(jaxtc.from_torch(merged), merged)


def test_jaxtc_does_not_import_torch():
    code = "import sys, jaxtc; jaxtc.from_torch; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("share", [False, True])
def test_under_the_guards_of_other_code(guard, share):
    theirs = torch_model()
    with GUARDS[guard]():
        model = jaxtc.from_torch(theirs, share=share)
    same_logits(model, theirs)
