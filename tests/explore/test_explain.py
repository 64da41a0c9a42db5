"""``explain`` against the same quantities computed by hand, and what it refuses."""

import copy
import dataclasses
import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import jaxtc
from jaxtc.errors import InputError, JaxtcError, SiteError
from jaxtc.explore.explain import explain
from jaxtc.explore.explanation import feature_url
from jaxtc.model.text import tokenized
from jaxtc.transcoders.promoted import promoted_tokens
from tests.support import cross_layer, tiny

PROMPT = "the capital of texas is"
IDS = [2, 4, 5, 6, 7, 8]


def explained(transcoders=None, prompt=PROMPT, **options):
    transcoders = tiny.transcoder(1) if transcoders is None else transcoders
    return explain(tiny.model(), tiny.tokenizer(), prompt, transcoders, **options)


def direct(site="mlp_in_normed", layer=1):
    """Activations, reconstruction and target of the prompt, (T, M), (T, D), (T, D), in float64."""
    names = [f"layers.{layer}.{site}", f"layers.{layer}.mlp_out"]
    result = jaxtc.run(tiny.model(), IDS, capture=names, logits=None)
    x, y = (np.asarray(result.activations[name][0], np.float64) for name in names)
    t = tiny.transcoder(layer)
    W_enc, b_enc, W_dec, b_dec, threshold = (
        np.asarray(p[...], np.float64) for p in (t.W_enc, t.b_enc, t.W_dec, t.b_dec, t.threshold)
    )
    z = x @ W_enc + b_enc
    a = z * (z > threshold)
    return a, a @ W_dec + b_dec, y


@pytest.mark.parametrize("site", ["mlp_in_normed", "mlp_in"])
def test_the_numbers_are_those_of_the_formulas(site):
    a, guess, y = direct(site)
    (report,) = explained(input_site=site).layers
    kept, missed = y[1:], (y - guess)[1:]  # <bos> does not count
    fvu = (missed**2).sum() / ((kept - kept.mean(0)) ** 2).sum()
    assert report.fvu == pytest.approx(fvu, rel=1e-5)
    assert report.explained_variance == pytest.approx(1 - fvu, rel=1e-5)
    assert report.l0 == pytest.approx((a[1:] > 0).sum(1).mean())
    errors = np.linalg.norm(y - guess, axis=1) / np.linalg.norm(y, axis=1)
    assert report.relative_error == pytest.approx(errors[1:].mean(), rel=1e-5)
    for position, token in enumerate(report.tokens):
        assert token.position == position and token.id == IDS[position]
        assert token.masked == (position == 0)
        assert token.l0 == (a[position] > 0).sum()
        assert token.above_one == (a[position] > 1).sum()
        assert token.relative_error == pytest.approx(errors[position], rel=1e-5)
    assert (report.input_site, report.output_site, report.width) == (site, "mlp_out", 50)


def test_every_stop_token_of_the_model_is_special_and_the_tokenizers_too():
    config = dataclasses.replace(tiny.config(), eos_token_id=(1, 6), pad_token_id=None)
    model = jaxtc.Gemma2(config, rngs=nnx.Rngs(0))
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.pad_token = "▁is"
    (report,) = explain(model, tokenizer, PROMPT, tiny.transcoder(1), max_new_tokens=0).layers
    assert [token.id for token in report.tokens if token.masked] == [2, 6, 8]
    kept = [token for token in report.tokens if not token.masked]
    assert report.l0 == pytest.approx(np.mean([token.l0 for token in kept]))
    # The tokens that metrics of a run leave out by themselves.
    counted = np.asarray(jaxtc.run(model, IDS).counted[0])
    assert [id for id, on in zip(IDS, counted, strict=True) if not on] == [2, 6]


def test_the_notebooks_score_is_taken_at_its_own_site_whatever_is_explained():
    _, guess, y = direct("mlp_in")
    expected = 1 - ((guess - y)[:, 1:] ** 2).mean() / y[:, 1:].var(ddof=1)
    for site in (None, "mlp_in"):
        (report,) = explained(input_site=site).layers
        assert report.notebook_score == pytest.approx(expected, rel=1e-5)


def test_features_are_the_strongest_first_and_only_active_ones():
    a, _, _ = direct()
    (report,) = explained(top_features=4).layers
    for token in report.tokens:
        order = np.argsort(-a[token.position])[:4]
        assert [feature.feature for feature in token.features] == order.tolist()
        values = [feature.activation for feature in token.features]
        np.testing.assert_allclose(values, a[token.position][order], rtol=1e-5)
    (every,) = explained(top_features=50).layers
    assert [len(token.features) for token in every.tokens] == [token.l0 for token in every.tokens]
    assert all(not token.features for token in explained(top_features=0).layers[0].tokens)


def test_promoted_tokens_are_direct_logit_attribution_with_the_final_gain():
    model, transcoder = tiny.model(), tiny.transcoder(1)
    wanted = np.arange(50)
    gain = 1 + np.asarray(model.final_norm.weight[...], np.float64)
    embedding = np.asarray(model.embed.weight[...], np.float64)
    rows = np.asarray(transcoder.W_dec[...], np.float64)
    best = np.argsort(-(rows * gain) @ embedding.T, axis=1)
    np.testing.assert_array_equal(promoted_tokens(model, transcoder, wanted, 6), best[:, :6])
    # The gain matters here, or the test would not see it missing.
    assert (np.argsort(-rows @ embedding.T, axis=1)[:, 0] != best[:, 0]).any()
    (report,) = explained(promoted=6).layers
    strongest = report.tokens[-1].features[0]
    pieces = tiny.tokenizer().convert_ids_to_tokens(best[strongest.feature, :6].tolist())
    assert strongest.promotes == tuple(pieces)


@pytest.mark.parametrize("count", [-1, 20, 2**40, 2.5, True])
def test_promoted_tokens_are_of_the_vocabulary(count):
    with pytest.raises(InputError, match=f"count is {count}, the vocabulary has"):
        promoted_tokens(tiny.model(), tiny.transcoder(1), [], count)


def test_promoted_tokens_in_several_blocks():
    transcoder = tiny.transcoder(1)
    wanted = np.arange(200) % 50
    got = promoted_tokens(tiny.model(), transcoder, wanted, 3)
    np.testing.assert_array_equal(
        got, promoted_tokens(tiny.model(), transcoder, range(50), 3)[wanted]
    )


def test_promoted_tokens_refuses_what_has_no_meaning():
    for wrong in ([50], [3, -1], 50):
        with pytest.raises(InputError, match=r"0 to 49, got (50|-1)\."):
            promoted_tokens(tiny.model(), tiny.transcoder(1), wrong)
    for wrong in ([3.7], [True], "3", [[1, 2], [3]], [[1, 2]], None):
        with pytest.raises(InputError, match="ids of n features, whole numbers in one row"):
            promoted_tokens(tiny.model(), tiny.transcoder(1), wrong)
    with pytest.raises(JaxtcError, match="D=16"):
        promoted_tokens(tiny.model(), tiny.transcoder(1, width=16), [0])


def test_layers_come_in_order_and_each_is_its_own():
    several = explained([tiny.transcoder(2), tiny.transcoder(0)])
    assert [report.layer for report in several.layers] == [0, 2]
    for report in several.layers:
        assert report == explained(tiny.transcoder(report.layer)).layers[0]


def test_a_mapping_is_loaded_one_layer_at_a_time():
    asked = []

    class OnDemand(dict):
        def __getitem__(self, layer):
            asked.append(layer)
            return super().__getitem__(layer)

    transcoders = OnDemand({layer: tiny.transcoder(None) for layer in (0, 1, 2)})
    found = explained(transcoders)
    assert [report.layer for report in found.layers] == asked == [0, 1, 2]


def test_the_continuation_is_greedy_and_can_be_left_out():
    found = explained(max_new_tokens=3)
    expected = jaxtc.generate(tiny.model(), IDS, 3).tokens[0]
    assert list(found.continuation_ids) == expected
    text = tiny.tokenizer().decode([*IDS, *expected], skip_special_tokens=True)
    assert PROMPT + found.continuation == text and found.continuation.startswith(" ")
    assert explained(max_new_tokens=0).continuation == ""


def test_unknown_words_are_reported():
    assert explained().warnings == ()
    (warning,) = explained(prompt="the capital of Dallas is Rome").warnings
    assert "'Dallas'" in warning and "'Rome'" in warning and "<unk>" in warning


def test_bos_twice_is_reported_and_neither_counts():
    found = explained(prompt="<bos> the capital")
    assert any("<bos> twice" in warning for warning in found.warnings)
    assert [token.masked for token in found.layers[0].tokens[:2]] == [True, True]


def test_an_end_of_text_and_a_missing_bos_are_reported():
    found = explained(prompt="the capital of texas<eos>")
    assert any("ends in <eos>" in warning for warning in found.warnings)
    made = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    made.post_processor = TemplateProcessing("$A", special_tokens=[])
    plain = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    ids, notes = tokenized(plain, "the capital of Rome", 2)
    assert ids == [4, 5, 6, 3] and len(notes) == 2
    assert "'Rome'" in notes[0] and "no <bos> in front" in notes[1]
    with pytest.raises(InputError, match="is a string, got list"):
        tokenized(plain, ["the capital"], 2)


def test_json_holds_everything_and_no_nan():
    found = explained(prompt="texas")  # one token counts: its variance is not defined
    assert math.isnan(found.layers[0].fvu)
    text = json.dumps(found.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["layers"][0]["explained_variance"] is None
    assert back["tokens"] == ["<bos>", "▁texas"]
    assert "explained_variance" in back["conventions"]


def test_padding_and_chunks_do_not_show(monkeypatch):
    prompt = " ".join(["the capital of texas is austin"] * 6)
    whole = explained(prompt=prompt)
    monkeypatch.setattr(importlib.import_module("jaxtc.explore.measure"), "_CHUNK", 16)
    for one, other in zip(
        whole.layers[0].tokens, explained(prompt=prompt).layers[0].tokens, strict=True
    ):
        assert one.l0 == other.l0 and one.features[0].feature == other.features[0].feature
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"prompt": ""}, InputError, "prompt is empty"),
        ({"prompt": " \n "}, InputError, "prompt is empty"),
        ({"prompt": "caf\udce9 is"}, InputError, r"character 3 is '.udce9'.*UTF-8"),
        (
            {"prompt": "texas" + " texas" * 49},
            InputError,
            "51 tokens and 2 new ones is longer .* 40",
        ),
        ({"top_features": -1}, InputError, "top_features is -1"),
        ({"top_features": 51}, InputError, "top_features is 51, .* 50 features"),
        ({"max_new_tokens": 1.5}, InputError, "max_new_tokens is 1.5"),
        ({"input_site": "mlp_inn"}, SiteError, "Did you mean 'mlp_in'"),
        ({"input_site": "layers.1.mlp_in"}, SiteError, "leave the layer out"),
        ({"input_site": "final_norm"}, SiteError, "has once"),
        ({"input_site": "mlp_act"}, JaxtcError, "D=24 at mlp_act, where this model has F=40"),
        ({"input_site": "attn_heads"}, JaxtcError, "has N·H=32"),
        ({"transcoders": []}, JaxtcError, "No transcoder"),
        ({"transcoders": {-1: tiny.transcoder(1)}}, SiteError, "count layers from 0"),
        ({"transcoders": {3: tiny.transcoder(1)}}, SiteError, "layer 3, .* 3 layers: 0 to 2"),
        ({"transcoders": tiny.transcoder(None)}, JaxtcError, "does not know its layer"),
        ({"transcoders": [tiny.transcoder(1)] * 2}, JaxtcError, "Two transcoders"),
        ({"transcoders": tiny.transcoder(1, width=16)}, JaxtcError, "D=16 .* D=24"),
    ],
)
def test_bad_input_is_explained(options, kind, message):
    with pytest.raises(kind, match=message):
        explained(**options)


def test_transcoders_of_different_kinds_are_refused():
    other = jaxtc.Transcoder.abstract(24, 50, layer=2, output_site="attn_out")
    with pytest.raises(JaxtcError, match="writes attn_out"):
        explained([tiny.transcoder(0), other])


def test_bfloat16_models_are_explained():
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.model())
    found = explain(model, tiny.tokenizer(), PROMPT, tiny.transcoder(1)).layers[0]
    assert found.fvu == pytest.approx(explained().layers[0].fvu, rel=0.05)


@pytest.mark.parametrize(("dtype", "remedy"), [("float16", "'bfloat16'"), ("float32", "broken")])
def test_a_model_that_overflows_is_refused(dtype, remedy):
    largest = {"float16": 60_000, "float32": 3e38}[dtype]
    wide = jax.tree.map(lambda leaf: leaf, tiny.model())
    wide.layers[1].mlp_out_norm.weight[...] = jnp.full((24,), largest, jnp.float32)
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), wide)
    message = f"layers.1.mlp_out is NaN or infinite.*computed in {dtype}.*{remedy}"
    with pytest.raises(JaxtcError, match=message):
        explain(narrow, tiny.tokenizer(), PROMPT, tiny.transcoder(1))
    if dtype == "float16":
        assert math.isfinite(
            explain(wide, tiny.tokenizer(), PROMPT, tiny.transcoder(1)).layers[0].fvu
        )


def test_a_transcoder_that_overflows_is_refused():
    narrow = jax.tree.map(lambda leaf: leaf.astype("float16"), tiny.transcoder(1))
    assert math.isfinite(explained(narrow).layers[0].fvu)
    narrow.W_dec[...] = jnp.full((50, 24), 60_000, "float16")
    with pytest.raises(JaxtcError, match="transcoder of layer 1 computes is NaN.*in float16"):
        explained(narrow)


def test_ids_that_the_tokenizer_does_not_have_are_shown_as_ids():
    config = dataclasses.replace(tiny.config(), vocab_size=40)
    model = jaxtc.Gemma2(config, rngs=nnx.Rngs(0))
    found = explain(model, tiny.tokenizer(), PROMPT, tiny.transcoder(1), max_new_tokens=4)
    features = [f for token in found.layers[0].tokens for f in token.features]
    shown = {piece for feature in features for piece in feature.promotes}
    assert {
        f"<id {index}>" for index in range(len(tiny.tokenizer()), 40)
    } & shown and "▁texas" in shown
    # Rows along one axis, of which the longest two are always said, whatever the sign is.
    model.embed.weight[...] = (
        jnp.zeros((40, 24)).at[:, 0].set(1).at[33:35, 0].set(jnp.array([2, -2]))
    )
    found = explain(model, tiny.tokenizer(), PROMPT, tiny.transcoder(1), max_new_tokens=2)
    assert found.continuation == "".join(f"<id {index}>" for index in found.continuation_ids)
    assert set(found.continuation_ids) <= {33, 34}


@pytest.mark.parametrize(
    ("source", "url"),
    [
        (
            "google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_11",
            "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-transcoder-16k/123",
        ),
        ("google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_21", None),
        ("google/gemma-scope-2b-pt-transcoders/layer_20/width_65k/average_l0_11", None),
        ("google/gemma-scope-2b-pt-transcoders/layer_26/width_16k/average_l0_11", None),
        ("/home/google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_11", None),
        ("embedded/layer_0/width_1024/average_l0_20", None),
        ("", None),
    ],
)
def test_neuronpedia_has_pages_for_the_default_tier_only(source, url):
    assert feature_url(source, 123) == url


# Cross-layer transcoders


def test_a_cross_layer_transcoder_layer_by_layer():
    whole = cross_layer.in_memory(3, 24, 50, skip=True)
    kept = jaxtc.run(tiny.model(), IDS, capture=["resid_mid", "mlp_out"], logits=None).activations
    read, y = (np.asarray(kept[site])[:, 0] for site in ("resid_mid", "mlp_out"))
    a, guess = np.asarray(whole.encode(read)), np.asarray(whole(read), np.float64)
    found = explained(whole, max_new_tokens=0)
    assert [report.layer for report in found.layers] == [0, 1, 2]
    for layer, report in enumerate(found.layers):
        missed, kept = (guess[layer] - y[layer])[1:], y[layer][1:]
        fvu = (missed**2).sum() / ((kept - kept.mean(0)) ** 2).sum()
        assert report.fvu == pytest.approx(fvu, rel=1e-4)
        assert report.l0 == pytest.approx((a[layer, 1:] > 0).sum(1).mean())
        assert (report.input_site, report.output_site) == ("resid_mid", "mlp_out")
        assert math.isnan(report.notebook_score)
        for token, row in zip(report.tokens, a[layer], strict=True):
            best = np.argsort(-row)[: len(token.features)]
            assert [feature.feature for feature in token.features] == best.tolist()
    # What earlier layers write counts: alone, the last layer's features would be far off.
    alone = np.asarray(whole.layers[2].finish(whole.layers[2].write(a[2], 2), read[2]), np.float64)
    far = ((alone - y[2])[1:] ** 2).sum() / ((y[2][1:] - y[2][1:].mean(0)) ** 2).sum()
    assert abs(far - found.layers[2].fvu) > 0.05 * far


def test_features_of_layers_from_0_on_may_be_given_lazily():
    whole = cross_layer.in_memory(3, 24, 50)
    loaded = []

    class Lazy(dict):
        def __getitem__(self, layer):
            loaded.append(layer)
            return whole.layers[layer]

    some = explained(Lazy.fromkeys(range(2)), max_new_tokens=0)
    assert some.layers == explained(whole, max_new_tokens=0).layers[:2]
    assert loaded == [0, 1]
    for given in (whole.layers[1], {1: whole.layers[1]}, {0: whole.layers[0], 2: whole.layers[2]}):
        with pytest.raises(JaxtcError, match="layers 0 to .* was not given. Give the whole"):
            explained(given)
    with pytest.raises(JaxtcError, match="layer 0 was not given|was not given"):
        explained({0: whole.layers[1]})
