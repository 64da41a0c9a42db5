"""Which text a folder is of: figures on another text are refused, by its note or its tokenizer."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

import jaxtc
from jaxtc.cli import embedded as cli
from jaxtc.embedded import DATA, model_folder
from jaxtc.embedded.corpus import default_corpus
from jaxtc.embedded.provenance import check_text, described, note_text
from jaxtc.embedded.report import accuracy, measure
from jaxtc.embedded.text import UserText
from jaxtc.embedded.tokenizer import for_transformers, train_bpe
from jaxtc.errors import InputError
from tests.support import tiny

CORPUS = default_corpus()
# Two texts with few words in common.
RECIPES = UserText("\n".join(
    f"Take {n} spoons of {what}, stir them into {how} milk and bake for {5 * n} minutes."
    for n in range(1, 40) for what in ("flour", "sugar", "butter") for how in ("warm", "cold")
))  # fmt: skip
CHESS = UserText("\n".join(
    f"{n}. The {piece} on {file}{n % 8 + 1} captures a pawn; Black resigns."
    for n in range(1, 50) for piece in ("bishop", "knight", "queen") for file in "abc"
))  # fmt: skip
SHIPPED = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


@pytest.fixture(scope="module")
def bpe():
    return {id(text): train_bpe(text.train, 400) for text in (RECIPES, CHESS)}


def test_the_shipped_folder_is_of_the_corpus():
    check_text(DATA, SHIPPED, CORPUS)
    assert json.loads((DATA / "text.json").read_text()) == {"text": described(CORPUS)}
    with pytest.raises(InputError, match="names 'the generated corpus, seed 0'.*--seed"):
        check_text(DATA, SHIPPED, default_corpus(1))


def test_a_tokenizer_tells_where_no_note_does(bpe, tmp_path):
    for text in (RECIPES, CHESS):
        check_text(tmp_path, bpe[id(text)], text)
        with pytest.raises(InputError, match=r"no token for \d+ of the corpus's 1000 names"):
            check_text(tmp_path, bpe[id(text)], CORPUS)
        with pytest.raises(InputError, match=r"gives <unk> for \d+ of \d+ tokens"):
            check_text(tmp_path, SHIPPED, text)
    for text, other in ((RECIPES, CHESS), (CHESS, RECIPES)):
        with pytest.raises(InputError, match="pieces of its tokenizer do not come up in it"):
            check_text(tmp_path, bpe[id(text)], other)


def test_a_tokenizer_that_knows_the_names_but_not_the_words_is_refused(tmp_path):
    state = json.loads(SHIPPED.to_str())
    for word in ("▁capital", "▁belongs"):
        del state["model"]["vocab"][word]
    with pytest.raises(InputError, match=r"gives <unk> for \d+ of \d+ tokens"):
        check_text(tmp_path, Tokenizer.from_str(json.dumps(state)), CORPUS)


def test_a_note_tells_of_a_text_that_differs_by_a_word(bpe, tmp_path):
    note_text(tmp_path, RECIPES)
    check_text(tmp_path, bpe[id(RECIPES)], UserText(RECIPES.text))
    edited = UserText(RECIPES.text.replace("flour", "rye", 1))
    with pytest.raises(InputError, match=r"another text than text with SHA-256.*text.json names"):
        check_text(tmp_path, bpe[id(RECIPES)], edited)
    (tmp_path / "text.json").write_text('["no note"]')
    check_text(tmp_path, bpe[id(RECIPES)], edited)  # as near as its tokenizer can tell


def test_the_report_refuses_before_it_measures(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtc.embedded.report.run", None)
    text = tmp_path / "chess.txt"
    text.write_text(CHESS.text)
    for arguments in (["--text", text], ["--seed", 7]):
        result = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
        assert isinstance(result.exception, InputError)
        assert "was trained on another text than" in str(result.exception)
    # A model of a user's text, measured as if it were of the corpus.
    jaxtc.save_model(tiny.model(), tmp_path / "model", for_transformers(bpe[id(CHESS)], 40))
    shutil.copytree(DATA / "transcoders", tmp_path / "transcoders")
    with pytest.raises(InputError, match=r"1000 names.*--text FILE"):
        measure(tmp_path)
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert isinstance(result.exception, InputError)


def test_accuracy_of_answers_that_are_no_tokens_is_refused(bpe):
    items = CORPUS.items("one_hop")[:3]
    with pytest.raises(InputError, match="where an answer is one token"):
        accuracy(tiny.model(), bpe[id(CHESS)], items)
