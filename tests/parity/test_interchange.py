"""Captures feed a PyTorch analysis and PyTorch's feed ours, under the names of either world."""

import numpy as np
import pytest
import torch

import jaxtc
from jaxtc.tap.sites import SITES

LAYER = 2


def apart(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖."""
    a, b = (np.asarray(jaxtc.to_numpy(x), np.float64) for x in (ours, theirs))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def oracle(make_oracle):
    return make_oracle("9b")


@pytest.fixture(scope="module")
def pair(models, oracle):
    """(ours, the reference)."""
    return models(oracle)


@pytest.fixture(scope="module")
def everything(pair, oracle):
    """Every site of every layer of one prompt."""
    return jaxtc.run(pair[0], oracle.prompts[0], capture=[site.name for site in SITES])


def aliases():
    for site in SITES:
        refused = dict(site.unlike)
        for library, name in (("hf", site.hf), ("tl", site.tl)):
            if name and name not in refused:
                yield pytest.param(site, library, id=f"{site.name}-{library}")


@pytest.mark.parametrize(("site", "library"), list(aliases()))
def test_a_foreign_name_is_the_same_array(everything, pair, oracle, site, library):
    """Not an equal array: the same one; and asked for by that name it is captured alike."""
    layer = LAYER if site.per_layer else None
    name = site.aliases(LAYER)[library]
    ours = f"layers.{layer}.{site.name}" if site.per_layer else site.name
    assert everything.activations[name] is everything.activations[ours]
    if name.endswith(".output"):
        assert everything.activations[name.removesuffix(".output")] is everything.activations[ours]
    in_torch = jaxtc.to_torch(everything.activations)
    assert in_torch[name] is in_torch[ours]
    assert in_torch[name].data_ptr() == everything.activations[ours].unsafe_buffer_pointer()


def test_both_kinds_of_names_meet(everything):
    """The sites that all three name are one array under three names."""
    shared = [site for site in SITES if site.hf and site.tl and not site.unlike]
    assert len(shared) >= 7
    for site in shared:
        names = site.aliases(LAYER)
        ours = f"layers.{LAYER}.{site.name}" if site.per_layer else site.name
        found = {id(everything.activations[name]) for name in (*names.values(), ours)}
        assert len(found) == 1, site.name


@pytest.mark.parametrize("name", ["hf", "tl"])
def test_a_capture_by_a_foreign_name(pair, oracle, everything, name):
    alias = {"hf": f"model.layers.{LAYER}.mlp.output", "tl": f"blocks.{LAYER}.hook_resid_mid"}[name]
    alone = jaxtc.run(pair[0], oracle.prompts[0], capture=alias, logits=None)
    [(_, array)] = alone.activations.items()
    np.testing.assert_allclose(array, everything.activations[alias], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_through_torch_and_back_into_an_edit(models, oracle, dtype):
    """A captured activation, as a torch tensor, put back where it was: nothing changes."""
    model, _ = models(oracle, dtype)
    clean, other = oracle.prompts[0], oracle.prompts[1] + oracle.prompts[2]
    other = other[: len(clean)]
    site = f"layers.{LAYER}.resid_mid"
    result = jaxtc.run(model, clean, capture=site)
    array = result.activations[site]
    tensor = jaxtc.to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert tensor.dtype == getattr(torch, dtype)
    back = jaxtc.from_foreign(tensor)
    assert back.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    expected = jaxtc.run(model, other, edits=[jaxtc.SetTo(array, site=site)]).logits
    # Everything after the patch is that of the clean run.
    assert apart(expected, result.logits) < {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert apart(jaxtc.run(model, other).logits, result.logits) > 0.1
    for given in (tensor, back, jaxtc.to_numpy(tensor), tensor.clone().requires_grad_()):
        found = jaxtc.run(model, other, edits=[jaxtc.SetTo(given, site=site)]).logits
        np.testing.assert_array_equal(found, expected)


def test_an_analysis_in_torch_steers_ours(pair, oracle):
    """Principal components found by torch in our activations, taken out of ours."""
    model, _ = pair
    ids = oracle.prompts[0]
    kept = jaxtc.to_torch(jaxtc.run(model, ids, capture="resid_post").activations)
    rows = kept[f"blocks.{LAYER}.hook_resid_post"][0]
    _, _, components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    edit = jaxtc.ProjectOut(components[:3], site=f"blocks.{LAYER}.hook_resid_post")
    after = jaxtc.run(model, ids, capture="resid_post", edits=[edit]).activations
    left = jaxtc.to_torch(after[f"layers.{LAYER}.resid_post"])[0] @ components[:3].T
    assert left.abs().max() < 1e-4 < (rows @ components[:3].T).abs().max()


def test_theirs_feed_ours(pair, oracle):
    """A tensor that a forward hook kept is patched in, and does what the same patch does there."""
    ours, theirs = pair
    source, target = oracle.prompts[1], oracle.prompts[0][: len(oracle.prompts[1])]
    norm = theirs.model.layers[LAYER].post_feedforward_layernorm
    kept = []
    handle = norm.register_forward_hook(lambda module, args, out: kept.append(out))
    norm.weight.requires_grad_(True)
    theirs(torch.tensor([source]))
    norm.weight.requires_grad_(False)
    handle.remove()
    [tensor] = kept
    assert tensor.requires_grad
    handle = norm.register_forward_hook(lambda module, args, out: tensor)
    expected = theirs(torch.tensor([target])).logits
    handle.remove()
    name = f"model.layers.{LAYER}.post_feedforward_layernorm.output"
    edit = jaxtc.SetTo(tensor, site=name)
    found = jaxtc.run(ours, torch.tensor([target]), edits=[edit])
    assert apart(found.logits, expected) < 1e-5
    without = jaxtc.run(ours, torch.tensor([target])).logits
    assert apart(without, expected) > 0.1


def test_their_tensors_in_our_transcoder(oracle, transcoders_of):
    """A tensor goes straight into our transcoder and our metrics."""
    ours, reference = transcoders_of(oracle)
    x = torch.randn(40, ours.d_in, generator=torch.Generator().manual_seed(0))
    features = reference.encode(x)
    assert apart(ours.encode(x), features) < 1e-5
    found = jaxtc.to_torch(ours(x))
    assert isinstance(found, torch.Tensor) and apart(found, reference(x)) < 1e-5
    assert jaxtc.metrics.FVU().update(reference(x), found).fvu < 1e-9
