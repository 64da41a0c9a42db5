"""Edits that would undo or distort each other without a word, refused before anything runs.

What is traced cannot be compared, and passes.
"""

import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import Edit
from jaxtc.edits.features import FeatureEdit
from jaxtc.errors import EditError
from jaxtc.tap.positions import is_traced
from jaxtc.tap.sites import ORDER


def check_conflicts(edits: Sequence[Edit], layers: int, width: int) -> None:
    """Refuse edits of what is replaced, and two edits of one feature at one token.

    Args:
        edits: with their targets checked.
        layers: layers of the model.
        width: W, the padded length.

    Raises:
        EditError: naming both.
    """
    for index, edit in enumerate(edits):
        if edit.replaces and not is_traced(edit.layer):
            _check_replaced(edit, index, edits, layers)
    for a, b in itertools.combinations((e for e in edits if isinstance(e, FeatureEdit)), 2):
        _check_features(a, b, layers, width)


def _check_replaced(edit: Edit, index: int, edits: Sequence[Edit], layers: int) -> None:
    """What leads from the site that is read to the one that is replaced is not computed."""
    gone = _layers(edit, layers)
    for other_index, other in enumerate(edits):
        inside = ORDER["mlp_in"] < ORDER[other.site] < ORDER[edit.site]
        before = other.site == edit.site and other_index < index
        if (inside or before) and not is_traced(other.layer) and _layers(other, layers) <= gone:
            raise EditError(
                f"{other} would have no effect: {edit} replaces what it changes. Leave one of them "
                "out" + (", or put it after the other." if before else ".")
            )


def _check_features(a: FeatureEdit, b: FeatureEdit, layers: int, width: int) -> None:
    """Each adds its difference from the transcoder's own activation, so two would add up wrong."""
    if a.site != b.site or a.transcoder.W_enc[...] is not b.transcoder.W_enc[...]:
        return
    if is_traced((_targets(a), _targets(b))):
        return
    features = np.intersect1d(a.feature, b.feature)
    if not features.size or not _layers(a, layers) & _layers(b, layers):
        return
    if all(_somewhere(a, b, width)):
        raise EditError(
            f"{a} and {b} both change feature {features[0]} at the same tokens, and each adds its "
            "difference from what the transcoder itself finds there. Make it one edit, or give "
            "them different positions."
        )


def _targets(edit: FeatureEdit) -> list:
    return [edit.layer, edit.row, edit.position, edit.feature]


def _layers(edit: Edit, layers: int) -> set[int]:
    """The layers that an edit names."""
    if edit.layer is not None:
        return set(np.atleast_1d(edit.layer).tolist())
    return set(range(layers) if edit.layers is None else edit.layers)


def _somewhere(a: Edit, b: Edit, width: int) -> Iterator[bool]:
    """Whether two edits share a row, a token, a coordinate."""
    for name in ("row", "coordinate"):
        mine, others = getattr(a, name), getattr(b, name)
        yield mine is None or others is None or bool(np.intersect1d(mine, others).size)
    if a.position is not None and b.position is not None:
        # As far as the prompts go; what follows them is named by spans and numbers alike.
        batch = next(iter(vars(a.position).values())).shape[0]
        at = jnp.broadcast_to(jnp.arange(2 * width), (batch, 2 * width))
        yield bool((a.position.selects(at) & b.position.selects(at)).any())
