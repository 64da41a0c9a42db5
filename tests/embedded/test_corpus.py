"""The embedded model's world, its corpus and its tokenizers."""

import csv
import json
import re
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxtc.embedded.corpus import (
    CITY_TEMPLATES,
    TWO_HOP_TEMPLATES,
    default_corpus,
    is_held_out,
)
from jaxtc.embedded.tokenizer import entity_id, for_transformers, train_bpe, world_tokenizer
from jaxtc.embedded.train_model import small_config
from jaxtc.training.packing import UNK

CORPUS = default_corpus()
WORLD = CORPUS.world
TOKENIZER = world_tokenizer(CORPUS)
KINDS = ("one_hop", "two_hop", "h1", "h2")
SENTENCES = [s for batch in range(40) for s in CORPUS.documents(0, batch, 500)]
TWO_HOP = [
    re.compile(re.escape(t).replace(r"\{", "{").replace(r"\}", "}").format(
        r="(?P<r>.+)", k="(state|country)", c="(?P<c>.+)", a="(?P<a>.+)"))
    for t in TWO_HOP_TEMPLATES
]  # fmt: skip


def tables():
    """Rows of the two tables, read here without the code under test."""
    for file, kind in (("states.tsv", "state"), ("countries.tsv", "country")):
        text = resources.files("jaxtc.embedded").joinpath(file).read_text(encoding="utf-8")
        for row in csv.DictReader(text.splitlines(), delimiter="\t"):
            yield row.pop(kind), row


def two_hop(sentence):
    """(city, relation) of a two-hop sentence, None for others."""
    for pattern in TWO_HOP:
        if match := pattern.fullmatch(sentence):
            return match["c"], match["r"]
    return None


def test_the_world_has_its_size_and_no_name_stands_for_two_things():
    assert len(WORLD.places) == 50 + 67
    assert len(WORLD.place_of) > 600
    roles = {}
    for place in WORLD.places:
        roles.setdefault(place.name, set()).add("place")
        for relation, value in place.attributes.items():
            role = "city" if relation in ("capital", "largest city") else relation
            roles.setdefault(value, set()).add(role)
        for city in place.cities:
            roles.setdefault(city, set()).add("city")
    assert {name: r for name, r in roles.items() if len(r) > 1} == {}
    for city, place in WORLD.place_of.items():
        assert [p.name for p in WORLD.places if city in p.cities] == [place.name]


def test_held_out_cities_and_pairs_are_in_no_two_hop_sentence():
    assert {"Dallas", "Oakland"} <= CORPUS.h2_cities
    assert not CORPUS.h2_cities & WORLD.answer_cities
    stated = {pair for s in SENTENCES if (pair := two_hop(s))}
    assert len(stated) > 2000
    assert not {city for city, _ in stated} & CORPUS.h2_cities
    assert not stated & CORPUS.h1_pairs
    assert stated <= set(CORPUS.trained_pairs)
    # Every city's place is taught, that of the held-out ones too.
    more = {s for batch in range(40, 120) for s in CORPUS.documents(0, batch, 500)}
    for city in CORPUS.h2_cities:
        fields = {"c": city, "k": WORLD.place_of[city].kind, "a": WORLD.place_of[city].name}
        assert more & {template.format(**fields) for template in CITY_TEMPLATES}, city


def test_held_out_text_and_training_text_share_no_sentence():
    held_out = CORPUS.documents(0, 0, 300, held_out=True)
    assert not set(held_out) & set(SENTENCES)
    assert all(map(is_held_out, held_out))


def test_sentences_depend_on_seed_stream_and_batch_only():
    again = default_corpus().documents(0, 3, 50)
    assert again == SENTENCES[1500:1550]
    others = [default_corpus(1).documents(0, 3, 50), CORPUS.documents(1, 3, 50)]
    assert all(other != again for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tested_fact_is_true_in_the_tables(kind):
    rows = dict(tables())
    cities = {city for place in WORLD.places for city in place.cities}
    names = re.compile("|".join(sorted(cities | set(rows), key=len, reverse=True)))
    for item in CORPUS.items(kind):
        named = names.search(item.prompt)[0]
        if named in cities:
            named, city = WORLD.place_of[named].name, named
            row = rows[named]
            answers = [row["capital"], row.get("largest city"), *row["other cities"].split(", ")]
            assert city in answers
        relations = [relation for relation in rows[named] if relation in item.prompt]
        # "largest city" is a relation of every state; "is a city in" is none.
        expected = rows[named][relations[0]] if relations else named
        assert item.answer == expected, item


def test_held_out_facts_are_not_trained_facts():
    asked = {kind: {two_hop(f"{i.prompt} {i.answer}.") for i in CORPUS.items(kind)}
             for kind in KINDS[1:]}  # fmt: skip
    pairs = {kind: {(c, r) for c, r in found} for kind, found in asked.items()}
    assert pairs["h1"] == CORPUS.h1_pairs
    assert {c for c, _ in pairs["h2"]} == CORPUS.h2_cities
    assert pairs["two_hop"] == set(CORPUS.trained_pairs)


def test_every_sentence_comes_back_from_its_tokens():
    encoded = TOKENIZER.encode_batch(SENTENCES)
    assert not any(UNK in e.ids for e in encoded)
    assert [TOKENIZER.decode(e.ids) for e in encoded] == SENTENCES


def test_every_entity_is_one_token_wherever_it_stands():
    for name in WORLD.entities:
        index = entity_id(TOKENIZER, name)
        assert TOKENIZER.encode(name).ids == [2, index]
        assert index in TOKENIZER.encode(f"The bird of {name}'s state is {name}.").ids


@pytest.mark.parametrize("make", [lambda: TOKENIZER, lambda: train_bpe(SENTENCES[:500], 600)])
def test_transformers_loads_the_tokenizer(tmp_path, make):
    made = make()
    for_transformers(made, 64).save_pretrained(tmp_path)
    # Beside a Gemma config, since that decides which class AutoTokenizer would take.
    config = small_config(made.get_vocab_size()).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The capital of Texas is Austin."
    assert loaded(text).input_ids == made.encode(text).ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    ids = (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id, loaded.unk_token_id)
    assert ids == (0, 1, 2, 3)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(SENTENCES[:500], 600)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_a_tokenizer_of_a_users_text_loses_nothing(bpe, text):
    if not any(special in text for special in ("<pad>", "<eos>", "<bos>", "<unk>")):
        assert bpe.decode(bpe.encode(text).ids, skip_special_tokens=False) == "<bos>" + text


def test_the_sentences_are_those_that_the_shipped_model_was_trained_on():
    """The order of draws is part of the recipe: another one makes another corpus of the seed."""
    assert default_corpus().documents(stream=7, batch=0, count=3, held_out=True) == [
        "Cities in Latvia include Daugavpils, Riga and Jurmala.",
        "People in Danbury know that the capital of their state is Hartford.",
        "Dunedin lies in the country of New Zealand.",
    ]
