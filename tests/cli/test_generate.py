"""``jaxtc generate``: what it writes while tokens come, how it steers, and how it fails."""

import io
import json
import sys

import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import jaxtc
from jaxtc import SetFeature
from jaxtc.cli.generate import Increments
from tests.support import tiny

PROMPT = "the [bold] capital of texas is"


@pytest.fixture
def generate(folders, cli_run):
    """``jaxtc generate`` on the tiny model: (code, out, err)."""

    def run(*arguments, **options):
        named = [] if "--model" in arguments else ["--model", folders / "model"]
        return cli_run("generate", *arguments, *named, **options)

    return run


def expected(count, **options):
    """(new ids, their text) of the library's own call."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer(PROMPT).input_ids
    new = jaxtc.generate(tiny.model(), ids, count, **options).tokens[0]
    before, after = (tokenizer.decode(x, skip_special_tokens=True) for x in (ids, ids + new))
    assert after.startswith(before)
    return new, after[len(before) :]


def test_the_text_is_on_stdout_and_the_rest_on_stderr(generate):
    code, out, err = generate(PROMPT, "--max-new-tokens", 9)
    assert (code, out) == (0, PROMPT + expected(9)[1] + "\n")
    assert "Loading the tokenizer …" in err and err.rstrip().endswith("Generating …")


def test_sampling_options_reach_the_library(generate):
    options = {"temperature": 1.5, "top_k": 15, "top_p": 0.9, "seed": 6}
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", v)]
    code, out, _ = generate(PROMPT, "--max-new-tokens", 9, *flags, "--json")
    told = json.loads(out)
    new, text = expected(9, **options)
    assert (told["new_ids"], told["continuation"]) == (new, text)
    assert told["prompt"] == PROMPT and told["ids"] == tiny.tokenizer()(PROMPT).input_ids
    assert {name: told[name] for name in options} == options
    assert told["steered"] == [] and told["layer"] is None
    assert new != expected(9)[0] and new != expected(9, **options | {"seed": 7})[0]


def test_steering_sets_the_features_on_all_tokens_but_bos(generate, folders):
    steer = ["--steer", "3=40", "--steer", "11=-2.5e1", "--layer", 1]
    steer += ["--transcoder", folders / "transcoders"]
    code, out, _ = generate(PROMPT, "--max-new-tokens", 9, *steer)
    edit = SetFeature(tiny.transcoder(1), [3, 11], [40.0, -25.0], position=slice(1, None))
    assert (code, out) == (0, PROMPT + expected(9, edits=[edit])[1] + "\n")
    assert expected(9, edits=[edit]) != expected(9)
    told = json.loads(generate(PROMPT, "--max-new-tokens", 2, *steer, "--json")[1])
    assert told["layer"] == 1
    assert told["steered"] == [{"feature": 3, "value": 40.0}, {"feature": 11, "value": -25.0}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "the capital of Dallas is Rome",
            "The tokenizer does not know 'Dallas', 'Rome': the model",
        ),
        ("<bos> the capital of texas is", "The prompt has <bos> twice"),
        ("the capital of texas<eos>", "The prompt ends in <eos>"),
    ],
)
def test_what_is_odd_about_the_prompt_is_said_and_the_text_stays_what_it_is(
    generate, prompt, message
):
    code, out, err = generate(prompt, "--max-new-tokens", 3, columns=200)
    assert code == 0 and out.startswith(prompt) and "Note:" not in out
    assert f"Note: {message}" in err
    told = json.loads(generate(prompt, "--max-new-tokens", 3, "--json")[1])
    assert any(warning.startswith(message) for warning in told["warnings"])
    assert json.loads(generate(PROMPT, "--max-new-tokens", 3, "--json")[1])["warnings"] == []


def test_the_embedded_model_by_default(generate):
    prompt = "The capital of the state containing Dallas is"
    code, out, _ = generate(prompt, "--model", "embedded")
    assert (code, out) == (0, prompt + " Austin.\n")
    code, out, _ = generate(prompt, "--model", "embedded", "--stop", "tin")
    assert (code, out) == (0, prompt + " Aus\n")


def test_tokens_are_written_as_they_come(generate, monkeypatch):
    written = []

    class Out(io.StringIO):
        def write(self, text):
            written.append(text)
            return super().write(text)

        def flush(self):
            written.append("flush")

    monkeypatch.setattr(sys, "stdout", Out())
    generate(PROMPT, "--max-new-tokens", 6)
    parts = [text for text in written if text and text != "flush"]
    assert parts[0] == PROMPT and len(parts) >= 6
    assert "".join(parts) == PROMPT + expected(6)[1] + "\n"
    assert [text for text in written if text][1] == "flush"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "1", "--top-p", "0"], "top_p is 0.0"),
        (["--temperature", "1", "--top-k", "0"], "top_k is 0"),
        (["--top-k", "3"], "without --temperature nothing is sampled"),
        (["--seed", "-1"], "seed is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-new-tokens", "99"], "longer than this model's context of 40"),
        (["--stop", ""], "--stop is empty"),
        (["--layer", "1"], "add --steer FEATURE=VALUE"),
        (["--steer", "3"], "--steer is '3', expected FEATURE=VALUE"),
        (["--steer", "x=3"], "--steer is 'x=3'"),
        (["--steer", "3=nan"], "--steer is '3=nan'"),
        (["--steer", "3=1", "--steer", "3=2"], "names a feature twice"),
        (["--steer", "3=1", "--layer", "1"], "Give --transcoder"),
        (
            ["--steer", "50=1", "--layer", "1", "--transcoder", "T", "--max-new-tokens", "5"],
            "feature 50 does not exist",
        ),
        (["--steer", "3=1", "--layer", "2", "--transcoder", "T"], "no transcoder for layer 2"),
        (["--model", "/nowhere"], "There is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(generate, folders, arguments, message):
    given = [folders / "transcoders" if word == "T" else word for word in arguments]
    code, out, err = generate(PROMPT, *given)
    assert (code, out) == (2, "")
    *progress, error = err.strip().splitlines()
    assert error.startswith("Error: ") and message in error
    assert all(line.endswith("…") for line in progress)


def test_a_prompt_that_is_no_text(generate):
    code, out, err = generate("caf\udce9 is")
    assert (code, out) == (2, "") and "The prompt is not Unicode text" in err


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Pieces with sentencepiece's spaces, and bytes for the rest, as Gemma's has."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁the", "▁cost", "s", "▁", "\n", ".", "▁▁"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def of_bytes(text):
    return [11 + byte for byte in text.encode()]


def test_increments_join_to_the_whole_text(byte_tokenizer):
    ids = [2, 4, 5]
    new = [6, 4, *of_bytes("é"), 7, *of_bytes("€🙂"), 8, 10, 5, 9, *of_bytes("x"), 1]
    text = Increments(byte_tokenizer, ids)
    parts = [text.add(token) for token in new]
    assert "".join(parts) == "s the" + "é" + " " + "€🙂" + "\n" + "  " + " cost.x"
    # Nothing of a character until its last byte, and no sign of what was missing.
    assert parts[:2] == ["s", " the"] and parts[2:4] == ["", "é"]
    assert parts[5:12] == ["", "", "€", "", "", "", "🙂"] and parts[-1] == ""
    assert text.rest() == "" and text.shown == "".join(parts)


def test_bytes_left_over_are_shown_at_the_end(byte_tokenizer):
    text = Increments(byte_tokenizer, [2, 4])
    assert [text.add(token) for token in [5, *of_bytes("€")[:2]]] == [" cost", "", ""]
    assert set(text.rest()) == {"\N{REPLACEMENT CHARACTER}"}


def test_a_stop_text_is_never_shown_in_part(byte_tokenizer):
    text = Increments(byte_tokenizer, [2], stop="ab\n")
    parts = [text.add(token) for token in of_bytes("xaaba")]
    assert parts == ["x", "", "a", "", "ab"] and not text.stopped
    assert [text.add(token) for token in of_bytes("b\n")] == ["", ""]
    assert text.stopped and text.shown == "xaab" and text.rest() == ""
    again = Increments(byte_tokenizer, [2], stop="ab\n")
    assert [again.add(token) for token in of_bytes("ab")] == ["", ""]
    assert again.rest() == "ab" == again.shown and not again.stopped


def test_bare_arrays_are_read_as_told(generate, folders, cli_run, tmp_path):
    """Files of which nothing says whose they are: --format, and --sites, as the error has it."""
    made = tiny.transcoder(1)
    file = jaxtc.save_transcoder(made, tmp_path / "mine.safetensors", format="circuit-tracer")
    arrays = load_file(file)
    del arrays["activation_function.threshold"]  # then the activation is ReLU
    save_file(arrays, file)
    told = ["--layer", 1, "--transcoder", file]
    sites = ["--sites", f"{made.input_site},{made.output_site}"]
    whose = ["--format", "circuit-tracer"]
    doors = {
        "generate": [PROMPT, "--max-new-tokens", 5, "--steer", "3=40", *told],
        "explain": [PROMPT, "--model", folders / "model", *told],
    }
    for name, arguments in doors.items():
        run = generate if name == "generate" else lambda *x: cli_run("explain", *x)
        code, _, err = run(*arguments, *sites)
        assert code == 2 and "--format circuit-tracer" in " ".join(err.split())
        code, _, err = run(*arguments, *whose)
        assert code == 2 and "--sites" in err
        code, _, err = run(*arguments, *sites, "--format", "circuit_tracer")
        assert code == 2 and "There is no format 'circuit_tracer'" in " ".join(err.split())
        code, out, err = run(*arguments, *sites, *whose, "--json")
        assert code == 0, err
    code, out, _ = generate(*doors["generate"], *sites, *whose)
    loaded = jaxtc.load_transcoder(
        file, 1, format="circuit-tracer", input_site=made.input_site, output_site=made.output_site
    )
    edit = SetFeature(loaded, 3, 40.0, position=slice(1, None))
    assert out == PROMPT + expected(5, edits=[edit])[1] + "\n"


def test_whose_features_without_a_feature(generate):
    for option in (["--sites", "mlp_in,mlp_out"], ["--format", "circuit-tracer"]):
        code, out, err = generate(PROMPT, *option)
        assert (code, out) == (2, "") and "--steer FEATURE=VALUE" in " ".join(err.split())
