"""Gradients with respect to edits' values, hence at every site, against PyTorch's autograd.

The scalar is a weighted sum of the logits of each prompt's last token.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxtc
from jaxtc.tap.sites import BY_NAME, NORM_SCALES, Address
from tests.parity import reference, torch_edits, torch_hooks
from tests.parity.figures import note
from tests.parity.lab import LAYERS, SITES, Lab, on_each_oracle
from tests.parity.oracles import EMBEDDED
from tests.parity.torch_hooks import Hooked, Where
from tests.support import unspared

TOLERANCE = 1e-4
# The sites looked at where other edits stand in between.
SOME = ("embed", "attn_heads", "resid_mid", "mlp_in_normed", "mlp_act", "mlp_out", "final_norm")


def weights(here: Lab, prompts: Sequence) -> np.ndarray:
    """(B, V) what the last tokens' logits are weighted with."""
    draw = np.random.default_rng(7)
    return draw.normal(size=(len(prompts), here.ours.config.vocab_size)).astype(np.float32)


def ours(here: Lab, prompts, values, edits: Callable):
    """Gradients with respect to ``values``, in the same pytree."""
    weight = weights(here, prompts)

    def scalar(values):
        result = jaxtc.run(here.ours, prompts, edits=edits(values), logits="last")
        return (result.logits * weight).sum()

    return jax.jit(jax.grad(scalar))(values)


def theirs(here: Lab, prompts, values: list[torch.Tensor], hooks: list[Hooked]):
    """The same of tensors that ``hooks`` use."""
    logits = torch_hooks.run(here.hf, prompts, hooks)
    last = torch.stack([row[len(p) - 1] for row, p in zip(logits, prompts, strict=True)])
    scalar = (last * torch.from_numpy(weights(here, prompts))).sum()
    return torch.autograd.grad(scalar, values, allow_unused=True, materialize_grads=True)


def check(figure: str, where: str, mine, expected: torch.Tensor) -> None:
    """Equal to 1e-4 of the norm, or nothing at all in both."""
    mine = np.asarray(mine)
    assert mine.shape == tuple(expected.shape)
    if not expected.any():
        assert not mine.any(), f"{where}: {np.abs(mine).max():.1e} where there is no gradient"
        return
    error = reference.relative([mine], [expected])
    note("float32", f"gradient, {figure}", error, where)
    assert error <= TOLERANCE, f"{where}: {error:.2e}"


def at_sites(here: Lab, sites: Sequence[str], edits, hooks, figure: str) -> dict[Address, float]:
    """Checks the gradient at sites in every layer, downstream of other edits there; gives norms."""
    prompts = here.prompts[:3]
    zeros, tensors, ends = {}, {}, list(hooks)
    for site in sites:
        shape = (len(prompts), *here.shape(BY_NAME[site])[1:])
        if BY_NAME[site].per_layer:
            zeros[site] = jnp.zeros((LAYERS, *shape))
            tensors[site] = [torch.zeros(shape, requires_grad=True) for _ in range(LAYERS)]
            change = torch_edits.add(tensors[site])
        else:
            zeros[site] = jnp.zeros(shape)
            tensors[site] = [torch.zeros(shape, requires_grad=True)]
            change = torch_edits.add(tensors[site][0])
        ends.append(Hooked(site, change))

    def listed(values):
        return [
            *edits,
            *(
                jaxtc.Add(jaxtc.PerLayer(value) if BY_NAME[site].per_layer else value, site=site)
                for site, value in values.items()
            ),
        ]

    mine = ours(here, prompts, zeros, listed)
    order = [(site, layer) for site in sites for layer in range(len(tensors[site]))]
    found = theirs(here, prompts, [tensors[site][layer] for site, layer in order], ends)
    norms = {}
    for (site, layer), expected in zip(order, found, strict=True):
        per_layer = BY_NAME[site].per_layer
        address = Address(site, layer if per_layer else None)
        got = mine[site][layer] if per_layer else mine[site]
        check(figure.format(site=site), f"{here.name} {address}", got, expected)
        norms[address] = float(expected.norm())
    return norms


@on_each_oracle
def test_at_every_site(name, labs):
    norms = at_sites(labs(name), SITES, [], [], "{site}")
    assert all(norm > 0 for norm in norms.values())


def changed(here: Lab, transcoders):
    """Edits that gradients must pass through, one of most kinds."""
    at = here.at("resid_mid", 5)
    vector, t_vector = at.pair(here.ours.config.hidden_size)
    listed = [
        ("attn_out", jaxtc.Scale, (0.5,), torch_edits.scale(0.5), {"layer": 1}),
        (
            "resid_mid",
            jaxtc.ProjectOut,
            (vector,),
            torch_edits.project_out(t_vector[None]),
            {"layer": (0, 2), "position": slice(2, None)},
        ),
        (
            "mlp_proj",
            jaxtc.Interpolate,
            (vector, 0.3),
            torch_edits.interpolate(t_vector, 0.3),
            {"layer": 2, "position": (-1, 1)},
        ),
        (
            "mlp_act",
            lambda **at: jaxtc.MeanAblate(over="prompt", **at),
            (),
            torch_edits.mean_of_prompt,
            {"layer": 1, "position": slice(1, 4)},
        ),
        (
            "resid_post",
            lambda **at: jaxtc.Copy(from_position=1, **at),
            (),
            torch_edits.copy(lambda row, position: (row, 1)),
            {"layer": 0, "position": 2},
        ),
        ("attn_heads", jaxtc.Zero, (), torch_edits.zero, {"layer": 3, "head": 1, "row": (0, 2)}),
        ("attn_pattern", jaxtc.KnockOut, (), None, {"key": 1, "position": -1, "layer": 1}),
    ]
    edits = [kind(*values, site=site, **where) for site, kind, values, _, where in listed]
    hooks = [Hooked(site, change, Where(**where)) for site, _, _, change, where in listed]
    return edits, hooks


def detached(here: Lab, transcoders):
    """What attribution graphs hold fixed: the rest is linear in the residual stream."""
    sites = ("attn_pattern", "mlp_out", *NORM_SCALES)
    return (
        [jaxtc.Detach(site=site) for site in sites],
        [Hooked(site, torch_edits.detach) for site in sites],
    )


def frozen(here: Lab, transcoders):
    """At the first, there is no way around: what comes before gets no gradient at all."""
    edits, hooks = [], []
    for site, layer in (("resid_post", 0), ("attn_out", 2)):
        at = here.at(site, 6)
        values, t_values = at.pair(*at.shape[1:])
        edits.append(jaxtc.Freeze(values, site=site, layer=layer))
        hooks.append(Hooked(site, torch_edits.freeze(t_values), Where(layer=layer)))
    return edits, hooks


def spliced(here: Lab, transcoders):
    """The MLP of two layers is not computed."""
    coder, t_coder = transcoders
    layers = (0, coder.layer)
    hooks = [Hooked("mlp_out", torch_edits.splice(t_coder), Where(layer=layers))]
    return [unspared.Splice(coder, layer=layers)], hooks


def featured(here: Lab, transcoders):
    """Spliced with its error, where a feature that is set does not depend on what it reads."""
    coder, t_coder = transcoders
    where = {"layer": coder.layer, "position": slice(1, None)}
    edits = [
        unspared.Splice(coder, error=True, layer=(1, coder.layer)),
        unspared.SetFeature(coder, 3, 2.0, **where),
        unspared.ScaleFeature(coder, np.arange(4, 9), 1.7, layer=1),
    ]
    three = torch_edits.feature(t_coder, 3, lambda a: torch.full_like(a, 2))
    some = each(t_coder, range(4, 9), lambda a, _: 1.7 * a)
    hooks = [
        Hooked("mlp_out", torch_edits.splice(t_coder, True), Where(layer=(1, coder.layer))),
        Hooked("mlp_out", three, Where(**where)),
        Hooked("mlp_out", some, Where(layer=1)),
    ]
    return edits, hooks


def everywhere(sites: Sequence[str], layers: Sequence[int]) -> set[Address]:
    return {Address(site, layer) for site in sites for layer in layers}


# Edits, and the addresses that they cut off from the scalar, given the transcoder's layer.
THROUGH = {
    "edits of values": (changed, lambda own: set()),
    "detached": (detached, lambda own: everywhere(("mlp_in_normed", "mlp_act"), range(LAYERS))),
    "frozen": (
        frozen,
        lambda own: {Address("embed"), Address("attn_heads", 2), *everywhere(SOME[1:-1], [0])},
    ),
    "spliced": (spliced, lambda own: everywhere(["mlp_act"], (0, own))),
    "features": (featured, lambda own: everywhere(["mlp_act"], (1, own))),
}


# Compiling takes long; on the shipped model what researchers do to it, in `pytest -m slow`.
SHIPPED = [
    pytest.param(EMBEDDED, case, marks=pytest.mark.slow) for case in ("detached", "features")
]
CASES = [("9b", case) for case in THROUGH] + SHIPPED


@pytest.mark.parametrize(("name", "case"), CASES)
def test_through_edits(name, case, labs, make_oracle, transcoders_of):
    here, coders = labs(name), transcoders_of(make_oracle(name))
    make, lost = THROUGH[case]
    norms = at_sites(here, SOME, *make(here, coders), f"past {case}")
    assert {address for address, norm in norms.items() if norm == 0} == lost(coders[0].layer)


@on_each_oracle
def test_of_values(name, labs, make_oracle, transcoders_of):
    """Of what edits hold: values, factors, weights, directions, activations of features."""
    here = labs(name)
    coder, t_coder = transcoders_of(make_oracle(name))
    draw = np.random.default_rng(8)
    features = np.array(here.lively(t_coder, coder.layer, 8)[0])
    vector = lambda site: here.at(site, 4).pair(here.ours.config.hidden_size)[0]  # noqa: E731
    peak = np.asarray(draw.uniform(1, 2, len(features)), np.float32)
    layer, some = coder.layer, {"position": slice(1, None)}
    # Kind, site, values to take the gradient of, the hook's change of them, where.
    cases = [
        (
            jaxtc.SetTo,
            "resid_post",
            [vector("resid_post")],
            torch_edits.set_to,
            {"layer": 1, **some},
        ),
        (jaxtc.Scale, "mlp_out", [vector("embed")], torch_edits.scale, {"layer": (0, 2)}),
        (
            jaxtc.Interpolate,
            "attn_out",
            [vector("attn_out"), np.float32(0.4), vector("mlp_out")],
            torch_edits.interpolate,
            {"layer": 1, **some},
        ),
        (
            jaxtc.ProjectOut,
            "resid_mid",
            [np.stack([vector("resid_mid"), vector("mlp_out")])],
            torch_edits.project_out,
            {"layer": 2},
        ),
        (jaxtc.MeanAblate, "mlp_in", [vector("mlp_in")], torch_edits.set_to, {"layer": 0, **some}),
        (
            lambda value, site, **at: unspared.SetFeature(coder, features, value, site=site, **at),
            "mlp_out",
            [peak],
            lambda v: each(t_coder, features, lambda a, i: v[i].expand(a.shape)),
            {"layer": layer, **some},
        ),
        (
            lambda value, site, **at: unspared.ScaleFeature(
                coder, features, value, site=site, **at
            ),
            "mlp_out",
            [peak],
            lambda v: each(t_coder, features, lambda a, i: v[i] * a),
            {"layer": layer},
        ),
    ]
    prompts = [here.prompts[row % 3] for row in range(len(cases))]

    def listed(values):
        return [
            kind(*given, site=site, row=row, **where)
            for row, ((kind, site, _, _, where), given) in enumerate(
                zip(cases, values, strict=True)
            )
        ]

    mine = ours(here, prompts, [case[2] for case in cases], listed)
    tensors = [[torch.tensor(v, requires_grad=True) for v in case[2]] for case in cases]
    hooks = [
        Hooked(site, change(*given), Where(row=row, **where))
        for row, ((_, site, _, change, where), given) in enumerate(zip(cases, tensors, strict=True))
    ]
    expected = iter(theirs(here, prompts, [v for given in tensors for v in given], hooks))
    for row, given in enumerate(mine):
        for index, got in enumerate(given):
            wanted = next(expected)
            assert wanted.any()
            check("edits' values", f"{name} row {row}, {index}", got, wanted)


def each(transcoder, ids: Sequence[int], change: Callable) -> torch_hooks.Change:
    """``change(a, i)`` of the i-th of several features."""
    changes = [
        torch_edits.feature(transcoder, int(f), lambda a, i=i: change(a, i))
        for i, f in enumerate(ids)
    ]

    def edit(x, now):
        for one in changes:
            x = one(x, now)
        return x

    return edit
