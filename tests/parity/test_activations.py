"""Every site of every layer against transformers' Gemma2ForCausalLM."""

import numpy as np
import pytest
import torch

from jaxtc.tap.sites import SITES, Address
from tests.parity import oracles, reference
from tests.parity.conftest import CASES
from tests.parity.figures import note

TOLERANCE = 1e-5
BFLOAT16_RATIO = 1.1
NAMES = [site.name for site in SITES]


def of_site(site: str, captured: reference.Captured) -> list[Address]:
    """The addresses of one site, by layer; every layer must be there."""
    found = sorted((a for a in captured if a.site == site), key=lambda a: a.layer or 0)
    assert found
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("site", NAMES)
def test_float32(oracle, case, site, ours, theirs):
    mine, reference_ = ours(oracle, CASES[case][0]), theirs(oracle, case)
    assert set(mine) == set(reference_)
    for address in of_site(site, mine):
        error = reference.relative(mine[address], reference_[address])
        note("float32", site, error, f"{oracle.name} {case} {address.layer}")
        assert error <= TOLERANCE, f"{address}: {error:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_masked_scores_are_the_least_float32(oracle, case, ours, theirs):
    mine, reference_ = ours(oracle, CASES[case][0]), theirs(oracle, case)
    for address in of_site("attn_scores", mine):
        for a, b in zip(mine[address], reference_[address], strict=True):
            masked = np.isnan(b.numpy())
            assert masked.any()
            assert (np.asarray(a)[masked] == np.finfo(np.float32).min).all()
            assert (np.asarray(a)[~masked] > -1e6).all()


@pytest.mark.parametrize("site", NAMES)
def test_bfloat16_is_as_near_the_truth_as_the_reference(oracle, site, ours, theirs):
    """Mean relative error over tokens, prompts and layers.

    One rounding decides the error of a token in a layer, and the residual stream of <bos> is so
    much larger than others' that its luck would decide a norm over a prompt.
    """
    errors = {"ours": [], "theirs": []}
    for case in ("right", "long"):
        truth = theirs(oracle, case, "truth")
        sides = {"ours": ours(oracle, CASES[case][0], "bfloat16")}
        sides["theirs"] = theirs(oracle, case, "bfloat16")
        for side, captured in sides.items():
            for address in of_site(site, captured):
                for a, b in zip(captured[address], truth[address], strict=True):
                    a = a.double().numpy() if isinstance(a, torch.Tensor) else a
                    errors[side].append(reference.relative_by_token(site, a, b))
    mean = {side: np.concatenate(found).mean() for side, found in errors.items()}
    ratio = note("bfloat16", site, float(mean["ours"] / mean["theirs"]), oracle.name)
    assert mean["theirs"] > 1e-4  # else nothing was rounded and nothing is compared
    assert ratio <= BFLOAT16_RATIO


# What a wrong implementation might get wrong, and how much the reference's logits must move.
CHANGES = {
    "window": {"sliding_window": 8},
    "window dropped": {"sliding_window": 4096},
    "layer types swapped": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "attention softcap": {"attn_logit_softcapping": None},
    "final softcap": {"final_logit_softcapping": None},
    "query scale": {"query_pre_attn_scalar": 20},
    "rope base": {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
}


@pytest.mark.parametrize("name", oracles.RANDOM)
@pytest.mark.parametrize("change", CHANGES)
def test_the_oracle_sees(name, change, make_oracle, models):
    """A constant that left the reference's output alone would leave ours untested."""
    oracle = make_oracle(name)
    changed = oracles.perturbed(name, **CHANGES[change])
    ids = torch.tensor(oracle.prompts[:1])
    with torch.no_grad():
        before, after = models(oracle)[1](ids).logits, changed(ids).logits
    assert reference.relative([after], [before]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", oracles.RANDOM)
def test_gains_and_softcaps_bite(name, make_oracle, theirs):
    captured = theirs(make_oracle(name), "right")
    scores = torch.cat([x[~x.isnan()] for x in captured[Address("attn_scores", 1)]])
    assert scores.abs().max() > 15
    assert max(x.abs().max() for x in captured[Address("logits")]) > 15
