"""Prompts of mixed lengths, padded as tokenizers do: each gives its own single-prompt numbers."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import jaxtc
from jaxtc import Add, KnockOut, Over, PerLayer, SetFeature, SetTo, Splice, Token, metrics, scores
from jaxtc.errors import EditError, InputError
from jaxtc.model.prompts import prepare
from jaxtc.reducers import At, Features, Mean, Norm, TopK
from jaxtc.tap.sites import BY_NAME, SITES
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, D

PAD, T = 0, max(LENGTHS)
LEFT = [T - n for n in LENGTHS]


def padded(starts, width=T, fill=PAD):
    """(ids, attention mask) of rows in which the prompts begin at these columns."""
    ids, mask = np.full((len(PROMPTS), width), fill), np.zeros((len(PROMPTS), width), int)
    for row, (prompt, start) in enumerate(zip(PROMPTS, starts, strict=True)):
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def batch(starts, **options):
    ids, mask = padded(starts, **options)
    return {"input_ids": ids, "attention_mask": mask}


# (what is given as tokens, other arguments, where each prompt begins)
FORMS = {
    "a list of lists": (lambda: (PROMPTS, {}), [0] * 3),
    "right, lengths": (lambda: (padded([0] * 3)[0], {"lengths": LENGTHS}), [0] * 3),
    "right, mask": (lambda: (padded([0] * 3)[0], {"attention_mask": padded([0] * 3)[1]}), [0] * 3),
    "left, mask": (lambda: (padded(LEFT)[0], {"attention_mask": padded(LEFT)[1]}), LEFT),
    "left, filled with what is no id": (
        lambda: (padded(LEFT, fill=-100)[0], {"attention_mask": padded(LEFT)[1] == 1}), LEFT,
    ),
    "left, a BatchEncoding": (lambda: (BatchEncoding(batch(LEFT)), {}), LEFT),
    "left, lists": (
        lambda: ({name: x.tolist() for name, x in batch(LEFT).items()}, {}), LEFT,
    ),
    "left, torch": (
        lambda: (BatchEncoding({n: torch.tensor(x) for n, x in batch(LEFT).items()}), {}), LEFT,
    ),
    "left, jax": (lambda: ({n: jnp.asarray(x) for n, x in batch(LEFT).items()}, {}), LEFT),
    "both sides": (lambda: (batch([1, 3, 0], width=T + 2), {}), [1, 3, 0]),
    "wider than the bucket of the longest": (lambda: (batch([9, 12, 0], width=18), {}), [9, 12, 0]),
    "encodings one by one": (lambda: ([{"input_ids": p} for p in PROMPTS], {}), [0] * 3),
}  # fmt: skip
SOME = ["a list of lists", "left, mask", "both sides"]


def near(found, expected):
    """To 1e-6 of the largest number: other batches add up in another order."""
    size = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * size)


@functools.cache
def alone(row):
    """A prompt by itself: every site and all logits."""
    sites = [site.name for site in SITES]
    return jaxtc.run(tiny.model(), PROMPTS[row], capture=sites)


def own(site, x, start, count):
    """One row (T, ...) of a site, that prompt's own columns only."""
    letters = [letter for letter in site.letters if letter != "B"]
    return x[tuple(slice(start, start + count) if a in "TS" else slice(None) for a in letters)]


@pytest.mark.parametrize("form", FORMS)
def test_run(form):
    make, starts = FORMS[form]
    tokens, options = make()
    found = jaxtc.run(tiny.model(), tokens, capture=[site.name for site in SITES], **options)
    columns = padded(starts, found.length)
    np.testing.assert_array_equal(found.tokens * found.mask, columns[0])
    np.testing.assert_array_equal(found.mask, columns[1] == 1)
    assert found.lengths.tolist() == LENGTHS
    assert found.last.tolist() == [s + n - 1 for s, n in zip(starts, LENGTHS, strict=True)]
    np.testing.assert_array_equal(found.counted, found.mask & (found.tokens != 2))
    for row, (start, n) in enumerate(zip(starts, LENGTHS, strict=True)):
        single = alone(row)
        near(found.logits[row, start : start + n], single.logits[0])
        for site in SITES:
            here, there = found.activations[site.name], single.activations[site.name]
            for layer in range(LAYERS) if site.per_layer else [None]:
                mine, its = (x if layer is None else x[layer] for x in (here, there))
                near(own(site, mine[row], start, n), its[0])


@pytest.mark.parametrize("form", SOME)
def test_edits_and_reducers(form):
    """Positions count from each prompt's first token; values and masks stand as the tokens do."""
    make, starts = FORMS[form]
    tokens, options = make()
    model, transcoder = tiny.model(), tiny.transcoder(1)
    width = prepare(tokens, model.config, **options).length
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((LAYERS, 3, width, D)).astype(np.float32)
    chosen = padded(starts, width)[0] % 3 == 2

    def edits(row=None):
        part = lambda x: x[row, starts[row] : starts[row] + LENGTHS[row]]  # noqa: E731
        values = whole if row is None else np.stack([part(x) for x in whole])[:, None]
        on = chosen if row is None else part(chosen)
        return [
            SetTo(PerLayer(values), site="attn_out", layer=[0, 2], position=[1, -1]),
            Add(values[1], site="layers.1.resid_mid", position=on),
            KnockOut(position=-1, key=Token(5), layer=1, row=None if row is not None else [0, 2])
            if row != 1 else Add(0.0, site="embed"),
            Splice(transcoder),
            SetFeature(transcoder, 3, 2.0, position=slice(1, 3)),
        ]  # fmt: skip

    capture = {
        "at": At("resid_post", [0, -1]), "mean": Mean("attn_out"), "sizes": Norm("q"),
        "top": TopK("attn_pattern", 2), "keys": At("attn_pattern", -1), "mean of keys": Mean("k"),
        "features": Features(transcoder=transcoder, capacity=50),
    }  # fmt: skip
    found = jaxtc.run(model, tokens, edits=edits(), capture=capture, logits="last", **options)
    kept = found.activations
    np.testing.assert_array_equal(found.left_out, found.mask & (found.tokens == 2))
    for row, (start, n) in enumerate(zip(starts, LENGTHS, strict=True)):
        single = jaxtc.run(model, PROMPTS[row], edits=edits(row), capture=capture, logits="last")
        near(found.logits[row], single.logits[0])
        for name in ("at", "mean", "mean of keys"):
            near(kept[name][:, row], single.activations[name][:, 0])
        mine = slice(start, start + n)
        near(kept["sizes"][:, row, mine], single.activations["sizes"][:, 0])
        near(kept["keys"][:, row, :, mine], single.activations["keys"][:, 0])
        near(kept["top"].values[:, row, :, mine], single.activations["top"].values[:, 0])
        # Of keys that nobody attends to the order says nothing.
        some = np.asarray(single.activations["top"].values[:, 0]) > 0
        ids = np.asarray(kept["top"].ids[:, row, :, mine]) - start
        np.testing.assert_array_equal(ids[some], single.activations["top"].ids[:, 0][some])
        for a, b in zip(*map(jax.tree.leaves, (kept["features"], single.activations["features"])),
                        strict=True):  # fmt: skip
            near(a[row, mine], b[0])


@pytest.mark.parametrize("form", FORMS)
def test_generate(form):
    make, starts = FORMS[form]
    tokens, options = make()
    found = jaxtc.generate(
        tiny.model(), tokens, 5, capture=["resid_post", "attn_pattern"],
        edits=[Add(0.3, site="layers.1.resid_mid", position="new")], stop=(), **options,
    )  # fmt: skip
    assert found.prompts == PROMPTS
    for row, (start, prompt) in enumerate(zip(starts, PROMPTS, strict=True)):
        single = jaxtc.generate(
            tiny.model(), prompt, 5, capture=["resid_post", "attn_pattern"], stop=(),
            edits=[Add(0.3, site="layers.1.resid_mid", position="new")],
        )  # fmt: skip
        assert found.tokens[row] == single.tokens[0]
        n = found.lengths[row]
        assert found.mask[row].nonzero()[0].tolist() == list(range(start, start + n))
        mine = slice(start, start + n)
        near(found.activations["resid_post"][:, row, mine], single.activations["resid_post"][:, 0])
        pattern = found.activations["attn_pattern"][:, row, :, mine, mine]
        near(pattern, single.activations["attn_pattern"][:, 0])


@pytest.mark.parametrize("form", SOME)
def test_sweep_and_gradients(form):
    make, starts = FORMS[form]
    tokens, options = make()
    model, layers = tiny.model(), Over(range(LAYERS))
    edits = [SetTo(0.0, site="mlp_out", layer=layers, position=Over([1, 2, -1]))]
    losses = jaxtc.sweep(model, tokens, edits, of=scores.Loss(), logits="all", **options).values
    last = jaxtc.sweep(model, tokens, edits, of=scores.Logit(7), **options).values
    slopes = jaxtc.gradients(model, tokens, scores.LogProbability(7), ["resid_mid", "k"], **options)
    whole = jaxtc.gradients(model, tokens, scores.Loss(), "embed", logits="all", **options)
    for row, (start, n) in enumerate(zip(starts, LENGTHS, strict=True)):
        prompt, mine = PROMPTS[row], slice(start, start + n)
        of = {"of": scores.Loss(), "logits": "all"}
        near(losses[..., row], jaxtc.sweep(model, prompt, edits, **of).values[..., 0])
        single = jaxtc.sweep(model, prompt, edits, of=scores.Logit(7)).values
        near(last[..., row], single[..., 0])
        single = jaxtc.gradients(model, prompt, scores.LogProbability(7), ["resid_mid", "k"])
        for site in ("resid_mid", "k"):
            near(slopes.gradients[site][:, row, mine], single.gradients[site][:, 0])
            near(slopes.activations[site][:, row, mine], single.activations[site][:, 0])
        single = jaxtc.gradients(model, prompt, scores.Loss(), "embed", logits="all")
        near(whole.score[row], single.score[0])
        near(whole.gradients["embed"][row, mine], single.gradients["embed"][0])


@pytest.mark.parametrize("form", SOME)
def test_losses_and_metrics(form):
    make, starts = FORMS[form]
    tokens, options = make()
    prompts = [[*prompt, 1] for prompt in PROMPTS]
    result = jaxtc.run(tiny.model(), tokens, **options)
    singles = [alone(row) for row in range(3)]
    each = [
        -np.take_along_axis(
            np.asarray(jax.nn.log_softmax(one.logits[0, :-1])), np.array(ids[1:-1])[:, None], 1
        )
        for one, ids in zip(singles, prompts, strict=True)
    ]
    near(scores.Loss()(result), [x.mean() for x in each])
    loss = metrics.Loss().update(result)
    near(loss.mean, np.concatenate(each).mean())
    assert (loss.tokens, loss.left_out) == (sum(LENGTHS) - 3, 0)
    transcoder, sites = tiny.transcoder(1), ["layers.1.mlp_in_normed", "layers.1.mlp_out"]
    kept = jaxtc.run(tiny.model(), tokens, capture=sites, logits=None, **options)
    x, y = (kept.activations[site] for site in sites)
    fvu = metrics.FVU().update(y, transcoder(x), kept)
    text = [np.concatenate([s.activations[site][0, 1:] for s in singles]) for site in sites]
    expected = metrics.FVU().update(text[1], transcoder(text[0]))
    near([fvu.fvu, fvu.tokens], [expected.fvu, sum(LENGTHS) - 3])
    assert fvu.left_out == kept.mask.size - fvu.tokens
    every = metrics.FVU().update(y, transcoder(x), kept.mask)
    assert every.tokens == sum(LENGTHS) and every.fvu != pytest.approx(fvu.fvu, rel=1e-3)
    active = metrics.FeatureStatistics(50).update(transcoder.encode(x), kept)
    near(active.density, metrics.FeatureStatistics(50).update(transcoder.encode(text[0])).density)


def test_special_tokens_as_answers():
    result = jaxtc.run(tiny.model(), [[2, 5, 7, 1], [2, 6, 1]])
    losses = np.asarray(metrics.next_token_loss(result.logits, result.tokens))
    text, every = [losses[0, 0], losses[0, 1], losses[1, 0]], [*losses[0], *losses[1, :2]]
    found = metrics.Loss().update(result)
    near(found.mean, np.mean(text))
    assert (found.tokens, found.left_out) == (3, 2)
    near(metrics.Loss(special_tokens=True).update(result).mean, np.mean(every))
    near(scores.Loss()(result), [losses[0, :2].mean(), losses[1, 0]])
    near(scores.Loss(special_tokens=True)(result), [losses[0].mean(), losses[1, :2].mean()])
    with pytest.raises(InputError, match="logits of all tokens"):
        metrics.Loss().update(jaxtc.run(tiny.model(), [2, 5], logits="last"))


def test_what_is_odd_about_text_is_warned_of():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    odd = {
        "the capital of Rome": "The tokenizer does not know 'Rome'",
        "<bos>the capital": "The prompt has <bos> twice",
        "the capital<eos>": "The prompt ends in <eos>",
    }
    for text, message in odd.items():
        with pytest.warns(UserWarning, match="^Prompt 2: " + message):
            found = jaxtc.run(model, ["paris", text], tokenizer=tokenizer)
        near(found.logits, jaxtc.run(model, [[2, 10], tokenizer(text).input_ids]).logits)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        jaxtc.generate(model, ["Rome"] * 9, 1, tokenizer=tokenizer)
    said = [str(one.message) for one in told if one.category is UserWarning]
    assert len(said) == 6 and said[-1] == "Of the prompts there are 4 more such notes."


def test_a_tokenizer_may_be_any_callable():
    class Bare:
        def __call__(self, text):
            return {"input_ids": tiny.tokenizer()(text).input_ids}

    model = tiny.model()
    found = jaxtc.run(model, "the capital", tokenizer=Bare()).logits
    near(found, jaxtc.run(model, "the capital", tokenizer=tiny.tokenizer()).logits)


def test_text():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    texts = ["the capital of texas", "paris"]
    found = jaxtc.run(model, texts, tokenizer=tokenizer)
    ids = [tokenizer(text).input_ids for text in texts]
    near(found.logits, jaxtc.run(model, ids).logits)
    assert jaxtc.generate(model, texts[0], 3, tokenizer=tokenizer).prompts == ids[:1]
    tokenizer.padding_side = "left"
    whole = tokenizer(texts, padding=True)
    assert whole.input_ids[1][0] == PAD
    found = jaxtc.run(model, whole, logits="last").logits
    near(found, jaxtc.run(model, ids, logits="last").logits)
    assert str(jaxtc.estimate(model, whole)) == str(jaxtc.estimate(model, ids))


def test_inside_a_trace():
    model = tiny.model()
    ids, mask = padded(LEFT)
    held = jaxtc.run(model, ids, attention_mask=mask, capture="resid_post")

    @jax.jit
    def both(ids, mask):
        found = jaxtc.run(model, ids, attention_mask=mask, capture="resid_post")
        return found.logits, found.activations["resid_post"], found.mask, scores.Loss()(found)

    logits, kept, on, loss = both(ids, mask)
    np.testing.assert_array_equal(on, mask == 1)
    np.testing.assert_allclose(logits[on], held.logits[on], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kept[:, on], held.activations["resid_post"][:, on], 1e-5, 1e-5)
    near(loss, scores.Loss()(held))
    hole = mask.copy()
    hole[0, 3] = 0
    logits = both(ids, hole)[0]
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1:]).any()
    known = jax.jit(lambda ids: jaxtc.run(model, ids, attention_mask=mask).logits)(ids)
    np.testing.assert_allclose(known[on], held.logits[on], rtol=1e-5, atol=1e-5)


ONES, TEXTS = np.ones((1, 1, 2, 2)), {"tokenizer": tiny.tokenizer()}
REFUSED = {
    "left, nothing said": (padded(LEFT)[0], {}, "Prompt 1 begins with id 0.*attention_mask"),
    "right, nothing said": (padded([0] * 3)[0], {}, "Prompt 1 ends with id 0.*input_ids.*mask"),
    "lists": ([[2, 5, 6], [0, 2, 5]], {}, "Prompt 1 begins with id 0"),
    "one prompt": ([2, 5, 0], {}, "Prompt 0 ends with id 0"),
    "lengths, but left": (padded(LEFT)[0], {"lengths": LENGTHS}, "Prompt 1 begins"),
    "ids of a mapping": ({"input_ids": padded(LEFT)[0]}, {}, "Prompt 1 begins with id 0"),
    "a hole": ([2, 5, 6], {"attention_mask": [1, 0, 1]}, "column 1, between tokens"),
    "nothing on": ([[2, 5], [2, 6]], {"attention_mask": [[1, 1], [0, 0]]}, "Prompt 1 is empty"),
    "another shape": ([2, 5, 6], {"attention_mask": [1, 1]}, r"rows of \[2\].*\(3,\)"),
    "other numbers": ([2, 5, 6], {"attention_mask": [1, 2, 1]}, "holds 2 in row 0"),
    "scores": ([2, 5], {"attention_mask": ONES}, r"float64 with shape \(1, 1, 2, 2\)"),
    "given twice": (batch(LEFT), {"attention_mask": padded(LEFT)[1]}, "given twice"),
    "with lengths": (batch(LEFT), {"lengths": LENGTHS}, "one of the two"),
    "other mapping": ({"ids": [2, 5]}, {}, "no input_ids, only 'ids'"),
    "text": (["the city", "paris"], {}, "Got text.*'the city', 'paris'.*tokenizer="),
    "text and a mask": (["paris"], {**TEXTS, "attention_mask": [1]}, "Text has"),
    "text and others": (["paris", [2]], TEXTS, "Some of these"),
    "no tokenizer": ("paris", {"tokenizer": "gemma"}, "tokenizer is a str"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    tokens, options, message = REFUSED[case]
    for call in (
        lambda **o: jaxtc.run(tiny.model(), tokens, **o),
        lambda **o: jaxtc.generate(tiny.model(), tokens, 2, **o),
        lambda **o: jaxtc.estimate(tiny.model(), tokens, **o),
        lambda **o: jaxtc.gradients(tiny.model(), tokens, scores.Logit(3), "embed", **o),
        lambda **o: jaxtc.sweep(tiny.model(), tokens, [Add(Over([0.0, 1.0]), site="embed")], **o),
    ):
        with pytest.raises(InputError, match=message):
            call(**options)


def test_padding_that_also_ends_texts():
    """One such id may be the end; two are padding."""
    config = tiny.config().__class__(**{**vars(tiny.config()), "pad_token_id": 1})
    assert prepare([2, 5, 1], config).lengths == [3]
    with pytest.raises(InputError, match="Prompt 0 ends with id 1"):
        prepare([2, 5, 1, 1], config)


def test_a_mask_of_positions_stands_as_the_tokens_do():
    ids, mask = padded(LEFT)
    with pytest.raises(EditError, match="mask is on at position"):
        edit = Add(1.0, site="embed", position=np.ones_like(ids, bool))
        jaxtc.run(tiny.model(), ids, attention_mask=mask, edits=[edit])
    assert BY_NAME["embed"].axes == "B T D"


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("layers", [[1, 2], [0, 1]])
def test_sweeps_with_edits_of_all_variants(form, layers):
    """Values and masks of edits without an axis stand as the tokens do, also in shared layers."""
    make, starts = FORMS[form]
    tokens, options = make()
    model, of = tiny.model(), scores.Logit(7)
    width = prepare(tokens, model.config, **options).length
    value = np.random.default_rng(0).standard_normal((3, width, D)).astype(np.float32)
    on = padded(starts, width)[0] % 3 == 2
    zero = SetTo(0.0, site="mlp_out", layer=Over(layers))
    edits = [Add(value, site="embed"), Add(2.0, site="layers.0.attn_out", position=on), zero]
    found = jaxtc.sweep(model, tokens, edits, of=of, **options).values
    for row, (start, n) in enumerate(zip(starts, LENGTHS, strict=True)):
        own = slice(start, start + n)
        edits = [
            Add(value[row, own], site="embed"),
            Add(2.0, site="layers.0.attn_out", position=on[row, own]), zero,
        ]  # fmt: skip
        near(found[:, row], jaxtc.sweep(model, PROMPTS[row], edits, of=of).values[:, 0])


@pytest.mark.parametrize("score", [scores.Logit(7), scores.Loss()], ids=["logit", "loss"])
@pytest.mark.parametrize("form", SOME)
def test_patching(form, score):
    """Clean and corrupted prompts padded alike or not, with edits that stand as the tokens do."""
    make, starts = FORMS[form]
    tokens, options = make()
    model = tiny.model()
    if options:
        tokens = {"input_ids": tokens, **options}
    width = prepare(tokens, model.config).length
    clean = [[2, *[(i + 3) % 19 for i in prompt[1:]]] for prompt in PROMPTS]
    value = np.random.default_rng(1).standard_normal((3, width, D)).astype(np.float32)
    on = padded(starts, width)[0] % 3 == 2
    edits = [Add(value, site="embed"), Add(1.5, site="layers.0.attn_out", position=on)]
    measured = jaxtc.activation_patching(model, clean, tokens, score, edits=edits)
    guessed = jaxtc.attribution_patching(model, clean, tokens, score, ["mlp_out", "q"], edits=edits)
    for row, (start, n) in enumerate(zip(starts, LENGTHS, strict=True)):
        own = slice(start, start + n)
        edits = [
            Add(value[row, own], site="embed"),
            Add(1.5, site="layers.0.attn_out", position=on[row, own]),
        ]  # fmt: skip
        pair = clean[row], PROMPTS[row], score
        single = jaxtc.activation_patching(model, *pair, edits=edits)
        near(measured.values[:, :n, row], single.values[..., 0])
        assert np.isnan(measured.values[:, n:, row]).all()
        near(measured.corrupted[row], single.corrupted[0])
        singles = jaxtc.attribution_patching(model, *pair, ["mlp_out", "q"], edits=edits)
        for site, found in guessed.items():
            near(found.values[:, :n, row], singles[site].values[..., 0])


BEYOND = {
    "eos in front of bos": ([[1, 1, 2, 6, 4]], "Prompt 0 begins with id 1"),
    "one eos in front of bos": ([[1, 2, 6, 4]], "Prompt 0 begins with id 1"),
    "several eos": ([[2, 6, 4, 1, 1], [2, 5, 7, 9, 4]], "Prompt 0 ends with id 1"),
    "rows of different depth": ([2, [5]], "rows of different depth"),
    "deeper rows": ([[2, [5]], [2]], "rows of different depth"),
    "texts and ids": ([[2, 5], "paris"], "Got text"),
    "encodings and ids": ([{"input_ids": [2, 5]}, [2, 6]], "Some of these prompts are encodings"),
    "nothing": (None, "what are no numbers"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_refused_by_run(case):
    tokens, message = BEYOND[case]
    with pytest.raises(InputError, match=message):
        jaxtc.run(tiny.model(), tokens)


def test_one_eos_ends_a_text():
    assert jaxtc.run(tiny.model(), [2, 5, 1], logits="last").lengths == [3]


def test_more_refusals():
    model = tiny.model()
    for given in ([[1], [1, 2]], [[1, [1]]]):
        with pytest.raises(InputError):
            jaxtc.run(model, PROMPTS[:2], lengths=given)
        with pytest.raises(InputError):
            jaxtc.run(model, PROMPTS[:2], attention_mask=given)
    with pytest.raises(InputError, match="A length is 'a'"):
        jaxtc.warm_up(model, ["a", 5])
    with pytest.raises(InputError, match=r"size \(B, T\) has no lengths"):
        jaxtc.estimate(model, (2, 5), attention_mask=[1, 1])
    result = jaxtc.run(model, PROMPTS)
    with pytest.raises(InputError, match="do not fit"):
        metrics.next_token_loss(result.logits, [PROMPTS[0]])
    with pytest.raises(InputError, match="a Encoding|a object|mask is a"):
        metrics.Mean().update(np.ones(2), object())


def test_columns_beyond_the_context():
    """Padding does not count as context, in sweeps neither."""
    ids, on = np.zeros((1, 80), int), (np.arange(80) >= 75)[None]
    ids[0, 75:] = PROMPTS[1]
    edit = [SetTo(0.0, site="mlp_out", layer=Over([1, 2]))]
    found = jaxtc.sweep(tiny.model(), ids, edit, of=scores.Logit(7), attention_mask=on).values
    near(found, jaxtc.sweep(tiny.model(), PROMPTS[1], edit, of=scores.Logit(7)).values)


def test_padding_inside_a_trace_is_no_token():
    ids, _ = padded(LEFT)
    found = jax.jit(lambda i: jaxtc.run(tiny.model(), i, logits="last").logits)(ids)
    assert np.isnan(found[1:]).all() and not np.isnan(found[0]).any()


def test_masks_of_tokenizers_output():
    whole = batch(LEFT)
    on = metrics.special_token_mask(whole, (0, 1, 2))
    np.testing.assert_array_equal(on, np.isin(whole["input_ids"], (0, 1, 2)))
    result = jaxtc.run(tiny.model(), whole)
    np.testing.assert_array_equal(metrics.special_token_mask(result, (0, 1, 2)), on)
    near(
        metrics.next_token_loss(result.logits, whole),
        metrics.next_token_loss(result.logits, result.tokens),
    )


@pytest.mark.parametrize("stored", SOME)
@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("site", ["resid_mid", "attn_pattern", "layers.1.v"])
def test_frozen_to_a_run_in_another_layout(form, stored, site):
    """Each prompt is held at its own tokens' activations, whichever way both runs were padded."""
    model, results = tiny.model(), []
    for name in (stored, form):
        tokens, options = FORMS[name][0]()
        results.append((tokens, {**options, "edits": [], "logits": "last"}))
    widths = {prepare(tokens, model.config, **{k: v for k, v in o.items() if "mask" in k}).length
              for tokens, o in results}  # fmt: skip
    (first, a), (second, b) = results
    push = Add(np.linspace(-1, 1, D), site="embed")
    kept = jaxtc.run(model, first, **{**a, "edits": [push]}, capture=site).activations
    edit = jaxtc.Freeze(kept, site=site)
    if len(widths) > 1:
        with pytest.raises(EditError, match="does not broadcast"):
            jaxtc.run(model, second, **{**b, "edits": [edit]})
        return
    found = jaxtc.run(model, second, **{**b, "edits": [edit]}).logits
    for row, prompt in enumerate(PROMPTS):
        kept = jaxtc.run(model, prompt, edits=[push], capture=site).activations
        single = jaxtc.run(model, prompt, edits=[jaxtc.Freeze(kept, site=site)], logits="last")
        near(found[row], single.logits[0])
