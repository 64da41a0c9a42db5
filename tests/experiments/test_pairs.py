"""Pairs of several lengths in one batch, named places, and windows of layers."""

import functools

import jax
import numpy as np
import pytest

import jaxtc
from jaxtc import Noise, PerLayer, SetTo, Token, activation_patching, attribution_patching
from jaxtc.errors import InputError
from jaxtc.experiments.scores import LogitDifference
from tests.support import tiny
from tests.support.batch import LAYERS

CLEAN = [[2, 5, 7, 9, 4, 11, 6, 3, 8], [2, 6, 9, 4], [2, 7, 5, 12, 10, 9]]
BAD = [[2, 5, 8, 9, 4, 11, 6, 3, 8], [2, 7, 9, 4], [2, 7, 5, 13, 10, 9]]
# A word of the corrupted prompts is two tokens: 13 stands where it ends.
LONGER = [[2, 5, 8, 13, 9, 4, 11, 6, 3, 8], [2, 7, 13, 9, 4], [2, 7, 5, 13, 13, 10, 9]]
OF = LogitDifference(5, 7)
NEAR = dict(rtol=1e-6, atol=1e-6)


@functools.cache
def mixed(kind, heads=False):
    site = "attn_heads" if heads else "mlp_out"
    found = kind(tiny.model(), CLEAN, BAD, OF, site, heads=heads)
    return found if isinstance(found, jaxtc.experiments.patching.Patching) else found[site]


@pytest.mark.parametrize("heads", [False, True], ids=["whole", "heads"])
@pytest.mark.parametrize("kind", [activation_patching, attribution_patching])
def test_each_pair_gives_what_it_gives_alone(kind, heads):
    found, site = mixed(kind, heads), "attn_heads" if heads else "mlp_out"
    assert found.values.shape == (LAYERS, 9, *[4] * heads, 3)
    assert found.axes["position"].tolist() == list(range(9))
    for row, (clean, bad) in enumerate(zip(CLEAN, BAD, strict=True)):
        one = kind(tiny.model(), clean, bad, OF, site, heads=heads)
        one, n = one if kind is activation_patching else one[site], len(clean)
        np.testing.assert_allclose(found.values[:, :n, ..., row], one.values[..., 0], **NEAR)
        np.testing.assert_allclose(found.clean[row], one.clean[0], **NEAR)
        share, alone = found.recovered[:, :n, ..., row], one.recovered[..., 0]
        np.testing.assert_allclose(share, alone, rtol=1e-4, atol=1e-4)
        assert np.isnan(found.values[:, n:, ..., row]).all()
        assert np.ptp(one.values) > 1e-3


def summed(result):
    return OF(result).sum()


def test_a_score_of_all_rows_leaves_rows_without_the_token_corrupted():
    found = activation_patching(tiny.model(), CLEAN, BAD, summed, "mlp_out")
    rows = mixed(activation_patching)
    held = np.where(np.isnan(rows.values), rows.corrupted, rows.values).sum(-1)
    assert found.values.shape == (LAYERS, 9)
    np.testing.assert_allclose(found.values, held, rtol=1e-5, atol=1e-5)
    guess = attribution_patching(tiny.model(), CLEAN, BAD, summed, "mlp_out")["mlp_out"]
    rows = mixed(attribution_patching)
    held = np.where(np.isnan(rows.values), rows.corrupted, rows.values).sum(-1)
    np.testing.assert_allclose(guess.values, held, rtol=1e-5, atol=1e-5)


def test_as_many_places_as_pairs_and_a_score_of_all():
    found = activation_patching(tiny.model(), CLEAN, BAD, summed, "mlp_out", positions=[0, 4, 8])
    assert found.values.shape == (LAYERS, 3) and np.isfinite(found.values).all()


def test_places_are_found_in_each_prompt_of_a_pair():
    """Pairs of two lengths: the last token, and where a token stands in each."""
    places = [Token(9), -1, 1]
    kept = jaxtc.run(tiny.model(), CLEAN, capture="resid_pre").activations["resid_pre"]
    clean_at = [[3, 8, 1], [2, 3, 1], [5, 5, 1]]
    bad_at = [[4, 9, 1], [3, 4, 1], [6, 6, 1]]
    found = activation_patching(tiny.model(), CLEAN, LONGER, OF, positions=places)
    guess = attribution_patching(tiny.model(), CLEAN, LONGER, OF, positions=places)["resid_pre"]
    assert found.values.shape == guess.values.shape == (LAYERS, 3, 3)
    assert found.axes["position"][1] == "-1" and "id=9" in found.axes["position"][0]
    slopes = jaxtc.gradients(tiny.model(), LONGER, OF, "resid_pre")
    here, slope = (np.asarray(x["resid_pre"]) for x in (slopes.activations, slopes.gradients))
    for row, place, layer in np.ndindex(3, 3, LAYERS):
        value = np.asarray(kept[layer, row, clean_at[row][place]])
        at = bad_at[row][place]
        edit = SetTo(value, site="resid_pre", layer=layer, position=at)
        alone = OF(jaxtc.run(tiny.model(), LONGER[row], edits=[edit], logits="last"))
        np.testing.assert_allclose(found.values[layer, place, row], alone[0], rtol=2e-5, atol=2e-5)
        change = (slope[layer, row, at] * (value - here[layer, row, at])).sum()
        expected = found.corrupted[row] + change
        np.testing.assert_allclose(guess.values[layer, place, row], expected, rtol=1e-4, atol=1e-4)


def test_numbers_as_places_keep_their_numbers_and_miss_where_a_row_is_short():
    found = activation_patching(tiny.model(), CLEAN, BAD, OF, "mlp_out", positions=[5, -1])
    whole = mixed(activation_patching).values
    assert found.axes["position"].tolist() == [5, -1]
    np.testing.assert_allclose(found.values[:, 0], whole[:, 5], **NEAR)
    assert np.isnan(found.values[:, 0, 1]).all()
    ends = np.stack([whole[:, len(clean) - 1, row] for row, clean in enumerate(CLEAN)], -1)
    np.testing.assert_allclose(found.values[:, 1], ends, **NEAR)


@pytest.mark.parametrize("heads", [False, True], ids=["whole", "heads"])
def test_a_window_restores_its_layers_together(heads):
    """Causal tracing's: clean prompts with noise at the subject, several layers put back."""
    noise, site = [Noise(3, 2.0, site="embed", position=1)], "attn_heads" if heads else "mlp_out"
    found = activation_patching(
        tiny.model(), CLEAN, CLEAN, OF, site, edits=noise, window=2, heads=heads
    )
    assert found.window == 2 and found.axes["layer"].tolist() == [0, 1, 2]
    kept = jaxtc.run(tiny.model(), CLEAN, capture=site).activations[site]
    head = {"head": 2} if heads else {}
    for layers, position in [([0, 1], 1), ([1, 2], 3), ([2], 2)]:
        where = dict(site=site, layer=layers, position=position, **head)
        result = jaxtc.run(
            tiny.model(), CLEAN, edits=[*noise, SetTo(PerLayer(kept), **where)], logits="last"
        )
        got = found.values[layers[0], position]
        np.testing.assert_allclose(got[2] if heads else got, OF(result), rtol=2e-5, atol=2e-5)
    one = activation_patching(tiny.model(), CLEAN, CLEAN, OF, site, edits=noise, heads=heads)
    np.testing.assert_allclose(found.values[-1], one.values[-1], **NEAR)
    assert np.nanmax(np.abs(found.values[0] - one.values[0])) > 1e-3


def test_missing_tokens_are_no_mistake_to_debug_nans():
    with jax.debug_nans(True):
        found = activation_patching(tiny.model(), CLEAN, BAD, OF, "mlp_out").recovered
        guess = attribution_patching(tiny.model(), CLEAN, BAD, OF, "mlp_out")["mlp_out"].recovered
    assert np.isnan(found).sum() == np.isnan(guess).sum() == LAYERS * (5 + 3)


def test_a_picture_leaves_missing_cells_empty():
    pytest.importorskip("matplotlib").use("agg")
    found = mixed(activation_patching)
    drawn = np.ma.filled(jaxtc.plots.heat_map(found).images[0].get_array(), np.nan)
    expected = np.nanmean(np.asarray(found.recovered, np.float64), -1)
    np.testing.assert_allclose(drawn, expected)
    one = jaxtc.plots.heat_map(found.recovered[..., 1]).images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(one)[0], np.arange(9) >= 4)
    named = activation_patching(tiny.model(), CLEAN, LONGER, OF, positions=[Token(9), -1])
    axes = jaxtc.plots.heat_map(named, tokens=["a", "b"])
    assert axes.get_xticklabels()[1].get_text() == "-1"


WRONG = {
    "pair": (r"pair 1 no token.*Token\(id\)", CLEAN, [BAD[0], [2, 5], BAD[2]], {}),
    "fewer": ("3 clean prompts and 2 corrupted", CLEAN, BAD[:2], {}),
    "nowhere": (r"No pair has the position 9 ", CLEAN, BAD, dict(positions=[0, 9])),
    "token": (r"No pair has the position Token\(id=12", CLEAN, BAD, dict(positions=[Token(12)])),
    "range": ("one by one", CLEAN, BAD, dict(positions=[slice(0, 2)])),
    "word": ("one by one", CLEAN, BAD, dict(positions=["prompt"])),
    "half": ("one by one|whole numbers", CLEAN, BAD, dict(positions=[0.5])),
    "none": ("empty", CLEAN, BAD, dict(positions=[])),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", [activation_patching, attribution_patching])
def test_what_is_wrong_is_refused(kind, name):
    words, clean, bad, options = WRONG[name]
    with pytest.raises(jaxtc.JaxtcError, match=words):
        kind(tiny.model(), clean, bad, OF, **options)


@pytest.mark.parametrize("window", [0, 4, 1.5])
def test_a_window_fits_the_model(window):
    with pytest.raises(InputError, match="window"):
        activation_patching(tiny.model(), CLEAN, BAD, OF, window=window)
