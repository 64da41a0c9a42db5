"""Adapters that are not merged: each is told by name, with what to do, and nothing is left out."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

import jaxtc
from jaxtc.errors import JaxtcError, SourceError, WeightsError
from jaxtc.weights.load_model import load_tokenizer
from jaxtc.weights.sources.resolve import resolve
from tests.support import tiny
from tests.weights.adapters.cases import DATA
from tests.weights.adapters.test_merged import bases, copied, rewrite, same_logits, write_base

LINES = r"PeftModel\.from_pretrained\(.*merge_and_unload\(\)\.save_pretrained"
Q = "base_model.model.model.layers.0.self_attn.q_proj"

__all__ = ["bases"]


def refused(folder, match, error=WeightsError, **given):
    with pytest.raises(error, match=match) as raised:
        jaxtc.load_model(folder, **given)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "kind", ["LOHA", "LOKR", "IA3", "ADALORA", "VERA", "OFT", "BOFT", "XLORA", "LN_TUNING", "NEW"]
)
def test_another_kind_has_the_lines_that_merge_it(kind, bases, tmp_path):
    folder = copied("plain", tmp_path / "a", peft_type=kind, base_model_name_or_path="x/y")
    refused(folder, f"{kind}.*{LINES}", base=bases())
    assert "'x/y'" in refused(folder, kind)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_prompts_cannot_be_merged_by_anyone(kind, bases, tmp_path):
    refused(copied("plain", tmp_path / "a", peft_type=kind), "cannot be merged", base=bases())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_qalora": True}, {"lora_bias": True}, {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [3]}, {"target_parameters": ["x"]}, {"use_bdlora": {"a": 1}},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"}, {"init_lora_weights": "lora_ga"},
        {"megatron_config": {"a": 1}}, {"of_next_year": 0.5}, {"kasa_config": {"b": 1}},
    ],
)  # fmt: skip
def test_settings_that_change_numbers_are_not_left_out(settings, bases, tmp_path):
    folder = copied("plain", tmp_path / "a", **settings)
    refused(folder, f"{next(iter(settings))} = .*{LINES}", base=bases())


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.3}, {"bias": "all"}, {"fan_in_fan_out": True}, {"of_next_year": None},
     {"eva_config": {"rho": 2}}, {"init_lora_weights": "gaussian"}, {"loftq_config": {"a": 1}}],
)  # fmt: skip
def test_settings_that_change_nothing(settings, bases, tmp_path):
    jaxtc.load_model(copied("plain", tmp_path / "a", **settings), base=bases())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 0}, "r is 0"), ({"r": "4"}, "r is '4'"), ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": float("inf")}, "lora_alpha"), ({"use_dora": 1}, "use_dora is 1"),
        ({"target_modules": [3]}, "target_modules"), ({"rank_pattern": {"a": 0}}, "rank_pattern"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
        ({"target_modules": "["}, "regular expression"),
        ({"target_modules": "(.|..)*[!?]"}, "too long"),
        ({"rank_pattern": {"[a-z]": 2, "([a-z_.0-9]|[a-z_.0-9]{2})*[!?]": 2}}, "too long"),
        ({"alpha_pattern": {"x" * 20_000: 2}}, "too long"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS.*head"),
    ],
)  # fmt: skip
def test_damaged_settings(settings, match, bases, tmp_path):
    refused(copied("plain", tmp_path / "a", **settings), match, base=bases())


def test_an_adapter_of_a_classifier_without_its_head(bases, tmp_path):
    folder = copied("plain", tmp_path / "a", task_type="SEQ_CLS", modules_to_save=["score"])
    head = {"base_model.model.score.weight": np.ones((2, 16), np.float32)}
    rewrite(folder, lambda tensors: tensors.update(head))
    refused(folder, "SEQ_CLS.*ignore='score", base=bases())
    made = jaxtc.load_model(folder, base=bases(), ignore="score.*", dtype="float32")
    same_logits(made, np.load(DATA / "plain/merged.npz")["logits"])
    refused(folder, "score is|score.weight is", base=bases(), ignore="other")


def test_its_own_head_is_ignored_on_a_base_that_has_nothing_to_ignore(bases, tmp_path):
    folder = copied("plain", tmp_path / "a", task_type="SEQ_CLS", modules_to_save=["score"])
    head = {"base_model.model.score.weight": np.ones((2, 16), np.float32)}
    rewrite(folder, lambda tensors: tensors.update(head))
    base = jaxtc.convert(bases(), tmp_path / "base")
    made = jaxtc.load_model(folder, base=base, ignore="score.*", dtype="float32")
    same_logits(made, np.load(DATA / "plain/merged.npz")["logits"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"peft_type": "LORA", "r": 4, "r": 8}', "says 'r' twice"),
        (b'{"peft_type": "LORA", "x": "' + b"x" * 500_000 + b'"}', "more than 400000 bytes"),
        (b"[1]", "is not a JSON object"),
        (b"{", "is not JSON that can be read"),
        (b"\xff", "is not JSON that can be read"),
    ],
)
def test_a_file_that_is_no_sound_json(content, message, bases, tmp_path):
    folder = copied("plain", tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(content)
    refused(folder, message, base=bases())


def test_settings_and_tensors_agree(bases, tmp_path):
    def check(name, match, change=lambda tensors: None, case="plain", **settings):
        folder = rewrite(copied(case, tmp_path / name, **settings), change)
        refused(folder, match, base=bases())

    check("rank", r"lora_A.weight has shape \(2, 16\), not \(3, 16\)", r=3)
    check("target", "layers.0.mlp.down_proj has a LoRA but is no target", target_modules=["q_proj"])
    check("layer", "layers.1.*no target", layers_to_transform=[0, 2])
    check(
        "missing",
        "q_proj is a target .* but has no tensors",
        target_modules=["q_proj"],
        case="norms",
        change=lambda t: [t.pop(x) for x in [*t] if "layers.1.self_attn" in x],
    )
    check("half", "q_proj lacks lora_B", lambda t: t.pop(f"{Q}.lora_B.weight"))
    check("no dora", "lacks lora_magnitude_vector", use_dora=True)
    check("dora", "use_dora is false", case="dora", use_dora=False)
    check("name", "x is no tensor of a LoRA", lambda t: t.update(x=np.zeros(3, np.float32)))
    bias = {f"{Q}.lora_B.bias": np.zeros(24, np.float32)}
    check("bias", "bias, and Gemma-2", lambda t: t.update(bias))
    check("nan", "lora_A.weight holds NaN", lambda t: t[f"{Q}.lora_A.weight"].fill(np.nan))
    check(
        "large",
        "too large for float32, once the adapter is merged",
        lambda t: [x.fill(1e30) for x in t.values()],
    )
    packed = {f"{Q}.lora_A.weight": np.zeros((2, 16), np.int8)}
    check("int8", "has dtype I8", lambda t: t.update(packed))
    other = {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": np.zeros((2, 16), "f4")}
    check("layer 7", "layers.7.mlp.up_proj is no matrix", lambda t: t.update(other))
    check("tokens", "48", case="tokens", trainable_token_indices=[3, 48])
    check("two tokens", "not the 3 trainable", case="tokens", trainable_token_indices=[3, 40, 5])


def test_the_wrong_base_is_told_by_shapes():
    refused(DATA / "plain", "has shape.*base=", base="embedded")


@pytest.mark.parametrize("name", [None, "", "owner/not-here", "/not/here", "../not-here", "~/x",
                                  "gs://bucket/model", "../../etc"])  # fmt: skip
def test_a_base_that_is_not_found_asks_for_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = copied("plain", tmp_path / "adapter", base_model_name_or_path=name)
    refused(folder, r"adapter.*base=", SourceError)


def test_a_base_that_is_no_model(tmp_path, bases):
    other = copied("plain", tmp_path / "other", base_model_name_or_path=str(bases()))
    refused(DATA / "plain", "is an adapter too.*convert", SourceError, base=other)
    quantised = write_base(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    refused(DATA / "plain", "quantised.*base=", JaxtcError, base=quantised)


def test_pickles_and_other_folders(tmp_path, bases):
    folder = copied("plain", tmp_path / "pickle")
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.bin is a pickle", base=bases())
    (folder / "adapter_model.bin").unlink()
    refused(folder, "no adapter_model.safetensors", base=bases())
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    (mlx / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 8}}))
    refused(mlx, "MLX.*mlx_lm.fuse", base=bases())
    both = shutil.copytree(bases(), tmp_path / "both")
    shutil.copytree(DATA / "plain", both, dirs_exist_ok=True)
    refused(both, "whole model .* and an adapter", SourceError)
    refused(bases(), "base=.* is for an adapter", SourceError, base="x/y")
    refused(bases(), "config= is for", SourceError, config=bases())
    # As some trainers write it: the base's config beside the adapter.
    shutil.copy(bases() / "config.json", folder)
    shutil.copy(DATA / "plain/adapter_model.safetensors", folder)
    jaxtc.load_model(folder, base=bases())


def test_convert_and_plan_know_an_adapter(tmp_path, bases):
    folder = copied("plain", tmp_path / "adapter", base_model_name_or_path=str(bases()))
    assert resolve(folder).kind == "model"
    whole, adapted = (jaxtc.plan(str(x), length=8) for x in (bases(), folder))
    assert whole.parts == adapted.parts
    with pytest.raises(SourceError, match="not a format for a model"):
        jaxtc.convert(folder, tmp_path / "out", to="npz")
    with pytest.raises(SourceError, match="base="):
        jaxtc.convert(DATA / "plain", tmp_path / "out", to="safetensors")
    assert not (tmp_path / "out").exists()


def test_the_folder_around_an_adapter_names_it(tmp_path):
    """As a trainer leaves them, ``checkpoint-500`` and so on."""
    copied("plain", tmp_path / "run/checkpoint-5")
    refused(tmp_path / "run", "checkpoint-5: give that folder", SourceError)
    with pytest.raises(SourceError, match="checkpoint-5: give that folder"):
        jaxtc.convert(tmp_path / "run", tmp_path / "out", to="safetensors")


def test_the_tokenizer_is_the_adapters_or_its_bases(tmp_path):
    base = write_base(tmp_path / "base")
    tiny.tokenizer().save_pretrained(base)
    folder = copied("plain", tmp_path / "adapter", base_model_name_or_path="../base")
    assert load_tokenizer(folder)("the city").input_ids == tiny.tokenizer()("the city").input_ids
    own = tiny.tokenizer()
    own.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((folder / "tokenizer_config.json").read_text()), "own": 1})
    )
    assert load_tokenizer(folder).init_kwargs["own"] == 1
    jaxtc.convert(folder, tmp_path / "out", to="safetensors")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["own"] == 1


def test_a_sound_file_of_safetensors_is_needed(tmp_path, bases):
    folder = copied("plain", tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    refused(folder, "not a sound safetensors", base=bases())
    safetensors.numpy.save_file({}, folder / "adapter_model.safetensors")
    refused(folder, "has no tensors", base=bases())
