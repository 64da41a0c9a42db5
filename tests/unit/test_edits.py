"""Each kind of edit against plain NumPy on what was there, and what a new program is needed for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import (
    Add,
    Apply,
    ClampFeature,
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
    ScaleFeature,
    SetFeature,
    SetTo,
    Splice,
    Zero,
)  # fmt: skip
from jaxtc.errors import EditError
from jaxtc.intercept import Tap
from tests.unit import taps, tiny
from tests.unit.batch import LAYERS, LENGTHS, PROMPTS, D
from tests.unit.taps import SITES, captured, random, same, stored, through

# Every kind against NumPy


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def last(site, prompts=PROMPTS):
    return random(site, prompts).shape[-1]


def full(site, prompts=PROMPTS):
    """A value for every layer, row, token, ... of a site."""
    return random(site, prompts, seed=5)


def at_token(array, at):
    """What an array of a site's shape holds for a token."""
    axis = jaxtc.sites.BY_NAME[at.site].sequence_axis
    token = np.moveaxis(array, axis, 1)[at.row, at.place]
    return token[..., : at.size] if at.site.startswith("attn_") else token


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


def everywhere(at):
    return True


def some(at):
    layers = (0, LAYERS - 1) if jaxtc.sites.BY_NAME[at.site].per_layer else (0,)
    return at.row in (0, 2) and at.place in (0, at.size - 1) and at.layer in layers


def somewhere(site):
    layer = {"layer": [0, -1]} if jaxtc.sites.BY_NAME[site].per_layer else {}
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
        (lambda: Noise(2**31, site="mlp_out"), "no 32-bit number"),
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


# Copies


COPIES = {
    "row, from the end": (
        dict(from_row=1, position=-1), lambda at: (1, -1) if at.place == at.size - 1 else None
    ),
    "rows": (
        dict(from_row=[1, 2, 0], position=[0, -1]),
        lambda at: ((at.row + 1) % 3, {0: 0, at.size - 1: -1}[at.place])
        if at.place in (0, at.size - 1) else None,
    ),
    "position": (
        dict(from_position=0, position=-1),
        lambda at: (at.row, 0) if at.place == at.size - 1 else None,
    ),
    "positions in pairs": (
        dict(from_position=[2, -1], position=[0, 1], row=[0, 2]),
        lambda at: (at.row, (2, -1)[at.place]) if at.place < 2 and at.row != 1 else None,
    ),
    "one position to all": (dict(from_position=1), lambda at: (at.row, 1)),
    "both": (
        dict(from_row=0, from_position=-2, row=[1, 2], position=1),
        lambda at: (0, -2) if at.row and at.place == 1 else None,
    ),
    "both, to all": (dict(from_row=1, from_position=-1), lambda at: (1, -1)),
    "before a token": (
        dict(from_row=2, from_position=jaxtc.Token(5, -1), row=0, position=jaxtc.Token(11)),
        lambda at: (2, 1) if (at.row, at.place) == (0, 5) else None,
    ),
    "one of another length": (
        dict(from_row=0, row=2, position=2),
        lambda at: (0, 2) if (at.row, at.place) == (2, 2) else None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COPIES)
def test_copy(case):
    where, source = COPIES[case]

    def copied(token, at):
        return token if source(at) is None else at.rows[source(at)[0]][source(at)[1]]

    sites = SITES[:-1]
    edits = {site: [Copy(site=site, **where)] for site in sites}
    found = through(edits, {s: captured()[s] for s in sites})
    for site in sites:
        assert same(site, found[site], captured()[site], copied, rtol=0)


def test_copy_of_whole_rows_and_of_patterns():
    prompts = [row[:3] for row in PROMPTS]
    x = {site: random(site, prompts) for site in SITES}
    edits = {site: [Copy(from_row=2, row=[0, 1], site=site)] for site in SITES}
    found = through(edits, x, prompts)
    for site in SITES:
        assert same(site, found[site], x[site], lambda _, at: at.rows[2][at.place], prompts, rtol=0)


# Noise, stored runs, attention edges


def noise(prompts, sites=("v", "attn_pattern"), seed=3, **where):
    """What was added at each site."""
    x = {site: random(site, prompts) for site in sites}
    edits = {site: [Noise(seed, site=site, **where)] for site in sites}
    found = through(edits, x, prompts)
    return {site: found[site][tuple(map(slice, x[site].shape))] - x[site] for site in sites}


def test_noise_of_a_token_is_its_own():
    """The same alone, in longer prompts, beside others and in another bucket; like no other's."""
    crowd, pair = noise([[2] * 20, [2] * 5, [2] * 9]), noise([[2] * 4, [2] * 3])
    near = dict(rtol=0, atol=1e-5)
    np.testing.assert_allclose(crowd["v"][:, 0, :4], pair["v"][:, 0], **near)
    np.testing.assert_allclose(crowd["v"][:, 1, :3], pair["v"][:, 1, :3], **near)
    pattern, small = crowd["attn_pattern"], pair["attn_pattern"]
    np.testing.assert_allclose(pattern[:, 0, :, :4, :4], small[:, 0], **near)
    np.testing.assert_allclose(pattern[:, 1, :, :3, :3], small[:, 1, :, :3, :3], **near)
    for found in (crowd["v"][:, 0].ravel(), pattern[:, 0].ravel()):
        assert abs(found.mean()) < 0.06 and abs(found.std() - 1) < 0.04
        assert len(np.unique(found.round(4))) > 0.95 * min(len(found), 4000)


def test_noise_is_the_same_in_decode_and_follows_its_seed_and_scale():
    edit = taps.checked([Noise(3, site="resid_post", scale=2.0)])

    @jax.jit
    def at(positions, edits):
        tap = Tap((), edits, positions, jnp.asarray(LENGTHS))
        return tap("resid_post", jnp.zeros((3, positions.shape[1], D)), 1)

    whole = at(jnp.broadcast_to(jnp.arange(16), (3, 16)), edit)
    step = at(jnp.asarray([[9], [5], [3]]), edit)[:, 0]
    np.testing.assert_array_equal(step, np.asarray(whole)[[0, 1, 2], [9, 5, 3]])
    half = at(jnp.asarray([[9], [5], [3]]), taps.checked([Noise(3, site="resid_post")]))[:, 0]
    np.testing.assert_allclose(2 * half, step, rtol=1e-6)
    other = at(jnp.asarray([[9], [5], [3]]), taps.checked([Noise(4, site="resid_post")]))[:, 0]
    assert np.abs(other - half).max() > 0.5
    key = at(
        jnp.asarray([[9], [5], [3]]), taps.checked([Noise(jax.random.key(3), site="resid_post")])
    )
    np.testing.assert_array_equal(key[:, 0], half)


def test_freeze_to_another_run_layer_by_layer():
    sites = [site for site in SITES if site != "logits"]
    edits = {s: [Freeze(stored(1), site=s)] for s in SITES}
    edits |= {f"{s}/one": [Freeze(stored(1), site=s, layer=-2)] for s in sites}
    edits |= {f"{s}/some": [Freeze(stored(1), site=s, layer=[0, 2], position=-1)] for s in sites}
    found = through(edits, {key: captured()[key.split("/")[0]] for key in edits})

    def becomes(chosen):
        return lambda was, at: at_token(captured(1)[at.site][at.layer], at) if chosen(at) else was

    choices = {"one": lambda at: at.layer == 1, "": everywhere,
               "some": lambda at: at.layer != 1 and at.place == at.size - 1}  # fmt: skip
    for key in edits:
        site, _, which = key.partition("/")
        assert same(site, found[key], captured()[site], becomes(choices[which]), rtol=0)


CUTS = {
    "a key": (dict(key=1), lambda at, n, s: s == 1),
    "the query itself": (dict(key=-1, position=-1), lambda at, n, s: at.last and s == at.size - 1),
    "keys of heads": (dict(key=[0, 2], head=[1, -1]), lambda at, n, s: n in (1, 3) and s in (0, 2)),
    "all that a query sees": (
        dict(key=slice(0, 2), position=1, row=0),
        lambda at, n, s: (at.row, at.place) == (0, 1) and s < 2,
    ),
    "a token, from the end, in one layer": (
        dict(key=jaxtc.Token(5), row=[0, 2], position=-1, layer=2),
        lambda at, n, s: at.layer == 2 and at.last and s == {0: 1, 2: 2}.get(at.row),
    ),
    "a mask": (dict(key=np.arange(9) < 2, position="prompt"), lambda at, n, s: s < 2),
    "a head": (dict(head=2, layer=[0]), lambda at, n, s: at.layer == 0 and n == 2),
}  # fmt: skip


def test_knock_out_is_masking_the_scores():
    site = "attn_pattern"
    scores = np.asarray(
        jaxtc.run(tiny.model(), PROMPTS, capture="attn_scores").activations["attn_scores"]
    )
    edits = {f"{site}/{cut}": [KnockOut(**where)] for cut, (where, _) in CUTS.items()}
    found = through(edits, {key: captured()[site] for key in edits})
    for cut, (_, chosen) in CUTS.items():

        def masked(token, at, chosen=chosen):
            at.last = at.place == at.size - 1
            kept = scores[at.layer, at.row, :, at.place, : at.size].astype(np.float64)
            off = [[chosen(at, n, s) for s in range(at.size)] for n in range(len(kept))]
            weights = np.where(np.asarray(off) | (kept < -1e30), 0, np.exp(kept))
            return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)

        assert same(site, found[f"{site}/{cut}"], captured()[site], masked, rtol=1e-4, atol=1e-6), (
            cut
        )


# In the compiled program: every kind at once


def T(layer):
    """Without a name, for two to be trees of one structure; a ReLU's, which finite steps need."""
    made = tiny.transcoder(layer).nameless()
    made.threshold[...] = jnp.zeros_like(made.threshold[...])
    return made


def spread(seed):
    return drawn(seed, D)


def whole(seed=0, **other):
    """An edit of every kind, by name, in one run; `seed` changes values and targets alike."""
    n = seed % 2
    kinds = {
        "add": lambda w: Add(spread(1 + seed), **w),
        "set": lambda w: SetTo(spread(2 + seed), **w),
        "zero": lambda w: Zero(**w),
        "scale": lambda w: Scale(0.5 + n, **w),
        "interpolate": lambda w: Interpolate(spread(3 + seed), 0.3 + n, start=spread(9), **w),
        "mean": lambda w: MeanAblate(over="prompt", **w),
        "mean value": lambda w: MeanAblate(spread(4 + seed), **w),
        "project": lambda w: ProjectOut(np.stack([spread(5 + seed), spread(8)]), **w),
        "copy row": lambda w: Copy(from_row=1 + n, **w),
        "copy position": lambda w: Copy(from_position=n, **w),
        "noise": lambda w: Noise(7 + seed, 0.5 + n, **w),
        "detach": lambda w: Detach(**w),
        "freeze": lambda w: Freeze(PerLayer(captured(1 + n)["v"]), **w),
        "knock out": lambda w: KnockOut(**w),
        "apply": lambda w: Apply(jax.tree_util.Partial(jnp.multiply, 0.5 + n), **w),
        "splice": lambda w: Splice(T(n), **w),
        "splices": lambda w: Splice({1: T(1 - n), 2: T(n)}, **w),
        "set feature": lambda w: SetFeature(T(1), [3 + n, 9], [2.0, 1.5 + n], **w),
        "scale feature": lambda w: ScaleFeature(T(2), [31, 20][n], 3.0 + n, **w),
        "clamp feature": lambda w: ClampFeature(T(2), 12 + n, low=0.5 + n, **w),
    }
    where = {
        "add": dict(site="resid_mid", layer=n, position=2 - n, row=n),
        "set": dict(site="attn_proj", layer=1 - n, position=-1 - n, coordinate=[3 + n, -1]),
        "zero": dict(site="q", layer=0, head=1 + n, row=1 - n),
        "scale": dict(site="attn_out", layer=n, position=[1, -1 - n]),
        "interpolate": dict(site="resid_pre", layer=1 + n, position=jaxtc.Token(5, -n), row=[0, 2]),
        "mean": dict(site="mlp_act", layer=2 - n, position=2 - n),
        "mean value": dict(site="mlp_in", layer=0, position=slice(n, 2), row=n),
        "project": dict(site="mlp_proj", layer=n, position=np.arange(9) < 1 + n),
        "copy row": dict(site="resid_post", layer=n, position=-1, row=0),
        "copy position": dict(site="attn_in", layer=1, position=-1 - n),
        "noise": dict(site="embed", position=[1 - n]),
        # Where nothing before it has a slope that finite steps would see.
        "detach": dict(site="attn_in_scale", layer=0, position=2 - n),
        "freeze": dict(site="v", layer=1 - n, position=0, head=n),
        "knock out": dict(layer=n, key=1, head=2 - n, position=-1),
        "apply": dict(site="final_norm", position=[-1, -1 - n], coordinate=n),
        "splice": dict(layer=n, position=-1 - n),
        "splices": dict(layer=2 - n, row=1),
        "set feature": dict(position=1, layer=1 - n),
        "scale feature": dict(layer=2 - n, row=n),
        "clamp feature": dict(layer=1 + n, position=-2),
    }
    return {
        name: make(where[name] | other.get(name.replace(" ", "_"), {}))
        for name, make in kinds.items()
    }


NAMES = tuple(whole())


def in_order(edits):
    """As a list; a dictionary that went through jax is sorted."""
    return [edits[name] for name in NAMES]


def logits(edits, prompts=PROMPTS):
    return np.asarray(jaxtc.run(tiny.model(), prompts, edits=in_order(edits), logits="last").logits)


@pytest.fixture(scope="module")
def base():
    """The program of every kind is compiled here; what follows runs it."""
    return whole(), logits(whole())


NUMBERS = {
    "int": int, "NumPy's": np.int64, "an array": lambda v: np.asarray(v, np.uint8),
    "JAX's": jnp.int32, "a weak one": jnp.asarray,
}  # fmt: skip
REALS = {"float": float, "NumPy's": np.float64, "JAX's": jnp.float32, "a weak one": jnp.asarray}


def variants():
    """(what, name of an edit, its fields): other spellings of the same."""
    for name, edit in whole().items():
        for field in (f.name for f in dataclasses.fields(edit)):
            value = getattr(edit, field)
            if isinstance(value, int):
                spellings = NUMBERS if value >= 0 else {k: NUMBERS[k] for k in ("NumPy's", "JAX's")}
                yield from ((f"{field}: {s}", name, {field: NUMBERS[s](value)}) for s in spellings)
            elif isinstance(value, float):
                yield from ((f"{field}: {s}", name, {field: REALS[s](value)}) for s in REALS)
            elif isinstance(value, np.ndarray):
                yield f"{field}: a list", name, {field: value.tolist()}
                yield f"{field}: JAX's", name, {field: jnp.asarray(value)}


VARIANTS = list(variants())


@pytest.mark.parametrize("kind", whole())
def test_other_values_and_targets_run_the_same_program(kind, base):
    edits, before = base
    with jaxtc.compiles() as found:
        after = logits(edits | {kind: whole(1)[kind]})
    assert len(found) == 0, found
    assert kind == "detach" or np.abs(after - before).max() > 1e-4
    assert np.isfinite(after).all()


@pytest.mark.parametrize(
    ("what", "kind", "fields"), VARIANTS, ids=[f"{k}, {w}" for w, k, _ in VARIANTS]
)
def test_other_spellings_run_the_same_program(what, kind, fields, base):
    edits, before = base
    with jaxtc.compiles() as found:
        after = logits(edits | {kind: dataclasses.replace(edits[kind], **fields)})
    assert len(found) == 0, found
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)


def test_a_whole_number_is_as_good_as_a_real_one(base):
    edits, _ = base
    results = []
    with jaxtc.compiles() as found:
        for factor in (
            2,
            2.0,
            np.int8(2),
            True + True,
            jnp.asarray(2),
            np.float16(2),
            np.asarray(2),
        ):
            one = dataclasses.replace(edits["scale"], factor=factor)
            two = dataclasses.replace(edits["set feature"], value=[factor, factor])
            results.append(logits(edits | {"scale": one, "set feature": two}))
    assert len(found) == 0, found
    np.testing.assert_array_equal(results, [results[0]] * len(results))


def test_another_row_s_prompt_and_other_lengths_run_the_same_program(base):
    edits, before = base
    with jaxtc.compiles() as found:
        mask = dataclasses.replace(edits["project"], position=np.arange(12) < 2)
        longer = [[*PROMPTS[0], 4, 5, 6], [2, 5, 6, 4], [2, 5, 13]]
        frozen = dataclasses.replace(edits["freeze"], activations=PerLayer(random("v", longer)))
        after = logits(edits | {"project": mask, "freeze": frozen}, longer)
    assert len(found) == 0, found
    assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-3


def test_values_over_tokens_of_any_length_run_one_program():
    def edits(n):
        text = [list(range(2, 2 + n))]
        values = {
            site: random(site, text, seed=n)[0] for site in ("resid_post", "attn_pattern", "v")
        }
        return text, [
            Add(values["resid_post"][0], site="resid_post", layer=0),
            SetTo(values["attn_pattern"], site="attn_pattern", layer=1, position=-1),
            Freeze(values["v"], site="v", layer=2, position=slice(0, 1)),
            Scale(np.ones((n, 1)), site="logits"),
            Interpolate(values["resid_post"], np.ones((1, n, 1)), site="resid_mid", layer=1, row=0),
        ]

    def found(n):
        text, some = edits(n)
        kept = jaxtc.run(
            tiny.model(), text, edits=some, capture=("layers.1.resid_mid", "layers.1.attn_pattern")
        )
        return kept.activations, some

    with jaxtc.compiles() as compiled:
        for n in (3, 9, 16):
            kept, some = found(n)
            np.testing.assert_allclose(
                kept["layers.1.resid_mid"], some[4].end, rtol=1e-5, atol=1e-5
            )
            last = np.asarray(kept["layers.1.attn_pattern"])[:, :, -1]
            np.testing.assert_allclose(last, some[1].value[:, :, -1])
    assert len(compiled) == 1, compiled


# Under transformations


# Kinds with nothing to take a gradient in, or where it stops.
STILL = ("zero", "mean", "copy row", "copy position", "detach", "freeze", "knock out")
GRADIENTS = ("value", "factor", "end", "weight", "start", "direction", "scale", "low", "function")


@pytest.fixture(scope="module")
def transformed():
    """[(edits, logits, slopes)] of two variants, in one call under jit, vmap and grad."""
    variants = [whole(0), whole(1)]
    stacked = jax.tree.map(lambda *v: jnp.stack([jnp.asarray(x) for x in v]), *variants)
    paths, tree = jax.tree_util.tree_flatten_with_path(stacked)
    moving = [i for i, (path, leaf) in enumerate(paths) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def loss(floats, leaves):
        leaves = [floats.get(i, leaf) for i, leaf in enumerate(leaves)]
        edits = jax.tree.unflatten(tree, leaves)
        out = jaxtc.run(tiny.model(), PROMPTS, edits=in_order(edits), logits="last").logits
        return (out * WEIGHTS).sum(), out

    leaves = [leaf for _, leaf in paths]
    floats = {i: leaves[i] for i in moving}
    (_, out), slopes = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(floats, leaves)
    names = {i: (paths[i][0][0].key, jax.tree_util.keystr(paths[i][0][1:])) for i in moving}
    return variants, out, {names[i]: slope for i, slope in slopes.items()}


WEIGHTS = drawn(11, len(PROMPTS), tiny.config().vocab_size)


def test_jit_and_vmap_give_what_single_runs_do(transformed):
    variants, out, _ = transformed
    for index, edits in enumerate(variants):
        np.testing.assert_allclose(out[index], logits(edits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", whole())
def test_gradients_are_those_of_finite_differences(kind, transformed):
    variants, _, slopes = transformed
    tried = moved = False
    for index, edits in enumerate(variants):
        leaves, tree = jax.tree_util.tree_flatten_with_path(edits[kind])
        for place, (path, leaf) in enumerate(leaves):
            name = jax.tree_util.keystr(path)
            if (kind, name) not in slopes:
                continue
            slope = np.asarray(slopes[kind, name][index])
            assert np.isfinite(slope).all(), name
            if kind == "freeze":
                assert not slope.any()
            if name.split(".")[1].split("[")[0] not in GRADIENTS and "W_dec" not in name:
                continue
            tried = True
            along = drawn(place, *np.shape(leaf))
            along, step = along / np.linalg.norm(along), 1e-2

            def loss(moved, place=place, leaves=leaves, tree=tree):
                flat = [leaf for _, leaf in leaves]
                flat[place] = np.asarray(flat[place], np.float32) + moved
                changed = edits | {kind: jax.tree.unflatten(tree, flat)}  # noqa: B023
                return (logits(changed).astype(np.float64) * WEIGHTS).sum()

            expected = (loss(step * along) - loss(-step * along)) / (2 * step)
            np.testing.assert_allclose(
                (slope * along).sum(), expected, rtol=3e-2, atol=3e-3, err_msg=name
            )
            moved |= slope.any()
    assert tried == bool(moved) == (kind not in STILL)


def test_mean_of_positions_that_few_prompts_have_has_a_gradient():
    edit = taps.checked([MeanAblate(over="rows", site="resid_post")])

    def total(x):
        tap = Tap((), edit, jnp.broadcast_to(jnp.arange(16), (3, 16)), jnp.asarray(LENGTHS))
        return (tap("resid_post", x, 0) ** 2).sum()

    assert np.isfinite(jax.grad(total)(jnp.ones((3, 16, D)))).all()


# A function of one's own


def test_apply_says_what_is_wrong_with_its_function():
    for function, error in (
        (lambda x: x[..., :1], "must keep shape and dtype"),
        (lambda x: x.astype(jnp.float16), "must keep shape and dtype"),
    ):
        with pytest.raises(EditError, match=error):
            through(
                {"resid_post": [Apply(function, site="resid_post")]},
                {"resid_post": captured()["resid_post"]},
            )


def test_a_function_with_arrays_of_its_own_compiles_once():
    def edits(seed):
        return [Apply(nnx.Linear(D, D, rngs=nnx.Rngs(seed)), site="resid_post", layer=seed)]

    with jaxtc.compiles() as found:
        first, second = (jaxtc.run(tiny.model(), PROMPTS, edits=edits(s)).logits for s in (0, 1))
    assert len(found) == 1 and np.abs(first - second).max() > 1e-3
