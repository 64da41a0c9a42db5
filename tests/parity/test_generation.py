"""Greedy generation, token for token what transformers' ``generate`` gives with its cache."""

import pytest
import torch

import jaxtc
from tests.parity import reference
from tests.parity.oracles import EMBEDDED

NEW = 128


@pytest.fixture(scope="module")
def expected(models):
    """Of each oracle, the continuation of each prompt run by itself, and the closest call."""
    kept = {}

    def of(oracle) -> list[list[int]]:
        if oracle.name not in kept:
            model = models(oracle)[1]
            kept[oracle.name] = [alone(model, prompt) for prompt in oracle.prompts]
        return kept[oracle.name]

    return of


def alone(model, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits).topk(2).values
    # Were two tokens all but tied, the rounding of either framework would choose between them.
    assert (best[..., 0] - best[..., 1]).min() > 2e-3
    return out.sequences[0, len(prompt) :].tolist()


def test_one_prompt(oracle, models, expected):
    ours, _ = models(oracle)
    for prompt, tokens in zip(oracle.prompts, expected(oracle), strict=True):
        assert len(tokens) == NEW
        assert jaxtc.generate(ours, prompt, NEW, stop=()).tokens == [tokens]


def test_prompts_of_different_lengths(oracle, models, expected):
    ours, _ = models(oracle)
    assert len(set(map(len, oracle.prompts))) > 1
    assert jaxtc.generate(ours, oracle.prompts, NEW, stop=()).tokens == expected(oracle)


def test_the_reference_batched(oracle, models):
    ours, model = models(oracle)
    ids, mask = reference.pad(oracle.prompts, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    tokens = out[:, ids.shape[1] :].tolist()
    assert jaxtc.generate(ours, oracle.prompts, NEW, stop=()).tokens == tokens


def test_the_texts_are_worth_comparing(oracle, expected):
    """A model that repeats one token would hide a wrong cache."""
    # The embedded one ends its sentence and then has nothing more to say.
    least = 3 if oracle.name == EMBEDDED else 8
    for tokens in expected(oracle):
        assert len(set(tokens)) >= least


def test_stop_token(oracle, models, expected):
    ours, model = models(oracle)
    prompt, tokens = oracle.prompts[0], expected(oracle)[0]
    stop = tokens[2]
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=stop
    )
    got = jaxtc.generate(ours, prompt, NEW, stop=[stop])
    assert got.tokens == [out[0, len(prompt) :].tolist()]
    assert got.tokens[0][-1] == stop and len(got.tokens[0]) <= 3
