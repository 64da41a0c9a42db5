"""Reducers: what each keeps of a site, against NumPy on the whole site; what they refuse."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Token
from jaxtc.captures.reducers import (
    At,
    Features,
    Mean,
    Norm,
    Project,
    Reducer,
    TopK,
    register_reducer,
)
from jaxtc.captures.request import understand
from jaxtc.errors import CapacityError, EditError, InputError, JaxtcError, SiteError
from jaxtc.programs.program import compiles
from jaxtc.tap.context import Context
from jaxtc.tap.sites import BY_NAME, SITES, Address
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, D, run

B, T = len(PROMPTS), max(LENGTHS)
RNG = np.random.default_rng(0)
DIRECTIONS = RNG.standard_normal((5, D)).astype(np.float32)
SITE = "layers.1.resid_post"


def reduced(reducer, **options):
    """What a run keeps: arrays as NumPy."""
    found = run(capture=[reducer], logits=None, **options).activations[str(reducer)]
    return jax.tree.map(np.asarray, found)


def each(kind, sites, *args):
    """What a run keeps of several sites, and each site whole: all with a leading axis L."""
    captures = {str(kind(site, *args)): kind(site, *args) for site in sites}
    found = run(capture=captures, logits=None).activations
    for site, (name, reducer) in zip(sites, captures.items(), strict=True):
        kept, full = jax.tree.map(np.asarray, found[name]), whole(site)
        if not reducer.every_layer:
            kept, full = jax.tree.map(lambda x: x[None], (kept, full))
        yield reducer.site, kept, full


@functools.cache
def everything():
    return run(capture=[site.name for site in SITES], logits=None).activations


def whole(address):
    """The site as it is, from a run that keeps all of it."""
    return np.asarray(everything()[address])


def near(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def same_rows(kept, expected):
    """Equal on the real tokens; both (B, T, ...)."""
    assert kept.shape == expected.shape
    for row, n in enumerate(LENGTHS):
        near(kept[row, :n], expected[row, :n])


# At

POSITIONS = {
    "the last by default": ({}, [[n - 1] for n in LENGTHS]),
    "an int": ({"position": 1}, [[1]] * B),
    "from the end": ({"position": -2}, [[n - 2] for n in LENGTHS]),
    "ints": ({"position": [0, 2, -1]}, [[0, 2, n - 1] for n in LENGTHS]),
    "one int in a list": ({"position": [1]}, [[1]] * B),
    "an array": ({"position": jnp.array([2, 0])}, [[2, 0]] * B),
    "a range": ({"position": range(3)}, [[0, 1, 2]] * B),
    "a row for each": ({"position": [[8, 0], [-1, 1], [2, 2]]}, [[8, 0], [4, 1], [2, 2]]),
    "after a token": ({"position": Token(2, offset=1)}, [[1]] * B),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_at(case):
    given, at = POSITIONS[case]
    sites = ["resid_post", "layers.0.q", "k", "attn_pattern", "logits"]
    for site, kept, full in each(At, sites, *given.values()):
        axis = site.sequence_axis  # that of one row, with L in front
        for row in range(B):
            expected = np.take(full[:, row], at[row], axis=axis)
            if np.ndim(given.get("position", -1)) == 0:
                expected = expected.squeeze(axis)
            near(kept[:, row], expected)


def test_at_keeps_nothing_else():
    """Bytes go with the positions, not with the prompts."""
    kept = run(capture=[At("resid_post", [0, -1])], logits=None)
    assert sum(x.size for x in jax.tree.leaves(kept.activations)) == LAYERS * B * 2 * D


def test_at_of_traced_positions():
    def last(position):
        return run(capture=[At(SITE, position)], logits=None).activations[f"At({SITE})"]

    full = whole(SITE)
    kept = jax.jit(jax.vmap(last))(jnp.array([0, -3, 3, -4]))
    near(kept[0], full[:, 0])
    for row, n in enumerate(LENGTHS):
        near(kept[1, row], full[row, n - 3])
    # The third prompt has three tokens: no position 3, nor -4.
    assert np.isnan(kept[2:, 2]).all() and np.isfinite(kept[2:, :2]).all()


# Mean


@pytest.mark.parametrize(
    ("position", "chosen"),
    [
        (None, lambda t, n: True),
        (slice(1, None), lambda t, n: t >= 1),
        (slice(-2, None), lambda t, n: t >= n - 2),
        ([0, -1], lambda t, n: t in (0, n - 1)),
        (np.arange(T) < 2, lambda t, n: t < 2),
        ("prompt", lambda t, n: True),
    ],
    ids=["all", "slice", "from the end", "ints", "mask", "prompt"],
)
def test_mean(position, chosen):
    sites = ["resid_post", "layers.2.k", "attn_pattern", "embed"]
    for site, kept, full in each(Mean, sites, position):
        for row, n in enumerate(LENGTHS):
            tokens = [t for t in range(n) if chosen(t, n)]
            expected = np.take(full[:, row], tokens, axis=site.sequence_axis)
            near(kept[:, row], expected.mean(site.sequence_axis))


def context(site, positions, lengths):
    return Context(BY_NAME[site], 0, jnp.asarray(positions), jnp.asarray(lengths), {}.__getitem__)


def test_padding_is_nothing_to_the_mean_and_sums_are_float32():
    x = np.full((1, 5000, 1), 1.0)
    x[0, 4000:] = np.nan
    here = context("resid_post", np.arange(5000)[None], [4000])
    kept = Mean("resid_post").reduce(jnp.asarray(x, jnp.bfloat16), here)
    assert kept.dtype == jnp.float32 and kept.tolist() == [[1.0]]  # bfloat16 stops counting at 256


# Norm, TopK, Project, Features


def test_norm():
    for _, kept, full in each(Norm, ["layers.0.resid_post", "layers.1.q", "mlp_act", "embed"]):
        for a, b in zip(kept, np.linalg.norm(full.astype(np.float64), axis=-1), strict=True):
            same_rows(a, b)


def test_gradient_of_the_norm():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    kept = jax.grad(lambda x: Norm("resid_post").reduce(x, None).sum())(x)
    near(kept, [[0.6, 0.8], [0, 0]])


def test_top_k():
    for site, kept, full in each(TopK, ["logits", "layers.1.mlp_act", "attn_pattern"], 3):
        assert kept.ids.dtype == np.int32 and kept.ids.shape == (*full.shape[:-1], 3)
        for row, n in enumerate(LENGTHS):
            top, own = (
                jax.tree.map(lambda x: np.take(x[:, row], range(n), axis=site.sequence_axis), part)  # noqa: B023
                for part in (kept, full)
            )
            near(top.values, -np.sort(-own, axis=-1)[..., :3])
            near(np.take_along_axis(own, top.ids, axis=-1), top.values)
            ids = np.sort(top.ids, axis=-1)
            assert (ids[..., 1:] > ids[..., :-1]).all(), site


@pytest.mark.parametrize("directions", [DIRECTIONS, DIRECTIONS[0], DIRECTIONS[:1].tolist()])
def test_project(directions):
    kept = reduced(Project("resid_post", directions))
    full = whole("resid_post").astype(np.float64)
    expected = full @ np.asarray(directions, np.float64).T
    assert kept.dtype == np.float32 and kept.shape == expected.shape
    for a, b in zip(kept, expected, strict=True):
        same_rows(a, b)


def test_gradient_flows_to_directions():
    def total(directions):
        found = run(PROMPTS[:1], capture=[Project(SITE, directions)], logits=None).activations
        return found[f"Project({SITE})"].sum()

    expected = whole(SITE)[0].sum(0)
    for row in jax.grad(total)(jnp.asarray(DIRECTIONS)):
        near(row, expected)


def test_features():
    transcoder = tiny.transcoder(1)
    reducer = Features(transcoder=transcoder, capacity=30)
    assert str(reducer) == "Features(layers.1.mlp_in_normed)"
    kept = reduced(reducer)
    full = whole("layers.1.mlp_in_normed")
    assert kept.values.shape == (B, T, 30) and kept.count.shape == (B, T)
    for row, n in enumerate(LENGTHS):
        expected = transcoder.encode_sparse(full[row, :n], 30)
        np.testing.assert_array_equal(kept.count[row, :n], expected.count)
        near(kept.values[row, :n], expected.values)
        active = np.asarray(expected.values) > 0
        assert active.any()
        np.testing.assert_array_equal(kept.ids[row, :n][active], np.asarray(expected.ids)[active])


def test_features_beyond_their_capacity_are_nan():
    kept = reduced(Features(transcoder=tiny.transcoder(1), capacity=4))
    for row, n in enumerate(LENGTHS):
        full = kept.count[row, :n] > 4
        np.testing.assert_array_equal(np.isnan(kept.values[row, :n]), np.tile(full[:, None], 4))
    assert (kept.count[0] > 4).any()


def test_features_of_a_named_place():
    unknown = tiny.transcoder(None)
    kept = reduced(Features("mlp_in_normed", transcoder=unknown, capacity=40))
    assert kept.values.shape == (LAYERS, B, T, 40)
    expected = unknown.encode(whole("layers.2.mlp_in_normed")[0])
    near(kept.values[2, 0].sum(-1), expected.sum(-1))


# All of them


def test_every_site_has_reducers():
    """At and TopK fit every site; every reducer's array is cut where it is padded."""
    captures = {f"{kind.__name__} {site.name}": kind(site.name, 1) for site in SITES
                for kind in (At, TopK)}  # fmt: skip
    found = run(capture=captures, logits=None).activations
    sizes = {**tiny.config().sizes, "B": B, "T": T, "S": T}
    for site in SITES:
        stack = (LAYERS,) if site.per_layer else ()
        shape = list(site.shape(sizes))
        assert found[f"TopK {site.name}"].ids.shape == (*stack, *shape[:-1], 1)
        del shape[site.sequence_axis]
        assert found[f"At {site.name}"].shape == (*stack, *shape)


def test_edits_show_in_what_is_kept():
    edit = jaxtc.SetTo(3.0, site=SITE, position=-1)
    assert (reduced(At(SITE), edits=[edit]) == 3).all()


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (At(SITE, 0), At(SITE, -1)),
        (At(SITE, [0, 1]), At(SITE, [[1, 2], [-1, 0], [0, 1]])),
        (Mean(SITE, slice(0, 2)), Mean(SITE, slice(-2, None))),
        (Project(SITE, DIRECTIONS), Project(SITE, -DIRECTIONS)),
        (Features(SITE, transcoder=tiny.transcoder(0), capacity=50),
         Features(SITE, transcoder=tiny.transcoder(2), capacity=50)),
    ],
    ids=["At", "At rows", "Mean", "Project", "Features"],
)  # fmt: skip
def test_another_value_runs_the_same_program(first, other):
    before = reduced(first)
    with compiles() as found:
        after = reduced(other)
    assert len(found) == 0
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert any(moved)


def test_another_k_is_another_program():
    with compiles() as found:
        reduced(TopK(SITE, 17))
    assert len(found) == 1


def test_aliases_and_layers_from_the_end():
    by_alias = reduced(At("blocks.1.hook_resid_post"))
    np.testing.assert_array_equal(by_alias, reduced(At(SITE)))
    np.testing.assert_array_equal(reduced(At("layers.-2.resid_post")), by_alias)
    assert str(At("model.layers.1.mlp")) == "At(layers.1.mlp_proj)"
    assert At(Address("embed")).address == "embed" and not At("embed").every_layer


def test_only_reducers_of_single_tokens_say_so():
    assert [kind.per_token for kind in (At, Mean)] == [False, False]
    assert all(kind.per_token for kind in (Norm, TopK, Project, Features))


# Reducers of one's own


@register_reducer()
class Error(Reducer):
    """What the MLP adds beyond a multiple of what it reads."""

    factor: Any = 1.0

    per_token = True
    reads = ("mlp_in_normed",)

    def reduce(self, x, context):
        return {"error": x - self.factor * context.read("mlp_in_normed")}


def test_a_reducer_of_ones_own():
    kept = reduced(Error("mlp_out", 0.5))["error"]
    expected = whole("mlp_out") - 0.5 * whole("mlp_in_normed")
    assert kept.shape == (LAYERS, B, T, D)
    for a, b in zip(kept, expected, strict=True):
        same_rows(a, b)


def test_what_a_reducer_of_ones_own_must_do():
    with pytest.raises(InputError, match="reads 'mlp_in_normed', which is not computed before"):
        reduced(Error("resid_mid"))

    @dataclasses.dataclass(frozen=True, eq=False)
    class Forgotten(Reducer):
        def reduce(self, x, context):
            return x

    with pytest.raises(InputError, match="put @jaxtc.reducers.register_reducer"):
        reduced(Forgotten("embed"))

    @register_reducer()
    class Silent(Reducer):
        pass

    with pytest.raises(NotImplementedError, match="Silent does not say what it keeps"):
        reduced(Silent("embed"))


# Names


def test_names_of_captures():
    def names(capture):
        asked = understand(capture, LAYERS)
        return [*map(str, asked.addresses), *asked.names]

    assert names("blocks.0.hook_resid_post") == ["layers.0.resid_post"]
    assert names(At("embed")) == ["At(embed)"]
    assert names(["embed", "embed", Norm("q")]) == ["embed", "Norm(q)"]
    assert names({"a": At("embed", 0), "b": At("embed", 1)}) == ["a", "b"]
    with pytest.raises(InputError, match=r"both be called 'At\(embed\)'.*capture={'first': At"):
        names([At("embed", 0), At("embed", 1)])
    for wrong in (3, [None], {"a": 1.0}):
        with pytest.raises(InputError, match="addresses such as"):
            names([wrong] if wrong == 3 else wrong)
    with pytest.raises(InputError, match="named by strings"):
        names({1: "embed"})


# What is refused


REFUSED = {
    "site": (lambda: At("resid_pots"), SiteError, "no site called 'resid_pots'.*resid_post"),
    "no string": (lambda: Norm(3), SiteError, "named by a string"),
    "nested": (lambda: Norm(At("embed")), SiteError, "named by a string, got At"),
    "layer": (lambda: At("layers.3.q"), SiteError, "layer 3.*3 layers: 0 to 2"),
    "outside": (lambda: At("embed", 3), EditError, "position 3 lies outside prompt 2 of 3 tokens"),
    "before": (lambda: At("embed", [0, -4]), EditError, "-4 lies outside prompt 2"),
    "no token": (lambda: At("embed", Token(999)), EditError, "no token at"),
    "rows": (lambda: At("embed", [[1], [2]]), EditError, "a row for each prompt"),
    "fraction": (lambda: At("embed", 0.5), EditError, "whole numbers"),
    "slice": (lambda: At("embed", slice(0, 2)), InputError, "fixed number of positions"),
    "mask": (lambda: At("embed", np.ones(T, bool)), EditError, "mask is on at position 8"),
    "everything": (lambda: At("embed", None), InputError, "capture the address itself"),
    "new": (lambda: Mean("embed", "new"), EditError, "generates none"),
    "empty row": (lambda: Mean("embed", np.eye(B, T, dtype=bool) * [[1], [1], [0]] > 0),
                  InputError, "selects no token of prompt 2"),
    "mean of scores": (lambda: Mean("attn_scores"), SiteError, "read attn_pattern"),
    "norm of scores": (lambda: Norm("attn_scores"), SiteError, "read attn_pattern"),
    "k of 0": (lambda: TopK("logits", 0), InputError, "at least 1"),
    "k of True": (lambda: TopK("logits", True), InputError, "k is True"),
    "k of 2.0": (lambda: TopK("logits", 2.0), InputError, "k is 2.0"),
    "k too large": (lambda: TopK("q", 9), InputError, r"last axis of q \[B T N H\] has 8"),
    "more than the keys": (lambda: TopK("attn_pattern", 10), InputError, "has 9 entries"),
    "width": (lambda: Project("mlp_act", DIRECTIONS), InputError, r"\[5, 24\].*\(K, 40\)"),
    "axes": (lambda: Project("embed", DIRECTIONS[None]), InputError, r"\[1, 5, 24\]"),
    "none": (lambda: Project("embed", DIRECTIONS[:0]), InputError, r"\[0, 24\]"),
    "complex": (lambda: Project("embed", DIRECTIONS * 1j), InputError, "expected real numbers"),
    "words": (lambda: Project("embed", ["a"] * D), InputError, "expected real numbers"),
    "keys": (lambda: Project("attn_pattern", DIRECTIONS), SiteError, "changes with the prompt"),
    "transcoder's width": (lambda: Features("mlp_act", transcoder=tiny.transcoder(1), capacity=3),
                           InputError, "reads D=24.*40 entries"),
    "no transcoder": (lambda: Features("embed", transcoder=3, capacity=3), InputError, "is a int"),
    "by place": (lambda: Features(tiny.transcoder(1), transcoder=None, capacity=3),
                 SiteError, "named by a string, got Transcoder"),
    "homeless": (lambda: Features(transcoder=tiny.transcoder(None), capacity=3),
                 InputError, "does not know its layer"),
    "capacity": (lambda: Features(transcoder=tiny.transcoder(1), capacity=51),
                 CapacityError, "capacity is 51, expected 1 to 50"),
    "no capacity": (lambda: Features(transcoder=tiny.transcoder(1), capacity=0),
                    CapacityError, "capacity is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(JaxtcError, match="(?s)" + message) as caught:
        reduced(make())
    assert type(caught.value) is error
