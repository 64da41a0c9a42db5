"""What a run is asked to keep: addresses, reducers, and the names they are found under."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtc.captures.base import Reducer
from jaxtc.errors import InputError, SiteError
from jaxtc.helpers import pytree
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.tap.sites import Address, parse, resolve

# What users may give as `capture`.
Capture = str | Address | Reducer
Captures = Capture | Sequence[Capture] | Mapping[str, Capture]


@pytree
@dataclasses.dataclass(frozen=True)
class Asked:
    """A ``capture`` argument, understood.

    Attributes:
        addresses: kept whole; sorted, each once (static).
        reducers: kept reduced (data).
        names: what each reducer's result is called (static).
        aliases: names that the caller gave to whole captures, with their addresses (static).
    """

    addresses: tuple[Address, ...] = dataclasses.field(metadata={"static": True})
    reducers: tuple[Reducer, ...]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    aliases: tuple[tuple[str, str], ...] = dataclasses.field(metadata={"static": True})

    def reach(self, layers: int) -> tuple[int, int]:
        """How far a pass must go for all of it: (layer, place in the layer)."""
        reduced = [a for reducer in self.reducers for a in resolve(reducer.address, layers)]
        return max(address.place(layers) for address in (*self.addresses, *reduced))

    def checked(self, config: Gemma2Config, prompts: Prompts) -> tuple[Reducer, ...]:
        """The reducers as compiled programs take them; raises for those that do not fit."""
        given = prompts.tokens, prompts.lengths, prompts.length
        return tuple(reducer.checked(config, *given) for reducer in self.reducers)

    def __bool__(self):
        return bool(self.addresses or self.reducers)


def understand(capture: Captures, layers: int) -> Asked:
    """What a ``capture`` argument asks for, in a model of ``layers`` layers.

    Raises:
        SiteError: an address that names nothing here.
        InputError: two reducers of one name, something that is neither address nor reducer, or a
            name of the caller's that is an address already.
    """
    addresses, reducers, aliases = set(), {}, {}
    for name, item in requests(capture).items():
        if isinstance(capture, Mapping) and name != str(item) and _is_address(name):
            raise InputError(f"capture names something {name!r}, which is an address already.")
        if isinstance(item, Reducer):
            resolve(item.address, layers)
            reducers[name] = item
        else:
            addresses.update(resolve(item, layers))
            aliases[name] = str(item)
    aliases = tuple((name, item) for name, item in aliases.items() if not _is_address(name))
    ordered = tuple(sorted(addresses, key=str))
    return Asked(ordered, tuple(reducers.values()), tuple(reducers), aliases)


def _is_address(name: str) -> bool:
    try:
        parse(name)
    except SiteError:
        return False
    return True


def requests(capture: Any) -> dict[str, "str | Address | Reducer"]:
    """What ``capture=`` asks for, by the name under which the result holds it.

    Args:
        capture: an address or a reducer, several of them, or a mapping from names of your own.

    Raises:
        InputError: something that is neither, or two reducers of one name.
        SiteError: no such site.
    """
    mapping = isinstance(capture, Mapping)
    single = isinstance(capture, str | Address | Reducer)
    several = capture.items() if mapping else enumerate([capture] if single else capture)
    named: dict[str, str | Address | Reducer] = {}
    for name, wanted in several:
        if mapping and not isinstance(name, str):
            raise InputError(f"Captures are named by strings, got {name!r}.")
        if not isinstance(wanted, str | Address | Reducer):
            raise InputError(
                "capture takes addresses such as 'layers.20.mlp_out', reducers such as "
                f"jaxtc.reducers.At('resid_post', -1), or a dict of them; got {wanted!r}."
            )
        if not mapping:
            name = str(wanted if isinstance(wanted, Reducer) else Address(*parse(wanted)))
            if name in named and isinstance(wanted, Reducer):
                raise InputError(
                    f"Two captures would both be called {name!r}; name them yourself: "
                    "capture={'first': " + name.split("(")[0] + "(...), 'second': ...}."
                )
        named[name] = wanted
    return named


def check_per_token(asked: Asked) -> None:
    """Raise InputError for a reducer that wants all tokens at once."""
    for name, reducer in zip(asked.names, asked.reducers, strict=True):
        if not reducer.per_token:
            raise InputError(
                f"{name} reduces over a prompt's tokens, and generate sees new ones one by one. "
                "Give a reducer of each token (Norm, TopK, Project, Features) or the address "
                "itself; or run the model once more: jaxtc.run(model, found.sequences, ...)."
            )


def check_logits(logits: Any, needed: bool = False) -> None:
    """Raise InputError unless ``logits`` is "all", "last" or (if not ``needed``) None."""
    if logits not in ("all", "last") and (needed or logits is not None):
        expected = "'all' or 'last'" if needed else "'all', 'last' or None"
        raise InputError(f"logits is {logits!r}, expected {expected}.")
