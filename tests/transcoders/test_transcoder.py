"""The transcoder: its threshold, its sparse path, its gradients, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtc import Transcoder
from jaxtc.errors import CapacityError, JaxtcError
from tests.support import tiny

D, M = 24, 50
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7, D)), jnp.float32)


@pytest.fixture(scope="module")
def transcoder():
    return tiny.transcoder(1)


def by_hand(transcoder, x):
    """Activations in float64."""
    w, b, threshold = (
        np.asarray(p[...], np.float64)
        for p in (transcoder.W_enc, transcoder.b_enc, transcoder.threshold)
    )
    z = np.asarray(x, np.float64) @ w + b
    return np.where((z > threshold) & (z > 0), z, 0)


def test_against_numpy(transcoder):
    a = transcoder.encode(X)
    assert a.shape == (3, 7, M) and 0.05 < (np.asarray(a) > 0).mean() < 0.6
    np.testing.assert_allclose(a, by_hand(transcoder, X), atol=1e-5)
    y = by_hand(transcoder, X) @ np.asarray(transcoder.W_dec[...], np.float64)
    np.testing.assert_allclose(transcoder(X), y + np.asarray(transcoder.b_dec[...]), atol=1e-5)


def test_biases_enter_where_they_should():
    """b_enc before the threshold; b_dec is added at the end and never taken from the input."""
    made = Transcoder(2, 1, rngs=nnx.Rngs(0))
    made.W_enc[...], made.W_dec[...] = jnp.ones((2, 1)), jnp.array([[1.0, 10.0]])
    made.b_enc[...], made.b_dec[...] = jnp.array([-1.0]), jnp.array([100.0, 200.0])
    made.threshold[...] = jnp.array([0.5])
    np.testing.assert_array_equal(made(jnp.array([[1.0, 2.0], [1.0, 0.5]])),
                                  [[102.0, 220.0], [100.0, 200.0]])  # fmt: skip


@pytest.mark.parametrize(
    ("z", "threshold", "active"),
    [(0.5, 0.5, False), (0.5, 0.25, True), (-0.25, -0.5, False), (0.0, -1.0, False),
     (0.125, -1.0, True), (0.0, 0.0, False)],
)  # fmt: skip
def test_strictly_above_the_threshold_and_positive(z, threshold, active):
    made = Transcoder(1, 1, rngs=nnx.Rngs(0))
    made.W_enc[...], made.threshold[...] = jnp.ones((1, 1)), jnp.array([threshold])
    assert made.encode(jnp.array([z])).item() == (z if active else 0)


def test_the_input_may_have_another_width_than_the_output():
    made = Transcoder(4, 9, 6, rngs=nnx.Rngs(0))
    assert (made.d_in, made.features, made.d_out) == (4, 9, 6)
    assert made(jnp.ones((2, 3, 4))).shape == (2, 3, 6) and made(jnp.ones(4)).shape == (6,)


# The sparse path


@pytest.mark.parametrize("jit", [False, True])
def test_sparse_equals_dense(transcoder, jit):
    dense = transcoder.encode(X)
    most = int((dense > 0).sum(-1).max())
    for capacity in (most, most + 3, M):
        encode = lambda x, c=capacity: transcoder.encode_sparse(x, c)  # noqa: E731
        sparse = (jax.jit(encode) if jit else encode)(X)
        assert sparse.values.shape == sparse.ids.shape == (3, 7, capacity)
        assert (np.diff(sparse.values, axis=-1) <= 0).all()
        np.testing.assert_array_equal(sparse.count, (dense > 0).sum(-1))
        rebuilt = np.zeros(dense.shape, np.float32)
        np.put_along_axis(rebuilt, np.asarray(sparse.ids), np.asarray(sparse.values), -1)
        np.testing.assert_allclose(rebuilt, dense, atol=1e-6)
        np.testing.assert_allclose(transcoder.decode_sparse(sparse), transcoder(X), atol=1e-5)


def test_too_many_features_raise_or_in_a_trace_give_nan(transcoder):
    dense = np.asarray(transcoder.encode(X) > 0).sum(-1)
    most = int(dense.max())
    with pytest.raises(CapacityError, match=f"has {most} active.*capacity={most} or more"):
        transcoder.encode_sparse(X, most - 1)
    sparse = jax.jit(lambda x: transcoder.encode_sparse(x, most - 1))(X)
    over = dense == most
    assert over.any() and not over.all()
    assert np.isnan(sparse.values[over]).all() and np.isfinite(sparse.values[~over]).all()
    np.testing.assert_array_equal(sparse.count, dense)
    decoded = transcoder.decode_sparse(sparse)
    assert np.isnan(decoded[over]).all()
    np.testing.assert_allclose(decoded[~over], transcoder(X)[~over], atol=1e-5)


@pytest.mark.parametrize("capacity", [0, -1, M + 1])
def test_capacities_that_cannot_be(transcoder, capacity):
    with pytest.raises(CapacityError, match=f"capacity is {capacity}, expected 1 to {M}"):
        transcoder.encode_sparse(X, capacity)


def test_no_tokens(transcoder):
    sparse = transcoder.encode_sparse(jnp.zeros((0, D)), 3)
    assert sparse.values.shape == (0, 3) and transcoder.decode_sparse(sparse).shape == (0, D)


# Dtypes, gradients, errors


def test_inputs_are_cast_to_the_transcoders_dtype(transcoder):
    a = transcoder.encode(X.astype(jnp.bfloat16))
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, transcoder.encode(X.astype(jnp.bfloat16).astype(jnp.float32)))
    narrow = Transcoder(D, M, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert narrow(X).dtype == jnp.bfloat16


def test_gradients_flow_through_active_features_only(transcoder):
    direction = jnp.asarray(np.random.default_rng(1).standard_normal((3, 7, M)), jnp.float32)
    slope = jax.grad(lambda x: (transcoder.encode(x) * direction).sum())(X)
    active = np.asarray(transcoder.encode(X) > 0)
    expected = (np.asarray(direction) * active) @ np.asarray(transcoder.W_enc[...]).T
    np.testing.assert_allclose(slope, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, D + 1), (D, 3), (1,)])
def test_another_width_is_refused(transcoder, shape):
    with pytest.raises(JaxtcError, match=f"last axis is D={D}"):
        transcoder.encode(jnp.zeros(shape))


def test_abstract():
    made = Transcoder.abstract(2304, 16384, layer=20)
    leaves = jax.tree.leaves(made)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves) and len(leaves) == 5
    assert (made.d_in, made.features, made.d_out, made.layer) == (2304, 16384, 2304, 20)


def test_defaults_are_gemma_scopes():
    made = Transcoder(4, 8, rngs=nnx.Rngs(0))
    assert (made.input_site, made.output_site) == ("mlp_in_normed", "mlp_out")
