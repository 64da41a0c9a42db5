"""Cross-layer transcoders by themselves, against their formulas written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import reducers
from jaxtc.errors import InputError, JaxtcError
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder
from jaxtc.transcoders.promoted import promoted_tokens
from tests.support import cross_layer, tiny

L, D, M = 3, 24, 50
PARTS = cross_layer.arrays(L, D, M, skip=True)
OURS = cross_layer.in_memory(skip=True)
X = np.random.default_rng(5).standard_normal((L, 4, D)).astype(np.float32)


def activations(layer):
    one = PARTS[layer]
    z = X[layer].astype(np.float64) @ one["W_enc"].T + one["b_enc"]
    return np.where(z > one["threshold"], z, 0)


def reconstruction(at):
    y = sum(activations(n) @ PARTS[n]["W_dec"][:, at - n] for n in range(at + 1))
    return y + PARTS[at]["b_dec"] + X[at] @ PARTS[at]["W_skip"]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5)


def test_formulas():
    a = OURS.encode(X)
    assert 1 < np.mean((np.asarray(a) > 0).sum(-1)) < M / 2
    for layer in range(L):
        close(a[layer], activations(layer))
        close(OURS.decode_at(layer, a[: layer + 1], X[layer]), reconstruction(layer))
    close(OURS(X), np.stack([reconstruction(layer) for layer in range(L)]))
    close(OURS.decode(list(a), list(X)), OURS(X))
    later = OURS.layers[1].write_all(a[1])
    assert later.shape == (2, 4, D)
    close(later[1], OURS.layers[1].write(a[1], 2))


def test_one_layer_s_features():
    one = OURS.layers[1]
    assert (one.layer, one.writes, one.d_in, one.d_out, one.features) == (1, range(1, 3), D, D, M)
    assert (OURS.d_in, OURS.d_out, OURS.features, len(OURS.layers)) == (D, D, M, L)
    assert (OURS.input_site, OURS.output_site) == ("resid_mid", "mlp_out")
    rows = one.decoder_rows(jnp.asarray([4, M, -1]))
    assert rows.shape == (3, 2, D) and np.isnan(rows[1:]).all()
    np.testing.assert_array_equal(rows[0], PARTS[1]["W_dec"][4])
    np.testing.assert_array_equal(one.decoder_rows(np.asarray([4]), 2)[0], PARTS[1]["W_dec"][4, 1])
    sparse = one.encode_sparse(X[1], M)
    dense = np.zeros((4, M))
    np.put_along_axis(dense, np.asarray(sparse.ids), np.asarray(sparse.values), -1)
    close(dense, activations(1))


def test_under_jit_and_in_bfloat16():
    made = jax.jit(lambda t, x: t(x))(OURS, X)
    close(made, OURS(X))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), OURS)
    assert narrow(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    shapes = CrossLayerTranscoder.abstract(26, 2304, 16384, dtype=jnp.bfloat16)
    assert shapes.layers[20].W_dec.shape == (16384, 6, 2304)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OURS(X[:2]), "reads 3 layers, got arrays of 2"),
        (lambda: OURS.decode(np.zeros((4, 1, M))), "features of 3 layers, got arrays of 4"),
        (lambda: OURS.decode_at(2, np.zeros((2, M)), X[2]), "layers 0 to 2; got .* of 2 layers"),
        (lambda: OURS.decode_at(3, np.zeros((4, M)), X[2]), "layers 0 to 3; got"),
        (lambda: OURS.decode(np.zeros((L, 1, M))), "skip connection.* decode\\(a, x\\)"),
        (lambda: OURS.layers[1].write(np.zeros(M), 0), "layer 1 write at layers 1 to 2, not at"),
        (lambda: OURS.layers[1].decoder_rows(jnp.asarray([1]), 3), "not at layer 3"),
        (lambda: OURS.encode(X[..., :5]), "last axis is D=24"),
    ],
)
def test_refused(call, message):
    with pytest.raises(JaxtcError, match=message):
        call()


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold", "W_dec", "b_dec", "W_skip"])
def test_parameters_are_written_into_and_not_replaced(name):
    one = cross_layer.in_memory(skip=True).layers[1]
    held = getattr(one, name)
    with pytest.raises(JaxtcError, match=rf"{name} is a parameter.*\.{name}\[...\] = new"):
        setattr(one, name, np.zeros(held.shape, np.float32))
    assert getattr(one, name) is held
    held[...] = jnp.full(held.shape, 3.0)
    assert (np.asarray(getattr(one, name)[...]) == 3).all()
    one.W_skip = None
    assert one.W_skip is None


def test_promoted_tokens_are_of_all_that_a_feature_writes():
    model, one = tiny.model(), OURS.layers[0]
    rows = PARTS[0]["W_dec"].astype(np.float64).sum(1)[[3, 9]]
    gain = np.asarray(model.final_norm.weight[...], np.float64)
    logits = (rows * (1 + gain)) @ np.asarray(model.embed.weight[...], np.float64).T
    expected = np.argsort(-logits, axis=-1)[:, :4]
    np.testing.assert_array_equal(promoted_tokens(model, one, [3, 9], 4), expected)
    alone = (PARTS[0]["W_dec"][[3, 9], 0] * (1 + gain)) @ np.asarray(model.embed.weight[...]).T
    assert (np.argsort(-alone, axis=-1)[:, :4] != expected).any()


def test_the_reducer_of_features():
    ids = [[2, 5, 7, 9], [2, 6, 4]]
    asked = {
        str(n): reducers.Features(transcoder=one, capacity=M) for n, one in enumerate(OURS.layers)
    }
    kept = jaxtc.run(tiny.model(), ids, capture=asked, logits=None).activations
    read = jaxtc.run(tiny.model(), ids, capture="resid_mid", logits=None).activations
    for layer, one in enumerate(OURS.layers):
        dense, sparse = one.encode(read[f"layers.{layer}.resid_mid"]), kept[str(layer)]
        assert (sparse.count == (dense > 0).sum(-1))[:, :3].all()
        close(sparse.values[:, :3, 0], np.asarray(dense).max(-1)[:, :3])
    with pytest.raises(InputError, match=r"give those of one, transcoder.layers\[20\]"):
        whole = reducers.Features("layers.1.resid_mid", transcoder=OURS, capacity=4)
        jaxtc.run(tiny.model(), ids, capture=whole, logits=None)
