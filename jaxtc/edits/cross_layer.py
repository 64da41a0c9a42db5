"""What edits do through a cross-layer transcoder, whose features write at later layers too.

:class:`jaxtc.Splice` and feature edits (:mod:`jaxtc.edits.features`) keep what they find at each
layer (:meth:`jaxtc.Edit.carry`) and write it, here and further on, by these functions.

Axis letters: B batch, T tokens, D hidden, M features, K features edited.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtc.edits.base import Edit
from jaxtc.errors import EditError
from jaxtc.tap.context import Context
from jaxtc.tap.positions import is_traced
from jaxtc.transcoders.cross_layer import (
    CROSS_LAYER,
    CrossLayerTranscoder,
    LayerFeatures,
    at_layer,
)


def is_cross_layer(given: Any) -> bool:
    """Whether it is a cross-layer transcoder, or the features of one of its layers."""
    return isinstance(given, CROSS_LAYER)


def check_splice(edit: Edit) -> None:
    """Refuse one layer's features, as no layer is reconstructed of them alone."""
    given = edit.transcoder
    if isinstance(given, LayerFeatures):
        raise EditError(
            f"Splice was given the features of layer {given.layer} of a cross-layer transcoder. "
            "What takes an MLP's place is made of the features of all layers up to it: "
            "Splice(jaxtc.load_transcoders(folder)) replaces every MLP, with layer=... those that "
            "are named."
        )


def check_apart(given: Iterable[Any]) -> None:
    """Refuse layers of a cross-layer transcoder that were put in a mapping or a list."""
    if any(is_cross_layer(part) for one in given for part in (one if is_row(one) else [one])):
        raise EditError(
            "The layers of a cross-layer transcoder belong together: give the whole, "
            "Splice(transcoder), and layer=... to replace the MLPs of some layers."
        )


def is_row(given: Any) -> bool:
    """Whether it is a list of things."""
    return isinstance(given, list | tuple | nnx.List)


def check_features(edit: Edit) -> None:
    """Refuse a feature edit that does not say whose layer's features it means."""
    given, kind = edit.transcoder, type(edit).__name__
    if isinstance(given, CrossLayerTranscoder) and edit.layer is None:
        raise EditError(
            f"{kind} needs a layer: each layer of a cross-layer transcoder has features of its "
            "own. Give layer=..., whose features these are; what they write at later layers "
            "changes along with it."
        )
    known = isinstance(given, LayerFeatures) and not is_traced(edit.layer)
    if known and not np.array_equal(edit.layer, given.layer):
        raise EditError(
            f"{kind} was given layer={edit.layer} and features of layer {given.layer}. For any "
            "other layer, or a sweep over layers, give the whole cross-layer transcoder."
        )


def check_model(edit: Edit, layers: int) -> None:
    """Refuse a dictionary of another number of layers, or one that reads what it writes."""
    given = edit.transcoder
    of = len(given.layers) if isinstance(given, CrossLayerTranscoder) else given.writes.stop
    if of != layers:
        raise EditError(
            f"{edit}: this cross-layer transcoder has {of} layers, and this model has {layers}. "
            "It belongs to another model."
        )
    if edit.site in edit.reads:
        raise EditError(
            f"{edit}: a cross-layer transcoder reads one site and writes a later one, this one "
            f"reads and writes {edit.site}."
        )


def reconstruction(edit: Edit, x: jax.Array, context: Context) -> jax.Array:
    """(B, T, D) at this layer, of the activations carried from here and all earlier layers.

    ``x`` (B, T, D) is what is read here.
    """
    here = context.layer
    return edit.transcoder.decode_at(here, [context.carried[n] for n in range(here + 1)], x)


def change_here(edit: Edit, changed: Any, context: Context) -> jax.Array | None:
    """(B, T, K) by how much the features of this layer change; None where there are none.

    ``changed(features of a layer, context)`` is what they change by. Zeros at a layer that is not
    named; NaN if a traced layer is not that of the only features.
    """
    part = at_layer(edit.transcoder, context.layer)
    if part is None:
        return None
    named = (jnp.asarray(edit.layer) == context.layer).any()
    change = changed(part, context)
    other = 0 if isinstance(edit.transcoder, CrossLayerTranscoder) else jnp.nan
    return jnp.where(named, change, jnp.asarray(other, change.dtype))


def written(edit: Edit, ids: jax.Array, x: jax.Array, context: Context) -> jax.Array:
    """What the changes of all layers up to this one write here, in the shape of ``x``, float32."""
    total = jnp.zeros(x.shape, jnp.float32)
    for layer, change in context.carried.items():
        if change is not None:
            rows = at_layer(edit.transcoder, layer).decoder_rows(ids, context.layer)
            total += jnp.matmul(change, rows, precision="highest").reshape(x.shape)
    return total
