"""Sampling: what the warpers of transformers keep, at their probabilities, as often as due."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxtc.programs.sampling import EVERY, draw, greedy, keep_top_k, keep_top_p, tempered

V = 997
SETTINGS = [
    (0.7, None, None),
    (1.0, 5, None),
    (1.0, 1, None),
    (1.0, V, None),
    (1.0, 3 * V, None),
    (1.0, None, 0.9),
    (1.0, None, 0.05),
    (1.0, None, 1e-30),
    (1.0, None, 0.999),
    (0.4, 40, 0.8),
    (2.5, 200, 0.6),
    (1e-2, 10, 0.5),
    (50.0, 700, 0.97),
]


@pytest.fixture(scope="module")
def logits():
    """Rows flat, peaked and in between, of both signs, softcapped as Gemma-2's are."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, V)) * np.array([[0.1], [1], [3], [8], [20], [60]])
    return (30 * np.tanh(rows / 30)).astype(np.float32)


def warped(logits, temperature, top_k, top_p):
    """transformers' own, in the order in which its generate applies them."""
    scores = torch.from_numpy(logits)
    for warper in (
        TemperatureLogitsWarper(temperature),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p else []),
    ):
        scores = warper(None, scores)
    return scores


def ours(logits, temperature, top_k, top_p):
    scores = tempered(jnp.asarray(logits), temperature)
    scores = keep_top_k(scores, top_k) if top_k else scores
    return keep_top_p(scores, top_p) if top_p else scores


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_probabilities_are_those_of_transformers(logits, temperature, top_k, top_p):
    theirs = warped(logits, temperature, top_k, top_p)
    found = ours(logits, temperature, top_k, top_p)
    assert (np.isfinite(found) == theirs.isfinite().numpy()).all()
    # At a low temperature theirs, not shifted, are too large for float32 to tell apart as well.
    found, theirs = jax.nn.softmax(found), theirs.softmax(-1).numpy()
    np.testing.assert_allclose(found, theirs, rtol=5e-4, atol=1e-9)


def test_the_settings_differ(logits):
    kept = [tuple(warped(logits, *setting).isfinite().sum(-1).tolist()) for setting in SETTINGS]
    assert len(set(kept)) >= 9 and (1,) * 6 in kept


def test_ties_stay_together():
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0, 0.0, -0.0, 2.0], [0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    kept = np.isfinite(keep_top_k(logits, 2))
    assert kept.tolist() == [[False, True, True, True, False, False, True], [True] * 7]
    theirs = TopKLogitsWarper(2)(None, torch.from_numpy(np.array(logits)))
    assert (kept == theirs.isfinite().numpy()).all()
    # Half of a row of equals is all of it.
    assert np.isfinite(keep_top_p(logits, 0.5)).tolist()[1] == [True] * 7


def test_p_of_one_keeps_all_and_the_least_keeps_one(logits):
    assert (keep_top_p(jnp.asarray(logits), 1.0) == logits).all()
    one = np.isfinite(keep_top_p(jnp.asarray(logits), 0.0))
    assert one.sum(-1).tolist() == [1] * 6 and (one.argmax(-1) == logits.argmax(-1)).all()


def chosen(logits, seed=0, places=None, temperature=1.0, top_k=EVERY, top_p=1.0):
    places = jnp.zeros(len(logits), jnp.int32) if places is None else places
    settings = np.float32(temperature), np.int32(top_k), np.float32(top_p)
    return DRAW(logits, jax.random.key(seed), places, *settings)


DRAW = jax.jit(draw)


@pytest.mark.parametrize("setting", [{}, {"top_k": 4}, {"top_p": 0.7}, {"temperature": 0.5}])
def test_tokens_come_as_often_as_they_should(setting):
    """Chi-squared against the warped probabilities; rows and places both make new draws."""
    logits = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], np.float32))
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | setting
    expected = warped(logits[None], **settings).softmax(-1)[0].numpy()
    rows, places = 200, 100
    batch = np.broadcast_to(logits, (rows, 6))
    draws = [chosen(batch, 3, jnp.full(rows, place), **setting) for place in range(places)]
    draws = np.stack(draws)
    counts = np.bincount(draws.ravel(), minlength=6)
    assert (counts[expected == 0] == 0).all()
    on = expected > 0
    wanted = expected[on] * draws.size
    # Each term is about chi-squared of one degree: 25 would be five standard deviations.
    assert ((counts[on] - wanted) ** 2 / wanted).sum() < 25
    # No row and no place repeats another.
    assert len(np.unique(draws, axis=0)) == places and len(np.unique(draws.T, axis=0)) == rows


def test_temperature_zero_is_greedy(logits):
    found = chosen(logits, temperature=0.0, top_k=3, top_p=0.2)
    assert (found == logits.argmax(-1)).all() and (found == greedy(jnp.asarray(logits))).all()
    assert (chosen(logits, temperature=1e-30) == logits.argmax(-1)).all()


def test_a_rows_draw_does_not_depend_on_its_neighbours(logits):
    places = jnp.array([4, 9, 2, 2, 7, 30])
    together = chosen(logits, 5, places)
    again = chosen(logits, 5, places)
    others = chosen(logits[:2], 5, places[:2])
    assert (together == again).all() and (together[:2] == others).all()
    moved = chosen(logits, 5, places + jnp.array([0, 1, 1, 1, 1, 1]))
    assert moved[0] == together[0]
    flat = jnp.zeros((1, V))
    seeds = {int(chosen(flat, seed)[0]) for seed in range(5)}
    steps = {int(chosen(flat, 0, jnp.array([place]))[0]) for place in range(5)}
    assert len(seeds) == 5 and len(steps) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_next_token_are_marked(temperature):
    rows = np.zeros((4, 5), np.float32)
    rows[0, 3] = np.nan
    rows[1] = -np.inf
    rows[2, 1:] = -np.inf
    rows[3, 2] = np.inf
    found = chosen(rows, temperature=temperature, top_k=2, top_p=0.9)
    assert found.tolist() == [-1, -1, 0, 2]


def test_one_program_for_every_setting(logits):
    before = DRAW._cache_size()
    for seed, (temperature, top_k, top_p) in enumerate([(0, None, None), *SETTINGS]):
        found = chosen(jnp.asarray(logits), seed, None, temperature, top_k or EVERY, top_p or 1.0)
        assert ((found >= 0) & (found < V)).all()
    assert DRAW._cache_size() <= before + 1
