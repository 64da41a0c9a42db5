"""The small files beside weights that say what those are: JSON or YAML, from anywhere, so checked.

What a file says is asked for key by key; a key that nobody asks for may change what the weights
compute, so it is refused unless it is known to be harmless, or is off.
"""

import json
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

from jaxtc.errors import SiteError, WeightsError, did_you_mean, first_line, some
from jaxtc.helpers import is_whole
from jaxtc.tap.sites import BY_NAME, parse
from jaxtc.weights.files import local

# More than any such file has; a runner's whole configuration is a few kB.
_MOST_BYTES = 400_000
# Of YAML, whose reader takes time quadratic in how deep brackets nest.
_MOST_BRACKETS = 200

# Names of places that others use and the table of sites, where each has one name, does not know.
_HOOKS = {"mlp.hook_in": "mlp_in", "mlp.hook_out": "mlp_proj"}
# The hook of each of our sites, as circuit-tracer's config.yaml and SAELens' cfg.json spell it.
HOOKS: Mapping[str, str] = {
    site.name: site.tl for site in BY_NAME.values() if site.tl and not site.unlike
} | {site: hook for hook, site in _HOOKS.items()}

_OFF = (None, False, 0, "", "none", "None")
_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda x: isinstance(x, str), "text"),
    "switch": (lambda x: isinstance(x, bool), "true or false"),
    "count": (lambda x: is_whole(x, 1) and x < 2**31, "a whole number from 1"),
    "index": (lambda x: is_whole(x) and x < 2**31, "a whole number from 0"),
    "object": (lambda x: isinstance(x, dict), "an object"),
    "texts": (lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x), "texts"),
}


class Settings:
    """What one file says; ``where`` is what messages call it, ``path`` the file.

    The methods raise WeightsError, for a value of another type and as they say.
    """

    def __init__(self, path: Path, raw: Mapping[str, Any], where: str | None = None):
        self.path, self._raw, self._asked = path, raw, set()
        self.where = where or str(path)

    def get(self, key: str, kind: str, default: Any = None) -> Any:
        """The value of ``key``; ``default`` where it is missing or null."""
        self._asked.add(key)
        value = self._raw.get(key)
        if value is None:
            return default
        fits, expected = _TYPES[kind]
        if not fits(value):
            raise self.wrong(f"its {key} is {_short(value)}, expected {expected}")
        return value

    def has(self, key: str) -> bool:
        """Whether it says anything of ``key``."""
        return self._raw.get(key) is not None

    @property
    def whole(self) -> dict[str, Any]:
        """All of it, for a reader with rules of its own; no key counts as asked for by that."""
        return dict(self._raw)

    def raw(self, key: str) -> Any:
        """The value of ``key``, of any type."""
        self._asked.add(key)
        return self._raw.get(key)

    def inner(self, key: str) -> "Settings":
        """The object at ``key``, empty where it is missing."""
        return Settings(self.path, self.get(key, "object", {}), f"{self.where}, {key}")

    def one_of(self, key: str, options: Collection[str], default: str | None = None) -> str | None:
        """The text at ``key``, which must be one of ``options``."""
        value = self.get(key, "text", default)
        if value is not None and value not in options:
            raise self.wrong(
                f"its {key} is {_short(value)}, expected {', '.join(map(repr, options))}."
                f"{did_you_mean(value, options)}"
            )
        return value

    def refuse(self, key: str, why: str, fine: Collection[Any] = _OFF) -> None:
        """Raise unless ``key`` is missing or one of these values."""
        value = self.raw(key)
        if not any(value is one or (type(value) is type(one) and value == one) for one in fine):
            raise self.wrong(f"its {key} is {_short(value)}: {why}")

    def finish(self, harmless: Collection[str]) -> None:
        """Raise for keys that were not asked for, are not harmless and are not off."""
        unknown = [
            key for key, value in self._raw.items()
            if key not in self._asked and key not in harmless and not _off(value)
        ]  # fmt: skip
        if unknown:
            given = some([f"{key} = {_short(self._raw[key])}" for key in unknown])
            raise self.wrong(
                f"jaxtc does not know what {given} does to what the weights compute, so they are "
                "not loaded. If it only describes how they were trained, remove it from a copy of "
                "the file"
            )

    def wrong(self, problem: str) -> WeightsError:
        """The error for something wrong with what the file says."""
        return WeightsError(f"{self.where}: {problem.rstrip('.')}.")

    def place(self, key: str) -> tuple[str, int | None] | None:
        """(site, layer) of the hook that ``key`` names, None where it is missing."""
        name = self.get(key, "text")
        return None if name is None else self.site(key, name)

    def site(self, key: str, name: str) -> tuple[str, int | None]:
        """(site, layer) of a hook of TransformerLens, ``transformers`` or ours.

        Raises SiteError for one that is no site.
        """
        prefix, _, rest = name.partition(".")
        number, _, below = rest.partition(".")
        layered = prefix == "blocks" and number.isdecimal() and below in _HOOKS
        if layered or name in _HOOKS:
            name = f"layers.{number}.{_HOOKS[below]}" if layered else _HOOKS[name]
        try:
            return parse(name)
        except SiteError as error:
            raise SiteError(
                f"{self.where}: its {key} is {_short(name)}, which jaxtc cannot read from. {error} "
                "If you know which site holds the same numbers, give it: input_site=..., "
                "output_site=..."
            ) from error


def read_json(path: Path) -> Settings:
    """A JSON object. Raises WeightsError for anything else, and for a key that is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _unique(pairs, path)

    def load(text: str) -> Any:
        return json.loads(text, object_pairs_hook=unique)

    return _read(path, load, "JSON")


def read_yaml(path: Path) -> Settings:
    """A YAML mapping without aliases. Raises WeightsError as :func:`read_json`."""
    import yaml  # slow to import, and few need it

    class Loader(yaml.SafeLoader):
        """Refuses what lets a small file stand for a huge object, or say a thing twice."""

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it uses an alias (*), which no such file does")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            pairs = [(self.construct_object(key, deep), None) for key, _ in node.value]
            if all(isinstance(key, Hashable) for key, _ in pairs):
                _unique(pairs, path)
            return super().construct_mapping(node, deep)

    def load(text: str) -> Any:
        if text.count("[") + text.count("{") > _MOST_BRACKETS:
            raise yaml.YAMLError("it has more brackets than any such file")
        return yaml.load(text, Loader)

    return _read(path, load, "YAML")


def _read(path: Path, load: Callable[[str], Any], language: str) -> Settings:
    with local.open_plain(path) as file:
        try:
            content = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > _MOST_BYTES:
        raise WeightsError(f"{path} has more than {_MOST_BYTES} bytes, which no such file has.")
    try:
        raw = load(content.decode())
    except WeightsError:
        raise
    # ValueError: not UTF-8, not JSON, integers too long, no date; the others: YAML's tags.
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        problem = " ".join(str(error).split()) or first_line(error)
        raise WeightsError(
            f"{path} is not {language} that can be read: {problem[:300]}."
        ) from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise WeightsError(f"{path} is not a {language} object with named fields, as expected.")
    return Settings(path, raw)


def _unique(pairs: list[tuple[Any, Any]], path: Path) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise WeightsError(f"{path} says {_short(twice)} twice; it was changed by hand.")
    return found


def _off(value: Any) -> bool:
    return value in ([], {}) or any(value is one or value == one for one in _OFF)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else ""
    if isinstance(value, list | dict):
        text = f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = text or type(value).__name__
    return text if len(text) <= 100 else text[:100] + "…"
