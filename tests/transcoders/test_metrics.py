"""Metrics against their formulas, written out in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtc.errors import InputError
from jaxtc.transcoders.encoder import SparseFeatures
from jaxtc.transcoders.metrics import (
    FVU,
    FeatureStatistics,
    Mean,
    delta_loss,
    loss_recovered,
    next_token_loss,
    notebook_score,
    relative_error,
    special_token_mask,
)

rng = np.random.default_rng(0)
Y = rng.normal(3, 2, (5, 7, 6))
GUESS = Y + rng.normal(0, 0.5, Y.shape)
MASK = rng.random((5, 7)) < 0.7


def direct_fvu(y, guess):
    return np.sum((y - guess) ** 2) / np.sum((y - y.mean(0)) ** 2)


def test_fvu_is_its_formula_over_unmasked_tokens():
    got = FVU().update(Y, GUESS, MASK)
    assert got.fvu == pytest.approx(direct_fvu(Y[MASK], GUESS[MASK]), rel=1e-13)
    assert got.explained_variance == pytest.approx(1 - got.fvu, abs=1e-15)
    assert got.tokens == MASK.sum()
    assert abs(got.fvu - direct_fvu(Y.reshape(-1, 6), GUESS.reshape(-1, 6))) > 1e-4


def test_fvu_uses_the_mean_vector_of_the_dataset_not_of_each_batch():
    # Rows around means far apart: within a batch nearly nothing varies.
    y = Y + 100 * np.arange(5)[:, None, None]
    guess = y + (GUESS - Y)
    streamed = FVU()
    for row in range(5):
        streamed.update(y[row], guess[row], MASK[row])
    batches = [direct_fvu(y[row][MASK[row]], guess[row][MASK[row]]) for row in range(5)]
    assert streamed.fvu == pytest.approx(direct_fvu(y[MASK], guess[MASK]), rel=1e-12)
    assert streamed.fvu < 0.01 * np.mean(batches)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 4], [3], [0, 4, 4]])
def test_any_split_and_merge_gives_the_same_fvu(cuts):
    whole = FVU().update(Y, GUESS, MASK)
    streamed, merged = FVU(), FVU()
    parts = zip(*(np.split(array, cuts) for array in (Y, GUESS, MASK)), strict=True)
    for y, guess, mask in parts:
        streamed.update(y, guess, mask)
        merged.merge(FVU().update(y, guess, mask))
    assert streamed.fvu == pytest.approx(whole.fvu, rel=1e-12)
    assert merged.fvu == pytest.approx(whole.fvu, rel=1e-12)
    assert streamed.tokens == merged.tokens == whole.tokens


def test_a_large_mean_costs_no_digits():
    far = 1e7
    y, guess = Y.reshape(-1, 6) + far, GUESS.reshape(-1, 6) + far
    streamed = FVU()
    for row, other in zip(y, guess, strict=True):  # one token at a time: the hardest split
        streamed.update(row, other)
    expected = direct_fvu(Y.reshape(-1, 6), GUESS.reshape(-1, 6))
    naive = np.sum((y - guess) ** 2) / (np.sum(y**2) - len(y) * np.sum(y.mean(0) ** 2))
    assert streamed.fvu == pytest.approx(expected, rel=1e-7)
    assert abs(naive / expected - 1) > 1e-3  # what the obvious formula would have said


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3, 4)])
def test_fvu_is_nan_where_nothing_varies(shape):
    assert np.isnan(FVU().update(np.ones(shape), np.zeros(shape)).fvu)


def test_bfloat16_arrays_are_accumulated_in_float64():
    y, guess = jnp.asarray(Y, jnp.bfloat16), jnp.asarray(GUESS, jnp.bfloat16)
    rows = [
        np.asarray(array.astype(jnp.float32), np.float64).reshape(-1, 6) for array in (y, guess)
    ]
    assert FVU().update(y, guess).fvu == pytest.approx(direct_fvu(*rows), rel=1e-13)


def test_feature_statistics():
    activations = np.maximum(rng.normal(-0.5, 1, (5, 7, 9)), 0)
    activations[..., 4] = 0
    whole = FeatureStatistics(9).update(activations, MASK)
    kept = activations[MASK]
    assert whole.l0 == pytest.approx(np.mean([np.count_nonzero(row) for row in kept]), rel=1e-15)
    np.testing.assert_array_equal(whole.density, (kept > 0).mean(0))
    np.testing.assert_array_equal(whole.dead, ~kept.any(0))
    assert whole.dead[4]
    streamed = FeatureStatistics(9)
    for row in range(5):
        streamed.update(activations[row], MASK[row])
    np.testing.assert_array_equal(streamed.counts, whole.counts)
    assert streamed.tokens == whole.tokens


def test_sparse_features_count_as_dense_ones():
    dense = np.maximum(rng.normal(-0.5, 1, (5, 7, 9)), 0).astype(np.float32)
    order = np.argsort(-dense, -1)
    values = np.take_along_axis(dense, order, -1)
    sparse = SparseFeatures(
        jnp.asarray(values), jnp.asarray(order), jnp.asarray((dense > 0).sum(-1))
    )
    got = FeatureStatistics(9).update(sparse, MASK)
    np.testing.assert_array_equal(got.counts, FeatureStatistics(9).update(dense, MASK).counts)
    lost = SparseFeatures(sparse.values.at[0, 0].set(jnp.nan), sparse.ids, sparse.count)
    with pytest.raises(InputError, match="capacity"):
        FeatureStatistics(9).update(lost)


def test_relative_error_of_each_token():
    got = relative_error(Y, GUESS)
    assert got.shape == (5, 7)
    expected = np.sqrt(((Y - GUESS) ** 2).sum(-1) / (Y**2).sum(-1))
    np.testing.assert_allclose(got, expected, rtol=1e-13)
    assert np.isnan(relative_error(np.zeros(3), np.ones(3)))


def test_notebook_score_is_the_notebooks_arithmetic():
    y, guess = Y[0][None], GUESS[0][None]
    kept, missed = y[0, :, 1:], guess[0, :, 1:] - y[0, :, 1:]
    variance = ((kept - kept.sum() / kept.size) ** 2).sum() / (kept.size - 1)
    expected = 1 - (missed**2).sum() / missed.size / variance
    assert notebook_score(y, guess) == pytest.approx(expected, rel=1e-14)
    assert notebook_score(y[0], guess[0]) == notebook_score(y, guess)


def test_notebook_score_drops_the_first_coordinate_and_keeps_the_first_token():
    guess, y = GUESS[0].copy(), Y[0].copy()
    base = notebook_score(y, guess)
    guess[:, 0] += 1e6
    assert notebook_score(y, guess) == base
    guess[0, 1] += 1e3
    assert notebook_score(y, guess) < base - 1


def test_notebook_score_refuses_a_batch():
    with pytest.raises(InputError, match="batch of 5"):
        notebook_score(Y, GUESS)


def test_next_token_loss_and_its_mean():
    logits, tokens = rng.normal(0, 3, (2, 5, 11)), rng.integers(0, 11, (2, 5))
    loss = next_token_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens))
    expected = np.array(
        [
            [
                -np.log(np.exp(logits[b, t, tokens[b, t + 1]]) / np.exp(logits[b, t]).sum())
                for t in range(4)
            ]
            for b in range(2)
        ]
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    mask = ~special_token_mask(tokens, tokens[0, 2:3])
    got = Mean().update(loss[:1], mask[:1, 1:]).update(loss[1:], mask[1:, 1:])
    assert got.mean == pytest.approx(expected[mask[:, 1:]].mean(), rel=1e-5)
    assert got.tokens == mask[:, 1:].sum() < 8


def test_delta_loss_and_loss_recovered():
    assert delta_loss(clean=2.0, spliced=2.5) == 0.5
    assert loss_recovered(clean=2.0, spliced=2.5, ablated=4.0) == 0.75
    assert np.isnan(loss_recovered(2.0, 2.0, 2.0))


def test_special_tokens_are_found_by_id_wherever_they_stand():
    ids = [[2, 5, 2, 0], [7, 1, 0, 0]]
    expected = [[True, False, True, True], [False, True, True, True]]
    np.testing.assert_array_equal(special_token_mask(ids, (0, 1, 2)), expected)
    np.testing.assert_array_equal(special_token_mask(ids, ()), np.zeros((2, 4), bool))
    np.testing.assert_array_equal(special_token_mask(ids, [None, np.int64(5)]), np.equal(ids, 5))
    with pytest.raises(InputError, match=r"special_ids are \[2, \(1, 107\)\]"):
        special_token_mask(ids, [2, (1, 107)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: FVU().update(Y, GUESS[..., 1:]),
            r"target \[5, 7, 6\], reconstruction \[5, 7, 5\]",
        ),
        (lambda: FVU().update(Y, GUESS, MASK[0]), r"bool\[7\], expected bool\[5, 7\]"),
        (lambda: FVU().update(Y, GUESS, MASK.astype(int)), "int64"),
        (lambda: FVU().update(Y, GUESS).update(Y[..., :3], Y[..., :3]), "D=3 after tokens of D=6"),
        (lambda: FeatureStatistics(9).update(Y), "M=9 features, got 6"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("width", [1, 3, 5])
def test_accumulators_of_two_widths_do_not_merge(width):
    ours = FVU().update(np.ones((3, 4)), np.zeros((3, 4)))
    other = FVU().update(np.ones((2, width)), np.zeros((2, width)))
    with pytest.raises(InputError, match=f"D={width} cannot be merged into one of D=4"):
        ours.merge(other)
    with pytest.raises(InputError, match="got float"):
        ours.merge(3.0)
    assert ours.tokens == 3 and ours.merge(FVU()).tokens == 3 and FVU().merge(ours).tokens == 3
