"""What a run is asked to keep: addresses, reducers, and the names they are found under."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtc.captures.base import Reducer
from jaxtc.errors import InputError, SiteError
from jaxtc.helpers import pytree
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.tap.positions import is_traced
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
        return tuple(reducer.checked(config, prompts) for reducer in self.reducers)

    @property
    def unpadded(self) -> list[Reducer]:
        """The reducers that see each prompt by itself, without padding."""
        return [one for one in self.reducers if not (one.per_token or one.padded)]

    def prompt_lengths(self, prompts: Prompts) -> tuple[int, ...] | None:
        """(B) tokens of each prompt as plain ints, where a reducer sees each without padding.

        Raises:
            InputError: they are traced, and so can be the length of nothing.
        """
        if not self.unpadded:
            return None
        if is_traced(prompts.lengths):
            raise InputError(
                f"{self.unpadded[0]} is given each prompt without padding, so the prompts' lengths "
                "are part of the program, and here they are traced. Give lengths as NumPy numbers, "
                "outside of what your jax.jit or jax.vmap takes; or say `padded = True` on the "
                "class, whose `reduce` then leaves padding out itself (context.real)."
            )
        return tuple(map(int, prompts.lengths))

    def __bool__(self):
        return bool(self.addresses or self.reducers)


def understand(capture: Captures, layers: int) -> Asked:
    """What a ``capture`` argument asks for, in a model of ``layers`` layers.

    Raises:
        SiteError: an address that names nothing here.
        InputError: two reducers of one name, something that is neither address nor reducer, or a
            name of the caller's that is an address already.
    """
    mapping = isinstance(capture, Mapping)
    single = isinstance(capture, str | Address | Reducer)
    addresses, reducers, aliases = set(), {}, {}
    for name, wanted in capture.items() if mapping else enumerate([capture] if single else capture):
        if not isinstance(wanted, str | Address | Reducer):
            raise InputError(
                "capture takes addresses such as 'layers.20.mlp_out', reducers such as "
                f"jaxtc.reducers.At('resid_post', -1), or a dict of them; got {wanted!r}."
            )
        if not mapping:
            name = str(wanted)
        elif not isinstance(name, str):
            raise InputError(f"Captures are named by strings, got {name!r}.")
        elif name != str(wanted) and _is_address(name):
            raise InputError(f"capture names something {name!r}, which is an address already.")
        if not isinstance(wanted, Reducer):
            addresses.update(resolve(wanted, layers))
            if name != str(wanted):
                aliases[name] = str(wanted)
            continue
        if name in reducers:
            raise InputError(
                f"Two captures would both be called {name!r}; name them yourself: "
                "capture={'first': " + name.split("(")[0] + "(...), 'second': ...}."
            )
        resolve(wanted.address, layers)
        reducers[name] = wanted
    ordered = tuple(sorted(addresses, key=str))
    return Asked(ordered, tuple(reducers.values()), tuple(reducers), tuple(aliases.items()))


def _is_address(name: str) -> bool:
    try:
        parse(name)
    except SiteError:
        return False
    return True


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
