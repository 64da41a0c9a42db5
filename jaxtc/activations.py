"""The captured arrays of a pass, found under any of their names."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtc.errors import SiteError
from jaxtc.sites import BY_NAME, ORDER, Address, parse, resolve


class Activations(Mapping):
    """The captured arrays, by address.

    Keys are canonical addresses (``layers.20.mlp_out``); every alias that names one works too, and
    a site without a layer gives all captured layers stacked in front, (L, ...).
    """

    def __init__(self, arrays: Mapping[Address, jax.Array], layers: int):
        self._arrays = dict(sorted(arrays.items(), key=lambda item: _by_layer(item[0])))
        self._layers = layers

    def __getitem__(self, key: "str | Address") -> jax.Array:
        wanted = resolve(key, self._layers)
        kept = [address for address in wanted if address in self._arrays]
        if not kept:
            held = ", ".join(map(str, self._arrays)) or "nothing"
            raise KeyError(f"{key!r} was not captured; this result holds {held}")
        site, layer = parse(str(key))
        if BY_NAME[site].per_layer and layer is None:
            return jnp.stack([self._arrays[address] for address in kept])
        return self._arrays[kept[0]]

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except (KeyError, SiteError):
            return False
        return True

    def __iter__(self):
        return map(str, self._arrays)

    def __len__(self):
        return len(self._arrays)

    def __repr__(self):
        rows = (f"{key}: {x.dtype}{list(x.shape)}" for key, x in self._arrays.items())
        return f"Activations({', '.join(rows)})"


def _by_layer(address: Address) -> tuple[int, int]:
    if address.layer is None:
        return (-1 if address.site == "embed" else 10**9, ORDER[address.site])
    return (address.layer, ORDER[address.site])


jax.tree_util.register_pytree_node(
    Activations,
    lambda kept: (tuple(kept._arrays.values()), (tuple(kept._arrays), kept._layers)),
    lambda aux, arrays: Activations(dict(zip(aux[0], arrays, strict=True)), aux[1]),
)
