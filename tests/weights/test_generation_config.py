"""Stop tokens of generation_config.json, joined with the config's and kept by every writer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import jaxtc
from jaxtc.errors import ConfigError
from jaxtc.weights.load_model import load_config
from jaxtc.weights.opening import choices_of
from jaxtc.weights.sources.resolve import CONFIG, resolve
from tests.support import tiny
from tests.support.checkpoints import tensors, theirs, write

PROMPT = [2, 5, 9, 33, 44, 12]
NEW = 12


def free() -> list[int]:
    """What follows when nothing stops."""
    made = theirs().generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return made[0, len(PROMPT) :].tolist()


TEXT = free()
FIRST = list(dict.fromkeys(TEXT))[2]  # the third token that comes up
END = TEXT.index(FIRST) + 1
NEVER = next(i for i in range(3, 96) if i not in TEXT)
assert 2 < END < NEW and 1 not in TEXT


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "m", tensors())


def say(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))


def reference(folder) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    made = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)
    return made[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("config", "said", "joined"),
    [
        (1, [1, FIRST], (1, FIRST)),
        (1, FIRST, (1, FIRST)),
        (1, [FIRST], (1, FIRST)),
        ([1, 7], [FIRST, 1], (1, 7, FIRST)),
        (None, FIRST, FIRST),
        (None, [FIRST, 1], (FIRST, 1)),
        (1, 1, 1),
    ],
)
def test_generation_stops_where_transformers_does(folder, config, said, joined):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": config}))
    GenerationConfig(eos_token_id=said, pad_token_id=0).save_pretrained(folder)
    model = jaxtc.load_model(folder, dtype="float32")
    assert model.config.eos_token_id == joined
    assert load_config(folder) == model.config
    found = jaxtc.generate(model, PROMPT, NEW).tokens[0]
    assert found == reference(folder)
    assert found == (TEXT if said == 1 else TEXT[:END])
    # Where more is wanted, `stop` is what counts.
    assert jaxtc.generate(model, PROMPT, NEW, stop=()).tokens[0] == TEXT


def test_both_files_are_obeyed_where_they_differ(folder):
    """transformers takes generation_config.json alone; we end there and at config.json's too."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": FIRST}))
    for said in (NEVER, None, []):
        say(folder, eos_token_id=said)
        model = jaxtc.load_model(folder, dtype="float32")
        assert jaxtc.generate(model, PROMPT, NEW).tokens[0] == TEXT[:END]


def test_without_the_file_the_config_says_it(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert jaxtc.load_model(folder).config.eos_token_id == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "null", '"x"', "\xff", "[" * 100_000, "9" * 5000]
    + [json.dumps({"eos_token_id": odd}) for odd in
       (True, "1", 1.0, -1, 96, 2**63, [1, None], [[1]], {"a": 1}, [True], ["1"])],
)  # fmt: skip
def test_an_unsound_file_is_named(folder, content):
    (folder / "generation_config.json").write_bytes(content.encode("latin-1"))
    for load in (jaxtc.load_model, load_config, jaxtc.plan):
        with pytest.raises(ConfigError, match="generation_config.json"):
            load(str(folder))
    with pytest.raises(ConfigError, match="generation_config.json"):
        jaxtc.convert(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_what_is_no_plain_file_is_named(folder):
    place = folder / "generation_config.json"
    place.unlink(missing_ok=True)
    for make in (place.mkdir, lambda: place.symlink_to("nowhere")):
        make()
        with pytest.raises(ConfigError, match="generation_config.json is not a plain file"):
            jaxtc.load_model(folder)
        place.rmdir() if place.is_dir() else place.unlink()
    place.write_text(" " * 1_000_001)
    with pytest.raises(ConfigError, match="at most 1,000,000 bytes"):
        jaxtc.load_model(folder)


def test_every_writer_keeps_it(folder, tmp_path):
    say(folder, eos_token_id=[1, FIRST], pad_token_id=0, temperature=0.5, do_sample=True)
    model = jaxtc.load_model(folder, dtype="float32")
    made = {
        "saved": jaxtc.save_model(model, tmp_path / "saved"),
        "checkpoint": jaxtc.save_checkpoint(model, tmp_path / "checkpoint"),
        "orbax": jaxtc.convert(folder, tmp_path / "orbax"),
    }
    made["back"] = jaxtc.convert(made["orbax"], tmp_path / "back", "safetensors")
    made["from a saved one"] = jaxtc.convert(made["checkpoint"], tmp_path / "more", "safetensors")
    for name, place in made.items():
        said = json.loads((place / "generation_config.json").read_text())
        assert said["eos_token_id"] == [1, FIRST], name
        assert said.get("temperature") == (0.5 if name in ("orbax", "back") else None)
        again = jaxtc.load_model(place, dtype="float32")
        assert again.config == model.config, name
        assert load_config(place) == model.config, name
        assert jaxtc.generate(again, PROMPT, NEW).tokens[0] == TEXT[:END]
    for name in ("saved", "back", "from a saved one"):
        assert reference(made[name]) == TEXT[:END]


def test_a_converted_one_that_was_changed_is_refused(folder, tmp_path):
    say(folder, eos_token_id=[1, FIRST])
    made = jaxtc.convert(folder, tmp_path / "orbax")
    say(made, eos_token_id=[1])
    with pytest.raises(jaxtc.JaxtcError, match="generation_config.json .* is not what was written"):
        jaxtc.load_model(made)


def test_the_command_says_what_it_does_not_take(folder, monkeypatch):
    from typer.testing import CliRunner

    from jaxtc.cli import app

    monkeypatch.setattr("jaxtc.cli.generate.load_tokenizer", lambda _: tiny.tokenizer())
    say(folder, eos_token_id=1, do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.2)

    def run(*more):
        done = CliRunner().invoke(
            app, ["generate", "the capital", "--model", str(folder), "--max-new-tokens", "1", *more]
        )
        assert done.exit_code == 0, done.output
        return " ".join(done.stderr.split())  # its lines end where the terminal does

    text = run()
    for said in (
        "do_sample = True",
        "temperature = 0.6",
        "top_p = 0.9",
        "repetition_penalty = 1.2",
    ):
        assert said in text
    text = run("--temperature", "1")
    assert "repetition_penalty = 1.2" in text and "do_sample" not in text
    say(folder, eos_token_id=1, temperature=0.6, cache_implementation="hybrid", max_length=8192)
    assert "generation_config" not in run()


@pytest.mark.parametrize("kept", ["folder", "converted", "adapter", "adapter of a converted one"])
def test_what_is_not_taken_however_the_model_is_kept(folder, tmp_path, kept):
    say(folder, eos_token_id=1, do_sample=True, temperature=0.6)
    source = jaxtc.convert(folder, tmp_path / "orbax") if "converted" in kept else folder
    if "adapter" in kept:
        settings = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": str(source)}
        source = tmp_path / "adapter"
        source.mkdir()
        (source / "adapter_config.json").write_text(json.dumps(settings))
    assert choices_of(resolve(source, CONFIG)) == {"do_sample": True, "temperature": 0.6}
    if "adapter" in kept:
        say(source, do_sample=True, top_k=9)  # its own comes first
        assert choices_of(resolve(source, CONFIG)) == {"do_sample": True, "top_k": 9}
