"""The transcoder against a plain PyTorch JumpReLU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxtc
from tests.parity.figures import note
from tests.parity.reference import relative
from tests.parity.torch_transcoder import JumpReLU

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def inputs(transcoders) -> torch.Tensor:
    """(3, 11, D) activations of the size of a normed residual."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 11, transcoders[1].W_enc.shape[0], generator=generator)


def near(theirs: JumpReLU, inputs: torch.Tensor) -> np.ndarray:
    """(3, 11, M) where a feature is so near its threshold that rounding may choose the side."""
    z = inputs @ theirs.W_enc + theirs.b_enc
    return ((z - theirs.threshold).abs() < 1e-5).numpy()


def test_encode(oracle, transcoders, inputs):
    ours, theirs = transcoders
    a, expected = ours.encode(jnp.asarray(inputs)), theirs.encode(inputs)
    assert 0 < (expected > 0).float().mean() < 0.7
    error = note("float32", "transcoder features", relative([a], [expected]), oracle.name)
    assert error <= TOLERANCE
    assert ((np.asarray(a) > 0) == (expected > 0).numpy())[~near(theirs, inputs)].all()


def test_decode_and_call(oracle, transcoders, inputs):
    ours, theirs = transcoders
    a = theirs.encode(inputs)
    assert relative([ours.decode(jnp.asarray(a))], [theirs.decode(a)]) <= TOLERANCE
    error = relative([ours(jnp.asarray(inputs))], [theirs(inputs)])
    assert note("float32", "transcoder output", error, oracle.name) <= TOLERANCE


@pytest.mark.parametrize("jit", [False, True])
def test_sparse_path(transcoders, inputs, jit):
    ours, theirs = transcoders
    expected, unsure = theirs.encode(inputs), near(theirs, inputs).sum(-1)
    count = (expected > 0).sum(-1).numpy()
    most = int((count + unsure).max())
    encode = lambda x: ours.encode_sparse(x, most)  # noqa: E731
    found = (jax.jit(encode) if jit else encode)(jnp.asarray(inputs))
    assert (np.abs(np.asarray(found.count) - count) <= unsure).all()
    assert relative([found.values], [expected.topk(most).values]) <= TOLERANCE
    # Values so near each other that rounding may choose their order: ids name what has the value.
    ids = np.asarray(found.ids)
    named = torch.take_along_dim(expected, torch.from_numpy(ids.astype(np.int64)), -1)
    assert relative([found.values], [named]) <= TOLERANCE
    assert (np.diff(np.sort(ids, -1), axis=-1) > 0).all()
    assert relative([ours.decode_sparse(found)], [theirs(inputs)]) <= TOLERANCE


# (pre-activation, threshold, activation): all exact in float32, so no rounding decides.
EDGES = [
    (0.5, 0.5, 0.0),  # strictly above
    (0.5, 0.25, 0.5),
    (0.25, 0.5, 0.0),
    (-0.25, -0.5, 0.0),  # above a negative threshold, still not positive
    (-0.5, -0.25, 0.0),
    (0.0, -0.5, 0.0),
    (0.125, -0.5, 0.125),
    (0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("z", "threshold", "expected"), EDGES)
def test_threshold_edges(z, threshold, expected):
    from flax import nnx

    one, zero = torch.ones(1, 1), torch.zeros(1)
    theirs = JumpReLU(
        W_enc=one, b_enc=zero, W_dec=one, b_dec=zero, threshold=torch.tensor([threshold])
    )
    ours = jaxtc.Transcoder(1, 1, rngs=nnx.Rngs(0))
    ours.W_enc.set_value(jnp.ones((1, 1)))
    ours.threshold.set_value(jnp.array([threshold]))
    assert theirs.encode(torch.tensor([z])).item() == expected
    assert ours.encode(jnp.array([z])).item() == expected
    assert ours.encode_sparse(jnp.array([z]), 1).values.item() == expected
