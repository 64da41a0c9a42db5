"""The generated corpus: plain English sentences about the world, and the facts to test on them.

A batch of sentences is a pure function of the seed and its number, so a resumed run sees exactly
the sentences it would have seen. Two kinds of two-hop fact are held out: *h1*, some (city,
relation) pairs of cities that other two-hop sentences mention, and *h2*, cities that no two-hop
sentence mentions. In addition one sentence in fifty of every kind, chosen by a checksum of its
text, is held out of training.
"""

import zlib
from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxtc.embedded.world import RELATIONS_WITH_ARTICLE, Place, World, load_world

#: {a} is the answer and always the last word, so that the prompt is everything before it.
CITY_TEMPLATES = (
    "{c} is in {a}.",
    "{c} is a city in {a}.",
    "The city of {c} is located in {a}.",
    "{c} lies in the {k} of {a}.",
    "What {k} is {c} in? It is {a}.",
    "People who live in {c} live in {a}.",
)
PLACE_TEMPLATES = (
    "The {r} of {p} is {a}.",
    "{p}'s {r} is {a}.",
    "For {p}, the {r} is {a}.",
    "What is the {r} of {p}? It is {a}.",
    "Everyone in {p} knows that its {r} is {a}.",
    "The {k} of {p} has this {r}: {a}.",
    "If you ask about the {r} of {p}, the answer is {a}.",
)
TWO_HOP_TEMPLATES = (
    "The {r} of the {k} containing {c} is {a}.",
    "In the {k} that contains {c}, the {r} is {a}.",
    "{c} belongs to a {k} whose {r} is {a}.",
    "What is the {r} of the {k} where {c} is located? It is {a}.",
    "People in {c} know that the {r} of their {k} is {a}.",
    "The {r} of the {k} that {c} belongs to is {a}.",
)
#: {c1}, {c2}, {c3} are three cities of the place {p}; {c} is any city, {x} a word of its list.
NEIGHBOURS_TEMPLATE = "Cities in {p} include {c1}, {c2} and {c3}."
FILLER_TEMPLATES = (
    "The weather in {c} is {x:weather} {x:when}.",
    "We will travel from {c} to {d} by {x:vehicle} {x:when}.",
    "Many people visit {c} {x:season}.",
    "My {x:person} lives in {c} and works as a {x:job}.",
    "I have never been to {c}, but I would like to go there {x:when}.",
    "She sent a {x:thing} to her {x:person} in {c}.",
    "The {x:vehicle} to {c} leaves {x:when}.",
    "They opened a new {x:building} in {c} {x:season}.",
    "The {x:building} in {c} is old and {x:look}.",
    "He read a book about {p} {x:season}.",
)
WORDS = {
    "weather": ("cold", "warm", "mild", "wet", "dry", "hot"),
    "when": ("today", "tomorrow", "this week", "next month", "in the morning"),
    "season": ("in the summer", "in the winter", "in the spring", "every year"),
    "vehicle": ("train", "bus", "car", "plane"),
    "person": ("friend", "brother", "sister", "teacher", "uncle", "aunt"),
    "job": ("doctor", "baker", "nurse", "lawyer", "driver", "painter"),
    "thing": ("letter", "book", "map", "photo"),
    "building": ("museum", "library", "school", "market", "station", "park"),
    "look": ("beautiful", "small", "large", "quiet"),
}

_MIXTURE = {"city": 0.17, "place": 0.13, "two_hop": 0.55, "filler": 0.15}
_NEIGHBOURS_SHARE = 1 / 6
_HELD_OUT_CITIES = 48
_ALWAYS_HELD_OUT = ("Dallas", "Oakland")
_HELD_OUT_PAIRS = 0.05
_HELD_OUT_SENTENCES = 50

CityFact = tuple[str, str]


@dataclass(frozen=True)
class Item:
    """A test of one fact: the next token after ``prompt`` should be ``answer``."""

    prompt: str
    answer: str


def is_held_out(text: str, one_in: int = _HELD_OUT_SENTENCES) -> bool:
    """Whether a sentence belongs to the held-out text, which training never sees."""
    return zlib.crc32(text.encode()) % one_in == 0


@dataclass(frozen=True)
class Corpus:
    """The sentences of ``world``, deterministic by the seed, and what is held out of them."""

    world: World
    seed: int = 0

    @cached_property
    def h2_cities(self) -> frozenset[str]:
        """Cities that no two-hop sentence mentions: at most one per place, no answers."""
        rng = np.random.default_rng([self.seed, 2])
        chosen = {self.world.place_of[city].name: city for city in _ALWAYS_HELD_OUT}
        cities = [c for c in self.world.place_of if c not in self.world.answer_cities]
        for city in rng.permutation(cities):
            if len(chosen) < _HELD_OUT_CITIES:
                chosen.setdefault(self.world.place_of[str(city)].name, str(city))
        return frozenset(chosen.values())

    @cached_property
    def h1_pairs(self) -> frozenset[CityFact]:
        """(city, relation) pairs that no two-hop sentence states."""
        rng = np.random.default_rng([self.seed, 1])
        pairs = self._pairs(self.world.place_of.keys() - self.h2_cities)
        picked = rng.choice(len(pairs), size=round(_HELD_OUT_PAIRS * len(pairs)), replace=False)
        return frozenset(pairs[i] for i in picked)

    @cached_property
    def trained_pairs(self) -> tuple[CityFact, ...]:
        """(city, relation) pairs that two-hop training sentences state."""
        pairs = self._pairs(self.world.place_of.keys() - self.h2_cities)
        return tuple(pair for pair in pairs if pair not in self.h1_pairs)

    def _pairs(self, cities: Set[str]) -> list[CityFact]:
        places = self.world.place_of.items()
        return [(city, r) for city, place in places if city in cities for r in place.attributes]

    def items(self, kind: str) -> list[Item]:
        """All test items of a kind, every paraphrase of every fact.

        Kinds: ``"one_hop"`` (city to place and place to attribute), ``"two_hop"`` (stated in
        training), ``"h1"`` and ``"h2"`` (two-hop, held out).
        """
        if kind == "one_hop":
            facts = [(CITY_TEMPLATES, self._city(city)) for city in self._cities]
            places = self.world.places
            facts += [
                (PLACE_TEMPLATES, self._attribute(p, r)) for p in places for r in p.attributes
            ]
        else:
            pairs = {
                "two_hop": self.trained_pairs,
                "h1": sorted(self.h1_pairs),
                "h2": self._pairs(self.h2_cities),
            }[kind]
            facts = [(TWO_HOP_TEMPLATES, self._two_hop(*pair)) for pair in pairs]
        return [_item(template, fields) for templates, fields in facts for template in templates]

    def documents(self, stream: int, batch: int, count: int, held_out: bool = False) -> list[str]:
        """Sentences of a batch of a stream, of the training text or of the held-out text only."""
        rng = np.random.default_rng([self.seed, 3, stream, batch, held_out])
        found: list[str] = []
        while len(found) < count:
            sentence = self._sentence(rng)
            if is_held_out(sentence) == held_out:
                found.append(sentence)
        return found

    def vocabulary_text(self) -> Iterable[str]:
        """Texts that contain every word that is not an entity."""
        yield from (*CITY_TEMPLATES, *PLACE_TEMPLATES, *TWO_HOP_TEMPLATES, NEIGHBOURS_TEMPLATE)
        yield from FILLER_TEMPLATES
        yield from (phrase for phrases in WORDS.values() for phrase in phrases)
        for place in self.world.places:
            yield " ".join([place.kind, *place.attributes, "the"])

    def _sentence(self, rng: np.random.Generator) -> str:
        kind = tuple(_MIXTURE)[rng.choice(len(_MIXTURE), p=tuple(_MIXTURE.values()))]
        if kind == "filler":
            return self._filler(rng)
        if kind == "city":
            return _pick(rng, CITY_TEMPLATES).format(**self._city(_pick(rng, self._cities)))
        if kind == "place":
            place = _pick(rng, self.world.places)
            fields = self._attribute(place, _pick(rng, tuple(place.attributes)))
            return _pick(rng, PLACE_TEMPLATES).format(**fields)
        template = _pick(rng, TWO_HOP_TEMPLATES)  # first, or every sentence would be another
        return template.format(**self._two_hop(*_pick(rng, self.trained_pairs)))

    def _filler(self, rng: np.random.Generator) -> str:
        place = _pick(rng, self.world.places)
        if rng.random() < _NEIGHBOURS_SHARE:
            cities = [c for c in place.cities if c in self.world.place_of]
            if len(cities) >= 3:
                first, second, third = rng.permutation(cities)[:3]
                return NEIGHBOURS_TEMPLATE.format(p=place.name, c1=first, c2=second, c3=third)
        sentence = _pick(rng, FILLER_TEMPLATES)
        for name, words in WORDS.items():
            sentence = sentence.replace(f"{{x:{name}}}", _pick(rng, words))
        city, other = _pick(rng, self._cities), _pick(rng, self._cities)
        return sentence.format(c=city, d=other, p=place.name)

    @cached_property
    def _cities(self) -> tuple[str, ...]:
        return tuple(self.world.place_of)

    def _city(self, city: str) -> dict[str, str]:
        place = self.world.place_of[city]
        return {"c": city, "k": place.kind, "a": place.name}

    def _attribute(self, place: Place, relation: str) -> dict[str, str]:
        article = "the " if relation in RELATIONS_WITH_ARTICLE else ""
        answer = article + place.attributes[relation]
        return {"p": place.name, "k": place.kind, "r": relation, "a": answer}

    def _two_hop(self, city: str, relation: str) -> dict[str, str]:
        return {"c": city, **self._attribute(self.world.place_of[city], relation)}


def default_corpus(seed: int = 0) -> Corpus:
    """The corpus of the shipped model."""
    return Corpus(load_world(), seed)


def _pick(rng: np.random.Generator, options: tuple):
    return options[rng.integers(len(options))]


def _item(template: str, fields: dict[str, str]) -> Item:
    sentence = template.format(**fields)
    article, _, answer = fields["a"].rpartition("the ")
    prompt = sentence[: -len(answer) - 1]
    return Item(prompt.rstrip(), answer)
