"""Transcoders in place of the MLP, and their features turned up and down."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

import jaxtc
from jaxtc import Add, PerLayer
from jaxtc.errors import EditError
from jaxtc.tap.sites import BY_NAME
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, D, near, real, run
from tests.support.taps import through
from tests.support.unspared import ClampFeature, ScaleFeature, SetFeature, Splice

READS, WRITES = "mlp_in_normed", "mlp_out"
EACH = {layer: tiny.transcoder(layer) for layer in range(LAYERS)}


def both(*edits):
    """What the MLP of layer 1 reads, and what it adds to the stream, with some edits."""
    sites = [f"layers.1.{site}" for site in (READS, WRITES)]
    kept = run(edits=edits, capture=sites, logits=None).activations
    return tuple(np.asarray(kept[site]) for site in sites)


# Splice


def spliced(layer, **options):
    """One program for any layer: of one transcoder, which the values say nothing of."""
    return run(edits=[Splice(EACH[layer], layer=layer, **options)]).logits


def test_all_layers_by_a_mapping_are_single_ones_in_a_list():
    one = run(edits=[Splice(EACH)]).logits
    many = run(edits=[Splice(transcoder) for transcoder in EACH.values()]).logits
    np.testing.assert_allclose(real(one), real(many), rtol=1e-5, atol=1e-5)
    assert np.abs(real(one) - real(run().logits)).max() > 0.1


def test_a_mapping_takes_its_layer_as_data():
    with jaxtc.compiles() as found:
        made = [run(edits=[Splice(EACH, layer=layer)]).logits for layer in (0, 1, -1)]
    assert len(found) <= 1, found
    with jaxtc.compiles() as found:
        single = [spliced(layer) for layer in range(LAYERS)]
    assert len(found) <= 1, found
    for one, other in zip(made, single, strict=True):
        np.testing.assert_allclose(real(one), real(other), rtol=1e-5, atol=1e-5)
    assert np.abs(real(made[0]) - real(made[1])).max() > 1e-2


def test_layers_swept_under_vmap_and_missed():
    swept = jax.jit(jax.vmap(lambda layer: run(edits=[Splice(EACH, layer=layer)]).logits))
    out = swept(jnp.asarray([0, 2, -1, 3]))
    for index, layer in enumerate((0, 2, 2)):
        np.testing.assert_allclose(real(out[index]), real(spliced(layer)), rtol=1e-4, atol=1e-5)
    assert np.isnan(out[3]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Splice({}), "given an empty mapping, expected a jaxtc.Transcoder"),
        (lambda: Splice(None), "given NoneType, expected a jaxtc.Transcoder"),
        (lambda: Splice([EACH[1]]), "given list, expected"),
        (lambda: Splice({3: EACH[1]}), "layer 3; this model has layers 0 to 2"),
        (lambda: Splice({-1: EACH[1]}), "layer -1; this model has layers 0 to 2"),
        (lambda: Splice({0: EACH[0], 2: EACH[2]}, layer=1), "has nothing for layer 1"),
        (lambda: Splice({1: tiny.transcoder(1, 8, 16)}), "belongs to another model"),
        (lambda: Splice(tiny.transcoder(None)), "give layer=..."),
        (lambda: SetFeature(EACH, 3, 1.0), "takes one transcoder"),
        (lambda: SetFeature(EACH[1], 50, 1.0), "feature 50 does not exist.*features 0 to 49"),
        (lambda: SetFeature(EACH[1], [0, -1], 1.0), "feature -1 does not exist"),
        (lambda: SetFeature(EACH[1], [4, 4], 1.0), "named twice"),
        (lambda: SetFeature(EACH[1], 1.0, 1.0), "feature must be whole numbers, one or a row"),
        (lambda: SetFeature(EACH[1], [4, 5], [1.0, 2.0, 3.0]), r"value of shape \(3,\)"),
        (lambda: SetFeature(EACH[1], 4, np.ones((9, 1))), r"value of shape \(9, 1\) is neither"),
        (lambda: ScaleFeature(EACH[1], 4, PerLayer([1.0, 2.0])), "each of the 3 layers"),
        (lambda: ClampFeature(EACH[1], 4), "has no bound"),
        (lambda: ClampFeature(EACH[1], 4, low=2.0, high=1.0), "low 2.0 is above high 1.0"),
    ],
)  # fmt: skip
def test_refused(make, message):
    with pytest.raises(EditError, match=message):
        through({"x": [make()]}, {})


def test_mappings_of_any_kind_and_with_numpy_s_layers():
    strange = types.MappingProxyType({np.int64(k): v for k, v in EACH.items()})
    edit = Splice(strange)
    assert edit.layers == (0, 1, 2)
    assert jax.tree.structure(edit) == jax.tree.structure(Splice(EACH))


def products(jaxpr, width, inside=False):
    """(outside of branches, inside) matrix products with an axis of `width` in this program."""
    found = [0, 0]
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
            found[inside] += any(width in shape for shape in shapes)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(value):
                body = getattr(value, "jaxpr", value)
                more = products(body, width, inside or eqn.primitive.name == "cond")
                found = [a + b for a, b in zip(found, more, strict=True)]
    return found


def is_program(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


MLP = tiny.config().intermediate_size
WORK = {
    "none": ([], [9, 0]),
    "one": ([Splice(EACH[1])], [0, 9]),
    "two layers of one": ([Splice(EACH[1], layer=[0, 2])], [0, 9]),
    "two": ([Splice(EACH[0]), Splice(EACH[1])], [0, 9]),
    "a mapping": ([Splice(EACH)], [0, 0]),
    "a mapping of some": ([Splice({0: EACH[0], 2: EACH[2]})], [3, 0]),
    "a mapping, by layer": ([Splice(EACH, layer=1)], [0, 9]),
    "with what it misses": ([Splice(EACH, error=True)], [9, 0]),
    "at a position": ([Splice(EACH, position=-1)], [9, 0]),
    "in a row": ([Splice(EACH[1], row=0)], [9, 0]),
    "after an edit of features": ([Splice(EACH), SetFeature(EACH[1], 3, 2.0)], [0, 0]),
}


@pytest.mark.parametrize("case", WORK)
def test_an_mlp_that_is_replaced_is_not_computed(case):
    """Three products a layer: nowhere, or in a branch that is taken where no splice is."""
    edits, expected = WORK[case]
    program = jax.make_jaxpr(lambda tokens: run(tokens, edits=edits).logits)(jnp.ones((2, 16), int))
    assert products(program.jaxpr, MLP) == expected


def test_an_mlp_that_is_looked_into_is_computed():
    def captured(tokens):
        return run(tokens, edits=[Splice(EACH)], capture="layers.1.mlp_act").activations[
            "layers.1.mlp_act"
        ]

    program = jax.make_jaxpr(captured)(jnp.ones((2, 16), int))
    assert products(program.jaxpr, MLP) == [3, 0]


def test_with_its_error_a_splice_changes_gradients_and_nothing_else():
    reads, writes = both()

    @jax.jit
    def spliced(x, reads):
        context = jaxtc.tap.context.Context(BY_NAME[WRITES], 1, None, None, lambda name: reads)
        return Splice(EACH[1], error=True).new(x, context)

    np.testing.assert_array_equal(spliced(writes, reads), writes)  # to the last bit
    # Two programs, which may round differently.
    clean = run(capture=WRITES)
    exact = run(edits=[Splice(EACH, error=True)], capture=WRITES)
    near(exact.logits, clean.logits)
    for a, b in zip(exact.activations[WRITES], clean.activations[WRITES], strict=True):
        near(a, b)


def slope(edits):
    """Of the last logits in a push on what layer 1's MLP reads, and on the features."""

    def loss(push, features):
        made = nnx.clone(EACH[1])
        made.W_dec[...] = made.W_dec[...] * features
        some = [Add(push, site=READS, layer=1), *edits(made)]
        out = run(PROMPTS[:1], edits=some, logits="last").logits
        return (out * jnp.linspace(-1, 1, out.shape[-1])).sum()

    return jax.jit(jax.grad(loss, (0, 1)))(jnp.zeros(D), 1.0)


def test_gradients_of_splices():
    """Through the features only; with the error added back too, and none through the MLP."""
    alone, features = slope(lambda made: [Splice(made)])
    with_error, features_too = slope(lambda made: [Splice(made, error=True)])
    assert np.isfinite(alone).all() and np.isfinite(with_error).all()
    assert np.abs(alone).max() > 1e-3 and np.abs(with_error).max() > 1e-3
    assert abs(features) > 1e-3 and abs(features_too) > 1e-3
    # The features' own Jacobian does not know about the error: the slopes that leave the site are
    # those of the clean run, and go through W_enc of the active features alone.
    reads, writes = both()
    n = LENGTHS[0]
    wide = PROMPTS[:1]

    def after(out):
        edit = [jaxtc.SetTo(out[None], site=WRITES, layer=1)]
        logits = run(wide, edits=edit, logits="last").logits
        return (logits * jnp.linspace(-1, 1, logits.shape[-1])).sum()

    # On the host: a GPU multiplies float32 in fewer bits unless asked.
    above = np.asarray(jax.jit(jax.grad(after))(jnp.asarray(writes[0, :n])))
    active = np.asarray(EACH[1].encode(reads[0, :n])) > 0
    W_enc, W_dec = np.asarray(EACH[1].W_enc[...]), np.asarray(EACH[1].W_dec[...])
    expected = ((above @ W_dec.T) * active @ W_enc.T).sum(0)
    np.testing.assert_allclose(with_error, expected, rtol=1e-3, atol=1e-4)


# Features


def encoded(reads, layer=1):
    return np.array(EACH[layer].encode(reads))


def decoded(a, layer=1):
    return np.asarray(EACH[layer].decode(a))


CHANGES = {
    "set": (lambda t, **w: SetFeature(t, 7, 2.5, **w), lambda a: {7: 0 * a[..., 7] + 2.5}),
    "set several": (
        lambda t, **w: SetFeature(t, [7, 49, 0], [2.5, -1, 0], **w),
        lambda a: {7: 0 * a[..., 7] + 2.5, 49: 0 * a[..., 7] - 1, 0: 0 * a[..., 7]},
    ),
    "set several to one": (
        lambda t, **w: SetFeature(t, [3, 4], 2.0, **w),
        lambda a: {3: 0 * a[..., 7] + 2, 4: 0 * a[..., 7] + 2},
    ),
    "scale": (lambda t, **w: ScaleFeature(t, 22, -3.0, **w), lambda a: {22: -3 * a[..., 22]}),
    "scale several": (
        lambda t, **w: ScaleFeature(t, [22, 11], np.array([0.0, 2.0]), **w),
        lambda a: {22: 0 * a[..., 22], 11: 2 * a[..., 11]},
    ),
    "clamp from below": (
        lambda t, **w: ClampFeature(t, 12, low=1.0, **w), lambda a: {12: np.maximum(a[..., 12], 1)}
    ),
    "clamp from above": (
        lambda t, **w: ClampFeature(t, [12, 31], high=[0.9, 0.0], **w),
        lambda a: {12: np.minimum(a[..., 12], 0.9), 31: 0 * a[..., 31]},
    ),
    "clamp": (
        lambda t, **w: ClampFeature(t, 0, low=0.6, high=1.0, **w),
        lambda a: {0: np.clip(a[..., 0], 0.6, 1.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_edits_of_features(change):
    """After a splice: the decoding of the changed features. Alone: the MLP moved by as much."""
    make, becomes = CHANGES[change]
    reads, writes = both()
    a = encoded(reads)
    changed = a.copy()
    for feature, value in becomes(a).items():
        changed[..., feature] = value
    assert np.abs(changed - a)[0].max() > 0.1
    where = dict(position=[0, -1], row=[0, 2])
    _, whole = both(Splice(EACH[1]), make(EACH[1]))
    np.testing.assert_allclose(real(whole), real(decoded(changed)), rtol=1e-4, atol=1e-4)
    _, moved = both(make(EACH[1], **where))
    should = writes + decoded(changed) - decoded(a)
    chosen = np.zeros(writes.shape[:2], bool)
    for b in (0, 2):
        chosen[b, [0, LENGTHS[b] - 1]] = True
    should = np.where(chosen[..., None], should, writes)
    np.testing.assert_allclose(real(moved), real(should), rtol=1e-4, atol=1e-4)


def test_features_of_several_layers_each_with_its_value():
    """With one transcoder at two layers; a value for each of the model's layers."""
    values = np.array([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]])
    edit = SetFeature(EACH[1], [7, 8], PerLayer(values), layer=[0, 2])
    kept = run(edits=[Splice(EACH[1], layer=[0, 2]), edit], capture=[READS, WRITES]).activations
    for layer in (0, 2):
        a = encoded(kept[READS][layer])
        a[..., [7, 8]] = values[layer]
        np.testing.assert_allclose(
            real(kept[WRITES][layer]), real(decoded(a)), rtol=1e-4, atol=1e-4
        )


def test_features_as_lists_under_jit():
    """Ids and amounts are leaves, alone or in a list, and so are numbers traced one by one."""
    want = run(edits=[SetFeature(EACH[1], [7, 8], [1.0, 2.0])], logits="last").logits

    @jax.jit
    def call(first, second, edit):
        one = SetFeature(EACH[1], [7, second], [first, 2.0])
        return [run(edits=[e], logits="last").logits for e in (one, edit)]

    for found in call(1.0, 8, SetFeature(EACH[1], [7, 8], [1.0, 2.0])):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_features_in_bfloat16_are_rounded_once():
    made = EACH[1]
    x = np.asarray(both()[0])
    site = jaxtc.tap.sites.BY_NAME[WRITES]
    wide = jnp.asarray(both()[1], jnp.bfloat16)
    context = jaxtc.tap.context.Context(site, 1, None, None, lambda name: x)
    edit = dataclasses.replace(SetFeature(made, 7, 2.5), value=np.float32(2.5))
    found = edit.new(wide, context)
    a = encoded(x)
    changed = a.copy()
    changed[..., 7] = 2.5
    should = jnp.asarray(np.asarray(wide, np.float32) + decoded(changed) - decoded(a), jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    same = np.asarray(found, np.float32) == np.asarray(should, np.float32)
    assert same.mean() > 0.99


NOT_TRANSCODERS = {
    "an array": (lambda t: Splice(np.ones((3, 4))), "ndarray"),
    "an array, placed": (lambda t: Splice(jnp.ones(3), site="mlp_out", layer=1), "ArrayImpl"),
    "of features": (lambda t: SetFeature(np.ones(3), 3, 1.0, site="mlp_out", layer=0), "ndarray"),
    "a list": (lambda t: Splice([t]), "list"),
    "nothing": (lambda t: Splice(None), "NoneType"),
    "an empty mapping": (lambda t: Splice({}), "an empty mapping"),
    "a mapping to nothing": (lambda t: Splice({1: t, 2: None}), "a mapping to NoneType"),
    "no layer": (lambda t: Splice({None: t}), "the key None"),
    "a name": (lambda t: Splice({1: t, "a": t}), "the key 'a'"),
    "from the end": (lambda t: Splice({-1: t}), "layer -1; this model has"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_TRANSCODERS)
def test_what_is_no_transcoder_is_named(name):
    make, words = NOT_TRANSCODERS[name]
    with pytest.raises(EditError, match=words):
        jaxtc.run(tiny.model(), [2, 5, 7], edits=[make(tiny.transcoder(1))])
