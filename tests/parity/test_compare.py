"""The numbers of a certificate, against formulas written out, and the verdict drawn from them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtc.model.gemma2 import MASKED
from jaxtc.parity.certificate import Divergence, Generation, Logits, Prompt, TruthRow
from jaxtc.parity.compare import Features, Predictions, Tally, generation
from jaxtc.parity.job import addresses
from jaxtc.parity.ours import groups
from jaxtc.parity.tolerances import DEPTH, FACTOR, MEASURED, tolerances
from jaxtc.parity.verdict import notes, of_generation, of_logits, of_transcoder, of_truth
from jaxtc.tap.sites import SITES, Address
from tests.support import tiny

TABLE = tolerances("float32")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def figures(tally):
    return tally.figures(TABLE, "isolated")


def test_relative_error_is_a_mean_over_tokens_of_all_prompts():
    tally = Tally("q")
    pairs = [(random(3, 2, 4, seed=n), random(3, 8, seed=n + 5)) for n in range(2)]
    for ours, theirs in pairs:
        tally.add(ours, theirs)  # one has its heads split off
    far = [a.reshape(3, 8) - b for a, b in pairs]
    each = [
        np.linalg.norm(d[t]) / np.linalg.norm(b[t])
        for d, (_, b) in zip(far, pairs, strict=True)
        for t in range(3)
    ]
    found = figures(tally)
    assert found.relative == pytest.approx(np.mean(each), rel=1e-6)
    assert found.worst == pytest.approx(max(each), rel=1e-6)
    assert found.largest == pytest.approx(np.abs(far).max(), rel=1e-6)


def test_a_token_of_zeros_counts_absolutely():
    tally = Tally("mlp_out")
    tally.add(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert figures(tally).worst == 5 and figures(tally).relative == 2.5


def test_bfloat16_is_read():
    tally = Tally("mlp_out")
    x = jnp.asarray(random(3, 4), jnp.bfloat16)
    tally.add(np.asarray(x), np.asarray(x, np.float32))
    assert figures(tally).worst == 0


def test_what_is_not_a_number_matches_nothing():
    for a, b in ((math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan), (math.inf, 1.0)):
        tally = Tally("mlp_out")
        tally.add(np.array([[a, 1.0], [1.0, 1.0]]), np.array([[b, 1.0], [1.0, 1.0]]))
        assert math.isinf(figures(tally).relative) and math.isinf(figures(tally).largest)


def scores(visible):
    """(N, T, S) as ours has them and as the reference's file does."""
    x = random(2, *visible.shape)
    return np.where(visible, x, MASKED).astype(np.float32), np.where(visible, x, np.nan)


def test_masked_scores_are_compared_as_masks():
    visible = np.tril(np.ones((4, 4), bool))
    ours, theirs = scores(visible)
    tally = Tally("attn_scores")
    tally.add(ours + np.where(visible, 1e-3, 0).astype(np.float32), theirs)
    assert tally.masks_differ == 0 and 0 < tally.worst < 1
    assert tally.largest == pytest.approx(1e-3, rel=1e-3)

    narrow = visible & ~np.tri(4, k=-2, dtype=bool)
    for a, b in ((narrow, visible), (visible, narrow)):
        tally = Tally("attn_scores")
        tally.add(scores(a)[0], scores(b)[1])
        assert tally.masks_differ == 2 * 3  # of each head
        assert math.isinf(tally.mean)


def test_tokens_of_scores_and_patterns_are_queries():
    tally = Tally("attn_pattern")
    theirs = np.ones((2, 3, 3))
    ours = theirs.copy()
    ours[:, 1] = 2
    tally.add(ours, theirs)
    assert tally.tokens == 3
    assert figures(tally).worst == 1 and figures(tally).relative == pytest.approx(1 / 3)


def test_predictions(monkeypatch):
    monkeypatch.setattr("jaxtc.parity.compare._ROWS", 3)
    ours, theirs = 3 * random(7, 11), 3 * random(7, 11, seed=1)
    tokens = [1, 4, 2, 9, 0, 10, 3]
    found = Predictions(TABLE)
    found.add(ours, theirs, tokens)
    result = found.result()

    def log(x):
        x = x.astype(np.float64)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log(ours), log(theirs)
    kl = (np.exp(q) * (q - p)).sum(-1)
    assert result.tokens == 7
    assert result.kl_mean == pytest.approx(kl.mean()) and result.kl_max == pytest.approx(kl.max())
    same = p.argmax(-1) == q.argmax(-1)
    assert result.top1 == pytest.approx(same.mean()) and result.top1_unexplained == (~same).sum()
    best = [set(np.argsort(-x)[:5]) & set(np.argsort(-y)[:5]) for x, y in zip(p, q, strict=True)]
    assert result.top5 == pytest.approx(np.mean([len(one) / 5 for one in best]))
    at = np.arange(6), tokens[1:]
    assert result.loss_ours == pytest.approx(-p[at].mean())
    assert result.loss_theirs == pytest.approx(-q[at].mean())
    assert len(of_logits(result, TABLE)) == 4


def test_a_likeliest_token_may_change_where_the_reference_was_not_sure():
    theirs = np.zeros((1, 6))
    theirs[0, :2] = 1.0, 1.0 - TABLE.margin / 2
    ours = theirs[:, [1, 0, 2, 3, 4, 5]]
    found = Predictions(TABLE)
    found.add(ours, theirs, [3])
    result = found.result()
    assert result.top1 == 0 and result.top1_unexplained == 0
    assert result.loss_ours is None  # one token has no next


def test_equal_predictions():
    found = Predictions(TABLE)
    x = random(4, 9)
    found.add(x, x, [1, 2, 3, 4])
    result = found.result()
    assert result == Logits(4, 0, 0, 1, 0, 1, result.loss_theirs, result.loss_theirs)
    assert of_logits(result, TABLE) == []


def test_generation():
    theirs = [
        {"tokens": [5, 6, 7], "margins": [1.0, 0.5, 2.0]},
        {"tokens": [5, 6, 7], "margins": [1.0, TABLE.margin / 2, 2.0]},
        {"tokens": [5, 6, 7], "margins": [3.0, 4.0, 2.0]},
    ]
    found = generation([[5, 1, 7], [5, 2, 3], [5, 6, 7]], theirs, None)
    assert found == Generation(
        3, 3, 1,
        [Divergence(0, 1, 1, 6, "", "", 0.5), Divergence(1, 1, 2, 6, "", "", TABLE.margin / 2)],
        TABLE.margin / 2,
    )  # fmt: skip
    [failure] = of_generation(found, TABLE)
    assert failure.startswith("generation: prompt 1 diverges after 1 new tokens")
    assert generation([[], []], [{}, {}], None) is None
    assert generation([[5]], [{"tokens": [6], "margins": [1.0]}], tiny.tokenizer()).divergences


def reference_features(transcoder, x, y):
    z = x @ np.asarray(transcoder.W_enc[...]) + np.asarray(transcoder.b_enc[...])
    a = np.where((z > np.asarray(transcoder.threshold[...])) & (z > 0), z, 0)
    out = a @ np.asarray(transcoder.W_dec[...]) + np.asarray(transcoder.b_dec[...])
    return {
        "mlp_in_normed": x, "mlp_out": y, "pre_activations": z, "activations": a,
        "reconstruction": out,
    }  # fmt: skip


def test_features():
    transcoder = tiny.transcoder(1)
    x, y = random(6, 24), random(6, 24, seed=1)
    theirs = reference_features(transcoder, x, y)
    tokens = [2, 7, 8, 2, 9, 5]
    found = Features(transcoder, TABLE, [2])
    found.add({"mlp_in_normed": x, "mlp_out": y}, theirs, tokens)
    result = found.result("here", 1)
    keep = [1, 2, 4, 5]
    assert result.tokens == 4 and result.differing == result.near_threshold == 0
    l0 = (theirs["activations"][keep] > 0).sum(1).mean()
    assert l0 > 1 and result.l0_ours == result.l0_theirs == pytest.approx(l0)
    assert result.overlap == 1 and result.pre_activations < 1e-6 > result.reconstruction
    centred = y[keep] - y[keep].mean(0)
    fvu = np.sum((y - theirs["reconstruction"])[keep] ** 2) / np.sum(centred**2)
    for one in (result.fvu_ours, result.fvu_theirs, result.fvu_reference):
        assert one == pytest.approx(fvu, rel=1e-5)


@pytest.mark.parametrize("name", ["pre_activations", "reconstruction"])
def test_an_error_of_the_transcoder_is_measured(name):
    """Of each token by its own norm, on the reference's input to that step."""
    transcoder = tiny.transcoder(1)
    x = random(6, 24)
    theirs = reference_features(transcoder, x, x)
    theirs[name] = theirs[name] / (1 + 1e-3 * np.arange(6)[:, None])
    found = Features(transcoder, TABLE, [])
    found.add({"mlp_in_normed": x, "mlp_out": x}, theirs, [1] * 6)
    assert getattr(found.result("here", 1), name) == pytest.approx(2.5e-3, rel=1e-3)


def test_features_that_differ():
    """A little of the input explains one that was on its threshold, and no other."""
    transcoder = tiny.transcoder(1)
    x, y = random(4, 24), random(4, 24, seed=1)
    theirs = reference_features(transcoder, x, y)
    moved = x + 1e-3 * random(4, 24, seed=2)
    # As if the reference had kept what is not above its threshold.
    token, feature = np.argwhere(theirs["activations"] == 0)[0]
    odd = {**theirs, "activations": theirs["activations"].copy()}
    odd["activations"][token, feature] = 1
    found = Features(transcoder, TABLE, [])
    found.add({"mlp_in_normed": moved, "mlp_out": y}, odd, [1] * 4)
    result = found.result("here", 1)
    near = (np.abs(theirs["pre_activations"] - 0.5) < 1e-2).sum()
    assert result.differing - result.near_threshold == 1
    assert result.near_threshold <= near
    assert result.overlap < 1


def test_no_token_that_counts():
    found = Features(tiny.transcoder(1), TABLE, [2])
    found.add({}, {}, [2, 2])
    assert found.result("here", 1) is None
    prompts, config = [Prompt("", 1)], tiny.config()
    [note] = [n for n in notes(config, prompts, [0, 1, 2], TABLE, True) if "transcoder" in n]
    assert "was not compared" in note
    assert not any("transcoder" in n for n in notes(config, prompts, [0, 1, 2], TABLE, False))


def test_no_active_feature_and_no_bias():
    """A reconstruction of zeros, of which no error is a part."""
    transcoder = nnx.clone(tiny.transcoder(1))
    transcoder.b_dec.set_value(0 * transcoder.b_dec[...])
    transcoder.threshold.set_value(0 * transcoder.threshold[...] + 1e6)
    x, y = random(4, 24), random(4, 24, seed=1)
    found = Features(transcoder, TABLE, [])
    found.add(
        {"mlp_in_normed": x, "mlp_out": y}, reference_features(transcoder, x, y), [1, 3, 4, 5]
    )
    result = found.result("here", 1)
    assert result.reconstruction == 0 and result.l0_theirs == 0
    assert of_transcoder(result) == []


def test_truth_is_judged():
    rows = [TruthRow("q", 2.5, 1.0, 2.5), TruthRow("k", 1.0, 1.0, 1.0)]
    rows.append(TruthRow("embed", 0.0, 0.0, None))
    [failure] = of_truth(rows, tolerances("bfloat16"))
    assert failure.startswith("q: our error against float64 is 2.50 times")
    assert of_truth(rows, TABLE) == []
    assert of_truth(None, TABLE) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tolerances(dtype):
    table = tolerances(dtype)
    assert set(MEASURED) <= {site.name for site in SITES} == set(table.isolated)
    for site in table.isolated:
        few, many = (table.limits("isolated", site, count) for count in (3, 10**9))
        assert few >= many
        assert many[0] == pytest.approx(table.isolated[site], rel=0.1)
        assert few[1] >= few[0]
    deeper = tolerances(dtype, 2 * DEPTH)
    assert deeper.isolated == table.isolated
    assert deeper.accumulated["q"] == pytest.approx(2 * table.accumulated["q"])
    assert deeper.kl_mean == pytest.approx(4 * table.kl_mean)
    column = 0 if dtype == "float32" else 2
    assert table.isolated["attn_scores"] == FACTOR * MEASURED["attn_scores"][column]
    assert tolerances(dtype, 1).kl_mean == table.kl_mean


def test_the_order_of_computation():
    found = addresses([0, 2])
    assert found[0] == Address("embed") and found[-1] == Address("logits")
    assert found.index(Address("resid_post", 0)) < found.index(Address("resid_pre", 2))
    assert Address("attn_in", 0) in found and Address("attn_in", 1) not in found


def test_groups_cover_the_layers(monkeypatch):
    config = tiny.config()
    assert list(groups(config, [0, 1, 2], 8, 4)) == [[0, 1, 2]]
    monkeypatch.setattr("jaxtc.parity.ours._CAPTURED", 1)
    assert list(groups(config, [0, 1, 2], 8, 4)) == [[0], [1], [2]]
