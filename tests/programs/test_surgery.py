"""Weights changed between calls are seen at once, and what cannot be seen is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc.errors import JaxtcError, SiteError
from tests.support import tiny

IDS = [2, 5, 7, 9]
ONES = np.ones(24, np.float32)


def written(model):
    model.layers[0].mlp_in_norm.weight[...] = jnp.asarray(ONES)


def written_by_numpy(model):
    model.layers[0].mlp_in_norm.weight[...] = ONES


def one_number(model):
    model.layers[0].mlp_in_norm.weight[3] = 4.0


def updated(model):
    nnx.update(model, jax.tree.map(lambda x: 1.1 * x, nnx.state(model)))


def swapped(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def shared(model):
    model.layers[0].mlp = model.layers[1].mlp


@pytest.mark.parametrize(
    "change", [written, written_by_numpy, one_number, updated, swapped, shared]
)
def test_new_numbers_are_never_stale(change):
    model = tiny.model()
    before = np.asarray(jaxtc.run(model, IDS).logits)
    jaxtc.generate(model, IDS, 2, stop=())
    change(model)
    after = np.asarray(jaxtc.run(model, IDS).logits)
    assert np.abs(after - before).max() > 1e-4
    # As the modules themselves compute it, without a program.
    whole, _ = model(jnp.asarray([IDS]))
    np.testing.assert_allclose(after, whole, rtol=1e-5, atol=1e-5)
    best = jaxtc.generate(model, IDS, 1, stop=()).tokens[0][0]
    assert best == after[0, -1].argmax()


def a_jax_array(model):
    model.layers[1].attn.q = jnp.ones(model.layers[1].attn.q.shape)


def a_numpy_array(model):
    model.layers[0].mlp_in_norm.weight = ONES


def another_param(model):
    model.final_norm.weight = nnx.Param(jnp.asarray(ONES))


def another_shape(model):
    model.layers[0].mlp_in_norm.weight = nnx.Param(jnp.ones(23), logical_axes=("embed",))


def whole_numbers(model):
    weight = model.layers[2].mlp.up
    weight.set_value(jnp.ones(weight.shape, jnp.int32))


def an_epsilon(model):
    model.layers[0].attn_out_norm.eps = 0.1


def a_note(model):
    model.note = 3


def another_layer(model):
    model.layers.append(model.layers[0])


REFUSED = {
    a_jax_array: r"layers\[1\].attn.q was a parameter .*layers\[1\].attn.q\[...\] = new",
    a_numpy_array: r"layers\[0\].mlp_in_norm.weight was .* array .*weight\[...\] = new",
    another_param: r"final_norm.weight .* another nnx.Param .*weight\[...\] = new",
    another_shape: r"layers\[0\].mlp_in_norm.weight is float32\[23\], .*\[24\].*\[...\] = new",
    whole_numbers: r"layers\[2\].mlp.up is int32.*expected floats",
    an_epsilon: r"layers\[0\].attn_out_norm.eps was changed",
    a_note: "model.note was changed",
    another_layer: r"model.layers\[3\] was changed",
}


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_programs_cannot_see_is_refused(change, warm):
    model = tiny.model()
    if warm:
        jaxtc.run(model, IDS)
    change(model)
    with pytest.raises(SiteError, match=REFUSED[change]):
        jaxtc.run(model, IDS)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "threshold"])
def test_a_transcoder_s_parameters_are_written_into(name):
    made = tiny.transcoder(1)
    array = jnp.zeros_like(getattr(made, name)[...])
    with pytest.raises(JaxtcError, match=rf"transcoder.{name}\[...\] = new"):
        setattr(made, name, array)
    edit = [jaxtc.Splice(made)]
    before = np.asarray(jaxtc.run(tiny.model(), IDS, edits=edit).logits)
    getattr(made, name)[...] = array + 0.25
    after = np.asarray(jaxtc.run(tiny.model(), IDS, edits=edit).logits)
    assert np.abs(after - before).max() > 1e-5
    made.layer, made.source = 2, "elsewhere"  # these are no parameters


class Whole:
    """The one number 1 with no axes, in each library."""

    def all():
        import torch

        return [np.array(1), np.int64(1), jnp.asarray(1), torch.tensor(1)]


@pytest.mark.parametrize("layer", Whole.all(), ids=lambda x: type(x).__name__)
def test_a_layer_may_be_an_array_of_one_number(layer):
    assert jaxtc.load_transcoder("embedded", layer).layer == 1
    made = jaxtc.Transcoder(24, 50, layer=layer, rngs=nnx.Rngs(0))
    assert type(made.layer) is int and made.layer == 1
    assert jaxtc.Splice({layer if layer.ndim else layer.item(): made}).layers == (1,)
    told = jaxtc.explain(tiny.model(), tiny.tokenizer(), "the capital", made, max_new_tokens=0)
    assert told.layers[0].layer == 1


@pytest.mark.parametrize("layer", [1.0, "1", True, -1, np.array([1]), np.array(1.0)])
def test_what_is_no_layer_is_refused(layer):
    with pytest.raises(JaxtcError, match="whole number from 0"):
        jaxtc.Transcoder(24, 50, layer=layer, rngs=nnx.Rngs(0))
    with pytest.raises(JaxtcError, match="whole number from 0"):
        jaxtc.load_transcoder("embedded", layer)
