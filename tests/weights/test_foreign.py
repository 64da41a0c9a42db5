"""What people have that is no Gemma-2 in safetensors: named at every door, with what to give."""

import json

import pytest
import torch
from typer.testing import CliRunner

import jaxtc
from jaxtc.cli import app
from jaxtc.errors import ConfigError, JaxtcError, SourceError, WeightsError
from jaxtc.parity import certify
from jaxtc.weights.load_model import load_config
from tests.support.checkpoints import SIZES, tensors, theirs, write

PICKLE, GGUF = "pickle of PyTorch, which can run code", r"quantised weights of llama\.cpp \(GGUF\)"

# What lies in a folder without config.json, and what is said of it.
FOLDERS = {
    "gguf": (["gemma-2-2b-it-Q4_K_M.gguf"], rf"gemma-2-2b-it-Q4_K_M\.gguf is {GGUF}"),
    "pickle": (["model.pt"], f"model.pt is a {PICKLE}"),
    "old pickles": (["pytorch_model.bin", "tokenizer.json"], f"pytorch_model.bin is a {PICKLE}"),
    "tokenizer": (
        ["tokenizer.json", "tokenizer_config.json"],
        "a tokenizer only, .*load_tokenizer",
    ),
    "transcoders": (["layer_0/params.npz"], "transcoders or autoencoders; load_transcoder reads"),
    "SAELens": (["cfg.json", "sae_weights.safetensors"], "load_transcoder reads"),
    "Keras": (["model.weights.h5"], "weights of Keras"),
    "flax": (["flax_model.msgpack"], "weights of Flax"),
    "run of a trainer": (["checkpoint-500/config.json"], "There is one in .*checkpoint-500: give"),
    "cache of the hub": (["snapshots/0123/config.json"], "There is one in .*snapshots/0123: give"),
    "nothing": ([], "has no config.json, so it is not a model's folder"),
}
FILES = {
    "gemma.gguf": GGUF, "pytorch_model.bin": PICKLE, "m.pth": PICKLE, "m.ckpt": PICKLE,
    "model.keras": "a model of Keras", "m.npz": "load_transcoder reads", "m.task": "MediaPipe",
    "model.safetensors": "one file of a checkpoint; give the folder",
    "config.json": "is a file; give the folder that holds config.json",
    "tokenizer.model": "a tokenizer of SentencePiece",
}  # fmt: skip

DOORS = {
    "load_model": jaxtc.load_model,
    "load_config": load_config,
    "plan": jaxtc.plan,
    "convert": lambda source: jaxtc.convert(source, f"{source}.out", kind="model"),
    "parity": lambda source: certify(model=source, prompts=[[2, 5]]),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path, kind, door):
    files, message = FOLDERS[kind]
    folder = tmp_path / "it"
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x")
    with pytest.raises(SourceError, match=message):
        DOORS[door](str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("door", [*DOORS, "load_tokenizer"])
@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name, door):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=FILES[name]):
        (DOORS | {"load_tokenizer": jaxtc.load_tokenizer})[door](str(tmp_path / name))


@pytest.mark.parametrize("name", ["m.gguf", "sae.pt", "m.bin"])
def test_pickles_and_quantised_files_are_no_transcoders(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match="pickle of PyTorch|GGUF"):
        jaxtc.load_transcoder(tmp_path / name)
    with pytest.raises(
        SourceError, match="holds no transcoders that jaxtc reads; .*(pickle of PyTorch|GGUF)"
    ):
        jaxtc.load_transcoder(tmp_path, layer=0)


def test_a_model_is_no_transcoder(tmp_path):
    folder = write(tmp_path / "m", tensors())
    with pytest.raises(SourceError, match="holds no transcoders: it is a model's folder, which"):
        jaxtc.load_transcoder(folder, layer=0)


@pytest.mark.parametrize("command", ["generate", "explain", "plan", "parity", "convert"])
def test_commands(tmp_path, command):
    folder = tmp_path / "q"
    folder.mkdir()
    raw = theirs().config.to_dict() | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(raw))
    given = {
        "generate": ["the", "--model", str(folder)],
        "explain": ["the", "--model", str(folder), "--transcoder", "embedded", "--layer", "0"],
        "plan": [str(folder)],
        "parity": [str(folder)],
        "convert": [str(folder), str(tmp_path / "out")],
    }[command]
    done = CliRunner().invoke(app, [command, *given])
    assert isinstance(done.exception, JaxtcError | SystemExit), done.exception
    assert done.exit_code
    assert "quantised" in f"{done.exception} {done.output}"
    assert not (tmp_path / "out").exists()


def quantised():
    """(tensors that replace a matrix, what they are called), without a word in config.json."""

    def matrix(*ends, dtype=torch.int32):
        return lambda s, w: {s + end: torch.ones(3, 4).to(dtype) for end in ends}

    u8, f8 = torch.uint8, torch.float8_e4m3fn
    return {
        "GPTQ": (matrix("qweight", "qzeros", "scales", "g_idx"), "GPTQ or AWQ"),
        "bitsandbytes 4": (
            lambda s, w: {s + "weight": torch.zeros(w.numel() // 2, 1, dtype=u8),
                          s + "weight.absmax": torch.ones(9),
                          s + "weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=u8)},
            "bitsandbytes, 4 bits",
        ),
        "bitsandbytes 8": (
            lambda s, w: {s + "weight": w.to(torch.int8), s + "SCB": torch.ones(len(w))},
            "bitsandbytes, 8 bits",
        ),
        "FP8": (lambda s, w: {s + "weight": w.to(f8), s + "weight_scale": torch.ones(1)}, "FP8"),
        "compressed": (matrix("weight_packed", "weight_shape"), "compressed-tensors"),
        "MLX": (matrix("weight", "scales", "biases"), "MLX"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", quantised())
def test_quantised_tensors_are_known_without_the_config(tmp_path, kind):
    make, method = quantised()[kind]
    state = {}
    for name, value in tensors().items():
        state |= make(name.removesuffix("weight"), value) if "_proj" in name else {name: value}
    folder = write(tmp_path / "m", state)
    for door in ("load_model", "convert", "parity"):
        with pytest.raises(WeightsError, match=f"quantised .{method}.*Give the checkpoint"):
            DOORS[door](folder)


def test_float8_alone_is_named_by_its_dtype(tmp_path):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in tensors().items()}
    folder = write(tmp_path / "m", state)
    with pytest.raises(WeightsError, match="has dtype F8_E4M3, .*8-bit floats are quantised: give"):
        jaxtc.load_model(folder)


def test_shards_without_their_index(tmp_path):
    folder = write(tmp_path / "m", tensors())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match="shards without model.safetensors.index.json"):
        jaxtc.load_model(folder)


@pytest.mark.parametrize("name", ["gemma-2-3b", "Gemma-2-2", "gemma2-2b"])
def test_near_names_of_models(name):
    for door in (jaxtc.plan, jaxtc.load_model, jaxtc.load_tokenizer):
        with pytest.raises(
            SourceError, match="Did you mean 'google/gemma-2-|or 'google/gemma-2-2b"
        ):
            door(name)


def test_sizes_are_still_known():
    for name in ("2b", "gemma-2-2b", "google/gemma-2-2b-it"):
        assert load_config(name).hidden_size == 2304
    assert load_config("9b").tie_word_embeddings and SIZES["hidden_size"] != 2304


def test_other_models_in_safetensors(tmp_path):
    """A Llama with the config of a Gemma-2 of its sizes: what is missing is told, not guessed."""
    state = {k: v for k, v in tensors().items() if "feedforward" not in k}
    with pytest.raises(WeightsError, match="pre_feedforward_layernorm.weight is missing"):
        jaxtc.load_model(write(tmp_path / "m", state))
    with pytest.raises(ConfigError, match="a Llama"):
        jaxtc.Gemma2Config.from_dict({"model_type": "llama"})
