"""Copies, noise, stored runs and attention edges: what they take from where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Copy, Freeze, KnockOut, Noise  # fmt: skip
from jaxtc.tap.tap import Tap
from tests.support import taps, tiny
from tests.support.batch import LENGTHS, PROMPTS, D
from tests.support.taps import SITES, at_token, captured, everywhere, random, same, stored, through

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
        return tap.at(1)("resid_post", jnp.zeros((3, positions.shape[1], D)))

    whole = at(jnp.broadcast_to(jnp.arange(16), (3, 16)), edit)
    step = at(jnp.asarray([[9], [5], [3]]), edit)[:, 0]
    whole = np.asarray(whole)[[0, 1, 2], [9, 5, 3]]
    np.testing.assert_allclose(step, whole, rtol=1e-5, atol=1e-6)  # two programs
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
