"""What an edit or a reducer can know about its pass; values that differ by layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import EditError
from jaxtc.helpers import frozen_pytree
from jaxtc.interchange import plain_fields
from jaxtc.sharding.placement import Placement
from jaxtc.tap.sites import Site


@frozen_pytree()
class PerLayer:
    """A value for each layer, wherever an edit takes a value: ``SetTo(PerLayer(stacked), ...)``.

    Attributes:
        array: (L, ...), the value of layer l at index l.
    """

    array: Any

    __post_init__ = plain_fields


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to that one."""
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def own(value: Any, layer: int | None) -> Any:
    """``value``, or that layer's where it is a :class:`PerLayer`."""
    return value.array[layer] if isinstance(value, PerLayer) else value


@dataclasses.dataclass(frozen=True)
class Context:
    """What an edit or a reducer can know about its pass.

    Attributes:
        site: row of the table of the site.
        layer: this layer, a plain int; None for a site that the model has once.
        positions: (B, T) int32, position of each token in its own text.
        lengths: (B,) int32, tokens of each prompt.
        read: value of an upstream site of the same layer, after its edits. Of the edit's own site:
            the value before the first edit that reads it, at each token where that one applies.
        placement: the mesh of the pass, None on a single device.
        ends: (B,) int32, tokens of each text by the end of this pass; the lengths when None.
        carried: by layer, what an edit kept of this layer and of earlier ones (``Edit.carry``).
    """

    site: Site
    layer: int | None
    positions: jax.Array
    lengths: jax.Array
    read: Callable[[str], jax.Array]
    placement: Placement | None = None
    ends: jax.Array | None = None
    carried: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    @property
    def real(self) -> jax.Array:
        """(B, T) booleans, true on tokens of the prompts (padding and new tokens are not)."""
        return self.positions < self.lengths[:, None]

    @property
    def there(self) -> jax.Array:
        """(B, T) booleans, true on tokens, of prompts and new ones; padding is not."""
        return self.positions < (self.lengths if self.ends is None else self.ends)[:, None]

    def fit(self, value: Any, x: jax.Array) -> jax.Array:
        """``value``, or this layer's of a :class:`PerLayer`, in the dtype and shape of ``x``.

        Raises:
            EditError: the shape does not broadcast to that of ``x``.
        """
        value = jnp.asarray(own(value, self.layer)).astype(x.dtype)
        if not broadcasts(value.shape, x.shape):
            raise EditError(
                f"A value of shape {value.shape} does not broadcast to {self.site.name} "
                f"[{self.site.axes}] = {x.shape}. (An edit of your own names its fields of values "
                'in `values = ("value",)`: they are padded as the prompts are.)'
            )
        return jnp.broadcast_to(value, x.shape)
