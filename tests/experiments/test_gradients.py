"""Gradients at sites: those of an added push, of finite differences, and of nothing in padding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import Add, Detach, PerLayer, Scale, gradients
from jaxtc.errors import CapacityError, EditError, InputError, SiteError
from jaxtc.experiments.scores import Logit, LogitDifference, LogProbability
from jaxtc.tap.sites import BY_NAME
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, VECTOR

SITES = tuple(BY_NAME)
OF = LogitDifference(5, 7)
EDITS = [Scale(1.5, site="resid_mid", layer=0), Add(VECTOR, site="mlp_out", layer=1, position=-1)]


@pytest.fixture(scope="module")
def everywhere():
    """Of every site, behind edits, in prompts of mixed lengths."""
    return gradients(tiny.model(), PROMPTS, OF, SITES, edits=EDITS)


def test_activations_and_score_are_those_of_a_run(everywhere):
    run = jaxtc.run(tiny.model(), PROMPTS, edits=EDITS, capture=SITES, logits="last")
    np.testing.assert_allclose(everywhere.score, OF(run), rtol=1e-5, atol=1e-5)
    assert set(everywhere.activations) == set(everywhere.gradients) == set(run.activations)
    for name, there in run.activations.items():
        here, slope = everywhere.activations[name], everywhere.gradients[name]
        assert here.shape == slope.shape == there.shape
        assert here.dtype == slope.dtype == there.dtype
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5)


def test_they_are_finite_differences(everywhere):
    """Along a random direction of every site (and layer), all of them in one program."""
    rng = np.random.default_rng(0)
    pushes, expected = {}, {}
    for site, row in BY_NAME.items():
        for layer in range(LAYERS) if row.per_layer else [None]:
            name = site if layer is None else f"layers.{layer}.{site}"
            here = np.asarray(everywhere.activations[name])
            push = rng.standard_normal(here.shape) * (np.abs(here) < 1e6)  # masked scores
            push = push / np.linalg.norm(push)
            pushes[name] = jnp.asarray(push, jnp.float32)
            expected[name] = (push * np.asarray(everywhere.gradients[name], np.float64)).sum()

    @jax.jit
    @jax.vmap
    def score(amounts):
        moved = [
            Add(push * amount, site=name)
            for (name, push), amount in zip(pushes.items(), amounts, strict=True)
        ]
        return OF(jaxtc.run(tiny.model(), PROMPTS, edits=[*EDITS, *moved], logits="last")).sum()

    step = 3e-2
    found = (score(step * jnp.eye(len(pushes))) - score(-step * jnp.eye(len(pushes)))) / (2 * step)
    expected = np.array(list(expected.values()))
    assert (np.abs(expected) > 1e-3).mean() > 0.8
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=2e-3)


def test_they_are_those_of_an_added_push(everywhere):
    names = ["layers.0.resid_pre", "layers.1.q", "layers.2.attn_pattern", "final_norm"]
    zeros = {name: jnp.zeros_like(everywhere.activations[name]) for name in names}

    @jax.jit
    @jax.grad
    def slopes(pushes):
        edits = [*EDITS, *(Add(push, site=name) for name, push in pushes.items())]
        return OF(jaxtc.run(tiny.model(), PROMPTS, edits=edits, logits="last")).sum()

    for name, slope in slopes(zeros).items():
        np.testing.assert_allclose(everywhere.gradients[name], slope, rtol=1e-4, atol=1e-5)


def test_padding_has_none_and_gives_none(everywhere):
    for name in SITES:
        slope = everywhere.gradients[name]
        axis = BY_NAME[name].sequence_axis + BY_NAME[name].per_layer
        slope = np.moveaxis(np.asarray(slope), axis, -1)
        slope = np.moveaxis(slope, 1 if BY_NAME[name].per_layer else 0, 0)
        for row, length in zip(slope, LENGTHS, strict=True):
            assert (row[..., length:] == 0).all()
            assert np.isfinite(row).all() and np.abs(row[..., :length]).max() > 0
    alone = gradients(tiny.model(), PROMPTS[2], OF, "resid_post", edits=EDITS)
    np.testing.assert_allclose(
        everywhere.gradients["resid_post"][:, 2:, : LENGTHS[2]], alone.gradients["resid_post"],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_those_of_a_site_are_behind_its_edits():
    """What an edit overwrites has none; the value that it puts there has."""
    edits = [Scale(0.0, site="layers.1.mlp_out")]
    found = gradients(tiny.model(), PROMPTS, OF, ["mlp_act", "mlp_out"], edits=edits).gradients
    assert (found["layers.1.mlp_act"] == 0).all()
    assert all(np.abs(found[f"layers.{n}.mlp_act"]).max() > 1e-3 for n in (0, 2))
    assert np.abs(found["layers.1.mlp_out"]).max() > 1e-3
    detached = gradients(
        tiny.model(), PROMPTS, OF, "embed", edits=[Detach(site="layers.0.attn_out")]
    )
    plain = gradients(tiny.model(), PROMPTS, OF, "embed")
    np.testing.assert_allclose(detached.score, plain.score, rtol=1e-6)
    assert np.abs(detached.gradients["embed"] - plain.gradients["embed"]).max() > 1e-3


def loss(result):
    """Of every token: one number."""
    return (jax.nn.log_softmax(result.logits) * result.mask[..., None])[..., 5].sum()


def of_activations(result):
    return (result.activations["layers.1.mlp_out"] ** 2).sum((1, 2))


def test_scores_of_all_tokens_and_of_activations():
    found = gradients(tiny.model(), PROMPTS, loss, "layers.2.resid_post", logits="all")
    assert found.score.shape == ()
    slope = np.asarray(found.gradients["layers.2.resid_post"])
    assert (np.abs(slope[0]).max(-1) > 0).all() and (slope[2, LENGTHS[2] :] == 0).all()
    found = gradients(tiny.model(), PROMPTS, of_activations, "mlp_out")
    slope, here = found.gradients["layers.1.mlp_out"], found.activations["layers.1.mlp_out"]
    np.testing.assert_allclose(slope, 2 * here, rtol=1e-5, atol=1e-6)
    assert (found.gradients["layers.2.mlp_out"] == 0).all()


def test_rows_are_summed_each_its_own():
    rows = gradients(tiny.model(), PROMPTS[:1] * 2, Logit([5, 7]), "embed").gradients["embed"]
    for row, token in enumerate((5, 7)):
        alone = gradients(tiny.model(), PROMPTS[0], Logit(token), "embed").gradients["embed"]
        np.testing.assert_allclose(rows[row], alone[0], rtol=1e-4, atol=1e-6)


def test_a_model_in_bfloat16():
    model = jaxtc.Gemma2(tiny.config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    wide = jaxtc.Gemma2(tiny.config(), rngs=nnx.Rngs(0))
    sites = ["resid_post", "attn_scores", "mlp_in_normed", "logits"]
    narrow = gradients(model, PROMPTS, OF, sites)
    full = gradients(wide, PROMPTS, OF, sites)
    for name in full.gradients:
        site = name.split(".")[-1]
        wanted = jnp.float32 if BY_NAME[site].float32 else jnp.bfloat16
        assert narrow.gradients[name].dtype == wanted
        a, b = (np.asarray(x.gradients[name], np.float32) for x in (narrow, full))
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


def test_other_edits_prompts_and_tokens_compile_nothing():
    def go(scale, layer, prompt, of):
        edit = Scale(PerLayer(jnp.full(LAYERS, scale)), site="mlp_out", layer=layer)
        return gradients(tiny.model(), prompt, of, "attn_out", edits=[edit])

    go(0.5, 1, PROMPTS[0], Logit(5))
    with jaxtc.compiles() as found:
        go(0.7, 2, PROMPTS[0][::-1], Logit(6))
    assert not found, found
    with jaxtc.compiles() as found:
        go(0.7, 2, PROMPTS[0], lambda result: result.logits[:, 0])
    assert "<lambda>: define it once" in found[-1].because


WRONG = {
    "no site": (InputError, "Name the sites", Logit(5), [], {}),
    "unknown": (SiteError, "no site called", Logit(5), "mlp_outt", {}),
    "layer": (SiteError, "layer 3", Logit(5), "layers.3.mlp_out", {}),
    "reducer": (InputError, "Name the sites", Logit(5), jaxtc.reducers.At("mlp_out", 0), {}),
    "edit": (EditError, "position 9", Logit(5), "q", dict(edits=[Detach(site="q", position=9)])),
    "logits": (InputError, "'all' or 'last'", Logit(5), "mlp_out", dict(logits=None)),
    "no function": (InputError, "of is 'mlp'", "mlp", "mlp_out", {}),
    "all logits": (InputError, "one real number", lambda r: r.logits, "mlp_out", {}),
    "ids": (InputError, "int32", lambda r: r.logits.argmax(-1), "mlp_out", {}),
    "nothing": (InputError, "one real number", lambda r: None, "mlp_out", {}),
    "two": (InputError, "one real number", lambda r: (r.logits[0, 0],) * 2, "mlp_out", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    kind, words, of, sites, options = WRONG[name]
    with pytest.raises(kind, match=words):
        gradients(tiny.model(), PROMPTS[0], of, sites, **options)


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtc.memory.needs.available", lambda *given: 1000)
    monkeypatch.setattr("jaxtc.memory.needs._SMALL", 0)
    with pytest.raises(CapacityError, match="gradients"):
        gradients(tiny.model(), PROMPTS, OF, "resid_post")


@pytest.mark.parametrize("of", [Logit(3), LogitDifference(3, [4, 5, 6]), LogProbability(3)])
def test_scores_by_hand(of):
    whole = jaxtc.run(tiny.model(), PROMPTS)
    last = np.stack([row[n - 1] for row, n in zip(whole.logits, LENGTHS, strict=True)])
    if isinstance(of, LogProbability):
        expected = last[:, 3] - np.log(np.exp(last).sum(-1))
    elif isinstance(of, Logit):
        expected = last[:, 3]
    else:
        expected = last[:, 3] - last[[0, 1, 2], [4, 5, 6]]
    np.testing.assert_allclose(of(whole), expected, rtol=1e-5, atol=1e-5)
    short = jaxtc.run(tiny.model(), PROMPTS, logits="last")
    np.testing.assert_allclose(of(short), expected, rtol=1e-5, atol=1e-5)


V = tiny.config().vocab_size
WRONG_IDS = {
    "beyond": (V, f"is token id {V}, outside the model's vocabulary of {V} ids"),
    "negative": (-1, "is token id -1"),
    "of a row": ([3, 4, V + 7], f"is token id {V + 7} of prompt 2"),
    "an array": (np.array([3, -4, 5]), "is token id -4 of prompt 1"),
    "on a device": (jnp.array([V, 1, 1]), f"is token id {V} of prompt 0"),
    "a number too few": ([3, 4], r"ids of shape \(2,\).*each of the 3 prompts, \(3,\)"),
    "a batch of batches": ([[3, 4, 5]], r"ids of shape \(1, 3\)"),
    "no whole number": (3.0, "expected a token's id, a whole number"),
    "text": ("▁Texas", "'▁Texas', expected a token's id"),
    "texts": (["a", "b", "c"], "expected a token's id"),
    "none": (None, "is None, expected a token's id"),
    "a flag": (True, "is True, expected a token's id"),
    "ragged": ([[3], [4, 5], [6]], "expected a token's id"),
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_ids_that_do_not_fit_are_refused_wherever_they_are_known(name, monkeypatch):
    token, message = WRONG_IDS[name]
    model, layer = tiny.model(), jaxtc.Over(range(2))
    result = jaxtc.run(model, PROMPTS, logits="last")
    edit = jaxtc.Zero(site="mlp_out", layer=layer)
    pair = [PROMPTS[0]] * 3
    for number in range(3):
        score = (Logit(token), LogProbability(token), LogitDifference(5, token))[number]
        field = f"{type(score).__name__}: {('token', 'token', 'other')[number]} "
        calls = [
            lambda: score(result),  # noqa: B023
            lambda: jaxtc.sweep(model, PROMPTS, [edit], of=score),  # noqa: B023
            lambda: gradients(model, PROMPTS, score, "embed"),  # noqa: B023
            lambda: jaxtc.activation_patching(model, pair, pair, score),  # noqa: B023
            lambda: jaxtc.attribution_patching(model, pair, pair, score),  # noqa: B023
        ]
        for call in calls:
            with monkeypatch.context() as patched:
                if call is not calls[0]:  # nothing runs before
                    patched.setattr("jaxtc.programs.program.Program.__call__", None)
                with pytest.raises(InputError, match=field) as caught:
                    call()
            assert re.search(message, str(caught.value)), caught.value


def test_scores_inside_another_are_checked_too():
    edit = jaxtc.Zero(site="mlp_out", layer=jaxtc.Over(range(2)))
    of = jax.tree_util.Partial(lambda score, result: 2 * score(result), Logit(V))
    with pytest.raises(InputError, match=f"Logit: token is token id {V}"):
        jaxtc.sweep(tiny.model(), PROMPTS, [edit], of=of)


def test_traced_ids_that_are_not_there_are_nan():
    result = jaxtc.run(tiny.model(), PROMPTS, logits="last")
    found = jax.jit(jax.vmap(lambda token: Logit(token)(result)))(jnp.array([-1, V, 3]))
    np.testing.assert_array_equal(np.isnan(found).all(1), [True, True, False])
    with pytest.raises(InputError, match=r"ids of shape \(2,\)"):
        jax.jit(lambda token: Logit(token)(result))(jnp.array([1, 2]))


def test_a_score_takes_a_result():
    with pytest.raises(InputError, match="takes what jaxtc.run returns"):
        Logit(3)(jnp.ones((3, V)))
