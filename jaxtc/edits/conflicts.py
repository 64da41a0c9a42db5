"""Edits that would undo or distort each other without a word, refused before anything runs.

What is traced cannot be compared, and passes.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxtc.edits.base import Edit
from jaxtc.edits.features import FeatureEdit
from jaxtc.errors import EditError
from jaxtc.tap.positions import is_traced
from jaxtc.tap.sites import ORDER


def check_conflicts(edits: Sequence[Edit], layers: int, width: int) -> None:
    """Refuse edits of what is replaced, and two edits of one feature at one token.

    Args:
        edits: with their targets settled.
        layers: layers of the model.
        width: W, the padded length.

    Raises:
        EditError: naming both.
    """
    for (i, a), (j, b) in itertools.permutations(enumerate(edits), 2):
        # What leads from the site that is read to the one that is replaced is not computed.
        inside = ORDER["mlp_in"] < ORDER[b.site] < ORDER[a.site]
        before = b.site == a.site and j < i
        known = a.replaces and (inside or before) and not is_traced((a.layer, b.layer))
        if known and _layers(b, layers) <= _layers(a, layers):
            raise EditError(
                f"{b} would have no effect: {a} replaces what it changes. Leave one of them out"
                + (", or put it after the other." if before else ".")
            )
        if i < j and isinstance(a, FeatureEdit) and isinstance(b, FeatureEdit) and a.site == b.site:
            _check_features(a, b, layers, width)


def _check_features(a: FeatureEdit, b: FeatureEdit, layers: int, width: int) -> None:
    """Each adds its difference from the transcoder's own activation, so two would add up wrong."""
    if a.transcoder.W_enc[...] is not b.transcoder.W_enc[...]:
        return
    if is_traced([getattr(edit, name) for edit in (a, b) for name in edit.targets]):
        return
    shared = [_layers(a, layers) & _layers(b, layers)]
    for name in ("feature", "row", "coordinate"):
        mine, others = getattr(a, name), getattr(b, name)
        if mine is not None and others is not None:
            shared.append(np.intersect1d(mine, others).size)
    if a.position is not None and b.position is not None:
        # As far as the prompts go; what follows them is named by spans and numbers alike.
        batch = next(iter(vars(a.position).values())).shape[0]
        at = np.broadcast_to(np.arange(2 * width), (batch, 2 * width))
        shared.append((a.position.selects(at) & b.position.selects(at)).any())
    if all(shared):
        raise EditError(
            f"{a} and {b} both change feature {np.intersect1d(a.feature, b.feature)[0]} at the "
            "same tokens, and each adds its difference from what the transcoder itself finds "
            "there. Make it one edit, or give them different positions."
        )


def _layers(edit: Edit, layers: int) -> set[int]:
    """The layers that an edit names."""
    if edit.layer is not None:
        return set(np.atleast_1d(edit.layer).tolist())
    return set(range(layers) if edit.layers is None else edit.layers)
