"""The small world that the embedded model knows: states, countries and the cities in them.

The facts are in ``states.tsv`` and ``countries.tsv``, one place a line. A city whose name stands
for two places of this world (Portland, Charleston) or for two neighbouring ones in the real world
(Kansas City) may be an answer (a capital, a largest city), but no prompt asks about it.
"""

import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from types import MappingProxyType

STATE_RELATIONS = ("capital", "abbreviation", "region", "nickname", "bird", "largest city")
COUNTRY_RELATIONS = ("capital", "continent", "language", "currency")
#: Relations whose answer English puts an article before ("the Lone Star State", "the euro").
RELATIONS_WITH_ARTICLE = frozenset({"region", "nickname", "bird", "currency"})
#: Relations whose answer is a city.
CITY_RELATIONS = ("capital", "largest city")

_AMBIGUOUS_ELSEWHERE = frozenset({"Kansas City"})


@dataclass(frozen=True)
class Place:
    """A state or a country: ``attributes`` maps each relation of its kind to the answer."""

    name: str
    kind: str
    attributes: MappingProxyType[str, str]
    cities: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """All places. ``place_of`` maps every city that may be asked about to its place."""

    places: tuple[Place, ...]

    @cached_property
    def place_of(self) -> dict[str, Place]:
        """City name to place, in the tables' order, ambiguous names left out."""
        named = Counter(city for place in self.places for city in place.cities)
        return {
            city: place
            for place in self.places
            for city in place.cities
            if named[city] == 1 and city not in _AMBIGUOUS_ELSEWHERE
        }

    @cached_property
    def answer_cities(self) -> frozenset[str]:
        """Cities that are the answer to a relation: their embeddings must be learnt as outputs."""
        return frozenset(
            place.attributes[relation]
            for place in self.places
            for relation in CITY_RELATIONS
            if relation in place.attributes
        )

    @cached_property
    def entities(self) -> tuple[str, ...]:
        """Every name in the world once, in a fixed order; each is one token."""
        each = ((p.name, *p.attributes.values(), *p.cities) for p in self.places)
        return tuple(dict.fromkeys(itertools.chain.from_iterable(each)))


def _read(file: str, kind: str, relations: tuple[str, ...]) -> Iterator[Place]:
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines(), delimiter="\t"):
        attributes = {relation: row[relation] for relation in relations}
        answers = (attributes[r] for r in CITY_RELATIONS if r in attributes)
        cities = tuple(dict.fromkeys([*answers, *row["other cities"].split(", ")]))
        yield Place(row[kind], kind, MappingProxyType(attributes), cities)


@lru_cache(maxsize=1)
def load_world() -> World:
    """Read the tables that ship with the package."""
    return World(
        (
            *_read("states.tsv", "state", STATE_RELATIONS),
            *_read("countries.tsv", "country", COUNTRY_RELATIONS),
        )
    )
