"""The captured arrays of a pass, found under any of their names."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxtc.errors import SiteError
from jaxtc.interchange import stack
from jaxtc.tap.sites import BY_NAME, Address, parse, resolve


class Activations(Mapping):
    """The captured arrays, by address.

    Keys are canonical addresses (``layers.20.mlp_out``); every alias that names one works too, and
    a site without a layer gives all captured layers stacked in front, (L, ...). What a reducer kept
    is found under the reducer's name, such as ``At(resid_post)``, or the name it was given.

    Attributes:
        layers: how many the model has.
    """

    def __init__(
        self,
        arrays: Mapping[Address, jax.Array],
        layers: int,
        reduced: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self._arrays = {a: arrays[a] for a in sorted(arrays, key=lambda a: a.place(layers))}
        self.layers = layers
        self._reduced, self._aliases = dict(reduced or {}), dict(aliases or {})

    def __getitem__(self, key: "str | Address") -> Any:
        if key in self._reduced:
            return self._reduced[key]
        wanted = self._aliases.get(key, key)
        kept = [self._arrays[a] for a in resolve(wanted, self.layers) if a in self._arrays]
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
        yield from map(str, self._arrays)
        yield from self._reduced

    def __len__(self):
        return len(self._arrays) + len(self._reduced)

    def __repr__(self):
        rows = [f"{key}: {x.dtype}{list(x.shape)}" for key, x in self._arrays.items()]
        return f"Activations({', '.join([*rows, *self._reduced])})"


def _flatten(kept: Activations):
    static = (tuple(kept._arrays), kept.layers, tuple(kept._aliases.items()))
    return (tuple(kept._arrays.values()), kept._reduced), static


def _unflatten(static, children) -> Activations:
    addresses, layers, aliases = static
    arrays, reduced = children
    return Activations(dict(zip(addresses, arrays, strict=True)), layers, reduced, dict(aliases))


jax.tree_util.register_pytree_node(Activations, _flatten, _unflatten)
