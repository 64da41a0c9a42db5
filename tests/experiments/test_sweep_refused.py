"""Sweeps: what is wrong is refused before anything runs; combinations that do not fit are NaN."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Add, MeanAblate, Over, ProjectOut, Scale, Token, Zero, sweep
from jaxtc.errors import CapacityError, EditError, InputError, SiteError
from jaxtc.experiments.scores import Logit
from tests.support import tiny
from tests.support.batch import LAYERS, PROMPTS, VECTOR, D
from tests.support.sweeps import at, named, over
from tests.support.unspared import SetFeature, Splice

LONG = PROMPTS[0]
EACH = np.random.default_rng(3).standard_normal((3, D)).astype(np.float32)
T1 = tiny.transcoder(1)
LAYER = over(*range(LAYERS))


def test_a_combination_that_is_not_there_is_nan():
    edit = Add(VECTOR, site="mlp_out", layer=1, row=over(1, 0, 2), position=over(0, 8, 3))
    found = sweep(tiny.model(), PROMPTS, [edit])
    assert list(found.axes) == ["position", "row"]
    found = found.values
    lost = np.isnan(found).all((2, 3))
    np.testing.assert_array_equal(lost, np.isnan(found).any((2, 3)))
    np.testing.assert_array_equal(lost.T, [[False, True, False], [False] * 3, [False, True, True]])
    for i, j in [(0, 0), (1, 1), (2, 1), (2, 0)]:
        alone = at(named(edit), dict(row=j, position=i))
        expected = jaxtc.run(tiny.model(), PROMPTS, edits=[alone], logits="last").logits
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-5, atol=1e-5)
    ids = sweep(tiny.model(), PROMPTS, [edit], of=lambda r: r.logits.argmax(-1)).values
    assert (ids[0, 1] >= 0).all()  # of NaN: `of` gives what it gives


def test_a_value_that_fits_in_no_combination_is_refused():
    """Each is there in some row, but position 8 and token 13 are in no row together."""
    where = dict(site="attn_pattern", row=over(0, 2), key=Token(over(13, name="token")))
    with pytest.raises(EditError, match="prompt 0 has no token|position 8 lies outside prompt 2"):
        sweep(tiny.model(), PROMPTS, [Scale(2.0, position=over(0, 8), **where)])
    with pytest.raises(EditError, match="prompt 0 has no token"):  # so row 0 is in none
        sweep(tiny.model(), PROMPTS, [Scale(2.0, position=0, **where)])


SITE = dict(site="mlp_out")
WRONG = {
    "no axis": (InputError, "No edit has an axis", [Zero(**SITE)], {}),
    "no edit": (InputError, "No edit has an axis", [], {}),
    "not an edit": (EditError, "got str", ["mlp_out"], {}),
    "lengths": (
        EditError, "'layer' has 2 values in layer and 3 elsewhere",
        [Zero(layer=LAYER, **SITE), Zero(layer=over(0, 1), **SITE)], {},
    ),
    "lengths in one edit": (
        EditError, "'a' has 3 values",
        [Add(Over(EACH, "a"), layer=over(0, 1, name="a"), **SITE)], {},
    ),
    "layer": (SiteError, "layer 3", [Zero(layer=over(0, 3), **SITE)], {}),
    "position": (EditError, "position 9 lies", [Zero(position=over(0, 9), **SITE)], {}),
    "second edit": (
        EditError, "position 9 lies",
        [Zero(layer=LAYER, **SITE), Zero(position=over(0, 9), site="attn_out")], {},
    ),
    "edit without axis": (
        EditError, "position 9 lies", [Zero(layer=LAYER, **SITE), Zero(position=9, **SITE)], {},
    ),
    "row and position": (
        EditError, "position 9 lies",
        [Zero(position=over(0, 9), row=over(0, 0), layer=LAYER, **SITE)], {},
    ),
    "head": (EditError, "heads 0 to 3", [Zero(head=over(0, 4), site="attn_heads")], {}),
    "no heads": (EditError, "no axis for head", [Zero(head=over(0, 1), **SITE)], {}),
    "row": (EditError, "rows 0 to 0", [Zero(row=over(0, 1), **SITE)], {}),
    "feature": (EditError, "feature 50", [SetFeature(T1, over(3, 50), 1.0)], {}),
    "feature, negative": (EditError, "feature -1", [SetFeature(T1, over(3, -1, 4), 1.0)], {}),
    "value": (EditError, "broadcast", [Add(Over(np.ones((2, D + 1))), **SITE)], {}),
    "direction": (EditError, "zeros", [ProjectOut(Over(np.eye(3, D)[:2] * 0), **SITE)], {}),
    "splices": (EditError, "nothing for layer 1", [Splice({0: T1}, layer=over(0, 1))], {}),
    "empty": (EditError, "one or more", [Zero(layer=Over([]), **SITE)], {}),
    "one number": (EditError, "Over 5", [Zero(layer=Over(5), **SITE)], {}),
    "words": (EditError, "Over", [Zero(position=over("prompt", "prompt"), **SITE)], {}),
    "slices": (EditError, "Over", [Zero(position=over(slice(2), slice(3)), **SITE)], {}),
    "static": (EditError, "over is static", [MeanAblate(over=over(0, 1), layer=LAYER, **SITE)], {}),
    "chunk 0": (InputError, "chunk is 0", [Zero(layer=LAYER, **SITE)], dict(chunk=0)),
    "half a chunk": (InputError, "chunk is 1.5", [Zero(layer=LAYER, **SITE)], dict(chunk=1.5)),
    "yes chunk": (InputError, "chunk is True", [Zero(layer=LAYER, **SITE)], dict(chunk=True)),
    "logits": (InputError, "'all', 'last'", [Zero(layer=LAYER, **SITE)], dict(logits="some")),
    "nothing": (InputError, "Nothing was asked", [Zero(layer=LAYER, **SITE)], dict(logits=None)),
    "not kept": (
        InputError, "no array", [Zero(layer=LAYER, **SITE)],
        dict(logits=None, capture="resid_post"),
    ),
    "never": (
        EditError, "never fire", [Zero(layer=LAYER, **SITE)],
        dict(logits=None, capture="layers.1.mlp_out", of=lambda r: r.activations["mlp_out"]),
    ),
    "not a function": (InputError, "of is 3", [Zero(layer=LAYER, **SITE)], dict(of=3)),
    "score without logits": (
        InputError, "kept none", [Zero(layer=LAYER, **SITE)],
        dict(of=Logit(3), logits=None, capture="resid_post"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    kind, words, edits, options = WRONG[name]
    with pytest.raises(kind, match=words):
        sweep(tiny.model(), LONG, edits, **options)


def test_ragged_values_are_refused():
    with pytest.raises(EditError, match="is not an array"):
        Over([[0, 1], [2]])


def test_results_that_do_not_fit_are_refused_at_once(monkeypatch):
    monkeypatch.setattr("jaxtc.memory.needs.available", lambda *given: 10**8)
    edit = Scale(Over(np.linspace(0, 1, 10**4)), layer=LAYER, **SITE)
    done = []
    with pytest.raises(CapacityError, match="this sweep keeps"):
        sweep(
            tiny.model(), LONG, [edit], of=lambda r: jnp.zeros(2000), chunk=8,
            progress=lambda *told: done.append(told),
        )  # fmt: skip
    assert not done
