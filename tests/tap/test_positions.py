"""Every way to say where an edit applies, against plain Python; what misses is an error, or NaN."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Add, Copy, KnockOut, SetTo, Token, Zero
from jaxtc.errors import EditError
from jaxtc.model.prompts import Prompts, prepare
from jaxtc.tap.positions import resolve, spelled
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, D
from tests.support.taps import SITES, captured, same, through
from tests.support.unspared import SetFeature

T = max(LENGTHS)
MADE = prepare(PROMPTS, tiny.config())
WIDTH = MADE.tokens.shape[1]
ON = np.random.default_rng(3).random((3, T)) < 0.5
ON &= np.arange(T) < np.asarray(LENGTHS)[:, None]


def nth(row, token, occurrence=0, offset=0):
    return [t for t, id in enumerate(row) if id == token][occurrence] + offset


# name: (position, the positions it names in a prompt, data of the spelling)
SPELLINGS = {
    "first": (0, lambda b, p: [0]),
    "second": (1, lambda b, p: [1]),
    "last": (-1, lambda b, p: [len(p) - 1]),
    "third last": (-3, lambda b, p: [len(p) - 3]),
    "NumPy's": (np.int64(-2), lambda b, p: [len(p) - 2]),
    "unsigned": (np.uint64(2), lambda b, p: [2]),
    "JAX's": (jnp.int32(2), lambda b, p: [2]),
    "a list": ([0, -1], lambda b, p: [0, len(p) - 1]),
    "a tuple": ((1, -3), lambda b, p: [1, len(p) - 3]),
    "an array": (np.array([2, 0]), lambda b, p: [0, 2]),
    "one twice": ([1, 1, -1], lambda b, p: [1, len(p) - 1]),
    "a row for each prompt": ([[8, 0], [-1, 1], [2, 2]], lambda b, p: [(0, 8), (1, 4), (2,)][b]),
    "a slice": (slice(1, 3), lambda b, p: [1, 2]),
    "from": (slice(1, None), lambda b, p: range(1, len(p))),
    "up to": (slice(None, 2), lambda b, p: [0, 1]),
    "all but the last": (slice(None, -1), lambda b, p: range(len(p) - 1)),
    "the last two": (slice(-2, None), lambda b, p: range(len(p) - 2, len(p))),
    "beyond the ends": (slice(-99, 99), lambda b, p: range(len(p))),
    "a slice for each prompt": (
        slice(np.array([7, 1, -3]), np.array([-1, 3, 99])),
        lambda b, p: [(7,), (1, 2), (0, 1, 2)][b],
    ),
    "everything": (slice(None), lambda b, p: range(len(p))),
    "a range": (range(0, 3, 2), lambda b, p: [0, 2]),
    "backwards": (range(2, -1, -1), lambda b, p: [0, 1, 2]),
    "a mask": ([True, False, True] + [False] * 6, lambda b, p: [0, 2]),
    "a mask for each prompt": (ON, lambda b, p: np.flatnonzero(ON[b])),
    "the prompt": ("prompt", lambda b, p: range(len(p))),
    "a token": (Token(2), lambda b, p: [0]),
    "after a token": (Token(2, 1), lambda b, p: [1]),
    "before a token's last": (
        Token([3, 12, 5], -1, -1), lambda b, p: [nth(p, (3, 12, 5)[b], -1, -1)]
    ),
    "a token for each prompt": (Token(np.array([11, 4, 13])), lambda b, p: [(5, 2, 1)[b]]),
}  # fmt: skip


def named(of):
    """(B, WIDTH) booleans."""
    on = np.zeros((len(PROMPTS), WIDTH), bool)
    for b, prompt in enumerate(PROMPTS):
        on[b, list(of(b, prompt))] = True
    return on


def at(found):
    places = jnp.broadcast_to(jnp.arange(WIDTH), (len(PROMPTS), WIDTH))
    return np.asarray(found.selects(places)) & (np.arange(WIDTH) < np.asarray(LENGTHS)[:, None])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling):
    position, of = SPELLINGS[spelling]
    found = resolve(position, MADE)
    np.testing.assert_array_equal(at(found), named(of))
    # Only real tokens are named, and every array is of one dtype.
    assert all(np.asarray(leaf).dtype in (np.int32, bool) for leaf in jax.tree.leaves(found))
    assert np.asarray(found.exist(jnp.asarray(LENGTHS))).all()


def test_traced_spellings():
    """All at once under jit: their numbers, the lengths and the tokens too are traced."""
    given = {name: spelled(position) for name, (position, _) in SPELLINGS.items()}

    @jax.jit
    def traced(given, tokens, lengths):
        found = {name: resolve(one, Prompts(tokens, lengths, T)) for name, one in given.items()}
        places = jnp.broadcast_to(jnp.arange(WIDTH), tokens.shape)
        return {name: (one.selects(places), one.exist(lengths)) for name, one in found.items()}

    found = traced(given, jnp.asarray(MADE.tokens), jnp.asarray(LENGTHS))
    real = np.arange(WIDTH) < np.asarray(LENGTHS)[:, None]
    for name, (_, of) in SPELLINGS.items():
        np.testing.assert_array_equal(np.asarray(found[name][0]) & real, named(of), err_msg=name)
        assert np.asarray(found[name][1]).all(), name


MISSES = {
    "past the shortest": (3, "position 3 lies outside prompt 2 of 3 tokens .0 to 2, or -3 to -1"),
    "before it": (-4, "position -4 lies outside prompt 2 of 3 tokens"),
    "one of several": ([0, 5], "position 5 lies outside prompt 1 of 5 tokens"),
    "in one prompt": ([[0], [0], [3]], "position 3 lies outside prompt 2"),
    "huge": (2**32, "position 4294967296 lies outside prompt 0"),
    "hugely negative": (-(2**32) - 1, "position -4294967297 lies outside prompt 0"),
    "an empty slice": (slice(2, 2), "the range 2:2 holds no token of prompt 0"),
    "a slice past the end": (slice(3, None), "the range 3:None holds no token of prompt 2"),
    "a huge slice": (slice(2**32, None), "holds no token of prompt 0"),
    "a mask over padding": (
        np.arange(T) < 4, "the mask is on at position 3 of prompt 2, of 3 tokens"
    ),
    "a mask with nothing on": (np.zeros(T, bool), "no position of the mask is on"),
    "no such token": (Token(7), "prompt 1 has no token at Token"),
    "not so often": (Token(2, occurrence=1), "prompt 0 has no token at"),
    "not so often from the end": (Token(2, occurrence=-2), "prompt 0 has no token at"),
    "before the start": (Token(2, -1), "the offset leads outside"),
    "after the end": (Token(2, 3), "prompt 2 has no token at"),
}  # fmt: skip
NONSENSE = {
    "a float": (1.0, "positions are whole numbers, a slice, a mask of booleans"),
    "nothing": ([], "positions are whole numbers"),
    "three axes": (np.zeros((3, 1, 1), int), "positions are whole numbers"),
    "ragged": ([[0, 1], [2], [0]], "its rows differ in length"),
    "other prompts": (
        [[0], [1]],
        r"shape \(2, 1\) are a row for each prompt, of which there are 3",
    ),
    "a mask of the bucket": (np.ones(WIDTH, bool), r"shape \(9,\) or \(3, 9\) here.*got \(16,\)"),
    "a word": ("last", "'last', expected 'prompt', 'new', or numbers"),
    "a step": (slice(0, 4, 2), "has a step; give a range"),
    "a slice of floats": (slice(0.5, None), "bounds of a slice are whole numbers.*got 0.5"),
    "a token's text": (Token("the"), "are whole numbers, one or one a prompt; got 'the'"),
    "two occurrences": (Token(2, occurrence=[0, 1]), "one or one a prompt"),
    "new": ("new", "run generates none"),
}


@pytest.mark.parametrize(("position", "message"), [*MISSES.values(), *NONSENSE.values()],
                         ids=[*MISSES, *NONSENSE])  # fmt: skip
def test_what_is_not_there_is_refused(position, message):
    with pytest.raises(EditError, match=message):
        through({"x": [Zero(site="mlp_out", position=position)]}, {})
    with pytest.raises(EditError, match=message):
        through({"x": [KnockOut(key=position)]}, {})


@pytest.mark.parametrize(
    "miss", [m for m in MISSES if "huge" not in m and m != "a mask with nothing on"]
)
def test_what_is_not_there_is_told_inside_a_trace(miss):
    position = spelled(MISSES[miss][0])
    told = jax.jit(lambda p, t, n: resolve(p, Prompts(t, n, T)).exist(n))(
        position, jnp.asarray(MADE.tokens), jnp.asarray(LENGTHS)
    )
    assert not np.asarray(told).all()


def test_rows_that_are_not_named_need_no_such_position():
    site, somewhere = "mlp_in_scale", (5, -9, slice(5, None), Token(7), np.arange(T) == 8)
    edits = {f"{site}/{i}": [Zero(site=site, position=p, row=0)] for i, p in enumerate(somewhere)}
    for made in through(edits, {key: captured()[site] for key in edits}).values():
        np.testing.assert_array_equal((made == 0).any((0, 2, 3)), [True, False, False])


# Heads, coordinates, rows, keys, layers


def chosen_at(**where):
    """Which entries of a token's array an edit names: its own targets, in plain Python."""

    def entries(token, at):
        on = np.ones(token.shape, bool)
        if "head" in where:
            heads = np.atleast_1d(where["head"]) % len(token)
            on &= np.isin(np.arange(len(token)), heads)[:, None]
        if "coordinate" in where:
            size = token.shape[-1]
            on &= np.isin(np.arange(size), np.atleast_1d(where["coordinate"]) % size)
        if "key" in where:
            keys = [k if k >= 0 else at.size + k for k in np.atleast_1d(where["key"])]
            on &= np.isin(np.arange(token.shape[-1]), keys)
        if "layer" in where:
            on &= at.layer in np.atleast_1d(where["layer"]) % LAYERS
        if "row" in where:
            on &= at.row in np.atleast_1d(where["row"])
        if "position" in where:
            on &= at.place in [
                p if p >= 0 else at.size + p for p in np.atleast_1d(where["position"])
            ]
        return on

    return entries


TARGETED = [
    ("q", dict(head=1)), ("q", dict(head=-1, coordinate=[0, -1])), ("q", dict(head=[0, 3], row=2)),
    ("v", dict(head=1, position=-1)), ("v", dict(head=-2, coordinate=3, layer=[0, -1], row=[0, 1])),
    ("resid_post", dict(coordinate=np.array([5, -2]), position=[0, -1], layer=-2)),
    ("resid_post", dict(layer=range(2), row=(0, 2))), ("resid_post", dict(layer=np.int64(2))),
    ("logits", dict(coordinate=[3, 7, -1], row=1, position=-2)),
    ("mlp_in_scale", dict(layer=jnp.array([1]), row=jnp.int32(0), position=8)),
    ("attn_pattern", dict(head=2, key=0)), ("attn_pattern", dict(key=2, row=[1, 2], layer=1)),
    ("attn_pattern", dict(key=[0, -1], position=-1, head=[-1])),
]  # fmt: skip


def test_targets_together():
    """As if each entry were asked by itself whether the edit names it."""
    cases = {f"{site}/{index}": (site, where) for index, (site, where) in enumerate(TARGETED)}
    edits = {key: [SetTo(7.0, site=site, **where)] for key, (site, where) in cases.items()}
    before = {key: captured()[site] for key, (site, _) in cases.items()}
    found = through(edits, before)
    for key, (site, where) in cases.items():
        entries = chosen_at(**where)
        assert same(
            site, found[key], before[key], lambda x, at, e=entries: np.where(e(x, at), 7, x), rtol=0
        ), key


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (dict(site="q", head=4), "this model has heads 0 to 3"),
        (dict(site="v", head=[0, 2]), "this model has heads 0 to 1"),
        (dict(site="q", head=-5), "heads 0 to 3"),
        (dict(site="mlp_out", head=0), r"mlp_out \[B T D\] has no axis for head.*q, k_un"),
        (dict(site="mlp_out", coordinate=24), "this model has coordinates 0 to 23"),
        (dict(site="mlp_in_scale", coordinate=0), "has no axis for coordinate"),
        (dict(site="attn_pattern", coordinate=0), "has no axis for coordinate"),
        (dict(site="mlp_out", key=0), "has no axis for key.*: attn_scores, attn_pattern.$"),
        (dict(site="mlp_out", row=[0, 3]), "the batch has rows 0 to 2"),
        (dict(site="mlp_out", row=True), "row must be whole numbers"),
        (dict(site="mlp_out", row=[[0]]), "row must be whole numbers, one or a row of them"),
        (dict(site="mlp_out", row=[]), "row must be whole numbers"),
        (dict(site="mlp_out", layer=[[0], [1, 2]]), "its rows differ in length"),
        (dict(site="mlp_out", layer=slice(0, 2)), "layer must be whole numbers"),
        (dict(site="mlp_out", layer="last"), "layer must be whole numbers"),
        (dict(site="embed", layer=-1), "the model has 'embed' once, so it takes no layer"),
        (dict(site="final_norm", layer=[0]), "takes no layer"),
    ],
)  # fmt: skip
def test_targets_refused(where, message):
    with pytest.raises(EditError, match=message):
        through({"x": [Zero(**where)]}, {})


# Targets that are only known inside a trace


HERE = dict(layer=2, head=3, coordinate=23, position=2, key=2, from_position=2, row=2, feature=49,
            token=2, start=2, from_row=0)  # fmt: skip
OUTSIDE = {"layer": (3, -4), "head": (4, -5), "coordinate": (24, -25), "position": (3, -4, 9, 20),
           "key": (3, -4), "from_position": (3, -4), "row": (3, -1), "feature": (50, -1),
           "token": (7, 99), "start": (3,), "from_row": (3, -1, 2)}  # fmt: skip
# What a negative one stands for; others are never negative.
FROM_THE_END = {"layer": LAYERS, "head": 4, "coordinate": D}


@pytest.fixture(scope="module")
def traced():
    """One program, with every target traced."""

    @jax.jit
    def call(to):
        edits = [
            Add(0.5, site="resid_mid", layer=to["layer"]),
            Zero(site="q", layer=1, head=to["head"]),
            Zero(site="mlp_out", layer=0, coordinate=to["coordinate"], row=1),
            Add(0.5, site="resid_pre", layer=1, position=to["position"]),
            KnockOut(key=to["key"], layer=2, head=0),
            Copy(from_position=to["from_position"], position=0, site="attn_in", layer=1),
            Zero(site="mlp_in", layer=1, row=to["row"]),
            SetFeature(tiny.transcoder(1), to["feature"], 1.0),
            Add(0.5, site="attn_out", layer=1, position=Token(to["token"])),
            Add(0.5, site="attn_out", layer=2, position=spelled(slice(to["start"], None))),
            Copy(from_row=to["from_row"], row=1, site="mlp_proj", layer=2),
        ]
        return jaxtc.run(tiny.model(), PROMPTS, edits=edits).logits

    return lambda **other: np.asarray(call({k: jnp.int32(v) for k, v in (HERE | other).items()}))


def test_traced_targets_that_exist(traced):
    out = traced()
    assert all(np.isfinite(row[:n]).all() for row, n in zip(out, LENGTHS, strict=True))
    for target, size in FROM_THE_END.items():
        np.testing.assert_array_equal(traced(**{target: HERE[target] - size}), out)


@pytest.mark.parametrize(("target", "index"), [(t, i) for t in OUTSIDE for i in OUTSIDE[t]])
def test_traced_targets_that_miss_are_nan(target, index, traced):
    out = traced(**{target: index})
    if target in ("feature", "from_row"):  # the tokens that would have been changed are
        assert np.isnan(out[1, 4]).all()
    else:
        assert np.isnan(out).all()


def test_the_names_of_targets_are_those_of_the_module():
    assert set(importlib.import_module("jaxtc.edits.base").TARGETS) <= set(HERE) and len(SITES) == 6
