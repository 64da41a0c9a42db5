"""Edits under jit, vmap and grad, and what captures and edits cost once compiled."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtc import Add, SetTo
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, VECTOR, D, logits, near, real, run
from tests.support.unspared import Splice

# `jaxtc.run` is the function; this is its module.
compiled = importlib.import_module("jaxtc.programs.run")._run


# Under transformations


def spliced(scale):
    transcoder = jax.tree.map(lambda x: x * scale, tiny.transcoder(1))
    return Splice(transcoder)


KINDS = {
    "add": lambda s: Add(VECTOR * s, site="resid_mid", layer=1, position=-1),
    "set": lambda s: SetTo(VECTOR * s, site="mlp_out", layer=0, position=1),
    "splice": spliced,
}


@pytest.mark.parametrize("kind", KINDS)
def test_jit_and_vmap_over_an_edit(kind):
    """A whole edit is a pytree: it can be an argument, and a batch of edits is a sweep."""
    edits = [KINDS[kind](s) for s in (1.0, 0.5, -2.0)]
    one_by_one = [logits(edit) for edit in edits]
    assert np.abs(one_by_one[0] - one_by_one[1]).max() > 1e-3
    near(jax.jit(logits)(edits[0]), one_by_one[0], 1e-5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *edits)
    for found, expected in zip(jax.vmap(logits)(stacked), one_by_one, strict=True):
        near(found, expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_finite_differences(kind):
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(tiny.config().vocab_size))

    def loss(s):
        return (logits(KINDS[kind](s), prompts=PROMPTS[:1])[0, -1] * weights).sum()

    slope = jax.jit(jax.grad(loss))(0.7)
    step = 1e-2
    assert abs(slope) > 1e-2
    expected = (loss(0.7 + step) - loss(0.7 - step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-2, atol=1e-3)


def test_gradient_at_a_site_of_every_coordinate():
    site = dict(site="layers.1.mlp_out", position=3)

    def loss(v):
        return logits(Add(v, **site), prompts=PROMPTS[:1])[0, -1, 5]

    slopes = jax.grad(loss)(jnp.zeros(D))
    step = 1e-2 * jnp.eye(D)
    expected = (jax.vmap(loss)(step) - jax.vmap(loss)(-step)) / 2e-2
    np.testing.assert_allclose(slopes, expected, rtol=0.02, atol=2e-4)


@pytest.mark.parametrize("target", ["layer", "position", "row"])
def test_a_sweep_equals_its_runs_and_is_nan_where_nothing_fires(target):
    fixed = {"layer": 1, "position": 0, "row": 0}
    del fixed[target]
    size = {"layer": LAYERS, "position": LENGTHS[0], "row": len(LENGTHS)}[target]

    def swept(index):
        return logits(Add(VECTOR, site="mlp_out", **fixed, **{target: index}))

    found = jax.vmap(swept)(jnp.arange(size + 1))
    for index in range(size):
        near(found[index], swept(index), 1e-5)
    assert np.isnan(found[size]).all()
    assert np.isfinite(real(found[0])).all()


def test_a_traced_position_in_the_padding_is_nan():
    """Position 4 exists in the first two prompts only."""
    edit = lambda p: logits(Add(VECTOR, site="mlp_out", layer=0, position=p))  # noqa: E731
    found = jax.vmap(edit)(jnp.array([-1, 2, 4]))
    assert [bool(np.isnan(x).any()) for x in found] == [False, False, True]


def test_captures_are_nan_too_where_an_edit_never_fires():
    def captured(layer):
        edit = Add(VECTOR, site="mlp_out", layer=layer)
        return run(edits=[edit], capture="layers.2.resid_post").activations["layers.2.resid_post"]

    assert np.isnan(jax.jit(captured)(9)).all()


# What it costs


def test_other_values_layers_positions_and_rows_run_the_same_program():
    def edited(scale, **where):
        return logits(Add(VECTOR * scale, site="mlp_out", **where))

    edited(1.0, layer=0, position=0, row=0)
    compiled_before = compiled.count
    edited(2.0, layer=0, position=0, row=0)
    edited(1.0, layer=2, position=-1, row=1)
    edited(1.0, layer=-1, position=2, row=2)
    other = [[token + 1 for token in prompt] for prompt in PROMPTS]
    logits(Add(VECTOR, site="mlp_out", layer=1, position=1, row=1), prompts=other)
    assert compiled.count == compiled_before
    edited(1.0, position=[0, 1, 2, 1, 0])  # another shape, another program
    assert compiled.count == compiled_before + 1


def flops(prompts=PROMPTS, **options) -> float:
    """Of the compiled program."""

    def program(tokens):
        found = run(tokens, **options)
        return found.logits, dict(found.activations)

    tokens = jnp.ones((4, 16), jnp.int32)
    return jax.jit(program).lower(tokens).compile().cost_analysis()["flops"]


def test_layers_past_the_last_capture_are_not_run():
    whole = flops()
    depths = [
        flops(capture=[f"layers.{layer}.mlp_in_normed"], logits=None) for layer in range(LAYERS)
    ]
    step = np.diff(depths)
    assert depths == sorted(depths) and depths[-1] < whole
    np.testing.assert_allclose(step, step[0], rtol=0.05)
    assert depths[0] < 0.8 * step[0]  # layer 0 stops before its MLP


def test_a_capture_costs_no_arithmetic():
    assert flops(capture=["layers.1.mlp_in_normed", "layers.1.mlp_out"]) <= 1.01 * flops()


def test_a_spliced_mlp_is_not_computed():
    narrow = tiny.transcoder(1, features=1)
    saved = flops() - flops(edits=[Splice(narrow)])
    config = tiny.config()
    mlp = 2 * 3 * 4 * 16 * config.hidden_size * config.intermediate_size
    assert saved > 0.8 * mlp
    assert flops(edits=[Splice(narrow, position=0)]) > flops()


def test_logits_of_the_last_token_only():
    np.testing.assert_allclose(
        run(logits="last").logits,
        [row[n - 1] for row, n in zip(run().logits, LENGTHS, strict=True)],
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert flops(logits="last") < flops()


def test_captures_alone_equal_captures_with_logits():
    names = ["layers.1.attn_pattern", "layers.0.mlp_in_normed", "embed"]
    alone, with_logits = run(capture=names, logits=None), run(capture=names)
    assert alone.logits is None
    for name in names:
        np.testing.assert_allclose(
            alone.activations[name], with_logits.activations[name], atol=1e-6
        )
