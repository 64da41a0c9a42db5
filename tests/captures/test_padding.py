"""Reducers and padding: one's own see none unless they ask, and nothing is kept in its place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import Over, Zero
from jaxtc.captures.reducers import At, Features, Mean, Norm, Project, Reducer, TopK
from jaxtc.captures.reducers import register_reducer as register
from jaxtc.errors import InputError
from jaxtc.programs.program import compiles
from tests.support import tiny
from tests.support.batch import LAYERS, PROMPTS, D, run

# Two of one length, and not in the order of their lengths.
MIXED = [PROMPTS[1], PROMPTS[0], PROMPTS[2], [2, 9, 9, 3, 17]]
LENGTHS = [5, 9, 3, 5]
SITE = "layers.1.resid_post"


@register()
class Plain(Reducer):
    """As a newcomer writes it: nothing in it knows of padding."""

    factor: Any = 1.0

    def reduce(self, x, context):
        length = jnp.full(len(x), x.shape[1])
        return {"mean": x.mean(1) * self.factor, "largest": x.max(1), "length": length}


@register()
class Attended(Reducer):
    """Over both axes of a pattern."""

    def reduce(self, x, context):
        return x.mean((2, 3))


@register()
class Chosen(Reducer):
    """With a position and another site."""

    position: Any = None
    reads = ("mlp_in_normed",)

    def reduce(self, x, context):
        on = self.position.selects(context.positions)[..., None]
        return jnp.sum(x * on, 1) - context.read("mlp_in_normed").mean(1)


@register()
class Masked(Reducer):
    """Asks for padding."""

    padded = True

    def reduce(self, x, context):
        assert x.shape[1] == 16
        return jnp.mean(x, 1, where=context.real[..., None])


@register()
class Whole(Reducer):
    def reduce(self, x, context):
        return 2 * x


@register()
class Overall(Reducer):
    def reduce(self, x, context):
        return x.mean((0, 1))


@register()
class Doubled(Reducer):
    per_token = True

    def reduce(self, x, context):
        return jnp.stack([x, 2 * x], -1)


@register()
class Turned(Reducer):
    per_token = True

    def reduce(self, x, context):
        return jnp.moveaxis(x, 1, 0)


def kept(reducer, prompts=MIXED, **options):
    found = run(prompts, capture=[reducer], logits=None, **options)
    return jax.tree.map(np.asarray, found.activations[str(reducer)])


def site(address, prompt):
    """(T, ...) of one prompt, or (L, T, ...)."""
    x = np.asarray(run([prompt], capture=[address], logits=None).activations[address], np.float64)
    return x[:, 0] if x.shape[0] == LAYERS else x[0]


def near(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# What they see


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 1, 2, 3], [3, 0]])
def test_ones_own_sees_exactly_the_tokens_of_each_prompt(rows):
    found = kept(Plain(SITE, 2.0), [MIXED[i] for i in rows])
    for at, row in enumerate(rows):
        x = site(SITE, MIXED[row])
        near(found["mean"][at], 2 * x.mean(0))
        near(found["largest"][at], x.max(0))
        assert found["length"][at] == LENGTHS[row]


def test_every_layer_and_every_axis_over_tokens():
    for name in ("resid_post", "k", "head_out"):
        found = kept(Plain(name))["mean"]
        for row, prompt in enumerate(MIXED):
            near(found[:, row], site(name, prompt).mean(1))
    found = kept(Attended("attn_pattern"))
    for row, prompt in enumerate(MIXED):
        near(found[:, row], site("attn_pattern", prompt).mean((2, 3)))
    near(found[0, :, 0], [1 / n for n in LENGTHS])  # each query attends with a sum of 1


@pytest.mark.parametrize(
    ("position", "chosen"),
    [
        (-1, lambda x: x[-1]),
        ([0, -2], lambda x: x[0] + x[-2]),
        (slice(1, None), lambda x: x[1:].sum(0)),
        (np.eye(4, 9, dtype=bool), None),
    ],
)
def test_positions_and_other_sites_are_those_of_the_prompt(position, chosen):
    found = kept(Chosen("layers.0.mlp_out", position))
    for row, prompt in enumerate(MIXED):
        x, other = (site(f"layers.0.{name}", prompt) for name in ("mlp_out", "mlp_in_normed"))
        near(found[row], (x[row] if chosen is None else chosen(x)) - other.mean(0))


def test_one_that_asks_for_padding_gets_it_and_masks_it_itself():
    near(kept(Masked(SITE)), kept(Plain(SITE))["mean"])
    with compiles() as found:
        kept(Masked(SITE), [MIXED[1], MIXED[1], MIXED[0], MIXED[2]])
    assert len(found) == 0  # other lengths of one bucket


def test_lengths_are_part_of_the_program_only_where_they_must_be():
    kept(Plain("embed"), MIXED[:2])
    with compiles() as found:
        kept(Plain("embed", 3.0), [MIXED[3], MIXED[1]])
    assert len(found) == 0
    with compiles() as found:
        kept(Plain("embed"), MIXED[1::-1])
    assert [one.because for one in found] == ["prompt lengths: 9, 5 (was 5, 9)"]


def test_the_width_of_an_array_is_not_its_length():
    ids = np.zeros((2, 9), np.int32)
    for row, prompt in enumerate(MIXED[:2]):
        ids[row, : len(prompt)] = prompt
    found = run(ids, lengths=LENGTHS[:2], capture=[Plain(SITE)], logits=None).activations
    near(found[f"Plain({SITE})"]["mean"][0], site(SITE, MIXED[0]).mean(0))


def test_in_a_sweep():
    edit = Zero(site="mlp_out", layer=Over(range(2)))
    for reducer in (Plain(SITE), Masked(SITE)):
        found = jaxtc.sweep(tiny.model(), MIXED, [edit], capture=reducer, logits=None,
                            of=lambda result: list(result.activations.values()))  # fmt: skip
        values = found.values[0]
        values = values["mean"] if isinstance(reducer, Plain) else values
        for layer in range(2):
            for row, prompt in enumerate(MIXED):
                one = kept(Plain(SITE), [prompt], edits=[Zero(site="mlp_out", layer=layer)])
                near(values[layer, row], one["mean"][0])


def test_inside_a_jit_of_ones_own():
    reducer = Plain(SITE)

    def mean(tokens, lengths):
        found = run(tokens, lengths=lengths, capture=reducer, logits=None)
        return found.activations[str(reducer)]["mean"]

    tokens = np.array([MIXED[1], MIXED[0] + [0] * 4])
    near(jax.jit(lambda tokens: mean(tokens, [9, 5]))(tokens)[1], site(SITE, MIXED[0]).mean(0))
    with pytest.raises(InputError, match="here they are traced.*`padded = True`"):
        jax.jit(mean)(tokens, jnp.array([9, 5]))


def test_gradients_flow_through_it():
    def total(prompts, vector, row):
        add = jaxtc.Add(vector, site="layers.0.resid_post")
        found = run(prompts, capture=Plain(SITE), edits=[add], logits=None).activations
        return jnp.square(found[f"Plain({SITE})"]["mean"][row]).sum()

    vector = jnp.ones(D)
    for row, prompt in enumerate(MIXED):
        slope = jax.grad(lambda v, row=row: total(MIXED, v, row))(vector)
        near(slope, jax.grad(lambda v, prompt=prompt: total([prompt], v, 0))(vector))


def test_memory_is_that_of_what_is_kept():
    shapes = jaxtc.estimate(tiny.model(), MIXED, capture=Plain("resid_post")).shapes
    given = jax.tree.map(np.shape, kept(Plain("resid_post")))
    assert jax.tree.map(lambda x: x.shape, shapes["Plain(resid_post)"]) == given


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (Whole(SITE), r"\(1, 3, 24\) of a prompt of 3 tokens and \(1, 5, 24\).*per_token = True"),
        (Overall(SITE), r"keeps \(24,\) of one prompt, of 9 tokens.*axis B in front"),
        (Turned(SITE), r"says `per_token = True`.*axes B T of resid_post.*\(3, 16\)"),
    ],
)
def test_what_does_not_fit_together_says_what_to_do(reducer, message):
    with pytest.raises(InputError, match=message):
        kept(reducer, PROMPTS)


# What is kept at padding


def of_tokens():
    transcoder = tiny.transcoder(1)
    return {
        "all": Features(transcoder=transcoder, capacity=50),
        "few": Features("resid_mid", transcoder=transcoder, capacity=30),
        "size": Norm("k"),
        "top": TopK("attn_pattern", 2),
        "project": Project(SITE, np.ones((2, D))),
        "own": Doubled("embed"),
    }


BLANK = {  # the axis over tokens, and what stands at padding
    "all": (1, [0, range(50), 0]), "few": (2, [0, range(30), 0]), "size": (2, [0]),
    "top": (3, [0, -1]), "project": (1, [0]), "own": (1, [0]),
}  # fmt: skip


def check_blank(activations, lengths):
    for name, (axis, blanks) in BLANK.items():
        leaves = jax.tree.leaves(activations[name])
        assert len(leaves) == len(blanks)
        for leaf, blank in zip(leaves, blanks, strict=True):
            for row, length in enumerate(lengths):
                mine = np.moveaxis(
                    np.take(np.asarray(leaf), row, axis=min(axis - 1, 1)), axis - 1, 0
                )
                past = mine[length:]
                np.testing.assert_array_equal(past, np.broadcast_to(blank, past.shape))


def test_nothing_is_kept_at_padding_in_a_run():
    found = run(MIXED, capture=of_tokens(), logits=None)
    check_blank(found.activations, LENGTHS)
    counts = np.asarray(found.activations["all"].count)
    assert (counts[np.asarray(found.mask)] > 0).any()
    for row, prompt in enumerate(MIXED):
        alone = run([prompt], capture=of_tokens(), logits=None).activations
        np.testing.assert_array_equal(counts[row, : LENGTHS[row]], alone["all"].count[0])
        near(found.activations["own"][row, : LENGTHS[row]], alone["own"][0])
        near(found.activations["all"].values[row, : LENGTHS[row]], alone["all"].values[0])


def test_nothing_is_kept_at_padding_in_a_sweep():
    found = jaxtc.sweep(
        tiny.model(), MIXED, [jaxtc.Scale(Over([1.0, 3.0]), site="embed")], capture=of_tokens(),
        logits=None, of=lambda result: dict(result.activations),
    )  # fmt: skip
    for variant in range(2):
        check_blank(jax.tree.map(lambda x, v=variant: x[v], found.values), LENGTHS)


def test_nothing_is_kept_at_padding_nor_past_the_end_in_a_generation():
    free = jaxtc.generate(tiny.model(), MIXED, 9, stop=()).tokens
    stop = free[0][2]  # ends the first row after its third token, at the latest
    found = jaxtc.generate(tiny.model(), MIXED, 9, stop=stop, capture=of_tokens())
    lengths = found.lengths.tolist()
    assert len(set(lengths)) > 1 and lengths[0] <= LENGTHS[0] + 2
    check_blank(found.activations, lengths)
    for row, sequence in enumerate(found.sequences):
        again = run([sequence[: lengths[row]]], capture=of_tokens(), logits=None).activations
        np.testing.assert_array_equal(
            found.activations["all"].count[row, : lengths[row]], again["all"].count[0]
        )


def test_padding_does_not_trip_a_capacity():
    """The tokens' own largest count is room enough, whatever padding would have."""
    reducer = Features(transcoder=tiny.transcoder(1), capacity=50)
    for prompts in ([PROMPTS[2]], MIXED):
        most = int(kept(reducer, prompts).count.max())
        tight = kept(Features(transcoder=tiny.transcoder(1), capacity=most), prompts)
        assert np.isfinite(tight.values).all() and tight.count.max() == most


def test_those_that_see_padding_say_so():
    assert [kind.padded for kind in (At, Mean, Plain, Masked)] == [True, True, False, True]
