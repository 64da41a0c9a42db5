"""The captured arrays of a pass, found under any of their names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxtc.errors import SiteError
from jaxtc.helpers import frozen_pytree
from jaxtc.interchange import stack
from jaxtc.tap.sites import BY_NAME, Address, parse, resolve


@frozen_pytree("layers", "aliases")
class Activations(Mapping):
    """The captured arrays, by address.

    Keys are canonical addresses (``layers.20.mlp_out``); every alias that names one works too, and
    a site without a layer gives all captured layers stacked in front, (L, ...). What a reducer kept
    is found under the reducer's name, such as ``At(resid_post)``, or the name it was given.

    Attributes:
        arrays: what was captured whole.
        layers: how many the model has (static).
        reduced: what each reducer kept, by its name.
        aliases: the caller's names for arrays (static).
        starts: of the prompts, see :class:`jaxtc.programs.call.RunResult`.
    """

    arrays: dict[Address, jax.Array]
    layers: int
    reduced: dict[str, Any] = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    starts: Any = None

    def __getitem__(self, key: "str | Address") -> Any:
        if key in self.reduced:
            return self.reduced[key]
        wanted = dict(self.aliases).get(key, key)
        kept = [self.arrays[a] for a in resolve(wanted, self.layers) if a in self.arrays]
        if not kept:
            held = ", ".join(self) or "nothing"
            raise KeyError(f"{key!r} was not captured; this result holds {held}")
        site, layer = parse(wanted)
        return stack(kept) if BY_NAME[site].per_layer and layer is None else kept[0]

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except (KeyError, SiteError):
            return False
        return True

    def __iter__(self):
        yield from map(str, sorted(self.arrays, key=lambda address: address.place(self.layers)))
        yield from self.reduced

    def __len__(self):
        return len(self.arrays) + len(self.reduced)

    def __repr__(self):
        rows = [f"{key}: {x.dtype}{list(x.shape)}" for key, x in self.arrays.items()]
        return f"Activations({', '.join([*rows, *self.reduced])})"
