"""Greedy generation: equal to running the whole text anew for each token, edits included."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import Add, Detach, SetTo, Splice
from jaxtc.errors import EditError, InputError
from jaxtc.model import Gemma2
from tests.unit import tiny

CONFIG = tiny.config()
PROMPTS = [[2, 5, 7, 9, 4, 11, 6, 8, 3], [2, 6, 4, 10, 12], [2, 13, 5]]
NEW = 8
VECTOR = 3 * jnp.asarray(np.random.default_rng(0).standard_normal(CONFIG.hidden_size), jnp.float32)
module = importlib.import_module("jaxtc.generate")


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
    assert again == together


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


def test_one_program_a_step(model):
    edit = lambda layer: [Add(VECTOR, site="mlp_out", layer=layer, position=0)]  # noqa: E731
    jaxtc.generate(model, PROMPTS[1], NEW, edits=edit(0), stop=())
    before = module._step._cache_size(), module._prefill._cache_size()
    jaxtc.generate(model, PROMPTS[2], NEW + 2, edits=edit(2), stop=())
    assert (module._step._cache_size(), module._prefill._cache_size()) == before


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
