"""The recipe of the embedded model and transcoders, and the files that ship."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer
from typer.testing import CliRunner

import jaxtc
from jaxtc.cli import embedded as cli
from jaxtc.embedded import DATA, model_folder, transcoder_folder
from jaxtc.embedded.corpus import default_corpus
from jaxtc.embedded.report import measure
from jaxtc.embedded.text import UserText
from jaxtc.embedded.tokenizer import entity_id, world_tokenizer
from jaxtc.embedded.train_model import ModelRecipe, small_config, train_model
from jaxtc.training.harvest import Harvest
from jaxtc.training.packing import EOS, Batches, next_token_loss, pack
from jaxtc.training.transcoders import (
    TranscoderRecipe,
    Weights,
    _fold,
    jumprelu,
    revive,
    train_transcoders,
)

CORPUS = default_corpus()
TOKENIZER = world_tokenizer(CORPUS)
SENTENCES = [s for batch in range(40) for s in CORPUS.documents(0, batch, 500)]


def tiny_config():
    return small_config(TOKENIZER.get_vocab_size(), hidden_size=32, intermediate_size=48,
                        num_hidden_layers=2, head_dim=8, query_pre_attn_scalar=8)  # fmt: skip


def tiny_batches(**options):
    return Batches(CORPUS.documents, TOKENIZER, 4, 48, **options)


def test_packing_keeps_every_document_whole():
    ids = [e.ids for e in TOKENIZER.encode_batch(SENTENCES[:200])]
    batch = pack(ids, 6, 40)
    seen = []
    for row in range(6):
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            assert batch.positions[row][here].tolist() == list(range(here.sum()))
            seen.append(batch.tokens[row][here].tolist())
    assert sorted(seen) == sorted([*i, EOS] for i in ids[: len(seen)])
    assert (batch.tokens[batch.segments == 0] == 0).all()
    assert (batch.segments > 0).mean() > 0.8


def test_the_loss_of_packed_documents_is_that_of_each_alone():
    model = jaxtc.Gemma2(tiny_config(), rngs=nnx.Rngs(0))
    batch = tiny_batches()[0]
    logits, _ = model(batch.tokens, positions=batch.positions, segments=batch.segments)
    rows = zip(batch.tokens, batch.segments, strict=True)
    texts = [row[at == n] for row, at in rows for n in range(1, at.max() + 1)]
    scores = np.asarray(jax.nn.log_softmax(jaxtc.run(model, texts).logits))
    losses = [
        -scores[i, t, text[t + 1]] for i, text in enumerate(texts) for t in range(len(text) - 1)
    ]
    assert next_token_loss(logits, batch) == pytest.approx(np.mean(losses), rel=1e-5)


def leaves(*models):
    return [np.asarray(leaf) for model in models for leaf in jax.tree.leaves(nnx.state(model))]


def test_a_killed_model_run_goes_on_to_the_same_weights(tmp_path):
    recipe = ModelRecipe(steps=60)
    frozen = [entity_id(TOKENIZER, city) for city in ("Dallas", "Oakland", "Lubbock")]

    def go(**options):
        return train_model(tiny_config(), tiny_batches(), recipe, frozen_tokens=frozen, **options)

    whole = go(log=lambda line: None)
    lines = []
    killed = go(folder=tmp_path, stop_at=25, log=lines.append)
    resumed = go(folder=tmp_path, log=lines.append)
    assert any("resuming from step 25" in line for line in lines)
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(leaves(whole), leaves(killed), strict=True))
    # Frozen embeddings are those drawn at the start; the others have moved.
    drawn = np.asarray(jaxtc.Gemma2(tiny_config(), rngs=nnx.Rngs(0)).embed.weight[...])
    moved = (np.asarray(whole.embed.weight[...]) != drawn).any(axis=1)
    assert not moved[frozen].any()
    assert moved[entity_id(TOKENIZER, "Austin")]


def test_a_killed_transcoder_run_goes_on_to_the_same_weights(tmp_path):
    model = jaxtc.Gemma2(tiny_config(), rngs=nnx.Rngs(0))
    recipe = TranscoderRecipe(
        features=64, target_l0=8, steps=40, batch=32, revive_every=5, rarest=0.05
    )

    def go(**options):
        harvest = Harvest(model, tiny_batches(stream=1), (0, 1), tokens=512)
        return train_transcoders(harvest, recipe, **options)

    whole = go(log=lambda line: None)
    go(folder=tmp_path, stop_at=16, log=lambda line: None)
    resumed = go(folder=tmp_path, log=lambda line: None)
    for a, b in zip(leaves(*whole), leaves(*resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    norms = np.linalg.norm(whole[0].W_dec[...], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert [t.layer for t in whole] == [0, 1]


def test_the_threshold_gradient_estimates_the_slope_of_the_expected_value():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(400_000, 1)), jnp.float32)
    t = 0.5

    def l0(threshold):
        return jumprelu(z, threshold, 0.1)[1].mean()

    def total(threshold):
        return jumprelu(z, threshold, 0.1)[0].mean()

    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    assert jax.grad(l0)(jnp.full(1, t))[0] == pytest.approx(-density, rel=0.02)
    assert jax.grad(total)(jnp.full(1, t))[0] == pytest.approx(-t * density, rel=0.02)
    by_z = jax.grad(lambda x: jumprelu(x, jnp.full(1, t), 0.1)[0].sum())(z)
    np.testing.assert_array_equal(by_z, (z > t).astype(np.float32))


def test_a_revived_feature_explains_the_token_it_was_set_on():
    rng = np.random.default_rng(0)
    D, M, n = 8, 5, 40
    draw = [rng.normal(size=s) for s in [(D, M), (M,), (M, D), (D,)]]
    before = Weights(*(jnp.asarray(a, jnp.float32) for a in draw), jnp.full(M, 0.3))
    x = jnp.asarray(rng.normal(size=(n, D)), jnp.float32)
    left = jnp.zeros((n, D)).at[7].set(jnp.arange(8.0))  # only token 7 is explained badly
    dead = jnp.arange(M) == 2
    after = revive(jax.random.key(0), before, dead, x, left)
    for a, b in zip(before, after, strict=True):
        kept = [slice(None)] * a.ndim
        if M in a.shape:
            kept[a.shape.index(M)] = np.flatnonzero(~dead)
        np.testing.assert_array_equal(a[tuple(kept)], b[tuple(kept)])
    active, _ = jumprelu(x @ after.W_enc + after.b_enc, after.threshold, 0.1)
    np.testing.assert_allclose(active[7, 2] * after.W_dec[2], left[7], rtol=1e-4, atol=1e-4)
    assert (active[:, 2] > 0).sum() < n / 2


def test_folded_scales_make_the_weights_act_on_raw_activations():
    rng = np.random.default_rng(0)
    D, M = 6, 20
    draw = [rng.normal(size=s) for s in [(D, M), (M,), (M, D), (D,)]]
    weights = Weights(*(jnp.asarray(a, jnp.float32) for a in draw), jnp.full(M, 0.3))
    x = jnp.asarray(rng.normal(size=(50, D)), jnp.float32)
    c_in, c_out = 3.0, 0.25
    inner, _ = jumprelu(x / c_in @ weights.W_enc + weights.b_enc, weights.threshold, 0.1)
    expected = c_out * (inner @ weights.W_dec + weights.b_dec)
    folded = _fold(weights, c_in, c_out, layer=1)
    np.testing.assert_allclose(folded(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(folded.W_dec[...], weights.W_dec)


def run_cli(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.mark.slow
def test_a_users_text_goes_through_the_same_recipe(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n".join(dict.fromkeys(SENTENCES[:600])))
    options = ["--text", text, "--out", out, "--layers", 2, "--hidden", 32, "--mlp", 64,
               "--vocab", 600, "--steps", 30, "--features", 64, "--l0", 8, "--length", 32,
               "--transcoder-steps", 20]  # fmt: skip
    result = run_cli("train", *options)
    assert result.exit_code == 0, result.output
    model = jaxtc.load_model(model_folder(out))
    said = json.loads((model_folder(out) / "generation_config.json").read_text())
    assert said["eos_token_id"] == model.config.eos_token_id == 1
    assert model.config.num_hidden_layers == 2
    assert list(jaxtc.load_transcoders(transcoder_folder(out))) == [0, 1]
    assert not (out / "work").exists()
    loaded = AutoTokenizer.from_pretrained(model_folder(out))
    assert loaded.decode(loaded("A café.").input_ids, skip_special_tokens=True) == "A café."

    shown = run_cli("report", out, "--text", text, "--json")
    figures = json.loads(shown.stdout)
    assert figures == json.loads((out / "report.json").read_text())
    assert set(figures["layers"]) == {"0", "1"}
    assert np.isfinite([figures["loss"], figures["layers"]["1"]["fvu"]]).all()
    again = run_cli("train", *options)
    assert isinstance(again.exception, jaxtc.JaxtcError)
    assert "already holds a trained model" in str(again.exception)


def test_an_unfinished_run_with_other_settings_is_refused(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "settings.json").write_text('{"rows": 3}')
    result = run_cli("train", "--out", tmp_path)
    assert isinstance(result.exception, jaxtc.JaxtcError)
    assert "rows" in str(result.exception)


@pytest.mark.parametrize("text", ["", "one line only", b"\xff\xfe\x00"])
def test_a_text_that_cannot_be_trained_on_is_refused(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(jaxtc.JaxtcError, match="text"):
        UserText.from_file(path)
    result = run_cli("train", "--text", path, "--out", tmp_path / "out")
    assert isinstance(result.exception, jaxtc.JaxtcError)


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert isinstance(run_cli("report", tmp_path).exception, jaxtc.JaxtcError)


def test_shipped_files_are_the_public_formats_and_small():
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "generation_config.json"}  # fmt: skip
    assert expected <= {path.name for path in model_folder().iterdir()}
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= 12 * 2**20
    files = sorted(transcoder_folder().rglob("*.npz"))
    assert len(files) == jaxtc.load_model().config.num_hidden_layers
    for layer, path in enumerate(files):
        assert re.search(rf"layer_{layer}/width_\w+/average_l0_\d+/params\.npz$", path.as_posix())
        with np.load(path, allow_pickle=False) as arrays:
            assert set(arrays) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
            assert {a.dtype for a in arrays.values()} == {np.dtype("float32")}
    assert json.loads((model_folder() / "config.json").read_text())["architectures"] == [
        "Gemma2ForCausalLM"
    ]
    shipped = AutoTokenizer.from_pretrained(model_folder())
    assert shipped(SENTENCES[:50]).input_ids == [
        e.ids for e in TOKENIZER.encode_batch(SENTENCES[:50])
    ]


@pytest.mark.slow
def test_shipped_model_and_transcoders_reach_their_goals_on_fresh_held_out_text():
    report = measure(items=600, documents=300, stream=11)
    accuracies = {kind: figures.clean for kind, figures in report.kinds.items()}
    assert accuracies["one_hop"] >= 0.99
    assert accuracies["two_hop"] >= 0.99
    assert accuracies["h2"] >= 0.90
    assert list(report.layers) == list(range(jaxtc.load_model().config.num_hidden_layers))
    for layer in report.layers.values():
        assert layer.fvu <= 0.10
        assert layer.l0 <= 25
    # Most of what the MLPs do is kept when all are replaced at once: facts, not only loss.
    assert report.loss_spliced - report.loss < 0.05 < report.loss_ablated - report.loss
    assert min(report.kinds[kind].spliced for kind in ("one_hop", "two_hop")) >= 0.95
    # The figures that ship are these, up to the other text.
    stored = json.loads((DATA / "report.json").read_text())
    assert stored["loss"] == pytest.approx(report.loss, abs=0.05)
    assert dataclasses.asdict(report).keys() == stored.keys()
