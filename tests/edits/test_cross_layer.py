"""Edits through a cross-layer transcoder: data as any edit's, and written at all later layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Add, Over, PerLayer, SetTo, Zero
from jaxtc.errors import JaxtcError
from tests.support import cross_layer, tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, VECTOR, D, near, real, run
from tests.support.unspared import ScaleFeature, SetFeature, Splice

M = 50
WHOLE = cross_layer.in_memory(LAYERS, D, M, skip=True)
OTHER = cross_layer.in_memory(LAYERS, D, M, skip=True, seed=9)
PLAIN = cross_layer.in_memory(LAYERS, D, M, seed=4)


def held(*edits, **options):
    """What every layer reads and writes with some edits."""
    kept = run(edits=edits, capture=["resid_mid", "mlp_out"], logits=None, **options).activations
    return np.asarray(kept["resid_mid"]), np.asarray(kept["mlp_out"])


def test_every_layer_reads_the_spliced_run():
    read, written = held(Splice(WHOLE))
    near_all(WHOLE(read), written)
    clean, _ = held()
    assert np.abs(read[1:] - clean[1:]).max() > 0.1


def near_all(a, b, tolerance=1e-5):
    for one, other in zip(a, b, strict=True):
        near(one, other, tolerance)


def test_features_of_a_layer_write_at_later_ones_only():
    _, clean = held()
    for edits in ([SetFeature(WHOLE, 4, 3.0, layer=1)], [SetFeature(WHOLE.layers[1], 4, 3.0)]):
        read, written = held(*edits)
        near(written[0], clean[0])
        # Layer 1's MLP reads what it always did, so its output moves by the feature's row alone.
        a = WHOLE.layers[1].encode(read[1])[..., 4:5]
        row = np.asarray(WHOLE.layers[1].W_dec[4, 0])
        near(written[1], clean[1] + (3 - np.asarray(a)) * row, 1e-5)
        # Layer 2 reads another stream; its own MLP, and the feature's second row.
        mlp = np.asarray(_mlp(2, read[2]))
        near(written[2], mlp + (3 - np.asarray(a)) * np.asarray(WHOLE.layers[1].W_dec[4, 1]), 1e-5)


def _mlp(layer, x):
    """The MLP of a layer, of its stream, with its norms."""
    site = dict(layer=layer)
    edits = [SetTo(x, site="resid_mid", **site)]
    kept = run(edits=edits, capture=f"layers.{layer}.mlp_out", logits=None).activations
    return kept[f"layers.{layer}.mlp_out"]


def test_after_a_splice_it_is_the_decoding_of_the_changed_features():
    ids, values = [4, 17, 30], [2.0, 0.0, 1.0]
    edits = [Splice(WHOLE), SetFeature(WHOLE, ids, values, layer=1)]
    read, written = held(*edits)
    a = np.array(WHOLE.encode(read))
    a[1][..., ids] = values
    near_all(WHOLE.decode(a, read), written)
    several = [Splice(WHOLE), *(SetFeature(WHOLE, 4, 2.0, layer=n) for n in (0, 2))]
    together = [Splice(WHOLE), SetFeature(WHOLE, 4, 2.0, layer=[0, 2])]
    near(run(edits=several).logits, run(edits=together).logits, 1e-5)


def test_where_else_than_named_nothing_is_written():
    where = dict(layer=0, position=[1, -1], row=[0, 2])
    read, clean = held()
    _, written = held(SetFeature(WHOLE, 8, 5.0, **where))
    change = np.abs(written[0] - clean[0]).max(-1) > 1e-4
    expected = np.zeros_like(change)
    for row in (0, 2):
        expected[row, [1, LENGTHS[row] - 1]] = True
    np.testing.assert_array_equal(real(change), real(expected))
    # Rows that are not named are as before at all layers.
    np.testing.assert_allclose(written[:, 1, : LENGTHS[1]], clean[:, 1, : LENGTHS[1]], atol=1e-6)
    _, spliced = held(Splice(WHOLE, position=slice(1, None)))
    np.testing.assert_allclose(spliced[0][:, 0], clean[0][:, 0], atol=1e-6)
    assert np.abs(spliced[0][:, 1] - clean[0][:, 1]).max() > 0.1


def test_special_tokens_are_left_alone_by_default():
    _, clean = held()
    for edits in ([jaxtc.Splice(WHOLE)], [jaxtc.SetFeature(WHOLE, 8, 5.0, layer=0)]):
        _, written = held(*edits)
        # What follows <bos> sees its own stream, which nothing was written to.
        np.testing.assert_allclose(written[:, :, 0], clean[:, :, 0], atol=1e-6)
        assert (np.abs(written[:, 0, 1:9] - clean[:, 0, 1:9]).max((0, 2)) > 1e-3).all()
    result = run(edits=[jaxtc.Splice(WHOLE)])
    assert result.left_out[:, 0].all() and not result.left_out[:, 1:].any()


def test_values_for_each_layer_and_scaling():
    one = run(edits=[SetFeature(WHOLE, 3, PerLayer([1.0, 2.0, 3.0]), layer=[0, 2])]).logits
    two = [SetFeature(WHOLE, 3, v, layer=n) for n, v in ((0, 1.0), (2, 3.0))]
    near(one, run(edits=two).logits, 1e-5)
    read, written = held(Splice(PLAIN), ScaleFeature(PLAIN, range(M), 0.0, layer=0))
    a = np.array(PLAIN.encode(read))
    a[0] = 0
    near_all(PLAIN.decode(a), written)


def test_layers_and_features_are_data():
    def edits(layer, feature, value):
        return [Splice(WHOLE), SetFeature(WHOLE, feature, value, layer=layer)]

    run(edits=edits(0, 1, 1.0))
    with jaxtc.compiles() as found:
        made = [run(edits=edits(n, 5 + n, 2.0 + n)).logits for n in (1, 2, -1)]
        run(edits=[Splice(OTHER), SetFeature(OTHER, 1, 2.0, layer=1)])
    assert not found, found
    assert np.abs(real(made[0]) - real(made[1])).max() > 1e-3


def test_traced_layers_and_features():
    def one(layer, feature):
        return run(edits=[SetFeature(WHOLE, feature, 2.0, layer=layer)]).logits

    layers, features = jnp.asarray([0, 2, -1, 3, 1]), jnp.asarray([4, 6, 6, 4, M])
    out = jax.jit(jax.vmap(one))(layers, features)
    for n in range(3):
        near(out[n], one(int(layers[n]), int(features[n])), 1e-5)
    assert np.isnan(out[3:]).all()
    spliced = jax.jit(jax.vmap(lambda n: run(edits=[Splice(WHOLE, layer=n)]).logits))
    out = spliced(jnp.asarray([2, 0, 7]))
    near(out[0], run(edits=[Splice(WHOLE, layer=2)]).logits, 1e-5)
    assert np.isnan(out[2]).all() and np.isfinite(real(out[1])).all()
    given = jax.jit(lambda edit: run(edits=[edit]).logits)
    part = WHOLE.layers[1]
    near(given(SetFeature(part, 4, 2.0)), one(1, 4), 1e-5)
    wrong = jax.jit(lambda n: run(edits=[SetFeature(part, 4, 2.0, layer=n)]).logits)
    near(wrong(1), one(1, 4), 1e-5)
    assert np.isnan(wrong(2)).any()


def test_swept():
    """Not begun in the middle, where what earlier layers carry would be missing."""
    edits = [Splice(WHOLE), SetFeature(WHOLE, Over([3, 9]), 2.0, layer=Over([1, 2]))]
    swept = jaxtc.sweep(tiny.model(), PROMPTS, edits)
    for i, layer in enumerate((1, 2)):
        for j, feature in enumerate((3, 9)):
            alone = [Splice(WHOLE), SetFeature(WHOLE, feature, 2.0, layer=layer)]
            expected = run(edits=alone, logits="last").logits
            np.testing.assert_allclose(swept.values[i, j], expected, rtol=1e-4, atol=1e-5)
    late = [Splice(WHOLE), Add(VECTOR, site="resid_post", layer=2, position=-1, row=Over([0, 1]))]
    swept = jaxtc.sweep(tiny.model(), PROMPTS, late).values
    for row in (0, 1):
        alone = [Splice(WHOLE), Add(VECTOR, site="resid_post", layer=2, position=-1, row=row)]
        expected = run(edits=alone, logits="last").logits
        np.testing.assert_allclose(swept[row], expected, rtol=1e-4, atol=1e-5)


def test_during_generation():
    edits = [Splice(WHOLE), SetFeature(WHOLE, 6, 2.0, layer=0)]
    found = jaxtc.generate(tiny.model(), PROMPTS, 4, edits=edits, stop=())
    for prompt, new in zip(PROMPTS, found.tokens, strict=True):
        text = list(prompt)
        for token in new:
            given = dict(attention_mask=[[1] * len(text)], logits="last")
            logits = run([text], edits=edits, **given).logits[0]
            assert int(np.argmax(logits)) == token
            text.append(int(token))


def test_gradients_with_respect_to_a_feature_and_the_decoders():
    def of(value):
        return run(edits=[SetFeature(PLAIN, 4, value, layer=0)], logits="last").logits[0, 3]

    step = 1e-2
    slope = (of(2 + step) - of(2 - step)) / (2 * step)
    assert abs(jax.grad(of)(2.0) - slope) < 0.03 * abs(slope) + 1e-3

    def loss(whole):
        return run(edits=[Splice(whole)], logits="last").logits.sum()

    grads = jax.grad(loss)(PLAIN)
    # Rows that write at the last layer matter, of every layer's features.
    assert all(np.abs(np.asarray(one.W_dec[:, -1])).max() > 0 for one in grads.layers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Splice(WHOLE.layers[1])], "features of all layers up to it: .*load_transcoders"),
        (lambda: [SetFeature(WHOLE, 3, 1.0)], "needs a layer.*Give layer="),
        (lambda: [SetFeature(WHOLE.layers[1], 3, 1.0, layer=2)], "layer=2 and features of layer 1"),
        (lambda: [SetFeature(WHOLE, 50, 1.0, layer=1)], "feature 50 does not exist"),
        (lambda: [SetFeature(WHOLE, 3, 1.0, layer=3)], "layer 3, but this model has 3 layers"),
        (lambda: [Splice({1: WHOLE})], "belong together: give the whole, Splice"),
        (lambda: [Splice(dict(enumerate(WHOLE.layers)))], "belong together: give the whole"),
        (lambda: [Splice(list(WHOLE.layers))], "belong together: give the whole"),
        (lambda: [Splice(WHOLE.layers)], "belong together: give the whole"),
        (lambda: [Splice(cross_layer.in_memory(2))], "has 2 layers, and this model has 3"),
        (lambda: [Splice(cross_layer.in_memory(4).layers[1])], "features of layer 1"),
        (lambda: [SetFeature(cross_layer.in_memory(4).layers[1], 1, 1.0)], "has 4 layers"),
        (lambda: [Splice(cross_layer.in_memory(3, 8))], "belongs to another model"),
        (lambda: [Splice(WHOLE, reads="mlp_out")], "reads and writes mlp_out"),
        (lambda: [Zero(site="mlp_out", layer=1), Splice(WHOLE)], "would have no effect"),
        (lambda: [SetFeature(WHOLE, 3, 1.0, layer=1), Splice(WHOLE)], "would have no effect"),
        (
            lambda: [SetFeature(WHOLE, 3, 1.0, layer=1), SetFeature(WHOLE, [2, 3], 0.0, layer=1)],
            "both change feature 3",
        ),
        (
            lambda: [SetFeature(WHOLE, 3, 1.0, layer=1), SetFeature(WHOLE.layers[1], 3, 0.0)],
            "both change feature 3",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(JaxtcError, match=message):
        run(edits=make())


GUARDS = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "NaN": lambda: jax.debug_nans(True),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "x64": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_under_the_guards_of_jax(guard):
    def computed():
        edits = [Splice(WHOLE), ScaleFeature(WHOLE, [3, 4], 2.0, layer=1)]
        x = np.random.default_rng(0).normal(size=(LAYERS, 5, D)).astype(np.float32)
        a = WHOLE.encode(x)
        rows = WHOLE.layers[1].decoder_rows(np.asarray([3, 4]))
        return run(edits=edits).logits, WHOLE(x), a, WHOLE.decode(a, x), rows

    expected = jax.device_get(computed())
    with GUARDS[guard]():
        found = computed()
    for a, b in zip(jax.device_get(found), expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_still_has_an_effect_is_let_through():
    """At later layers a feature writes, though one layer's output is replaced after it."""
    edits = [SetFeature(WHOLE, 3, 4.0, layer=1), Zero(site="mlp_out", layer=1)]
    only = run(edits=edits[1:]).logits
    assert np.abs(real(run(edits=edits).logits) - real(only)).max() > 1e-3
    edits = [SetFeature(WHOLE, 3, 4.0, layer=1), Splice(tiny.transcoder(1))]
    only = run(edits=edits[1:]).logits
    assert np.abs(real(run(edits=edits).logits) - real(only)).max() > 1e-3


def test_an_estimate_counts_the_features_of_all_layers():
    wide = cross_layer.in_memory(LAYERS, D, 4000)
    one = jaxtc.estimate(tiny.model(), (2, 30), edits=[Splice(tiny.transcoder(1, 4000))])
    whole = jaxtc.estimate(tiny.model(), (2, 30), edits=[Splice(wide)])
    assert whole.workspace == LAYERS * one.workspace
