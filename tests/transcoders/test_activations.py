"""Every activation: its values, some features of it, its sparse path, edits, and what keeps it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import Transcoder
from jaxtc.captures.reducers import Features
from jaxtc.errors import CapacityError, JaxtcError, SourceError
from jaxtc.transcoders.activations import ACTIVATIONS, TopK, activation_of
from jaxtc.weights.files.formats import FORMATS
from tests.support.batch import D, real, run
from tests.support.unspared import ClampFeature, ScaleFeature, SetFeature, Splice

M, LAYER = 50, 1
X = np.random.default_rng(0).standard_normal((3, 7, D)).astype(np.float32)
READS, WRITES = f"layers.{LAYER}.mlp_in_normed", f"layers.{LAYER}.mlp_out"


def highest(z, k):
    order = np.argsort(-z, axis=-1, kind="stable")  # of equals, the first
    kept = np.zeros(z.shape, bool)
    np.put_along_axis(kept, order[..., :k], True, axis=-1)
    return np.where(kept & (z > 0), z, 0)


# By name: the activation, and its values from pre-activations and the transcoder, in NumPy.
CASES = {
    "jumprelu": ("jumprelu", lambda z, t: z * ((z > np.asarray(t.threshold[...])) & (z > 0))),
    "relu": ("relu", lambda z, t: np.maximum(z, 0)),
    "topk": (TopK(9), lambda z, t: highest(z, 9)),
    "batchtopk": ("batchtopk", lambda z, t: z * (z > max(t.threshold[...].item(), 0))),
}


def test_every_activation_is_tested():
    assert list(CASES) == list(ACTIVATIONS), "add a case to CASES, above, that shows all it does"


def made(name, **options) -> Transcoder:
    t = Transcoder(D, M, activation=CASES[name][0], layer=LAYER, rngs=nnx.Rngs(3), **options)
    rng = np.random.default_rng(1)
    for parameter in t.activation.parameters:
        held = getattr(t, parameter)
        held[...] = jnp.asarray(rng.uniform(0.2, 0.8, held.shape), held.dtype)
    return t


@pytest.mark.parametrize("name", CASES)
def test_no_activation_is_negative(name):
    a = np.asarray(made(name).encode(np.random.default_rng(2).standard_normal((40, D))))
    assert (a >= 0).all() and (a > 0).any(), "encode_sparse keeps the largest, and needs a >= 0"


def dense(name, t, x) -> np.ndarray:
    return CASES[name][1](np.asarray(t.pre_activations(x)), t)


each = pytest.mark.parametrize("name", CASES)


# The module


@each
def test_values(name):
    t = made(name)
    should = dense(name, t, X)
    assert 0.05 < (should > 0).mean() < 0.7
    np.testing.assert_array_equal(t.encode(X), should)
    np.testing.assert_allclose(jax.jit(t.encode)(X), should, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(t.encode)(X), should, atol=1e-5)
    np.testing.assert_allclose(t.encode(X[0, 0]), should[0, 0], atol=1e-5)
    assert t.encode(jnp.zeros((0, D))).shape == (0, M)
    np.testing.assert_allclose(t(X), t.decode(should), atol=1e-5)


@each
def test_nan_stays_nan(name):
    t = made(name)
    assert np.isnan(t.encode(np.full((1, D), np.nan))).all()
    t.b_enc[...] = t.b_enc[...].at[7].set(jnp.nan)
    found = np.asarray(t.encode(X))
    assert np.isnan(found[..., 7]).all() and np.isfinite(np.delete(found, 7, -1)).all()


@each
def test_some_features(name):
    t, ids = made(name), [7, 49, 0]
    some = t.encode_features(X, jnp.array([*ids, M, -1]))
    np.testing.assert_allclose(some[..., :3], t.encode(X)[..., ids], atol=1e-6)
    assert np.isnan(some[..., 3:]).all()
    text = jax.jit(t.encode_features).lower(X, jnp.array(ids)).as_text()
    assert (f"3x7x{M}x" in text) != t.activation.per_feature


@each
def test_the_sparse_path(name):
    t = made(name)
    should = dense(name, t, X)
    count = (should > 0).sum(-1)
    most = int(count.max())
    compiled = jax.jit(t.encode_sparse, static_argnums=1)
    for sparse in (t.encode_sparse(X, most), compiled(X, most), compiled(X, most + 2)):
        np.testing.assert_array_equal(sparse.count, count)
        rebuilt = np.zeros_like(should)
        np.put_along_axis(rebuilt, np.asarray(sparse.ids), np.asarray(sparse.values), -1)
        np.testing.assert_allclose(rebuilt, should, atol=1e-5)
        np.testing.assert_allclose(t.decode_sparse(sparse), t.decode(should), atol=1e-5)
    with pytest.raises(CapacityError, match=f"has {most} active.*capacity={most} or more"):
        t.encode_sparse(X, most - 1)
    short = compiled(X, most - 1)
    np.testing.assert_array_equal(np.isnan(short.values).all(-1), count == most)


@each
def test_gradients_flow_through_active_features_only(name):
    t = made(name)
    direction = np.random.default_rng(1).standard_normal((3, 7, M)).astype(np.float32)
    slope = jax.grad(lambda x: (t.encode(x) * direction).sum())(jnp.asarray(X))
    # The slope of each feature's activation, by finite differences: here all are 0 or 1.
    z, step = np.asarray(t.pre_activations(X), np.float64), 1e-6
    rise = CASES[name][1](z + step, t) - CASES[name][1](z - step, t)
    expected = (direction * np.round(rise / (2 * step))) @ np.asarray(t.W_enc[...]).T
    np.testing.assert_allclose(slope, expected, atol=1e-5)


# In the model


@each
def test_edits_of_features(name):
    t = made(name)
    kept = run(capture=[READS, WRITES], logits=None).activations
    x, y = np.asarray(kept[READS]), np.asarray(kept[WRITES])
    a = np.array(t.encode(x))
    changed = a.copy()
    changed[..., 7], changed[..., 9] = 2.5, 3 * a[..., 9]
    changed[..., 12] = np.clip(a[..., 12], 0.1, 0.9)
    edits = [SetFeature(t, 7, 2.5), ScaleFeature(t, 9, 3.0), ClampFeature(t, 12, 0.1, 0.9)]
    features = Features(transcoder=t, capacity=M)
    alone = run(edits=edits, capture=[WRITES, features], logits=None).activations
    both = run(edits=[Splice(t), *edits], capture=WRITES, logits=None).activations
    moved = y + np.asarray(t.decode(changed) - t.decode(a))
    np.testing.assert_allclose(real(alone[WRITES]), real(moved), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(real(both[WRITES]), real(t.decode(changed)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(real(alone[str(features)].count), real((a > 0).sum(-1)))


@each
def test_other_values_do_not_compile(name):
    first, second = made(name), made(name, source="elsewhere")
    second.W_enc[...] = 2 * second.W_enc[...]

    def call(t, feature, value):
        edits = [Splice(t), SetFeature(t, feature, value)]
        return run(edits=edits, capture=Features(transcoder=t, capacity=M))

    call(first, 7, 2.5)
    with jaxtc.compiles() as found:
        call(second, 8, 1.5)
    assert not found, found


# What is kept of it


@each
def test_facts_and_variant(name):
    t = made(name, skip=True, input_site="mlp_in", source="here")
    facts = json.loads(json.dumps(t.facts()))
    twin = Transcoder.from_facts(facts)
    assert jax.tree.structure(twin) == jax.tree.structure(t) and twin.facts() == facts
    assert [x.shape for x in jax.tree.leaves(twin)] == [x.shape for x in jax.tree.leaves(t)]
    assert t.variant == "transcoder+skip" + ("" if name == "jumprelu" else f"+{name}")
    assert activation_of(t.activation.facts()) == t.activation == activation_of(t.activation)


@pytest.mark.parametrize(
    "change",
    [{"d_in": "24"}, {"features": 0}, {"d_out": 10**30}, {"layer": -1}, {"skip": 1},
     {"activation": "relu"}, {"activation": {"name": "rellu"}}, {"activation": {"name": []}},
     {"input_site": "mlp_inn"}, {"source": None}, {"relu": True}],
    ids=str,
)  # fmt: skip
def test_facts_that_cannot_be(change):
    facts = made("relu").facts()
    with pytest.raises(JaxtcError):
        Transcoder.from_facts(facts | change)
    del facts["skip"]
    with pytest.raises(JaxtcError, match="not the facts of a transcoder: skip=None"):
        Transcoder.from_facts(facts)


@each
def test_checkpoints_give_it_back(name, tmp_path):
    t = made(name, source="here")
    found = jaxtc.load_transcoder(jaxtc.save_checkpoint({LAYER: t}, tmp_path / "kept"), LAYER)
    assert found.facts() == t.facts()
    jax.tree.map(np.testing.assert_array_equal, found, t)
    options = {"source": tmp_path / "kept", "out": tmp_path / "out", "to": "circuit-tracer"}
    if "circuit-tracer" not in t.activation.files and t.activation.as_threshold is None:
        with pytest.raises(SourceError, match=f"no activation '{name}'"):
            jaxtc.convert(**options)
    else:
        sites = {"input_site": t.input_site, "output_site": t.output_site}
        found = jaxtc.load_transcoder(jaxtc.convert(**options), LAYER, **sites)
        np.testing.assert_array_equal(found.encode(X), t.encode(X))


@each
@pytest.mark.parametrize("format", [one.name for one in FORMATS if one.written])
def test_files_compute_the_same_or_are_refused(name, format, tmp_path):
    t = made(name)
    unknown = format not in t.activation.files and t.activation.as_threshold is None
    if unknown or (format, name) == ("saelens", "topk"):  # which it has of autoencoders only
        with pytest.raises(SourceError, match=f"has no .*{name}'.*save_checkpoint"):
            jaxtc.save_transcoder(t, tmp_path, format=format)
        assert not [*tmp_path.iterdir()]
        return
    file = jaxtc.save_transcoder(t, tmp_path / f"layer_{LAYER}", format=format)
    sites = {"input_site": t.input_site, "output_site": t.output_site}
    np.testing.assert_array_equal(jaxtc.load_transcoder(file, **sites).encode(X), t.encode(X))


# TopK


def test_of_equal_pre_activations_the_lower_ids_are_kept():
    t = Transcoder(1, 6, activation=TopK(3), rngs=nnx.Rngs(0))
    t.W_enc[...] = jnp.array([[1.0, 2.0, 1.0, 1.0, -1.0, 1.0]])
    np.testing.assert_array_equal(t.encode(jnp.array([[1.0], [-1.0]])),
                                  [[1, 2, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]])  # fmt: skip


def test_in_bfloat16_exactly_k_are_kept():
    """A program may hold unrounded pre-activations, in which other features would be tied."""
    t = made("topk", dtype=jnp.bfloat16)
    found = jax.jit(t.encode)(X)
    assert found.dtype == jnp.bfloat16 and ((found > 0).sum(-1) == 9).all()


def test_nan_takes_a_place():
    t = Transcoder(1, 4, activation=TopK(2), rngs=nnx.Rngs(0))
    t.W_enc[...] = jnp.array([[3.0, jnp.nan, 2.0, 1.0]])
    np.testing.assert_array_equal(t.encode(jnp.array([1.0])), [3, np.nan, 0, 0])


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (
            "topkk",
            "no activation 'topkk', only jumprelu, relu, topk, batchtopk.* Did you mean 'topk'",
        ),
        (None, "no activation None"),
        ("topk", "'topk' takes k, got none; give TopK.k=..."),
        ({"name": "relu", "k": 3}, "'relu' takes no settings, got k"),
        ({"name": "topk", "k": 0}, "k is 0, expected a whole number from 1"),
        ({"name": "topk", "k": 2.5}, "k is 2.5, expected a whole number"),
        (lambda: TopK(True), "k is True, expected a whole number"),
        (lambda: TopK(51), "k is 51, but the transcoder has 50 features"),
    ],
)
def test_refused(activation, message):
    with pytest.raises(JaxtcError, match=message):
        given = activation() if callable(activation) else activation
        Transcoder.abstract(D, M, activation=given)
