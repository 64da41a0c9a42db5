"""Generation: equal to running the whole text anew for each token, edits and captures included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import Add, Detach, Scale, SetTo, compiles
from jaxtc.captures.reducers import At, Features, Mean, Norm, Project, TopK
from jaxtc.errors import EditError, InputError, JaxtcError, SiteError
from jaxtc.model.gemma2 import Gemma2
from jaxtc.tap.sites import SITES
from tests.support import tiny
from tests.support.unspared import SetFeature, Splice

CONFIG = tiny.config()
PROMPTS = [[2, 5, 7, 9, 4, 11, 6, 8, 3], [2, 6, 4, 10, 12], [2, 13, 5]]
NEW = 8
VECTOR = 3 * jnp.asarray(np.random.default_rng(0).standard_normal(CONFIG.hidden_size), jnp.float32)


@pytest.fixture(scope="module")
def model():
    """Gains large enough that texts do not repeat one token."""
    made = Gemma2(CONFIG, rngs=nnx.Rngs(1))
    key = jax.random.key(0)
    for index, layer in enumerate(made.layers):
        for norm in (layer.attn_out_norm, layer.mlp_out_norm):
            draw = jax.random.normal(jax.random.fold_in(key, index), norm.weight.shape)
            norm.weight[...] = 6 + draw
    return made


def slowly(model, prompt, steps=NEW, edits=()):
    """One full pass a token. A position stays where it was in the prompt."""
    text = list(prompt)
    for _ in range(steps):
        fixed = [at(edit, prompt) for edit in edits]
        fitting = [edit for edit in fixed if edit.position is None or edit.position < len(text)]
        # All in one shape, so that one program serves every step.
        rows = np.full((1, 16), 0)
        rows[0, : len(text)] = text
        logits = jaxtc.run(model, rows, lengths=[len(text)], edits=fitting).logits
        text.append(int(logits[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


def at(edit, prompt):
    """The edit with its position counted from the front."""
    if edit.position is None or edit.position >= 0:
        return edit
    return dataclasses.replace(edit, position=edit.position + len(prompt))


EDITS = {
    "none": [],
    "everywhere": [Add(VECTOR, site="resid_post", layer=1)],
    "at the last of the prompt": [Add(VECTOR, site="resid_post", layer=0, position=-1)],
    "inside the prompt": [SetTo(VECTOR[:8], site="layers.1.v", position=1)],
    "at a new token": [Add(5 * VECTOR, site="resid_mid", layer=0, position=-1),
                       Add(-VECTOR, site="resid_mid", position=6)],
    "transcoder": [Splice(tiny.transcoder(1)), Detach(site="attn_pattern")],
    "logits": [SetTo(jnp.arange(CONFIG.vocab_size) == 9, site="logits", position=-1)],
}  # fmt: skip


@pytest.mark.parametrize("kind", EDITS)
def test_equals_full_passes(model, kind):
    prompt = PROMPTS[1]
    found = jaxtc.generate(model, prompt, NEW, edits=EDITS[kind], stop=())
    assert found.tokens == [slowly(model, prompt, edits=EDITS[kind])]
    assert found.prompts == [prompt] and found.sequences == [prompt + found.tokens[0]]
    plain = jaxtc.generate(model, prompt, NEW, stop=()).tokens
    assert len(set(plain[0])) >= 4
    assert (found.tokens == plain) == (kind == "none")


def test_a_batch_gives_each_prompt_its_own_text(model):
    together = jaxtc.generate(model, PROMPTS, NEW, stop=())
    assert together.prompts == PROMPTS
    for prompt, tokens in zip(PROMPTS, together.tokens, strict=True):
        assert jaxtc.generate(model, prompt, NEW, stop=()).tokens == [tokens]
    padded = np.zeros((3, 9), int)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    lengths = [len(prompt) for prompt in PROMPTS]
    again = jaxtc.generate(model, padded, NEW, lengths=lengths, stop=())
    assert (again.prompts, again.tokens) == (together.prompts, together.tokens)


def test_edits_of_one_row_leave_the_others(model):
    plain = jaxtc.generate(model, PROMPTS, NEW, stop=()).tokens
    edit = Add(VECTOR, site="resid_post", layer=1, row=1)
    found = jaxtc.generate(model, PROMPTS, NEW, edits=[edit], stop=()).tokens
    alone = jaxtc.generate(
        model, PROMPTS[1], NEW, edits=[Add(VECTOR, site="resid_post", layer=1)], stop=()
    ).tokens
    assert found == [plain[0], alone[0], plain[2]] and alone[0] != plain[1]


def test_stops(model):
    whole = jaxtc.generate(model, PROMPTS, NEW, stop=()).tokens
    stop = whole[0][3]
    found = jaxtc.generate(model, PROMPTS, NEW, stop=[stop]).tokens
    for cut, row in zip(found, whole, strict=True):
        end = row.index(stop) + 1 if stop in row else NEW
        assert cut == row[:end]
    assert len(found[0]) <= 4


def test_the_default_stop_is_the_configs(model):
    whole = jaxtc.generate(model, PROMPTS[0], NEW, stop=()).tokens[0]
    for eos in (whole[2], (whole[2], 0), None):
        other = Gemma2.abstract(dataclasses.replace(CONFIG, eos_token_id=eos))
        nnx.update(other, nnx.state(model))
        end = NEW if eos is None else whole.index(whole[2]) + 1
        assert jaxtc.generate(other, PROMPTS[0], NEW).tokens == [whole[:end]]


# As given to generate, and the same of one run over texts whose prompts have these lengths (B, 1).
PHASES = {
    "none": ([], lambda lengths: []),
    "both": (
        [Add(VECTOR, site="resid_post", layer=1), Scale(0.5, site="attn_heads", head=2)],
        lambda lengths: PHASES["both"][0],
    ),
    "prompt": (
        [Add(VECTOR, site="resid_mid", layer=0, position="prompt")],
        lambda lengths: [
            Add(VECTOR, site="resid_mid", layer=0, position=columns(lengths) < lengths)
        ],
    ),
    "new": (
        [Scale(-1.0, site="mlp_out", layer=2, position="new")],
        lambda lengths: [Scale(-1.0, site="mlp_out", layer=2, position=fed_back(lengths))],
    ),
    "ends of prompts, some new tokens": (
        [SetTo(VECTOR, site="resid_pre", layer=1, position=-1),
         SetTo(VECTOR[:8], site="v", position=10, row=0)],
        lambda lengths: [SetTo(VECTOR, site="resid_pre", layer=1, position=lengths - 1),
                         SetTo(VECTOR[:8], site="v", position=10, row=0)],
    ),
    "transcoder": (
        [Splice(tiny.transcoder(1)),
         SetFeature(tiny.transcoder(1), 7, 9.0, position=slice(1, None))],
        lambda lengths: PHASES["transcoder"][0],
    ),
}  # fmt: skip


def columns(lengths):
    """Positions of the longest text that is run, (1, T)."""
    return np.arange(max(lengths.ravel()) + NEW - 1)[None]


def fed_back(lengths):
    """(B, T) booleans: new tokens but the last."""
    return (columns(lengths) >= lengths) & (columns(lengths) < lengths + NEW - 1)


def own(site, x, length):
    """What belongs to a row's own tokens."""
    axes = site.axes.split()[1:]
    return np.asarray(x)[tuple(slice(length if letter in "TS" else None) for letter in axes)]


@pytest.mark.parametrize("kind", PHASES)
def test_captures_over_the_steps_equal_one_run(model, kind):
    """Every site of every layer; the window is smaller than two prompts, and two are padded."""
    given, of_run = PHASES[kind]
    sites = [site.name for site in SITES]
    found = jaxtc.generate(model, PROMPTS, NEW, edits=given, capture=sites, stop=())
    lengths = np.array([[len(prompt)] for prompt in PROMPTS])
    assert found.lengths.tolist() == (lengths[:, 0] + NEW - 1).tolist()
    plain = jaxtc.generate(model, PROMPTS, NEW, stop=()).tokens
    assert (found.tokens == plain) == (kind == "none")
    texts = [text[:-1] for text in found.sequences]
    whole = jaxtc.run(model, texts, edits=of_run(lengths), capture=sites)
    for row, (start, length) in enumerate(zip(lengths[:, 0], found.lengths, strict=True)):
        assert whole.logits[row, start - 1 : length].argmax(-1).tolist() == found.tokens[row]
    assert list(found.activations) == list(whole.activations)
    for address in whole.activations:
        site = next(s for s in SITES if s.name == address.split(".")[-1])
        ours, wanted = found.activations[address], whole.activations[address]
        assert ours.shape == wanted.shape and ours.dtype == wanted.dtype
        for row, length in enumerate(found.lengths):
            a, b = own(site, ours[row], length), own(site, wanted[row], length)
            seen = b > -1e30  # not masked
            assert (seen == (a > -1e30)).all()
            scale = max(np.abs(b[seen]).max(), 1e-3)
            np.testing.assert_allclose(a[seen], b[seen], atol=1e-5 * scale, rtol=0)


def test_reducers_of_each_token(model):
    wanted = {
        "size": Norm("resid_post"),
        "next": TopK("logits", 3),
        "read": TopK("layers.1.attn_pattern", 2),
        "probe": Project("layers.1.resid_mid", VECTOR),
        "features": Features(transcoder=tiny.transcoder(1), capacity=50),
        "whole": "layers.0.q",
    }
    rows = {"size": 1}
    tokens = {"size": 2, "read": 2}
    found = jaxtc.generate(model, PROMPTS, NEW, capture=wanted, stop=())
    texts = [text[:-1] for text in found.sequences]
    whole = jaxtc.run(model, texts, capture=wanted).activations
    assert found.activations["size"].shape == (3, 3, 9 + NEW - 1)
    for name in wanted:
        parts = jax.tree.leaves(found.activations[name]), jax.tree.leaves(whole[name])
        for ours, theirs in zip(*parts, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            for row, length in enumerate(found.lengths):
                at = [slice(None)] * ours.ndim
                at[rows.get(name, 0)], at[tokens.get(name, 1)] = row, slice(length)
                a, b = ours[tuple(at)], theirs[tuple(at)]
                np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


def test_a_row_that_stops_keeps_its_own_tokens_only(model):
    whole = jaxtc.generate(model, PROMPTS, NEW, stop=())
    stop = whole.tokens[1][2]
    found = jaxtc.generate(model, PROMPTS, NEW, capture="resid_post", stop=stop)
    alone = jaxtc.generate(model, PROMPTS[1], NEW, capture="resid_post", stop=stop)
    count = len(found.tokens[1])
    assert count < NEW == max(map(len, found.tokens))
    assert (
        found.lengths[1] == len(PROMPTS[1]) + count - 1 == alone.activations["resid_post"].shape[2]
    )
    np.testing.assert_allclose(
        found.activations["resid_post"][:, 1, : found.lengths[1]],
        alone.activations["resid_post"][:, 0], rtol=1e-4, atol=1e-4,
    )  # fmt: skip


SAMPLED = {"temperature": 1.5, "top_k": 12, "top_p": 0.95, "stop": ()}


def test_a_seed_gives_the_same_text_whatever_stands_around_it(model):
    found = jaxtc.generate(model, PROMPTS, NEW, seed=4, **SAMPLED).tokens
    assert jaxtc.generate(model, PROMPTS, NEW, seed=jax.random.key(4), **SAMPLED).tokens == found
    other = jaxtc.generate(model, PROMPTS, NEW, seed=5, **SAMPLED).tokens
    greedy = jaxtc.generate(model, PROMPTS, NEW, stop=()).tokens
    assert all(a != b and a != c for a, b, c in zip(found, other, greedy, strict=True))
    # Other neighbours, of other lengths, and none at all.
    changed = jaxtc.generate(model, [PROMPTS[0], PROMPTS[1], [2]], NEW, seed=4, **SAMPLED).tokens
    assert changed[:2] == found[:2] and changed[2] != found[2]
    assert jaxtc.generate(model, PROMPTS[0], NEW, seed=4, **SAMPLED).tokens == found[:1]
    # A row of its own: the same prompt twice is two texts.
    twice = jaxtc.generate(model, [PROMPTS[0]] * 3, NEW, seed=4, **SAMPLED).tokens
    assert twice[0] == found[0] and len(set(map(tuple, twice))) == 3


def test_a_text_cut_short_goes_on_as_it_did(model):
    """Whether a token was chosen after the prompts' pass or after a step makes no difference."""
    found = jaxtc.generate(model, PROMPTS, NEW, seed=1, **SAMPLED)
    cut = [text[: -(NEW - k)] for k, text in zip((3, 1, 5), found.sequences, strict=True)]
    again = jaxtc.generate(model, cut, NEW - 5, seed=1, **SAMPLED)
    for k, new, old in zip((3, 1, 5), again.tokens, found.tokens, strict=True):
        assert new == old[k : k + NEW - 5]


def test_top_k_of_one_and_a_tiny_p_are_greedy(model):
    greedy = jaxtc.generate(model, PROMPTS, NEW, stop=()).tokens
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        found = jaxtc.generate(model, PROMPTS, NEW, temperature=2, stop=(), **options)
        assert found.tokens == greedy


@pytest.mark.parametrize("ahead", [True, False])
def test_streaming(model, ahead):
    whole = jaxtc.generate(model, PROMPTS, NEW, stop=()).tokens
    stop = [whole[0][2]] if not ahead else []
    seen = []
    found = jaxtc.generate(
        model, PROMPTS, NEW, stop=stop, stream=lambda step, ids: seen.append((step, ids))
    )
    assert [step for step, _ in seen] == list(range(max(map(len, found.tokens))))
    rows = zip(*(ids for _, ids in seen), strict=True)
    for row, tokens in zip(rows, found.tokens, strict=True):
        assert list(row) == tokens + [None] * (len(row) - len(tokens))
    assert ahead or any(None in ids for _, ids in seen)


def test_a_stream_can_end_it(model):
    whole = jaxtc.generate(model, PROMPTS, NEW, stop=()).tokens
    found = jaxtc.generate(
        model, PROMPTS, NEW, stop=(), capture="logits", stream=lambda step, ids: step == 3
    )
    assert found.tokens == [row[:4] for row in whole]
    assert found.activations["logits"].shape[1] == 9 + 3
    assert found.lengths.tolist() == [len(prompt) + 3 for prompt in PROMPTS]


def test_one_program_a_step(model):
    def edits(layer, value, position):
        return [Add(value * VECTOR, site="mlp_out", layer=layer, position=position)]

    with compiles() as found:
        jaxtc.generate(model, PROMPTS[1], NEW, edits=edits(0, 1.0, 0), stop=())
    assert len(found) <= 2
    with compiles() as found:
        jaxtc.generate(model, PROMPTS[2], NEW + 2, edits=edits(2, 2.0, 7), stop=[3, 4])
        for seed, temperature, k, p in ((1, 0.5, 3, None), (2, 1, None, 0.5), (3, 0, 2, 0.1)):
            jaxtc.generate(
                model, PROMPTS[1], 3, edits=edits(1, 0.0, -1), stop=5, seed=seed,
                temperature=temperature, top_k=k, top_p=p,
            )  # fmt: skip
    assert len(found) == 0, found


def test_to_the_end_of_the_context(model):
    context = CONFIG.max_position_embeddings
    found = jaxtc.generate(model, PROMPTS[0], context - 9, stop=()).sequences[0]
    assert len(found) == context
    assert found[-1] == int(jaxtc.run(model, found[:-1], logits="last").logits.argmax())


@pytest.mark.parametrize(
    ("tokens", "count", "options", "error", "message"),
    [
        (PROMPTS, 0, {}, InputError, "max_new_tokens is 0"),
        (PROMPTS, 2.0, {}, InputError, "max_new_tokens is 2.0"),
        (PROMPTS, True, {}, InputError, "max_new_tokens is True"),
        (PROMPTS, 32, {}, InputError, "9 tokens and 32 new ones is longer"),
        ([], 2, {}, InputError, "is empty"),
        ([99], 2, {}, InputError, "Token id 99"),
        ([2, 5], 3, {"edits": [Add(VECTOR, site="mlp_out", position=4)]}, EditError, "position 4"),
        ([2, 5], 3, {"edits": [Add(VECTOR, site="mlp_out", row=1)]}, EditError, "rows 0 to 0"),
        ([2, 5], 3, {"edits": [Add(VECTOR[:3], site="mlp_out")]}, EditError, "does not broadcast"),
        ([2, 5], 3, {"temperature": -0.1}, InputError, "temperature is -0.1"),
        ([2, 5], 3, {"temperature": float("nan")}, InputError, "temperature is nan"),
        ([2, 5], 3, {"temperature": float("inf")}, InputError, "temperature is inf"),
        ([2, 5], 3, {"temperature": "hot"}, InputError, "temperature is 'hot'"),
        ([2, 5], 3, {"top_p": 0.0}, InputError, "top_p is 0.0"),
        ([2, 5], 3, {"top_p": 1.01}, InputError, "top_p is 1.01"),
        ([2, 5], 3, {"top_p": float("nan")}, InputError, "top_p is nan"),
        ([2, 5], 3, {"top_k": 0}, InputError, "top_k is 0"),
        ([2, 5], 3, {"top_k": 2.5}, InputError, "top_k is 2.5"),
        ([2, 5], 3, {"top_k": True}, InputError, "top_k is True"),
        ([2, 5], 3, {"seed": -1}, InputError, "seed is -1"),
        ([2, 5], 3, {"seed": 2**32}, InputError, "seed is 4294967296"),
        ([2, 5], 3, {"seed": 0.5}, InputError, "seed is 0.5"),
        ([2, 5], 3, {"seed": jax.random.key(0, impl="rbg")}, InputError, "threefry2x32"),
        ([2, 5], 3, {"seed": jax.random.split(jax.random.key(0))}, InputError, "a single"),
        ([2, 5], 3, {"stop": 19}, InputError, "0 to 18"),
        ([2, 5], 3, {"stop": "<eos>"}, InputError, "stop is '<eos>'"),
        ([2, 5], 3, {"stop": [1, -1]}, InputError, "expected token ids"),
        ([2, 5], 3, {"capture": "mlp_outt"}, SiteError, "mlp_out"),
        ([2, 5], 3, {"capture": "layers.3.mlp_out"}, SiteError, "layers: 0 to 2"),
        ([2, 5], 3, {"capture": At("resid_post")}, InputError, "sees new ones one by one"),
        ([2, 5], 3, {"capture": Mean("resid_post")}, InputError, "TopK, Project, Features"),
        (
            [2, 5],
            1,
            {"edits": [Add(1.0, site="mlp_out", position="new")]},
            EditError,
            "'new' names",
        ),
        ([2, 5], 3, {"edits": [Add(jnp.nan, site="mlp_out")]}, JaxtcError, "computed NaN"),
        ([2, 5], 3, {"edits": [Add(jnp.nan, site="mlp_out")], "temperature": 1}, JaxtcError, "NaN"),
        (PROMPTS, 3, {"edits": [SetTo(-jnp.inf, site="logits", row=1)]}, JaxtcError, "prompt 1"),
    ],
)
def test_refused(model, tokens, count, options, error, message):
    with pytest.raises(error, match=message):
        jaxtc.generate(model, tokens, count, **options)


def test_the_last_position_that_is_fed_back(model):
    edit = Add(VECTOR, site="mlp_out", position=3)
    assert len(jaxtc.generate(model, [2, 5], 3, edits=[edit], stop=()).tokens[0]) == 3


def test_not_inside_a_trace(model):
    with pytest.raises(InputError, match="cannot run inside jit"):
        jax.jit(lambda t: jaxtc.generate(model, t, 2).tokens)(jnp.array([[2, 5]]))

    def edited(position):
        edits = [Add(VECTOR, site="mlp_out", position=position)]
        return jaxtc.generate(model, [2, 5], 2, edits=edits).tokens

    with pytest.raises(InputError, match="cannot run inside jit"):
        jax.jit(edited)(0)
