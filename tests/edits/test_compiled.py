"""Edits of every kind in one program: what compiles it anew, jit, vmap and grad."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import (
    Add,
    Apply,
    Copy,
    Detach,
    Edit,
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
from jaxtc.tap.tap import Tap
from jaxtc.transcoders.transcoder import nameless
from tests.support import taps, tiny
from tests.support.batch import LENGTHS, PROMPTS, D
from tests.support.taps import captured, drawn, random, through
from tests.support.unspared import ClampFeature, ScaleFeature, SetFeature, Splice

# In the compiled program: every kind at once


def T(layer):
    """Without a name, for two to be trees of one structure; a ReLU's, which finite steps need."""
    made = nameless(tiny.transcoder(layer))
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


def kinds():
    """Every kind of edit that users are given."""
    found, todo = set(), [Edit]
    while todo:
        cls = todo.pop()
        more = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("jaxtc.edits.")]
        todo += more
        found |= set() if more else {cls}
    return found


def test_every_kind_is_among_those_tested_here_and_public():
    tested = {type(edit) for edit in whole().values()}
    assert kinds() == tested, "add a case to `kinds` and `where` of whole(), above"
    assert all(getattr(jaxtc, kind.__name__, None) is kind for kind in kinds())


def test_every_kind_is_compared_with_hooks_on_torch():
    texts = [path.read_text() for path in (Path(__file__).parents[1] / "parity").glob("test_*.py")]
    compared = set(re.findall(r"\bjaxtc\.(\w+)", " ".join(texts)))
    missing = {kind.__name__ for kind in kinds()} - compared
    assert not missing, "add it to torch_edits.py, and last to KINDS of test_interventions.py"


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
            if isinstance(value, int) and not isinstance(value, bool):
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
    changed = whole(1)[kind]  # may capture, and so compile, by itself
    with jaxtc.compiles() as found:
        after = logits(edits | {kind: changed})
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
    moves = kind not in STILL
    assert tried == bool(moved) == moves, f"{kind}: with nothing to differentiate, add it to STILL"


def test_mean_of_positions_that_few_prompts_have_has_a_gradient():
    edit = taps.checked([MeanAblate(over="rows", site="resid_post")])

    def total(x):
        tap = Tap((), edit, jnp.broadcast_to(jnp.arange(16), (3, 16)), jnp.asarray(LENGTHS))
        return (tap.at(0)("resid_post", x) ** 2).sum()

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
