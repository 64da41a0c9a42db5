"""Each activation of transcoders against plain PyTorch: by itself, and spliced with edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxtc
from jaxtc.transcoders.activations import ACTIVATIONS, TopK
from tests.parity import oracles
from tests.parity.figures import note
from tests.parity.reference import relative
from tests.parity.torch_transcoder import ACTIVATE, spliced
from tests.support.unspared import SetFeature, Splice

TOLERANCE = 1e-5
LAYER, M, D = 2, 96, oracles.SHAPES["9b"]["hidden_size"]
SETTINGS = {"topk": TopK(11)}


def test_every_activation_has_a_reference():
    assert list(ACTIVATE) == list(ACTIVATIONS), (
        "add it to ACTIVATE of torch_transcoder.py and, if it has settings, to SETTINGS, above"
    )


each = pytest.mark.parametrize("name", ACTIVATIONS)


def drawn(name):
    """Ours, and PyTorch's activations and output, (..., D) to (..., M) and (..., D)."""
    sites = {"input_site": "mlp_in", "output_site": "mlp_out"}
    ours = jaxtc.Transcoder(
        D, M, activation=SETTINGS.get(name, name), layer=LAYER, rngs=nnx.Rngs(0), **sites
    )
    rng = np.random.default_rng(len(name))
    held = {
        "W_enc": rng.standard_normal((D, M)) / D**0.5, "b_enc": rng.standard_normal(M) * 0.3,
        "W_dec": rng.standard_normal((M, D)) / M**0.5 * 4, "b_dec": rng.standard_normal(D) * 0.5,
    }  # fmt: skip
    own = list(ours.activation.parameters)
    held |= {key: rng.uniform(0.2, 0.8, getattr(ours, key).shape) for key in own}
    held = {key: torch.tensor(value, dtype=torch.float32) for key, value in held.items()}
    for key, value in held.items():
        getattr(ours, key)[...] = jnp.asarray(value.numpy())
    settings = ours.activation.facts()
    rest = {key: value for key, value in settings.items() if key != "name"}
    rest |= {key: held[key] for key in own}

    def encode(x):
        return ACTIVATE[name](x @ held["W_enc"] + held["b_enc"], **rest)

    def decode(a):
        return a @ held["W_dec"] + held["b_dec"]

    return ours, encode, decode


@each
@torch.no_grad()
def test_by_itself(name):
    ours, encode, decode = drawn(name)
    x = torch.randn(3, 11, D, generator=torch.Generator().manual_seed(3))
    a = encode(x)
    assert 0.05 < (a > 0).float().mean() < 0.7
    error = note("float32", f"{name}: features", relative([ours.encode(x)], [a]), "transcoder")
    assert error <= TOLERANCE
    assert relative([ours(x)], [decode(a)]) <= TOLERANCE
    most = int((a > 0).sum(-1).max())
    sparse = ours.encode_sparse(x, most)
    assert relative([sparse.values], [a.topk(most).values]) <= TOLERANCE
    assert relative([ours.decode_sparse(sparse)], [decode(a)]) <= TOLERANCE
    some = ours.encode_features(x, jnp.array([5, 90, 17]))
    assert relative([some], [a[..., [5, 90, 17]]]) <= TOLERANCE


@each
def test_gradients(name):
    ours, encode, decode = drawn(name)
    x = torch.randn(3, 11, D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    decode(encode(x)).square().sum().backward()
    slope = jax.grad(lambda x: jnp.square(ours(x)).sum())(jnp.asarray(x.detach().numpy()))
    assert relative([slope], [x.grad]) <= TOLERANCE


@each
@torch.no_grad()
def test_spliced_in_both(make_oracle, models, name):
    ours, encode, decode = drawn(name)
    oracle = make_oracle("9b")
    model, reference = models(oracle)
    edits = [Splice(ours), SetFeature(ours, [5, 17], [2.0, 0.0])]
    result = jaxtc.run(model, oracle.prompts, edits=edits)

    def call(x):
        a = encode(x)
        a[..., 5], a[..., 17] = 2.0, 0.0
        return decode(a)

    logits, expected = [], []
    for row, prompt in enumerate(oracle.prompts):
        with spliced(reference, LAYER, "mlp_in", "mlp_out", call):
            expected.append(reference(torch.tensor([prompt]), use_cache=False).logits[0])
        logits.append(np.asarray(result.logits[row])[: len(prompt)])
    error = note("float32", f"{name}: spliced logits", relative(logits, expected), oracle.name)
    assert error <= TOLERANCE
