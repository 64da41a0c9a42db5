"""Captures and edits: what they select, what they change, what they refuse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Add, Detach, Edit, SetTo
from jaxtc.edits.check import check_edits
from jaxtc.errors import EditError, InputError, SiteError
from jaxtc.model.prompts import prepare
from jaxtc.tap.sites import SITES
from jaxtc.tap.tap import Tap
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, VECTOR, D, logits, near, real, run
from tests.support.unspared import Splice

# Where an edit applies


def everywhere(b, t, n):
    return True


SELECTIONS = {
    "all": ({}, everywhere),
    "position": ({"position": 1}, lambda b, t, n: t == 1),
    "positions": ({"position": jnp.array([0, 2])}, lambda b, t, n: t in (0, 2)),
    "last": ({"position": -1}, lambda b, t, n: t == n - 1),
    "from either end": ({"position": [0, -2]}, lambda b, t, n: t in (0, n - 2)),
    "row": ({"row": 1}, lambda b, t, n: b == 1),
    "rows": ({"row": np.array([0, 2])}, lambda b, t, n: b != 1),
    "last of a row": ({"row": 0, "position": -1}, lambda b, t, n: b == 0 and t == n - 1),
    "beyond the shortest": ({"row": [0, 1], "position": 4}, lambda b, t, n: b < 2 and t == 4),
}


@pytest.mark.parametrize("choice", SELECTIONS)
def test_selection(choice):
    where, chosen = SELECTIONS[choice]
    site = "layers.0.resid_mid"
    edits = [Add(VECTOR, site=site, **where)]
    before, after = (
        run(edits=given, capture=[site], logits=None).activations[site] for given in ((), edits)
    )
    moved = np.asarray(after - before)
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            expected = VECTOR if chosen(b, t, n) else jnp.zeros(D)
            np.testing.assert_allclose(moved[b, t], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "touched"), [(None, {0, 1, 2}), (1, {1}), (-1, {2}), ([0, 2], {0, 2}), ([-3], {0})]
)
def test_layers(layer, touched):
    # mlp_proj of a layer is set, so what other layers' edits do upstream does not show in it.
    edits = [SetTo(0.5, site="mlp_proj", layer=layer)]
    found = run(edits=edits, capture="mlp_proj").activations["mlp_proj"]
    for index in range(LAYERS):
        assert bool((real(found[index]) == 0.5).all()) == (index in touched)


@pytest.mark.parametrize("site", [s for s in SITES if s.name != "logits"], ids=lambda s: s.name)
def test_every_site_can_be_edited(site):
    """Zero there changes the logits, and only from the edited position on."""

    def outputs(*edits):  # not compiled: 24 programs would take a minute
        prompts = prepare(PROMPTS[:1], tiny.config())
        positions = jnp.arange(prompts.tokens.shape[1])[None]
        checked, _ = check_edits(edits, tiny.config(), (LAYERS, len(SITES)), prompts)
        tap = Tap((), checked, positions, prompts.lengths)
        found = tiny.model()(jnp.asarray(prompts.tokens), tap=tap)[0]
        return np.asarray(found)[:, : LENGTHS[0]]

    before = outputs()
    after = outputs(SetTo(0.0, site=site.name, layer=1 if site.per_layer else None, position=2))
    np.testing.assert_allclose(after[:, :2], before[:, :2], atol=1e-5)
    assert np.abs(after - before)[:, 2].max() > 1e-3


def test_the_logits_themselves():
    found = run(edits=[SetTo(7.0, site="logits", position=-1)], logits="last").logits
    assert found.shape == (3, tiny.config().vocab_size) and (found == 7).all()
    assert not (logits(SetTo(7.0, site="logits", position=-2))[0, -1] == 7).any()


def test_edits_apply_in_order_and_captures_see_them():
    site = "layers.0.resid_mid"
    edits = [SetTo(jnp.ones(D), site=site), Add(VECTOR, site=site)]
    found = run(edits=edits, capture=[site]).activations[site]
    np.testing.assert_allclose(real(found), np.broadcast_to(1 + VECTOR, (17, D)), atol=1e-6)
    assert (real(run(edits=edits[::-1], capture=[site]).activations[site]) == 1).all()


def test_set_to_what_was_captured_restores_the_run():
    site = "layers.1.resid_mid"
    clean = run(capture=[site])
    broken = Add(VECTOR, site="layers.0.mlp_out")
    assert np.abs(logits(broken) - clean.logits).max() > 0.1
    near(logits(broken, SetTo(clean.activations[site], site=site)), clean.logits, 1e-5)


def test_a_captured_pattern_fits_its_site_despite_the_padding():
    site = "layers.2.attn_pattern"
    clean = run(capture=[site])
    near(logits(SetTo(clean.activations[site], site=site)), clean.logits)


def test_a_mask_for_scores():
    """Hiding a token from every later one is the same as never looking at it."""
    site, blind = "layers.1.attn_scores", np.zeros(9, np.float32)
    blind[3] = -1e9
    edit = Add(jnp.asarray(blind), site=site)
    pattern = run(PROMPTS[:1], edits=[edit], capture="attn_pattern").activations
    assert (np.asarray(pattern["layers.1.attn_pattern"])[0, :, 4:, 3] == 0).all()
    assert (np.asarray(pattern["layers.2.attn_pattern"])[0, :, 4:7, 3] > 0).all()


def test_detach_keeps_the_value_and_stops_the_gradient():
    def loss(v, *edits):
        return (logits(Add(v, site="layers.0.resid_post", position=0), *edits) ** 2).sum()

    zero = jnp.zeros(D)
    assert np.abs(jax.grad(loss)(zero)).max() > 1e-3
    detach = Detach(site="resid_post", layer=1)
    assert float(loss(zero, detach)) == pytest.approx(float(loss(zero)), rel=1e-6)
    assert (jax.grad(loss)(zero, detach) == 0).all()
    # With only some rows detached the others' gradient flows on.
    assert np.abs(jax.grad(loss)(zero, dataclasses.replace(detach, row=[1, 2]))).max() > 1e-3


# Splice


def test_splice_reads_one_site_and_writes_another():
    transcoder = tiny.transcoder(1)
    sites = ["layers.1.mlp_in_normed", "layers.1.mlp_out"]
    found = run(edits=[Splice(transcoder)], capture=sites).activations
    expected = transcoder(found[sites[0]])
    near(found[sites[1]], expected)
    assert np.abs(real(expected) - real(run(capture=sites).activations[sites[1]])).max() > 0.1


def test_splice_at_some_positions_keeps_the_mlp_elsewhere():
    site = "layers.1.mlp_out"
    clean = run(capture=[site]).activations[site]
    found = run(edits=[Splice(tiny.transcoder(1), position=-1)], capture=[site]).activations[site]
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(found[b, : n - 1], clean[b, : n - 1], atol=1e-6)
        assert np.abs(found[b, n - 1] - clean[b, n - 1]).max() > 0.01


def test_splice_sees_earlier_edits_of_what_it_reads():
    reads = "layers.1.mlp_in_normed"
    edits = [Splice(tiny.transcoder(1)), SetTo(VECTOR, site=reads)]
    found = run(edits=edits, capture=["layers.1.mlp_out"]).activations["layers.1.mlp_out"]
    expected = np.broadcast_to(tiny.transcoder(1)(VECTOR), (17, D))
    np.testing.assert_allclose(real(found), expected, atol=1e-5)


# What is refused


class Unregistered(Edit):
    def new(self, x, context):
        return x


@jaxtc.register_edit()
class Silent(Edit):
    pass


REFUSED = [
    (lambda: Add(VECTOR), EditError, "Add needs a site"),
    (lambda: Add(VECTOR, site="mlp_oot"), SiteError, "Did you mean 'mlp_out'"),
    (lambda: Add(VECTOR, site="layers.1.mlp_out", layer=1), EditError, "give one of the two"),
    (lambda: Add(VECTOR, site="mlp_out", layer=3), SiteError, "layer 3, but this model has 3"),
    (lambda: Add(VECTOR, site="mlp_out", layer=[0, -4]), SiteError, "layer -4"),
    (lambda: Add(VECTOR, site="mlp_out", layer=1.0), EditError, "layer must be whole numbers"),
    (lambda: Add(VECTOR, site="mlp_out", position=[]), EditError, "positions are whole numbers"),
    (lambda: Add(VECTOR, site="mlp_out", position=3), EditError, "outside prompt 2 of 3 tokens"),
    (lambda: Add(VECTOR, site="mlp_out", position=-4), EditError, "0 to 2, or -3 to -1"),
    (lambda: Add(VECTOR, site="mlp_out", position=9, row=0), EditError, "prompt 0 of 9 tokens"),
    (lambda: Add(VECTOR, site="mlp_out", row=3), EditError, "batch has rows 0 to 2"),
    (lambda: Add(VECTOR, site="mlp_out", row=-1), EditError, "batch has rows 0 to 2"),
    (lambda: Add(VECTOR, site="logits", layer=0), EditError, "takes no layer"),
    (lambda: Add(VECTOR[:-1], site="mlp_out"), EditError, r"\(23,\), which does not broadcast to"),
    (lambda: Add(jnp.ones((2, 3, 9, D)), site="mlp_out"), EditError, "does not broadcast"),
    (lambda: SetTo(1j, site="mlp_out"), EditError, "complex"),
    (lambda: Splice(tiny.transcoder(None)), EditError, "give layer="),
    (lambda: Splice(tiny.transcoder(7)), SiteError, "layer 7"),
    (lambda: Splice(tiny.transcoder(0, 8, 16)), EditError, "belongs to another model"),
    (
        lambda: Splice(tiny.transcoder(0), reads=("resid_post",)),
        EditError,
        "not computed before 'mlp_out'",
    ),
    (lambda: VECTOR, EditError, "edits must be edits"),
    (lambda: Unregistered(site="mlp_out"), EditError, "put @jaxtc.register_edit.. above"),
    (lambda: Silent(site="mlp_out"), NotImplementedError, "does not say what it changes"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[r[2][:30] for r in REFUSED])
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        logits(make())


@pytest.mark.parametrize(
    ("edit", "capture"),
    [
        (Add(VECTOR, site="layers.1.mlp_out"), "layers.1.mlp_in"),
        (Add(VECTOR, site="layers.2.resid_pre"), "layers.1.resid_post"),
        (Add(VECTOR, site="mlp_out"), "layers.0.mlp_in"),
        (Add(VECTOR, site="final_norm"), "layers.2.resid_post"),
        (Add(VECTOR, site="layers.0.resid_pre"), "embed"),
    ],
    ids=str,
)
def test_edits_that_nothing_asked_for_depends_on(edit, capture):
    with pytest.raises(EditError, match="would never fire"):
        run(edits=[edit], capture=[capture], logits=None)
    assert run(edits=[edit], capture=[capture]).logits is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits": None}, InputError, "Nothing was asked for"),
        ({"logits": "first"}, InputError, "expected 'all', 'last' or None"),
        ({"capture": ["layers.5.mlp_out"]}, SiteError, "layer 5"),
        ({"capture": "mlpp"}, SiteError, "no site called 'mlpp'"),
        ({"capture": [3]}, InputError, "capture takes addresses"),
    ],
)
def test_runs_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


# Edits of one's own


@jaxtc.register_edit()
class Scale(Edit):
    """Multiply by a factor."""

    factor: Any
    values = ("factor",)

    def new(self, x, context):
        return x * context.fit(self.factor, x)


@jaxtc.register_edit()
class Widen(Edit):
    def new(self, x, context):
        return jnp.concatenate([x, x], axis=-1)


def test_an_edit_of_ones_own():
    clean = run(capture=["layers.1.mlp_out"])
    found = logits(Scale(3.0, site="layers.1.mlp_out"))
    near(found, logits(SetTo(3 * clean.activations["layers.1.mlp_out"], site="layers.1.mlp_out")),
         1e-5)  # fmt: skip
    with pytest.raises(EditError, match=r"returned float32\[3, 16, 48\].*keep shape and dtype"):
        logits(Widen(site="layers.1.mlp_out"))


# What comes back


def test_results_are_found_under_every_name():
    result = run(capture=["blocks.1.hook_mlp_out", "model.layers.0.self_attn", "attn_in"])
    kept = result.activations
    assert list(kept) == ["layers.0.attn_in", "layers.0.attn_proj", "layers.1.attn_in",
                          "layers.1.mlp_out", "layers.2.attn_in"]  # fmt: skip
    assert kept["layers.1.mlp_out"] is kept["model.layers.1.post_feedforward_layernorm"]
    assert kept["attn_in"].shape == (LAYERS, 3, 9, D) and len(kept) == 5
    with pytest.raises(KeyError, match="was not captured; this result holds"):
        kept["layers.1.mlp_in"]
    with pytest.raises(SiteError):
        kept["layers.1.mlp_inn"]
    assert result.mask.tolist() == [[t < n for t in range(9)] for n in LENGTHS]


def test_results_pass_through_transformations():
    outer = jax.jit(lambda tokens: run(tokens, capture=["layers.1.mlp_out"]))
    inside, outside = outer(jnp.array(PROMPTS[:1])), run(PROMPTS[:1], capture=["layers.1.mlp_out"])
    np.testing.assert_allclose(inside.logits, outside.logits, atol=1e-5)
    np.testing.assert_allclose(
        inside.activations["mlp_out"], outside.activations["mlp_out"], atol=1e-5
    )
