"""Prompts of the certificate: what is odd about how they were tokenized is among its notes."""

from jaxtc.parity.texts import prompts_of
from tests.support import tiny


def test_what_is_odd_about_a_prompt_is_noted():
    prompts = ["the capital of texas is", "the capital of Rome", [2, 3, 3], "<bos> the capital"]
    texts, ids, notes = prompts_of(prompts, "tiny", tiny.config(), tiny.tokenizer, 0)
    assert texts == [*prompts[:2], None, prompts[3]]
    assert ids[1] == tiny.tokenizer()(prompts[1]).input_ids and ids[2] == [2, 3, 3]
    assert notes[0].startswith("Prompt 2: The tokenizer does not know 'Rome'")
    assert notes[-1].startswith("Prompt 4: The prompt has <bos> twice")
    assert {note.split(":")[0] for note in notes} == {"Prompt 2", "Prompt 4"}


def test_notes_do_not_bury_the_rest():
    *_, notes = prompts_of(["Ein Haus am Wald"] * 40, "tiny", tiny.config(), tiny.tokenizer, 0)
    assert len(notes) == 6 and notes[-1] == "Of the prompts there are 35 more such notes."
