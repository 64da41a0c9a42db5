"""Sweeps: every variant is the run it stands for, in few compiles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import (
    Add,
    Apply,
    Copy,
    KnockOut,
    MeanAblate,
    Noise,
    Over,
    PerLayer,
    ProjectOut,
    Scale,
    SetTo,
    Token,
    Zero,
    sweep,
)
from jaxtc.captures.reducers import At, Norm
from jaxtc.experiments.scores import Logit, LogitDifference
from jaxtc.tap.sites import BY_NAME
from tests.support import tiny
from tests.support.batch import LAYERS, PROMPTS, VECTOR, D
from tests.support.sweeps import at, named, over
from tests.support.unspared import ClampFeature, SetFeature, Splice

LONG = PROMPTS[0]
RNG = np.random.default_rng(3)
EACH = RNG.standard_normal((3, D)).astype(np.float32)
NOISE = [Noise(1, 0.5, site="embed", position=1), Noise(2, 0.5, site="layers.1.mlp_out")]


def logits_of(result):
    return result.logits


def compare(edits, prompts=LONG, of=logits_of, **options):
    """A sweep against a run for each place; along each axis, something must change."""
    found = sweep(tiny.model(), prompts, edits, of=of, **{"logits": "all"} | options)
    shape = tuple(map(len, found.axes.values()))
    options.pop("chunk", None)
    one_by_one = []
    for place in itertools.product(*map(range, shape)):
        chosen = [at(named(edit), dict(zip(found.axes, place, strict=True))) for edit in edits]
        one_by_one.append(of(jaxtc.run(tiny.model(), prompts, edits=chosen, **options)))
    assert jax.tree.structure(found.values) == jax.tree.structure(one_by_one[0])
    expected = jax.tree.map(
        lambda *ones: np.stack(ones).reshape(*shape, *ones[0].shape), *one_by_one
    )
    for values, wanted in zip(*map(jax.tree.leaves, (found.values, expected)), strict=True):
        assert values.shape == wanted.shape and values.dtype == wanted.dtype
        np.testing.assert_allclose(values, wanted, rtol=5e-5, atol=5e-5)
    for axis, name in enumerate(found.axes):
        steps = np.abs(np.diff(jax.tree.leaves(expected)[0], axis=axis))
        steps = np.moveaxis(steps, axis, 0).reshape(shape[axis] - 1, -1).max(1)
        assert steps.min() > 1e-3, f"nothing changes along {name}"
    return found


T1 = tiny.transcoder(1)
LAYER = over(*range(LAYERS))
VALUES = RNG.standard_normal((2, LAYERS, 1, len(LONG), D))
AXES = {
    "targets": [
        SetTo(VECTOR, site="resid_pre", layer=over(-1, 0, -2), position=over(-1, 2, -9)),
        Add(2.0, site="resid_mid", layer=1, coordinate=over(0, 5, -1)),
        Zero(site="attn_heads", layer=over(0, 2, name="other"), head=over(0, 3)),
    ],
    "attention": [
        KnockOut(layer=1, key=over(0, 3), position=over(4, 8)),
        Zero(site="v", layer=over(1, 0), head=over(0, 1)),
        Add(3.0, site="attn_scores", layer=2, head=over(0, 2, name="h"), key=over(0, 3, name="k")),
    ],
    "values": [
        Add(Over(EACH), site="mlp_out", layer=over(0, 2)),
        Scale(over(0.0, -2.0), site="attn_out", layer=over(2, 1)),
        SetTo(Over(VALUES[:, 0], "tokens"), site="mlp_in", layer=over(0, 1)),
        SetTo(PerLayer(Over(VALUES, "each")), site="resid_mid", layer=over(0, 2), position=3),
    ],
    "positions": [
        Add(VECTOR, site="mlp_out", layer=over([0, 2], [1, 2]), position=over([0, 1], [3, -1])),
        Add(VECTOR, site="attn_out", layer=1, position=Over(np.tri(3, len(LONG), 1, bool), "mask")),
        Add(VECTOR, site="embed", position=Token(over(5, 11, name="token"))),
        Add(VECTOR, site="attn_in", position=slice(over(0, 4, name="start"), None)),
    ],
    "one name": [
        Add(Over(EACH, "pair"), site="mlp_out", layer=over(2, 0, 1, name="pair")),
        Scale(0.3, site="attn_out", layer=over(0, 2, name="l")),
        Add(VECTOR, site="mlp_out", layer=over(2, 1, name="l"), position=over(1, 3)),
    ],
    "among others": [*NOISE, Zero(site="mlp_out", layer=LAYER, position=over(1, -1))],
    "same site": [
        Add(VECTOR, site="layers.1.resid_pre"),
        Scale(2.0, site="resid_pre", layer=over(1, 2)),
        Add(-VECTOR, site="layers.2.resid_pre"),
        Scale(0.5, site="final_norm"),
        *NOISE,
    ],
    "late layers": [Zero(site="mlp_out", layer=over(2, 1)), *NOISE],
    "embed": [
        Add(VECTOR, site="embed", position=over(2, 3)),
        Add(VECTOR, site="layers.2.mlp_out", position=over(0, 8, name="p")),
    ],
    "after the layers": [
        Add(Over(EACH), site="final_norm"),
        Add(over(1.0, 2.0, name="v"), site="logits", coordinate=over(3, 4)),
        NOISE[1],
    ],
    "noise": [
        Noise(over(0, 1, 7), site="resid_mid", layer=over(0, 2)),
        Noise(Over(jax.random.split(jax.random.key(0), 2), "key"), site="mlp_out"),
        ProjectOut(Over(EACH), site="resid_post", layer=over(0, 2)),
    ],
    "features": [
        SetFeature(T1, over(11, 0), over(1.0, 5.0), layer=over(2, 0)),
        SetFeature(T1, over([3, 4], [5, 49], name="f"), 4.0, position=over(1, -1)),
        ClampFeature(T1, 7, low=over(1.0, 2.0, 3.0), layer=0),
    ],
    "splice": [
        Splice(tiny.transcoder(0), layer=LAYER),
        Splice(T1, layer=over(0, 2, name="l"), position=over(0, -1)),
    ],
    "splices": [
        Splice({0: tiny.transcoder(0), 2: tiny.transcoder(2)}, layer=over(0, 2)),
        Splice(T1),
        SetFeature(T1, over(0, 1, 2), over(1.0, 3.0)),
    ],
    "splices, late": [
        Splice({1: T1, 2: tiny.transcoder(2)}), Add(VECTOR, site="mlp_out", layer=over(2, 1))
    ],
    "means, functions": [
        MeanAblate(site="mlp_out", layer=over(2, 1), position=over(2, 7)),
        Apply(jnp.tanh, site="resid_mid", layer=over(0, 1, name="l"), position=over(2, 7)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_a_sweep_is_its_runs(name):
    compare(AXES[name])


ROWS = {
    "one row": [
        Zero(site="mlp_out", layer=over(0, 2), row=over(0, 1, 2)),
        Copy(from_row=over(1, 2), row=0, site="resid_post", layer=over(0, 1, name="l"), position=0),
        SetTo(VECTOR, site="attn_out", layer=1, position=over(-1, -3, 0)),
    ],
    "a row each": [
        Copy(from_row=over([2, 0, 1], [1, 2, 0]), site="attn_out", layer=over(0, 1), position=-1),
        Copy(from_position=over(0, 1), position=over(2, -1), site="resid_mid", layer=over(0, 1)),
        Add(VECTOR, site="mlp_out", position=over([[0], [3], [1]], [[8], [4], [2]], name="p")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_sweep_over_a_batch_of_mixed_lengths(name):
    compare(ROWS[name], PROMPTS)


def test_sites_of_every_shape():
    """Along "site" one edit at a time does something, each another amount."""
    edits, amounts = [], np.diag(np.linspace(0.3, 0.7, len(BY_NAME)))
    for amount, site in zip(amounts, BY_NAME.values(), strict=True):
        where = dict(site=site.name, position=over(1, -1))
        where |= dict(layer=over(2, 0)) if site.per_layer else {}
        # The same added to all scores changes nothing; nor does a norm's input scaled.
        add = site.name != "attn_scores"
        edit = Add(Over(amount, "at"), **where) if add else Scale(Over(1 - amount, "at"), **where)
        edits.append(edit)
    compare(edits, PROMPTS[:2])


PLACES = [SetTo(VECTOR, site="mlp_out", layer=LAYER, position=over(0, 1, 2, -1))]


def everything(result):
    return {
        "logits": result.logits,
        "kept": (result.activations["mlp_out"], result.activations["At(resid_post)"]),
        "norm": result.activations["Norm(layers.1.resid_mid)"],
        "mask": result.mask,
    }


@pytest.mark.parametrize("logits", ["all", "last"])
def test_captures_and_reducers_for_a_function_that_gives_a_pytree(logits):
    capture = ["mlp_out", At("resid_post", -1), Norm("layers.1.resid_mid")]
    found = compare(PLACES, PROMPTS, everything, logits=logits, capture=capture, chunk=5)
    assert found.values["mask"].dtype == bool
    assert found.values["kept"][0].shape == (LAYERS, 4, LAYERS, 3, 9, D)


def test_captures_without_logits():
    found = compare(
        PLACES, PROMPTS, lambda r: r.activations["layers.2.resid_post"], logits=None,
        capture="layers.2.resid_post",
    )  # fmt: skip
    assert found.values.shape == (LAYERS, 4, 3, 9, D)


@pytest.mark.parametrize("chunk", [1, np.int64(5), 100])
def test_every_chunk_size_gives_the_same_and_tells_how_far_it_is(chunk):
    done = []
    found = sweep(tiny.model(), LONG, PLACES, chunk=chunk, progress=lambda *told: done.append(told))
    whole = sweep(tiny.model(), LONG, PLACES).values
    np.testing.assert_allclose(found.values, whole, rtol=1e-5, atol=1e-5)
    assert done[-1] == (12, 12) and len(done) == -(-12 // min(int(chunk), 12))
    assert done == sorted(set(done)) and {n for _, n in done} == {12}


def test_axes_are_told_in_order():
    edits = [
        SetTo(Over(EACH), site="mlp_out", position=over(1, 2), layer=over(2, 0)),
        Zero(site="attn_heads", head=over(3, 1, name="h"), layer=over(0, 1)),
    ]
    found = sweep(tiny.model(), LONG, edits)
    assert list(found.axes) == ["layer", "position", "value", "h"]
    np.testing.assert_array_equal(found.axes["layer"], [2, 0])
    np.testing.assert_array_equal(found.axes["value"], EACH)
    assert found.values.shape == (2, 2, 3, 2, 1, tiny.config().vocab_size)


def scaled(scale, result):
    return result.logits * scale


OF = {
    "rows": (LogitDifference(6, [5, 6, 7]), LogitDifference(6, [7, 5, 6])),
    "partial": [jax.tree_util.Partial(scaled, jnp.float32(scale)) for scale in (3, 4)],
}


@pytest.mark.parametrize("name", OF)
def test_scores_are_data(name):
    of, other = OF[name]
    found = sweep(tiny.model(), PROMPTS, PLACES, of=of).values
    edits = [at(named(PLACES[0]), dict(layer=1, position=2))]
    one = jaxtc.run(tiny.model(), PROMPTS, edits=edits, logits="last")
    np.testing.assert_allclose(found[1, 2], of(one), rtol=1e-5, atol=1e-5)
    with jaxtc.compiles() as compiled:
        another = sweep(tiny.model(), PROMPTS, PLACES, of=other).values
    assert not compiled, compiled
    np.testing.assert_allclose(another[1, 2], other(one), rtol=1e-5, atol=1e-5)


def test_a_sweep_can_be_differentiated():
    def total(v):
        edits = [Add(Over(v), site="mlp_out", layer=1)]
        return sweep(tiny.model(), LONG, edits, of=Logit(5)).values.sum()

    slopes = jax.grad(total)(jnp.asarray(EACH))
    step = jnp.zeros_like(slopes).at[1, 4].set(1e-2)
    expected = (total(EACH + step) - total(EACH - step)) / 2e-2
    np.testing.assert_allclose(slopes[1, 4], expected, rtol=1e-2)


# What is not run


def test_shared_layers_are_not_run(monkeypatch):
    """Where a layer is not run its NaN is not seen; where it is, it is."""
    model = tiny.model()
    broken = jax.tree.map(lambda x: x, model)
    broken.layers[1].mlp.down[...] = jnp.full_like(broken.layers[1].mlp.down[...], jnp.nan)
    module = __import__("sys").modules["jaxtc.experiments.sweep"]
    good = jaxtc.run(model, LONG, capture=["embed", "resid_post"]).activations
    shared = jnp.stack([good["embed"], *good["resid_post"][:-1]])
    shared = jnp.pad(shared, [(0, 0), (0, 0), (0, 16 - len(LONG)), (0, 0)])
    monkeypatch.setattr(module, "_entering", lambda *given: shared)
    edits = [Zero(site="attn_out", layer=over(0, 1, 2))]
    found = sweep(broken, LONG, edits, chunk=1).values
    assert list(np.isnan(found).any((1, 2))) == [True, True, False]
    expected = sweep(model, LONG, edits, chunk=1).values
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-5)
    # A chunk begins at the first of its layers.
    assert np.isnan(sweep(broken, LONG, edits, chunk=3).values).all()


def test_shared_layers_see_the_other_edits_once():
    """Edits of the site where a variant begins are not applied twice."""
    same = [Add(VECTOR, site="resid_pre"), Add(VECTOR, site="resid_post"), Scale(2.0, site="embed")]
    for site in ("resid_pre", "resid_post", "attn_in"):
        compare([*same, Add(-VECTOR, site=site, layer=over(2, 1))], PROMPTS)


# What it costs


def score(result):
    return result.logits.max(-1)


@pytest.mark.parametrize("kind", [int, np.int64, jnp.int32, jnp.asarray])
def test_how_a_number_is_written_compiles_nothing(kind):
    def go(kind):
        edits = [
            Noise(kind(3), 0.5, site="embed", row=kind(0)),
            SetFeature(T1, kind(7), 2.0, layer=kind(1)),
            Zero(site="attn_out", layer=LAYER),
        ]
        sweep(tiny.model(), LONG, edits, of=score)
        jaxtc.gradients(tiny.model(), LONG, Logit(3), "mlp_out", edits=edits[:2])

    go(int)
    with jaxtc.compiles() as found:
        go(kind)
    assert not found, found


def test_other_values_and_prompts_compile_nothing():
    def go(values, layers, prompt, where, of=score):
        edit = SetTo(Over(values), site="mlp_out", layer=Over(layers), position=where)
        return sweep(tiny.model(), prompt, [edit, Add(values[0], site="embed")], of=of).values

    go(EACH, [0, 1], LONG, 3)
    with jaxtc.compiles() as found:
        go(-EACH, [1, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1], -1)
        go(jnp.asarray(EACH), np.array([2, 2]), LONG, 0)
    assert not found, found
    with jaxtc.compiles() as found:
        go(EACH, [0, 1], LONG, 3, of=Logit(3))
        go(EACH, [0, 1], LONG, 3, of=Logit(5))
    assert len(found) == 1
    with jaxtc.compiles() as found:
        for _ in range(2):
            go(EACH, [0, 1], LONG, 3, of=lambda result: result.logits)
    assert [one.program for one in found] == ["sweep"] * 2
    assert "<lambda>: define it once" in found[-1].because
    with jaxtc.compiles() as found:
        go(EACH, [0, 1], LONG[:-1], 3)
    assert "length 8 (was 9)" in found[-1].because


def test_a_model_in_bfloat16():
    model = jaxtc.Gemma2(tiny.config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    edit = SetTo(VECTOR, site="mlp_out", layer=LAYER, position=over(1, -1))
    found = sweep(model, PROMPTS, [edit]).values
    for i, j in itertools.product(range(LAYERS), range(2)):
        alone = at(named(edit), dict(layer=i, position=j))
        one = jaxtc.run(model, PROMPTS, edits=[alone], logits="last").logits
        np.testing.assert_allclose(found[i, j], one, rtol=0.05, atol=0.05)
