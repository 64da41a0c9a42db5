"""Activation patching by hand, and attribution patching against it where it must be exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Add, Noise, SetTo, activation_patching, attribution_patching
from jaxtc.errors import EditError, InputError, SiteError
from jaxtc.experiments.scores import Logit, LogitDifference
from tests.support import tiny
from tests.support.batch import LAYERS, VECTOR

CLEAN = [2, 5, 7, 9, 4, 11, 6]
BAD = [2, 5, 8, 9, 4, 11, 6]
BATCH = ([CLEAN, CLEAN[::-1]], [BAD, [6, 3, 4, 9, 7, 5, 12]])
OF = LogitDifference(5, 7)
NEAR = dict(rtol=2e-5, atol=2e-5)


def by_hand(clean, bad, site, layer, position, edits=(), **where):
    kept = jaxtc.run(tiny.model(), clean, capture=site).activations[f"layers.{layer}.{site}"]
    patch = SetTo(kept, site=site, layer=layer, position=position, **where)
    return OF(jaxtc.run(tiny.model(), bad, edits=[*edits, patch], logits="last"))


@pytest.mark.parametrize("prompts", [(CLEAN, BAD), BATCH], ids=["one", "batch"])
def test_every_place_is_patched_as_by_hand(prompts):
    found = activation_patching(tiny.model(), *prompts, OF, "mlp_out")
    rows = np.ndim(prompts[0]) if np.ndim(prompts[0]) == 2 else 1
    assert found.values.shape == (LAYERS, len(CLEAN), rows) and found.site == "mlp_out"
    assert list(found.axes) == ["layer", "position"]
    for layer, position in [(0, 2), (1, 6), (2, 6), (2, 0)]:
        expected = by_hand(*prompts, "mlp_out", layer, position)
        np.testing.assert_allclose(found.values[layer, position], expected, **NEAR)
    for score, prompt in zip((found.clean, found.corrupted), prompts, strict=True):
        np.testing.assert_allclose(score, OF(jaxtc.run(tiny.model(), prompt)), **NEAR)


def test_what_must_come_back_does_and_what_cannot_does_not():
    found = activation_patching(tiny.model(), CLEAN, BAD, OF)
    assert abs(found.clean - found.corrupted) > 0.01
    # The prompts differ at position 2 only, and the score is read at the end.
    np.testing.assert_allclose(found.recovered[0, 2], 1, atol=1e-3)
    np.testing.assert_allclose(found.recovered[0, [0, 1, 3, 4, 5, 6]], 0, atol=1e-3)
    np.testing.assert_allclose(found.recovered[:, :2], 0, atol=1e-3)
    last = activation_patching(tiny.model(), CLEAN, BAD, OF, "resid_post").recovered[-1]
    np.testing.assert_allclose(last, np.eye(7)[6][:, None], atol=1e-3)


@pytest.mark.parametrize("site", ["attn_heads", "v"])
def test_heads_one_at_a_time(site):
    found = activation_patching(tiny.model(), CLEAN, BAD, OF, site, heads=True)
    heads = {"attn_heads": 4, "v": 2}[site]
    assert found.values.shape == (LAYERS, 7, heads, 1)
    assert list(found.axes) == ["layer", "position", "head"]
    for layer, position, head in [(0, 2, 1), (1, 6, 0), (1, 2, heads - 1)]:
        expected = by_hand(CLEAN, BAD, site, layer, position, head=head)
        np.testing.assert_allclose(found.values[layer, position, head], expected, **NEAR)


CORRUPTED = [Noise(3, 2.0, site="embed", position=[2, 3]), Add(VECTOR, site="layers.1.resid_pre")]


def test_causal_tracing_corrupts_with_noise():
    """Edits are part of the corrupted runs only, and come before the patch at its site."""
    found = activation_patching(tiny.model(), CLEAN, CLEAN, OF, edits=CORRUPTED)
    bad = jaxtc.run(tiny.model(), CLEAN, edits=CORRUPTED, logits="last")
    np.testing.assert_allclose(found.corrupted, OF(bad), **NEAR)
    np.testing.assert_allclose(found.clean, OF(jaxtc.run(tiny.model(), CLEAN)), **NEAR)
    assert abs(found.clean - found.corrupted) > 0.05
    for layer, position in [(0, 2), (1, 6), (1, 3), (2, 6)]:
        expected = by_hand(CLEAN, CLEAN, "resid_pre", layer, position, CORRUPTED)
        np.testing.assert_allclose(found.values[layer, position], expected, **NEAR)


def test_progress_and_chunks():
    done = []
    whole = activation_patching(tiny.model(), CLEAN, BAD, OF)
    found = activation_patching(
        tiny.model(), CLEAN, BAD, OF, chunk=8, progress=lambda *told: done.append(told)
    )
    np.testing.assert_allclose(found.values, whole.values, **NEAR)
    assert done == [(8, 21), (16, 21), (21, 21)] or done == [(7, 21), (14, 21), (21, 21)]


SITES = ["resid_pre", "attn_heads", "v", "mlp_in_normed"]


def mean_score(result):
    return OF(result).mean()


@pytest.mark.parametrize("of", [OF, mean_score], ids=["rows", "number"])
def test_attribution_is_gradient_times_difference(of):
    edits = [Add(VECTOR, site="layers.1.resid_pre", position=4)]
    clean, bad = BATCH
    kept = jaxtc.run(tiny.model(), clean, capture=SITES, logits="last")
    found = attribution_patching(tiny.model(), *BATCH, of, SITES, edits=edits)
    heads = attribution_patching(
        tiny.model(), *BATCH, of, ["attn_heads", "v"], edits=edits, heads=True
    )
    assert list(found) == SITES

    def score(pushes):
        moved = [*edits, *(Add(push, site=name) for name, push in pushes.items())]
        result = jaxtc.run(tiny.model(), bad, edits=moved, capture=SITES, logits="last")
        return of(result), dict(result.activations)

    zeros = {name: jnp.zeros_like(kept.activations[name]) for name in kept.activations}
    value, pull, here = jax.vjp(score, zeros, has_aux=True)
    rows = value.shape
    for row in range(*rows) if rows else [()]:
        (slopes,) = pull(jnp.zeros(rows).at[row].set(1))
        for name in SITES:
            full = [f"layers.{n}.{name}" for n in range(LAYERS)]
            terms = np.stack([
                np.asarray(slopes[n]) * (np.asarray(kept.activations[n]) - here[n]) for n in full
            ]).sum(1)  # fmt: skip
            expected = value[row] + terms.reshape(LAYERS, len(CLEAN), -1).sum(-1)
            got = found[name].values[..., row] if rows else found[name].values
            assert got.shape == (LAYERS, len(CLEAN))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
            if name in heads:
                expected = value[row] + terms.sum(-1)
                got = heads[name].values[..., row] if rows else heads[name].values
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["v"].clean, of(kept), **NEAR)
    np.testing.assert_allclose(found["v"].corrupted, value, **NEAR)


def test_attribution_is_exact_where_the_patch_is_small():
    """The corrupted embedding is a hair off: a straight line is all that there is to see."""
    sites = ["resid_pre", "mlp_in_normed"]
    edits = [Noise(0, 5e-3, site="embed", position=[1, 2, 4])]
    exact = {s: activation_patching(tiny.model(), CLEAN, CLEAN, OF, s, edits=edits) for s in sites}
    guess = attribution_patching(tiny.model(), CLEAN, CLEAN, OF, sites, edits=edits)
    for name in sites:
        change = np.asarray(exact[name].values - exact[name].corrupted)
        guessed = np.asarray(guess[name].values - guess[name].corrupted)
        assert np.abs(change).max() > 2e-4
        assert np.linalg.norm(change - guessed) < 0.03 * np.linalg.norm(change), name


def test_attribution_ranks_places_of_the_embedded_model_as_patching_does():
    model, tokenizer = jaxtc.load_model(), jaxtc.load_tokenizer()
    texts = [
        "The capital of the state containing Dallas is",
        "The capital of the state containing Oakland is",
    ]
    clean, bad = (tokenizer(text).input_ids for text in texts)
    answers = [tokenizer(f"x {word}").input_ids[-1] for word in ("Austin", "Sacramento")]
    of = LogitDifference(*answers)
    exact = activation_patching(model, clean, bad, of, "mlp_out")
    guess = attribution_patching(model, clean, bad, of, "mlp_out")["mlp_out"]
    assert exact.clean > 0 > exact.corrupted  # the model knows both
    a, b = (np.asarray(x.values - x.corrupted).ravel() for x in (exact, guess))
    there = np.abs(a) > 0.02 * np.abs(a).max()
    assert there.sum() >= 3 and there.sum() < there.size / 4
    assert (np.argsort(a[there]) == np.argsort(b[there])).all()
    np.testing.assert_array_equal(there, np.abs(b) > 0.02 * np.abs(a).max())
    assert np.corrcoef(a, b)[0, 1] > 0.95


def test_other_prompts_and_answers_compile_nothing():
    def go(clean, bad, answer):
        activation_patching(tiny.model(), clean, bad, Logit(answer))
        attribution_patching(tiny.model(), clean, bad, Logit(answer))

    go(CLEAN, BAD, 5)
    with jaxtc.compiles() as found:
        go(BAD[::-1], CLEAN, 6)
    assert not found, found


WRONG = {
    "lengths": (InputError, r"have \[7\] tokens and the corrupted ones \[6\]", CLEAN, BAD[1:], {}),
    "rows": (InputError, "1 corrupted ones", [CLEAN, CLEAN], BAD, {}),
    "once": (SiteError, "these sites can: resid_pre", CLEAN, BAD, dict(site="embed")),
    "layer": (SiteError, "layer by layer", CLEAN, BAD, dict(site="layers.1.mlp_out")),
    "pairs": (SiteError, "token by token", CLEAN, BAD, dict(site="attn_pattern")),
    "no heads": (
        SiteError,
        "head by head; these sites can: q",
        CLEAN,
        BAD,
        dict(site="mlp_out", heads=True),
    ),
    "edit": (EditError, "position 7", CLEAN, BAD, dict(edits=[Add(1.0, site="q", position=7)])),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    kind, words, clean, bad, options = WRONG[name]
    with pytest.raises(kind, match=words):
        activation_patching(tiny.model(), clean, bad, OF, **options)
    if "site" in options:
        options = options | {"sites": options["site"]}
        options.pop("site")
    with pytest.raises(kind, match=words):
        attribution_patching(tiny.model(), clean, bad, OF, **options)
