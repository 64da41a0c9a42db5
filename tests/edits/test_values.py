"""Each kind of edit against plain NumPy on what was there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import (
    Add,
    Apply,
    Copy,
    Detach,
    Freeze,
    Interpolate,
    KnockOut,
    MeanAblate,
    Noise,
    PerLayer,
    ProjectOut,
    Scale,
    SetTo,
    Zero,
)  # fmt: skip
from jaxtc.errors import EditError
from tests.support import tiny
from tests.support.batch import LAYERS, PROMPTS, D
from tests.support.taps import SITES, at_token, captured, drawn, everywhere, random, same, through

# Every kind against NumPy


def last(site, prompts=PROMPTS):
    return random(site, prompts).shape[-1]


def full(site, prompts=PROMPTS):
    """A value for every layer, row, token, ... of a site."""
    return random(site, prompts, seed=5)


def vector(seed, at_or_site, prompts=PROMPTS):
    if isinstance(at_or_site, str):
        return drawn(seed, last(at_or_site, prompts))
    value = drawn(seed, last(at_or_site.site, at_or_site.prompts))
    return value[: at_or_site.size] if at_or_site.site.startswith("attn_") else value


def mean(*rows):
    return np.mean([token for row in rows for token in row], axis=0, dtype=np.float64)


def keys(at):
    """Tokens of other rows, with as many keys as this one."""
    if not at.site.startswith("attn_"):
        return at.rows
    return [[np.pad(t, [(0, 0), (0, at.size)])[:, : at.size] for t in row] for row in at.rows]


def projected(token, *directions):
    basis = np.linalg.qr(np.stack(directions, -1).astype(np.float64))[0]
    return token - token @ basis @ basis.T


def double_first(x):
    return x.at[..., 0].multiply(2)


DENSE = SITES[:-1]
# name: (makes the edit, what a token becomes, sites)
KINDS = {
    "Add a vector": (
        lambda s, p, **w: Add(vector(1, s, p), site=s, **w), lambda x, at: x + vector(1, at), SITES
    ),
    "Add to each token": (
        lambda s, p, **w: Add(full(s, p)[0], site=s, **w),
        lambda x, at: x + at_token(full(at.site, at.prompts)[0], at),
        SITES,
    ),
    "Add PerLayer": (
        lambda s, p, **w: Add(PerLayer(full(s, p)), site=s, **w),
        lambda x, at: x + at_token(full(at.site, at.prompts)[at.layer], at),
        [s for s in SITES if s != "logits"],
    ),
    "SetTo": (
        lambda s, p, **w: SetTo(vector(1, s, p), site=s, **w), lambda x, at: vector(1, at), SITES
    ),
    "SetTo a number": (lambda s, p, **w: SetTo(3, site=s, **w), lambda x, at: 3, SITES),
    "Zero": (lambda s, p, **w: Zero(site=s, **w), lambda x, at: 0, SITES),
    "Scale": (lambda s, p, **w: Scale(-1.5, site=s, **w), lambda x, at: -1.5 * x, SITES),
    "Scale by a vector": (
        lambda s, p, **w: Scale(vector(1, s, p), site=s, **w),
        lambda x, at: x * vector(1, at),
        SITES,
    ),
    "Interpolate": (
        lambda s, p, **w: Interpolate(vector(1, s, p), 0.3, site=s, **w),
        lambda x, at: 0.7 * x + 0.3 * vector(1, at),
        SITES,
    ),
    "Interpolate between": (
        lambda s, p, **w: Interpolate(
            vector(1, s, p), vector(2, s, p), start=vector(3, s, p), site=s, **w
        ),
        lambda x, at: vector(3, at) + vector(2, at) * (vector(1, at) - vector(3, at)),
        SITES,
    ),
    "MeanAblate over the batch": (
        lambda s, p, **w: MeanAblate(site=s, **w), lambda x, at: mean(*keys(at)), SITES
    ),
    "MeanAblate over the prompt": (
        lambda s, p, **w: MeanAblate(over="prompt", site=s, **w),
        lambda x, at: mean(at.rows[at.row]),
        SITES,
    ),
    "MeanAblate over the rows": (
        lambda s, p, **w: MeanAblate(over="rows", site=s, **w),
        lambda x, at: mean([row[at.place] for row in keys(at) if len(row) > at.place]),
        SITES,
    ),
    "MeanAblate to a value": (
        lambda s, p, **w: MeanAblate(vector(1, s, p), site=s, **w),
        lambda x, at: vector(1, at),
        SITES,
    ),
    "ProjectOut a direction": (
        lambda s, p, **w: ProjectOut(vector(1, s, p), site=s, **w),
        lambda x, at: projected(x, vector(1, at)),
        DENSE,
    ),
    "ProjectOut a plane": (
        lambda s, p, **w: ProjectOut([1e3 * vector(1, s, p), vector(2, s, p)], site=s, **w),
        lambda x, at: projected(x, vector(1, at), vector(2, at)),
        [s for s in DENSE if s != "mlp_in_scale"],
    ),
    "ProjectOut PerLayer": (
        lambda s, p, **w: ProjectOut(PerLayer(drawn(4, LAYERS, last(s))), site=s, **w),
        lambda x, at: projected(x, drawn(4, LAYERS, last(at.site))[at.layer]),
        [s for s in DENSE if s != "logits"],
    ),
    "Detach": (lambda s, p, **w: Detach(site=s, **w), lambda x, at: x, SITES),
    "Apply": (
        lambda s, p, **w: Apply(double_first, site=s, **w),
        lambda x, at: np.concatenate([2 * x[..., :1], x[..., 1:]], -1),
        SITES,
    ),
    "Apply a pytree": (
        lambda s, p, **w: Apply(jax.tree_util.Partial(jnp.multiply, jnp.float32(2)), site=s, **w),
        lambda x, at: 2 * x,
        SITES,
    ),
}  # fmt: skip


def some(at):
    layers = (0, LAYERS - 1) if jaxtc.tap.sites.BY_NAME[at.site].per_layer else (0,)
    return at.row in (0, 2) and at.place in (0, at.size - 1) and at.layer in layers


def somewhere(site):
    layer = {"layer": [0, -1]} if jaxtc.tap.sites.BY_NAME[site].per_layer else {}
    return {"row": [0, 2], "position": [-1, 0], **layer}


def expected(becomes, chosen, prompts=PROMPTS):
    def value(token, at):
        at.prompts = prompts
        return becomes(token.astype(np.float64), at) if chosen(at) else token

    return value


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind):
    make, becomes, sites = KINDS[kind]
    edits = {s: [make(s, PROMPTS)] for s in sites}
    edits |= {f"{s}/some": [make(s, PROMPTS, **somewhere(s))] for s in sites}
    before = {key: captured()[key.split("/")[0]] for key in edits}
    found = through(edits, before)
    for key in edits:
        chosen = some if key.endswith("some") else everywhere
        changed = same(
            key.split("/")[0], found[key], before[key], expected(becomes, chosen),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        assert (changed > 0) == (kind != "Detach"), key


ODD = {
    "one token": [[2]],
    "a whole bucket": [list(range(2, 18))],
    "as many prompts as tokens": [[2, 5, 7], [2, 6, 4], [2, 13, 5]],
    "D tokens": [[2, *range(3, 14), *range(3, 15)]],
}


@pytest.mark.parametrize("shape", ODD)
def test_kinds_on_odd_shapes(shape):
    prompts = ODD[shape]
    assert shape != "D tokens" or len(prompts[0]) == D
    sites = ("resid_post", "attn_pattern")
    cases = {f"{s}/{kind}": s for kind in KINDS for s in sites if s in KINDS[kind][2]}
    edits = {key: [KINDS[key.split("/")[1]][0](s, prompts)] for key, s in cases.items()}
    before = {key: random(s, prompts) for key, s in cases.items()}
    found = through(edits, before, prompts)
    for key, site in cases.items():
        becomes = expected(KINDS[key.split("/")[1]][1], everywhere, prompts)
        same(site, found[key], before[key], becomes, prompts, rtol=1e-4, atol=1e-4)


def test_kinds_in_bfloat16():
    """Rounded once, from a result in float32."""
    kinds = [kind for kind in KINDS if kind != "Apply a pytree"]
    edits = {f"resid_post/{kind}": [KINDS[kind][0]("resid_post", PROMPTS)] for kind in kinds}
    before = {key: jnp.asarray(captured()["resid_post"], jnp.bfloat16) for key in edits}
    found = through(edits, before)
    for key in edits:
        becomes = expected(KINDS[key.split("/")[1]][1], everywhere)
        # Add rounds its value first, as torch does with two tensors.
        error = 2**-7 if key.split("/")[1].startswith("Add") else 2**-8
        same("resid_post", found[key], np.asarray(before[key], np.float32), becomes,
             rtol=error, atol=3e-2 if "Add" in key else 1e-2)  # fmt: skip


def test_several_at_one_site_apply_in_order():
    chain = [Add(1.0, site="resid_post"), Scale(2.0, site="resid_post", position=-1),
             SetTo(5.0, site="resid_post", coordinate=0), Add(1.0, site="resid_post", row=0),
             MeanAblate(site="resid_post", row=1, over="prompt")]  # fmt: skip
    x = captured()["resid_post"]

    def in_order(token, at):
        rows = [[1 + token for token in row] for row in at.rows]
        for b, row in enumerate(rows):
            row[-1] = 2 * row[-1]
            for token in row:
                token[0] = 5
            if b == 0:
                row[:] = [1 + token for token in row]
        return mean(rows[1]) if at.row == 1 else rows[at.row][at.place]

    found = through({"resid_post": chain}, {"resid_post": x})["resid_post"]
    same("resid_post", found, x, in_order, rtol=1e-5, atol=1e-5)


# Values that do not fit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SetTo(PerLayer(np.ones((2, D))), site="mlp_out"), "each of the 3 layers"),
        (lambda: SetTo(PerLayer(np.ones((3, D))), site="embed"), "that each layer has"),
        (lambda: SetTo(PerLayer(1.0), site="mlp_out"), "each of the 3 layers"),
        (lambda: ProjectOut(PerLayer(np.ones((2, D))), site="mlp_out"), "each of the 3 layers"),
        (lambda: Add(np.ones((3, D)), site="mlp_out"), r"\(3, 24\).*\[B T D\] = \(3, 9, 24\)"),
        (lambda: Add("up", site="mlp_out"), "expected real numbers"),
        (lambda: ProjectOut(np.ones(23), site="mlp_out"), r"expected \(24,\) or \(K, 24\)"),
        (lambda: ProjectOut(np.zeros(D), site="mlp_out"), "span only 0 dimensions"),
        (lambda: ProjectOut(np.ones((2, D)), site="mlp_out"), "span only 1 dimensions"),
        (lambda: ProjectOut(np.ones(9), site="attn_pattern"), "last axis runs over tokens"),
        (lambda: MeanAblate(site="mlp_out", over="tokens"), "expected 'batch', 'prompt' or 'rows'"),
        (lambda: MeanAblate(site="attn_scores"), "scores are masked"),
        (lambda: Noise(1.5, site="mlp_out"), "a whole number or a jax.random.key"),
        (lambda: Noise(2**31, site="mlp_out"), "not a 32-bit integer"),
        (lambda: Noise(jax.random.PRNGKey(0), site="mlp_out"), "a whole number or a jax.random"),
        (lambda: Apply(3, site="mlp_out"), "expected a function, got"),
        (lambda: Copy(site="mlp_out"), "copies nothing"),
        (lambda: Copy(from_row=3, position=0, site="mlp_out"), "rows 0 to 2"),
        (lambda: Copy(from_row=-1, position=0, site="mlp_out"), "rows 0 to 2"),
        (lambda: Copy(from_row=[0, 1], position=0, site="mlp_out"), "each of the 3 rows"),
        (lambda: Copy(from_row=0, site="mlp_out"), "use prompts of one length"),
        (lambda: Copy(from_row=0, position=slice(0, 2), site="mlp_out"), "one length"),
        (lambda: Copy(from_row=2, row=0, position=4, site="mlp_out"), "row 2, which has 3 tokens"),
        (lambda: Copy(from_row=0, from_position=9, site="mlp_out"), "outside prompt 0 of 9 tokens"),
        (lambda: Copy(from_position=[0, 1], position=0, site="mlp_out"), "expected 1 or 1"),
        (lambda: Copy(from_position=slice(0, 2), position=0, site="mlp_out"), "whole numbers or a"),
        (lambda: KnockOut(), "would cut all attention"),
        (lambda: KnockOut(key=0, site="attn_scores"), "works at attn_pattern only"),
        (lambda: KnockOut(key=3), "outside prompt 2 of 3 tokens"),
    ],
)  # fmt: skip
def test_refused(make, message):
    with pytest.raises(EditError, match=message):
        through({"x": [make()]}, {})


def test_what_a_stored_run_lacks():
    kept = jaxtc.run(tiny.model(), PROMPTS, capture="layers.1.mlp_out", logits=None).activations
    assert Freeze(kept, site="mlp_out", layer=np.int64(1)).activations.shape == (3, 9, D)
    with pytest.raises(EditError, match="at 1 of 3 layers. Capture it at all"):
        Freeze(kept, site="mlp_out")
    with pytest.raises(EditError, match="lacks this site.*was not captured"):
        Freeze(kept, site="mlp_out", layer=0)
    with pytest.raises(EditError, match="lacks this site"):
        Freeze(kept, site="resid_post")
