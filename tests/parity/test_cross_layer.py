"""Cross-layer transcoders, spliced and edited in both frameworks, from the same files."""

import jax
import numpy as np
import pytest
import torch

import jaxtc
from tests.parity import oracles
from tests.parity.figures import note
from tests.parity.reference import relative
from tests.parity.torch_cross_layer import CrossLayer, hooked
from tests.support import cross_layer
from tests.support.unspared import ClampFeature, ScaleFeature, SetFeature, Splice

TOLERANCE = 1e-5
L, M = oracles.COMMON["num_hidden_layers"], 80
D = oracles.SHAPES["9b"]["hidden_size"]
# By name: what is read; the arrays.
KINDS = {
    "JumpReLU": ("resid_mid", {"threshold": True}),
    "ReLU and skip": ("mlp_in_normed", {"threshold": False, "skip": True}),
    "with gain": ("mlp_in", {"threshold": True, "skip": True}),
}


def setting(layer, features, values):
    def change(at, a):
        if at == layer:
            a = a.clone()
            a[..., features] = torch.tensor(values)
        return a

    return change


def scaled(layer, feature, factor):
    def change(at, a):
        if at == layer:
            a = a.clone()
            a[..., feature] *= factor
        return a

    return change


def clamped(at, a):
    if at == 2:
        a = a.clone()
        a[..., 5] = a[..., 5].clamp(min=0.7)
    return a


# By name: our edits of the whole transcoder; what the hooks do.
EDITS = {
    "every MLP": (lambda t: [Splice(t)], {"splice": range(L)}),
    "some MLPs": (lambda t: [Splice(t, layer=[1, 3])], {"splice": (1, 3)}),
    "a feature set": (
        lambda t: [SetFeature(t, [7, 30], [2.0, 0.0], layer=1)],
        {"change": setting(1, [7, 30], [2.0, 0.0])},
    ),
    "spliced, a feature of the first layer scaled": (
        lambda t: [Splice(t), ScaleFeature(t, 11, -3.0, layer=0)],
        {"splice": range(L), "change": scaled(0, 11, -3.0)},
    ),
    "spliced, clamped, of one layer's features": (
        lambda t: [Splice(t), ClampFeature(t.layers[2], 5, low=0.7)],
        {"splice": range(L), "change": clamped},
    ),
    "the last layer": (
        lambda t: [SetFeature(t, 3, 4.0, layer=-1)],
        {"change": setting(L - 1, [3], [4.0])},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_edits_in_both(make_oracle, models, tmp_path, kind):
    reads, options = KINDS[kind]
    folder = cross_layer.write(tmp_path, cross_layer.arrays(L, D, M, **options), reads)
    ours, theirs = jaxtc.load_transcoders(folder), CrossLayer(folder)
    assert (ours.input_site, ours.output_site) == (reads, "mlp_out")
    oracle = make_oracle("9b")
    model, reference = models(oracle)
    clean = [reference(torch.tensor([p]), use_cache=False).logits[0] for p in oracle.prompts]
    for name, (edits, hooks) in EDITS.items():
        result = jaxtc.run(model, oracle.prompts, edits=edits(ours), capture="mlp_out")
        logits, written, expected, expected_written = [], [], [], []
        for row, prompt in enumerate(oracle.prompts):
            with hooked(reference, theirs, reads, **hooks) as kept:
                expected.append(reference(torch.tensor([prompt]), use_cache=False).logits[0])
            expected_written.append(torch.stack([kept[at][0] for at in range(L)]))
            logits.append(np.asarray(result.logits[row])[: len(prompt)])
            held = np.asarray(result.activations["mlp_out"][:, row])
            written.append(held[:, : len(prompt)])
        assert relative([x.numpy() for x in expected], clean) > 1e-3, name  # it matters
        for what, a, b in (("mlp_out", written, expected_written), ("logits", logits, expected)):
            error = note("float32", f"cross-layer, {kind}, {name}: {what}", relative(a, b), "9b")
            assert error <= TOLERANCE, (name, what)


@torch.no_grad()
def test_by_itself_in_float64(tmp_path):
    folder = cross_layer.write(tmp_path, cross_layer.arrays(L, D, M, skip=True))
    ours, exact = jaxtc.load_transcoders(folder), CrossLayer(folder, torch.float64)
    x = np.random.default_rng(3).standard_normal((L, 2, 5, D)).astype(np.float32)
    given = [torch.from_numpy(part).double() for part in x]
    a = [exact.encode(layer, part) for layer, part in enumerate(given)]
    y = [exact.decode_at(layer, a, part) for layer, part in enumerate(given)]
    assert 0.1 < np.mean([(part > 0).double().mean() for part in a]) < 0.6
    assert relative(np.asarray(ours.encode(x)), a) < 1e-6
    assert relative(np.asarray(ours(x)), y) < 1e-6


@torch.no_grad()
def test_error_terms_leave_the_value_and_give_the_features_gradient(make_oracle, models, tmp_path):
    folder = cross_layer.write(tmp_path, cross_layer.arrays(L, D, M, skip=True))
    ours, theirs = jaxtc.load_transcoders(folder), CrossLayer(folder)
    oracle = make_oracle("9b")
    model, reference = models(oracle)
    [prompt], T = oracle.prompts[:1], len(oracle.prompts[0])
    edits = [Splice(ours, error=True)]
    same = jaxtc.run(model, [prompt], edits=edits).logits
    clean = reference(torch.tensor([prompt]), use_cache=False).logits
    assert relative([np.asarray(same)], [clean]) < TOLERANCE

    # Gradient of a logit with respect to what layer 0 adds in front of its MLP.
    def ours_of(v):
        push = jaxtc.Add(v, site="attn_out", layer=0, position=T - 3)
        return jaxtc.run(model, [prompt], edits=[push, *edits], logits="last").logits[0, 5]

    found = jax.grad(ours_of)(np.zeros(D, np.float32))
    inputs = {}

    def splice(at):
        def write(module, args, out):
            a = [theirs.encode(n, inputs[n]) for n in range(at + 1)]
            made = theirs.decode_at(at, a, inputs[at])
            return out.detach() + made - made.detach()

        return write

    def read(at):
        return lambda module, args, out: inputs.__setitem__(at, args[0])

    with torch.enable_grad():
        v = torch.zeros(D, requires_grad=True)
        blocks, handles = reference.model.layers, []

        def push(module, args, out):
            added = torch.zeros_like(out)
            added[0, T - 3] = 1
            return out + added * v

        handles.append(blocks[0].post_attention_layernorm.register_forward_hook(push))
        for at, block in enumerate(blocks):
            handles.append(block.pre_feedforward_layernorm.register_forward_hook(read(at)))
            handles.append(block.post_feedforward_layernorm.register_forward_hook(splice(at)))
        reference(torch.tensor([prompt]), use_cache=False).logits[0, -1, 5].backward()
        for handle in handles:
            handle.remove()
    assert relative([np.asarray(found)], [v.grad]) < TOLERANCE
