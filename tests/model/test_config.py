"""Reading a config.json."""

import json

import pytest
from transformers import Gemma2Config as TorchConfig

from jaxtc import Gemma2Config
from jaxtc.errors import ConfigError

RELEASED = {
    "2b": Gemma2Config(),
    "9b": Gemma2Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8,
    ),
    "27b": Gemma2Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
        num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144,
    ),
}  # fmt: skip


def test_defaults_are_those_of_transformers():
    ours = Gemma2Config()
    theirs = TorchConfig().to_dict()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                 "num_attention_heads", "num_key_value_heads", "query_pre_attn_scalar",
                 "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
                 "rms_norm_eps", "max_position_embeddings", "pad_token_id", "eos_token_id",
                 "bos_token_id"):  # fmt: skip
        assert getattr(ours, name) == theirs[name], name
    assert list(ours.layer_types) == theirs["layer_types"]
    assert ours.rope_theta == theirs["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("size", RELEASED)
def test_round_trip_through_transformers(size):
    config = RELEASED[size]
    theirs = TorchConfig(**config.to_dict())
    assert Gemma2Config.from_dict(theirs.to_dict()) == config
    assert Gemma2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(Gemma2Config.from_dict(config.to_dict())) == hash(config)


def test_even_layers_slide():
    config = Gemma2Config(num_hidden_layers=3)
    assert config.layer_types == ("sliding_attention", "full_attention", "sliding_attention")


def both(sliding, full, **more):
    """rope_parameters by type of layer."""
    return {"sliding_attention": {"rope_type": "default", "rope_theta": sliding},
            "full_attention": {"rope_type": "default", "rope_theta": full, **more}}  # fmt: skip


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 9.0},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 9.0},
        {"rope_scaling": {"type": "default", "rope_theta": 7.0}, "rope_theta": 9.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 9.0},
    ],
)
def test_the_rotary_base_is_that_of_transformers(raw):
    theirs = TorchConfig(**json.loads(json.dumps(raw))).rope_parameters["rope_theta"]
    assert Gemma2Config.from_dict({"model_type": "gemma2", **raw}).rope_theta == theirs


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"rope_theta": 500.0}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, {"rope_theta": 7.0}),
        ({"rope_scaling": None}, {"rope_theta": 10000.0}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7.0}, {"rope_theta": 7.0}),
        ({"rope_scaling": {"factor": 1.0, "rope_type": "default"}}, {"rope_theta": 10000.0}),
        ({"rope_parameters": {}, "rope_theta": 7.0}, {"rope_theta": 7.0}),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 9.0}, {"rope_theta": 7.0}),
        (
            {
                "rope_parameters": {
                    "rope_theta": 7.0,
                    "original_max_position_embeddings": 8192,
                    "partial_rotary_factor": 1.0,
                    "attention_factor": None,
                }
            },
            {"rope_theta": 7.0},
        ),
        # By type of layer, all alike.
        ({"rope_parameters": both(7.0, 7)}, {"rope_theta": 7.0}),
        ({"rope_parameters": {"full_attention": None}, "rope_theta": 7.0}, {"rope_theta": 7.0}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"is_causal": True, "attention_bias": False, "mlp_bias": None, "pruned_heads": {}}, {}),
        ({"sliding_window_pattern": 2, "_name_or_path": "x", "num_labels": 3}, {}),
        ({"quantization_config": None, "quantization": {}}, {}),
        ({"final_logit_softcapping": None}, {"final_logit_softcapping": None}),
        ({"eos_token_id": [1, 107]}, {"eos_token_id": (1, 107)}),
        ({"layer_types": None}, {"layer_types": Gemma2Config().layer_types}),
        ({"attn_logit_softcapping": None}, {"attn_logit_softcapping": None}),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, {}),
        ({"transformers_version": "4.42.0", "torch_dtype": "bfloat16"}, {}),
    ],
)
def test_forms_of_several_versions(raw, expected):
    base = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
    config = Gemma2Config.from_dict(base | raw)
    for name, value in expected.items():
        assert getattr(config, name) == value


OTHERS = [
    ({"model_type": "gemma"}, "model_type 'gemma'.*runs Gemma-2 only"),
    ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"model_type": None}, "runs Gemma-2 only"),
    ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type = 'linear', .*factor = 2.0"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
    ({"rope_parameters": both(1e4, 1e6)}, "several rope_theta in one model .10000.0, 1000000.0."),
    ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "several rope_theta"),
    (
        {"rope_parameters": both(7.0, 7.0, rope_type="llama3", factor=8.0)},
        "rope_parameters.full_attention.rope_type = 'llama3'.*full_attention.factor = 8.0",
    ),
    ({"rope_parameters": both(7.0, None)}, "several rope_theta"),
    ({"rope_parameters": {"rope_theta": None}, "rope_theta": 7.0}, "rope_theta is None"),
    (
        {"rope_parameters": {"full_attention": 3}},
        "rope_parameters.full_attention is 3, expected an",
    ),
    ({"rope_parameters": {"rope_theta": 7.0, "mrope_section": [8]}}, "mrope_section = .8."),
    ({"rope_parameters": {"rope_theta": 7.0, "factor": 2.0}}, "rope_parameters.factor = 2.0"),
    ({"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"rope_theta": 9.0}}, "several rope"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_scaling.rope_type = 'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "short_factor = .1."),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_local_base_freq": 1e4}, "rope_local_base_freq"),
    ({"is_causal": False}, "is_causal = False"),
    ({"mlp_bias": True}, "mlp_bias = True"),
    ({"use_qk_norm": True}, "use_qk_norm = True"),
    ({"sliding_window_pattern": 6}, "sliding_window_pattern = 6"),
    ({"use_sliding_window": False}, "use_sliding_window = False"),
    ({"pruned_heads": {"1": [0]}}, "pruned_heads"),
    ({"num_experts": 8}, "num_experts = 8"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .gptq, 4 bits."),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "quantised .bitsandbytes, 8 bits.",
    ),
    (
        {"quantization_config": {"quant_method": "fp8"}, "_name_or_path": "google/gemma-2-9b-it"},
        r"quantised .fp8.*made from \(google/gemma-2-9b-it\)",
    ),
    (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "quantised .compressed-tensors",
    ),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, "awq, 4 bits"),
    ({"quantization_config": {"quant_algo": "NVFP4"}}, "quantised .NVFP4"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantised .MLX, 4 bits"),
    ({"compression_config": {"format": "naive-quantized"}}, "quantised .naive-quantized"),
    ({"quantization_config": True}, "quantised .by an unnamed method"),
    ({"quantization_config": {"quant_method": ["x"], "bits": "4"}}, "by an unnamed method"),
    (
        {"model_type": "paligemma", "text_config": {"model_type": "gemma2"}},
        "a PaliGemma with a Gemma-2 inside.*Gemma2ForCausalLM.config.text_config.",
    ),
    ({"model_type": "gemma", "quantization_config": {"bits": 4}}, "a Gemma 1 .model_type 'gemma'"),
    ({"model_type": None, "class_name": "GemmaBackbone"}, "a model of Keras"),
    ({"model_type": None, "d_sae": 16384}, "a transcoder or autoencoder .load_transcoder"),
    ({"sliding_window": None}, "sliding_window is None, expected a whole number"),
    ({"hidden_size": 0}, "hidden_size is 0, expected a whole number of at least 1"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"head_dim": "256"}, "head_dim is '256'"),
    ({"head_dim": 7}, "head_dim .7. is odd"),
    ({"num_attention_heads": 9}, "not a multiple of"),
    ({"layer_types": ["full_attention"]}, "lists 1 layers"),
    ({"num_hidden_layers": "26"}, "num_hidden_layers is '26'"),
    ({"layer_types": 26}, "layer_types is 26"),
    ({"layer_types": [["full_attention"]] * 26}, "layer type .'full_attention'. is neither"),
    ({"layer_types": ["dense"] * 26}, "layer type 'dense'"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
    ({"rope_theta": [1e4]}, "rope_theta is .10000.0., expected a finite number"),
    ({"rms_norm_eps": 10**400}, "expected a finite number above 0"),
    ({"rope_scaling": [1]}, "rope_scaling is .1., expected an object or null"),
    ({"rope_parameters": "default"}, "rope_parameters is 'default'"),
    ({"bos_token_id": [2]}, "bos_token_id is .2., expected the id of a token"),
    ({"pad_token_id": "0"}, "pad_token_id is '0'"),
    ({"pad_token_id": -1}, "pad_token_id is -1"),
    ({"eos_token_id": [1, None]}, "eos_token_id is .1, None., expected .* or a list of them"),
    ({"eos_token_id": True}, "eos_token_id is True"),
    ({"layer_types": {}}, "layer_types is {}, expected a list"),
    ({"layer_types": []}, "layer_types lists 0 layers"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings is None, expected true or false"),
    ({"model_type": "llama", "architectures": [1]}, "runs Gemma-2 only"),
    ({"model_type": "llama", "architectures": 7}, "runs Gemma-2 only"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS, ids=lambda x: str(x)[:40])
def test_refused(change, message):
    raw = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"} | change
    with pytest.raises(ConfigError, match=message):
        Gemma2Config.from_dict(raw)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        Gemma2Config(hidden_size=-1, vocab_size=0)
    assert "hidden_size" in str(caught.value) and "vocab_size" in str(caught.value)


@pytest.mark.parametrize("kind", [None, True, -1, 2.5, 10**400, "x", [1], [[]], {}, {"a": 1}])
def test_no_field_of_another_type_gets_through_as_another_error(kind):
    sound = Gemma2Config(num_hidden_layers=2).to_dict()
    for name in {**sound, "rope_scaling": 0, "hidden_activation": 0}:
        try:
            hash(Gemma2Config.from_dict({**sound, name: kind}))
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 200_000, "9" * 5000])
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="config.json"):
        Gemma2Config.from_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Gemma2Config.from_file(tmp_path / "absent.json")
