"""Skip connections, ReLU, and autoencoders that read the site they write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import Add, PerLayer, Transcoder
from jaxtc.captures.reducers import Features
from jaxtc.errors import EditError, InputError, JaxtcError
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.metrics import FVU
from tests.support import tiny
from tests.support.batch import LENGTHS, D, real, run
from tests.support.taps import through
from tests.support.unspared import ScaleFeature, SetFeature, Splice

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7, D)), jnp.float32)
SAES = ("resid_post", "mlp_out", "attn_heads")
LAYER = 1


def made(width=D, **options) -> Transcoder:
    t = Transcoder(width, 50, layer=LAYER, **options, rngs=nnx.Rngs(3))
    draw = np.random.default_rng(1).standard_normal
    if t.threshold is not None:
        t.threshold[...] = jnp.full((50,), 0.5)
    if t.W_skip is not None:
        t.W_skip[...] = jnp.asarray(draw((D, width)), jnp.float32)
    t.b_dec[...] = jnp.asarray(draw(D), jnp.float32)
    return t


def sae(site: str) -> Transcoder:
    width = BY_NAME[site].width(tiny.config().sizes)
    t = Transcoder(width, 50, layer=LAYER, input_site=site, output_site=site, rngs=nnx.Rngs(5))
    t.threshold[...] = jnp.full((50,), 0.2)
    return t


def at(site, *edits, layer=LAYER):
    """What a layer has at a site, heads joined."""
    address = f"layers.{layer}.{site}"
    held = run(edits=edits, capture=address, logits=None).activations[address]
    return np.asarray(BY_NAME[site].join(held))


# The module


def test_the_skip_connection_is_never_dropped():
    t = made(skip=True)
    a = t.encode(X)
    part = np.asarray(X) @ np.asarray(t.W_skip[...]).T
    # On the host: a GPU multiplies float32 in fewer bits unless asked.
    should = np.asarray(a) @ np.asarray(t.W_dec[...]) + np.asarray(t.b_dec[...]) + part
    assert np.abs(part).max() > 1
    sparse = t.encode_sparse(X, 50)
    for y in (t(X), t.decode(a, X), t.decode_sparse(sparse, X), jax.jit(lambda t, x: t(x))(t, X)):
        np.testing.assert_allclose(y, should, rtol=1e-5, atol=1e-5)
    for call in (lambda: t.decode(a), lambda: t.decode_sparse(sparse)):
        with pytest.raises(JaxtcError, match="has a skip connection.*decode.a, x."):
            call()
    assert t.variant == "transcoder+skip" and t.W_skip.logical_axes == ("embed", "embed")


def test_relu():
    relu, jump = made(activation="relu"), made()
    jump.threshold[...] = jnp.zeros(50)
    np.testing.assert_array_equal(relu.encode(X), jump.encode(X))
    np.testing.assert_array_equal(relu.encode(X), np.maximum(relu.pre_activations(X), 0))
    assert relu.threshold is None and relu.variant == "transcoder+relu"
    assert np.isnan(relu.encode(jnp.full((1, D), jnp.nan))).all()
    abstract = Transcoder.abstract(4, 9, 6, activation="relu", skip=True)
    assert sorted(x.shape for x in jax.tree.leaves(abstract)) == [
        (4, 9),
        (6,),
        (6, 4),
        (9,),
        (9, 6),
    ]


def test_heads_are_joined_by_who_calls():
    t = sae("attn_heads")
    heads = jnp.ones((2, 3, 4, 8))
    with pytest.raises(JaxtcError, match="join the heads first"):
        t(heads)
    assert t(BY_NAME["attn_heads"].join(heads)).shape == (2, 3, 32)
    assert BY_NAME["resid_post"].join(X) is X


# In the model


def test_a_splice_takes_the_skip_and_edits_of_features_leave_it():
    t = made(skip=True)
    sites = ["layers.1.mlp_in_normed", "layers.1.mlp_out"]
    kept = run(capture=sites, logits=None).activations
    x, y = (np.asarray(kept[site]) for site in sites)
    np.testing.assert_allclose(real(at("mlp_out", Splice(t))), real(t(x)), rtol=1e-4, atol=1e-4)
    a = np.array(t.encode(x))
    b = a.copy()
    b[..., 7] = 2.5
    moved = at("mlp_out", SetFeature(t, 7, 2.5))
    delta = (b - a) @ np.asarray(t.W_dec[...])
    np.testing.assert_allclose(real(moved), real(y + delta), rtol=1e-4, atol=1e-4)
    both = at("mlp_out", Splice(t), SetFeature(t, 7, 2.5))
    np.testing.assert_allclose(real(both), real(t.decode(b, x)), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def clean():
    """{site: (layers, B, T, ...)} of the tiny model."""
    kept = run(capture=SAES, logits=None).activations
    return {site: np.asarray(kept[site]) for site in SAES}


def push(site):
    """A vector, and the edit that adds it."""
    width = BY_NAME[site].width(tiny.config().sizes)
    vector = np.linspace(-1, 1, width, dtype=np.float32)
    shaped = vector.reshape(4, 8) if site == "attn_heads" else vector
    return vector, Add(shaped, site=site, layer=LAYER)


# Edits of the autoencoder t, add among them, and what layer 1 becomes: of x, push v, changed
# features c(x) in place of t's own a(x), and decoder d.
CASES = {
    "splice": (lambda t, add: [Splice(t)], lambda x, v, a, c, d: d(a(x))),
    "splice of two layers": (
        lambda t, add: [Splice(t, layer=[1, 2])], lambda x, v, a, c, d: d(a(x))
    ),
    "with what it misses": (lambda t, add: [Splice(t, error=True)], lambda x, v, a, c, d: x),
    "features alone": (lambda t, add: features(t), lambda x, v, a, c, d: x + d(c(x)) - d(a(x))),
    "features after a splice": (
        lambda t, add: [Splice(t), *features(t)], lambda x, v, a, c, d: d(c(x))
    ),
    "another edit between": (
        lambda t, add: [Splice(t), add, *features(t)], lambda x, v, a, c, d: d(c(x)) + v
    ),
    "another edit before": (
        lambda t, add: [add, Splice(t), *features(t)], lambda x, v, a, c, d: d(c(x + v))
    ),
    "a splice elsewhere first": (
        lambda t, add: [Splice(t, layer=2), add, *features(t)],
        lambda x, v, a, c, d: x + v + d(c(x + v)) - d(a(x + v)),
    ),
}  # fmt: skip


def features(t):
    return [SetFeature(t, 7, PerLayer([0.0, 2.5, 9.0]), layer=LAYER), ScaleFeature(t, 9, 3.0)]


def test_autoencoders_at_their_sites(clean):
    """All read what their site held before the first of them, wherever that one applies."""
    keys = {f"{site}/{case}": (site, case) for site in SAES for case in CASES}
    edits = {key: CASES[case][0](sae(site), push(site)[1]) for key, (site, case) in keys.items()}
    found = through(edits, {key: clean[site] for key, (site, _) in keys.items()})
    for key, (site, case) in keys.items():
        t = sae(site)

        def changed(x, t=t):
            a = np.array(t.encode(x))
            a[..., 7], a[..., 9] = 2.5, 3 * a[..., 9]
            return a

        x = BY_NAME[site].join(clean[site][LAYER])
        a = np.asarray(t.encode(x))
        assert 0.02 < (a > 0).mean() < 0.98
        should = CASES[case][1](x, push(site)[0], t.encode, changed, t.decode)
        got = BY_NAME[site].join(found[key][LAYER])
        np.testing.assert_allclose(real(got), real(should), rtol=1e-4, atol=1e-4, err_msg=key)


def test_a_splice_at_a_position_settles_only_that_token(clean):
    site, t = "resid_post", sae("resid_post")
    vector, add = push(site)
    found = through({site: [Splice(t, position=-1), add, Splice(t)]}, {site: clean[site]})[site]
    x = clean[site][LAYER]
    for row, n in zip(range(len(LENGTHS)), LENGTHS, strict=True):
        should = np.array(t(x[row, :n] + vector))
        should[-1] = np.asarray(t(x[row, n - 1]))
        np.testing.assert_allclose(found[LAYER, row, :n], should, rtol=1e-4, atol=1e-4)


def test_b_dec_taken_off_the_input(clean):
    """In the model: splices, edits of features, features, gradients; the error of a splice."""
    x = clean["resid_post"][LAYER]
    t = Transcoder(D, 50, layer=LAYER, subtract_b_dec=True, input_site="resid_post",
                   output_site="resid_post", rngs=nnx.Rngs(5))  # fmt: skip
    t.threshold[...] = jnp.full((50,), 0.2)
    t.b_dec[...] = jnp.asarray(np.random.default_rng(2).standard_normal(D), jnp.float32)
    W_enc, W_dec, b_dec = (np.asarray(p[...], np.float64) for p in (t.W_enc, t.W_dec, t.b_dec))
    z = (x - b_dec) @ W_enc
    a = np.where(z > 0.2, z, 0)
    np.testing.assert_allclose(real(t.encode(x)), real(a), rtol=1e-4, atol=1e-4)
    b = a.copy()
    b[..., 7] = 2.5
    for edits, should in [
        ([Splice(t)], a @ W_dec + b_dec),
        ([Splice(t), SetFeature(t, 7, 2.5)], b @ W_dec + b_dec),
        ([SetFeature(t, 7, 2.5)], x + (b - a) @ W_dec),
        ([Splice(t, error=True)], x),
    ]:
        np.testing.assert_allclose(
            real(at("resid_post", *edits)), real(should), rtol=1e-4, atol=1e-4
        )
    [kept] = run(capture=[Features(transcoder=t, capacity=50)], logits=None).activations.values()
    np.testing.assert_array_equal(real(kept.count), real((a > 0).sum(-1)))
    slope = jax.grad(lambda x: t(x).sum())(jnp.asarray(x))
    should = (np.where(z > 0.2, 1, 0) * W_dec.sum(-1)) @ W_enc.T
    np.testing.assert_allclose(real(slope), real(should), rtol=1e-4, atol=1e-4)
    tree = jax.tree.structure(t)
    t.subtract_b_dec = False
    assert jax.tree.structure(t) != tree  # so that no compiled program serves both


def test_an_autoencoder_of_the_embedding():
    t = Transcoder(D, 50, input_site="embed", output_site="embed", rngs=nnx.Rngs(5))
    t.threshold[...] = jnp.full((50,), 0.2)
    kept = run(capture=["embed", Features(transcoder=t, capacity=50)], logits=None).activations
    x = np.asarray(kept["embed"])
    a = np.array(t.encode(x))
    np.testing.assert_array_equal(kept["Features(embed)"].count, (a > 0).sum(-1))
    b = a.copy()
    b[..., 7] = 2.5
    for edits, should in [
        ([Splice(t)], t(x)),
        ([Splice(t), SetFeature(t, 7, 2.5)], t.decode(b)),
        ([Splice(t, error=True)], x),
        ([SetFeature(t, 7, 2.5)], x + (b - a) @ np.asarray(t.W_dec[...])),
    ]:
        result = run(edits=edits, capture="embed")
        np.testing.assert_allclose(
            real(result.activations["embed"]), real(should), rtol=1e-4, atol=1e-4
        )
    assert np.abs(real(run(edits=[Splice(t)]).logits) - real(run().logits)).max() > 1e-2
    with pytest.raises(EditError, match="embed"):
        run(edits=[Splice(t, layer=1)])
    with pytest.raises(JaxtcError, match="is of 'embed', which the model has once"):
        jaxtc.explain(tiny.model(), tiny.tokenizer(), "the city", t)


@pytest.mark.parametrize("site", SAES)
def test_an_autoencoder_in_a_run(clean, site):
    """The value itself is computed (nothing is skipped), and what follows sees the splice."""
    t = sae(site)
    address, features = f"layers.1.{site}", Features(transcoder=t, capacity=50)
    spliced = run(edits=[Splice(t)], capture=[address, features])
    x = BY_NAME[site].join(clean[site][LAYER])
    got = BY_NAME[site].join(np.asarray(spliced.activations[address]))
    np.testing.assert_allclose(real(got), real(t(x)), rtol=1e-4, atol=1e-4)
    assert np.abs(real(spliced.logits) - real(run().logits)).max() > 1e-2
    count = np.asarray(spliced.activations[str(features)].count)
    again = np.asarray(t.encode(got))
    assert count.shape == x.shape[:2] and (count[0] == (again > 0).sum(-1)[0]).mean() > 0.8


def test_gradients_reach_an_autoencoders_features():
    def loss(scale):
        t = nnx.clone(sae("resid_post"))
        t.W_dec[...] = t.W_dec[...] * scale
        return run(edits=[Splice(t, error=True)], logits="last").logits.std()

    slope = jax.jit(jax.grad(loss))(1.0)
    assert np.isfinite(slope) and abs(slope) > 1e-6


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Splice(sae("attn_heads"), site="resid_post", reads="resid_post"), EditError,
         "reads D=32 and writes D=32, but this model has 24 at resid_post"),
        (lambda: Splice(sae("resid_post"), site="attn_heads", reads="attn_heads"), EditError,
         "has 32 at attn_heads and 32 at attn_heads. It belongs to another model or another site"),
        (lambda: SetFeature(sae("resid_post"), 1, 1.0, site="mlp_out"), EditError,
         "reads 'resid_post', which is not computed before 'mlp_out'"),
        (lambda: Splice(made(), site="attn_pattern", reads="attn_scores"), EditError,
         "no vector for each token"),
        (lambda: Features("layers.1.attn_heads", transcoder=sae("mlp_out"), capacity=3),
         InputError, "reads D=24, but attn_heads .B T N H. has 32 entries for a token"),
    ],
)  # fmt: skip
def test_refused(make, error, message):
    given = make()
    options = {"capture": [given]} if isinstance(given, Features) else {"edits": [given]}
    with pytest.raises(error, match=message):
        run(**options)


@pytest.mark.parametrize("kind", ["skip", "attn_heads"])
def test_explain_measures_with_the_skip_and_at_the_autoencoders_own_site(kind):
    t = made(skip=True) if kind == "skip" else sae(kind)
    [report] = jaxtc.explain(
        tiny.model(), tiny.tokenizer(), "the capital of texas is", t, max_new_tokens=0
    ).layers
    ids = [token.id for token in report.tokens]
    sites = [f"layers.1.{site}" for site in (t.input_site, t.output_site)]
    kept = run([ids], capture=sites, logits=None).activations
    x, y = (BY_NAME[address.split(".")[-1]].join(np.asarray(kept[address])) for address in sites)
    keep = ~np.array([[token.masked for token in report.tokens]])
    assert report.fvu == pytest.approx(FVU().update(y, t(x), keep).fvu, rel=1e-4)
    assert report.l0 == pytest.approx((np.asarray(t.encode(x)) > 0).sum(-1)[keep].mean())
    assert (report.input_site, report.output_site) == (t.input_site, t.output_site)
    assert np.isnan(report.notebook_score) == (kind != "skip")  # which is about transcoders
