"""Edits that would undo each other are refused."""

import jax
import jax.numpy as jnp
import pytest

import jaxtc
from jaxtc import Add, Apply, Zero
from jaxtc.errors import EditError
from tests.support import tiny
from tests.support.batch import LAYERS, PROMPTS, VECTOR, logits
from tests.support.unspared import ScaleFeature, SetFeature, Splice

T = tiny.transcoder(1)
EVERY = {layer: tiny.transcoder(layer) for layer in range(LAYERS)}

REFUSED = {
    "inside": [Splice(T), Zero(site="layers.1.mlp_act")],
    "inside, after": [Zero(site="layers.1.mlp_out_scale"), Splice(T)],
    "inside every layer": [Splice(EVERY), Zero(site="mlp_proj")],
    "before": [Add(VECTOR, site="layers.1.mlp_out"), Splice(T)],
    "one feature twice": [SetFeature(T, 3, 1.0), ScaleFeature(T, [2, 3], 0.0)],
    "at one position": [
        SetFeature(T, 3, 1.0, position=[0, -1]),
        SetFeature(T, 3, 2.0, position=slice(2, None)),
    ],
}
FINE = {
    "after": [Splice(T), Add(VECTOR, site="layers.1.mlp_out")],
    "another layer": [Splice(T), Zero(site="layers.0.mlp_act")],
    "some layers": [Splice(T), Zero(site="mlp_act")],
    "not replaced": [Splice(T, position=0), Zero(site="layers.1.mlp_act")],
    "other features": [SetFeature(T, 3, 1.0), SetFeature(T, 4, 1.0)],
    "other positions": [SetFeature(T, 3, 1.0, position=0), SetFeature(T, 3, 2.0, position=1)],
    "other rows": [SetFeature(T, 3, 1.0, row=0), SetFeature(T, 3, 2.0, row=[1, 2])],
    "other layers": [SetFeature(T, 3, 1.0), SetFeature(T, 3, 2.0, layer=2)],
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    with pytest.raises(EditError, match="would have no effect|both change feature 3"):
        logits(*REFUSED[case])


@pytest.mark.parametrize("case", FINE)
def test_fine(case):
    assert jnp.isfinite(logits(*FINE[case])).all()


def test_a_function_that_returns_nothing():
    with pytest.raises(EditError, match="returned NoneType, expected an array"):
        logits(Apply(lambda x: None, site="layers.0.mlp_out"))


def test_a_traced_mask_with_nothing_on_and_a_traced_row_outside_are_nan():
    def masked(on):
        return jaxtc.run(tiny.model(), PROMPTS[:1], edits=[
            Add(VECTOR, site="resid_mid", position=on)]).logits  # fmt: skip

    on = jnp.zeros((2, len(PROMPTS[0])), bool).at[1, 3].set(True)
    found = jax.vmap(masked)(on)
    assert jnp.isnan(found[0]).all() and jnp.isfinite(found[1]).all()

    def copied(row):
        edit = jaxtc.Copy(row, site="layers.0.resid_mid", row=0, position=0)
        return jaxtc.run(tiny.model(), PROMPTS, edits=[edit]).logits

    found = jax.vmap(copied)(jnp.asarray([1, 7]))
    assert jnp.isfinite(found[0]).all() and jnp.isnan(found[1]).all()
