"""Edits of attention's scores: what a query may not see stays unseen, unless keys are named."""

import jax
import numpy as np
import pytest

import jaxtc
from jaxtc import (
    Add,
    Apply,
    Copy,
    Edit,
    Freeze,
    Interpolate,
    MeanAblate,
    Noise,
    PerLayer,
    Scale,
    SetTo,
    Zero,
    register_edit,
)  # fmt: skip
from jaxtc.model.gemma2 import MASKED
from tests.edits.test_compiled import kinds
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, run
from tests.support.taps import drawn, through

SITE = dict(site="attn_scores")
WINDOW = tiny.config().sliding_window


def flipped(scores):
    return -scores


@register_edit()
class Half(Edit):
    """A user's own."""

    def new(self, x, context):
        return -0.5 * x


@register_edit()
class Open(Edit):
    """A user's own, who asks for it."""

    unmasks = True

    def new(self, x, context):
        return 0 * x


MASKED_STILL = {
    "flip": Scale(-1.0, **SITE),
    "negative, at one layer and head": Scale(-2.0, site="layers.1.attn_scores", head=1),
    "negative, at one key": Scale(-1.0, **SITE, key=3, row=0),
    "zero": Zero(**SITE),
    "zero at keys": Zero(**SITE, key=slice(2, None), row=0),
    "set": SetTo(0.5, **SITE),
    "set at the end": SetTo(0.5, **SITE, position=-1),
    "set to an array": SetTo(drawn(1, 9, 9), **SITE),
    "set by layer": SetTo(PerLayer(drawn(2, LAYERS, 9, 9)), **SITE),
    "push": Add(3e38, **SITE),
    "interpolate": Interpolate(0.0, 0.5, **SITE),
    "past the end": Interpolate(0.0, 2.0, **SITE),
    "dataset": MeanAblate(0.0, **SITE),
    "noise": Noise(0, 2.0, **SITE),
    "copy": Copy(from_position=2, position=1, **SITE),
    "copy a row": Copy(from_row=0, row=1, position=[0, 1], **SITE),
    "apply": Apply(flipped, **SITE),
    "freeze": Freeze(PerLayer(drawn(3, LAYERS, 3, 4, 9, 9)), **SITE),
    "an own": Half(**SITE),
    "twice": [Add(1.0, **SITE), Scale(-1.0, **SITE)],
}  # fmt: skip


@pytest.fixture(scope="module")
def before():
    return run(capture="attn_scores").activations["attn_scores"]


@pytest.fixture(scope="module")
def found(before):
    edits = {f"attn_scores/{name}": given for name, given in MASKED_STILL.items()}
    edits = {key: one if isinstance(one, list) else [one] for key, one in edits.items()}
    return through(edits, dict.fromkeys(edits, np.asarray(before)))


@pytest.mark.parametrize("name", MASKED_STILL)
def test_what_may_not_be_seen_stays_unseen(name, before, found):
    moved = 0
    for layer in range(LAYERS):
        for row, n in enumerate(LENGTHS):
            was = np.asarray(before)[layer, row, :, :n, :n]
            after = np.asarray(found[f"attn_scores/{name}"])[layer, row, :, :n, :n]
            back = np.arange(n)[:, None] - np.arange(n)
            unseen = (back < 0) | (back >= (WINDOW if layer % 2 == 0 else n))
            unseen = np.broadcast_to(unseen, was.shape)
            assert (was[unseen] == MASKED).all() and (after[unseen] == MASKED).all()
            moved += np.abs(after - was)[~unseen].max() > 1e-3
            assert np.isfinite(after).all()
    assert moved


def test_every_kind_that_fits_scores_is_tried():
    tried = {type(one) for given in MASKED_STILL.values() for one in np.atleast_1d(given).tolist()}
    refused = {jaxtc.KnockOut, jaxtc.ProjectOut, jaxtc.Detach}
    transcoders = {kind for kind in kinds() if "transcoder" in kind.__dataclass_fields__}
    assert kinds() - refused - transcoders <= tried


def test_a_flip_does_not_look_ahead():
    """Tokens that come later change nothing of what came before."""
    edits = [Scale(-1.0, **SITE)]
    whole = run(PROMPTS[:1], edits=edits).logits
    other = run([[*PROMPTS[0][:5], 13, 12, 11, 10]], edits=edits).logits
    np.testing.assert_allclose(whole[0, :5], other[0, :5], rtol=1e-6, atol=1e-6)
    assert np.abs(whole - other)[0, 5:].max() > 1e-3
    assert np.abs(whole - run(PROMPTS[:1]).logits).max() > 1e-3


@pytest.mark.parametrize("edit", [Zero(**SITE), SetTo(0.0, **SITE)], ids=["zero", "set"])
def test_even_scores_look_evenly_at_what_may_be_seen(edit):
    pattern = run(capture="attn_pattern", edits=[edit]).activations["layers.1.attn_pattern"]
    for row, n in enumerate(LENGTHS):
        even = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
        np.testing.assert_allclose(pattern[row, 2, :n, :n], even, rtol=1e-6)


OPENED = {"keys": SetTo(0.0, key=slice(None), **SITE), "an own": Open(**SITE)}


@pytest.mark.parametrize("name", OPENED)
def test_scores_set_key_by_key_are_seen_but_for_padding(name):
    patterns = run(capture="attn_pattern", edits=[OPENED[name]]).activations
    for pattern, length in zip(patterns["layers.0.attn_pattern"], LENGTHS, strict=True):
        np.testing.assert_allclose(pattern[:, :length, :length], 1 / length, rtol=1e-6)


def test_a_key_that_was_opened_can_be_changed_again():
    opened = SetTo(1.0, site="layers.1.attn_scores", position=1, key=3, row=0)
    edits = [opened, Scale(2.0, site="layers.1.attn_scores")]
    scores = run(edits=edits, capture="layers.1.attn_scores").activations["layers.1.attn_scores"]
    assert (scores[0, :, 1, 3] == 2).all() and (scores[0, :, 1, 2] == MASKED).all()


def test_scores_are_differentiable_beside_the_mask():
    def loss(factor):
        edits = [Scale(factor, **SITE)]
        return (run(edits=edits, logits="last").logits ** 2).sum()

    slope = jax.grad(loss)(-1.0)
    step = (loss(-0.999) - loss(-1.001)) / 0.002
    assert np.isfinite(slope) and abs(slope) > 1e-3
    np.testing.assert_allclose(slope, step, rtol=0.05)
