"""The forward pass: padding, windows, segments, the cache, and numbers worked out another way."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc.errors import SiteError
from jaxtc.model.config import FULL, SLIDING
from jaxtc.model.gemma2 import Gemma2, empty_cache, masks, rotate, softcap
from jaxtc.programs.leaves import parameters
from tests.support import tiny

CONFIG = tiny.config()
PROMPTS = [[2, 5, 7, 9, 4, 11, 6, 8, 3], [2, 6, 4, 10, 12], [2, 13, 5]]


@pytest.fixture(scope="module")
def batch():
    return jaxtc.run(tiny.model(), PROMPTS, capture=["layers.2.resid_post"])


def test_padding_leaves_every_prompt_as_it_is_alone(batch):
    for b, prompt in enumerate(PROMPTS):
        logits, _ = tiny.model()(jnp.array([prompt]))  # no bucket, no batch
        np.testing.assert_allclose(batch.logits[b, : len(prompt)], logits[0], atol=1e-5)
        # What the padding holds does not matter.
        rows = np.full((1, 12), 7)
        rows[0, : len(prompt)] = prompt
        other = jaxtc.run(tiny.model(), rows, lengths=[len(prompt)])
        np.testing.assert_allclose(other.logits[0, : len(prompt)], logits[0], atol=1e-5)


def test_results_have_the_length_given(batch):
    assert batch.logits.shape == (3, 9, CONFIG.vocab_size)
    assert batch.activations["layers.2.resid_post"].shape == (3, 9, CONFIG.hidden_size)


def test_a_token_sees_no_later_one(batch):
    changed = [*PROMPTS[0][:5], 13, 14, 15, 16]
    after = jaxtc.run(tiny.model(), [changed, *PROMPTS[1:]]).logits
    np.testing.assert_array_equal(after[0, :5], batch.logits[0, :5])
    assert (np.abs(after - batch.logits)[0, 5:].max(-1) > 1e-3).all()
    np.testing.assert_array_equal(after[1], batch.logits[1])


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_a_window_counts_the_token_itself(size):
    """With all layers sliding, token t of one layer sees exactly tokens t-size+1 to t."""
    config = dataclasses.replace(CONFIG, sliding_window=size, layer_types=(SLIDING,) * 3)
    model = Gemma2(config, rngs=nnx.Rngs(0))
    pattern = jaxtc.run(model, PROMPTS[0], capture=["layers.0.attn_pattern"]).activations
    seen = np.asarray(pattern["layers.0.attn_pattern"][0, 0]) > 0
    t, s = np.indices(seen.shape)
    np.testing.assert_array_equal(seen, (s <= t) & (t - s < size))


def test_even_layers_slide_and_odd_ones_do_not():
    found = jaxtc.run(tiny.model(), PROMPTS[0], capture="attn_pattern").activations
    for layer in range(3):
        sees_first = np.asarray(found[f"layers.{layer}.attn_pattern"])[0, :, 8, 0] > 0
        assert sees_first.all() if layer % 2 else not sees_first.any()


def test_masks_by_hand():
    config = dataclasses.replace(CONFIG, sliding_window=2)
    both = masks(config, jnp.array([[0, 1, 2, 0, 1]]), jnp.array([[0, 0, 0, 1, 1]]), None)
    full = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    near = np.array(full)
    near[2, 0] = 0
    np.testing.assert_array_equal(both[FULL][0], np.array(full, bool))
    np.testing.assert_array_equal(both[SLIDING][0], near.astype(bool))


def test_packed_texts_do_not_see_each_other():
    model, texts = tiny.model(), PROMPTS
    tokens = jnp.array([sum(texts, [])])
    positions = jnp.array([[t for text in texts for t in range(len(text))]])
    segments = jnp.array([[i for i, text in enumerate(texts) for _ in text]])
    packed, _ = model(tokens, positions=positions, segments=segments)
    alone = [model(jnp.array([text]))[0][0] for text in texts]
    np.testing.assert_allclose(packed[0], jnp.concatenate(alone), atol=1e-5)
    unmarked, _ = model(tokens, positions=positions)
    assert np.abs(unmarked - packed).max() > 1e-2


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [5, 1, 3], [2, 7]])
def test_prefill_and_decoding_give_what_one_pass_gives(chunks):
    model, tokens = tiny.model(), jnp.array([PROMPTS[0], PROMPTS[0][::-1]])
    whole, none = model(tokens)
    assert none is None
    cache, start, parts = empty_cache(CONFIG, 2, 16, model.dtype), 0, []
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        out, cache = model(tokens[:, start : start + size], positions=positions, cache=cache)
        parts.append(out)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    assert all((np.asarray(keys)[:, 9:] == 0).all() for keys, _ in cache)


def test_rows_at_different_places_decode_together():
    """Stale slots ahead of a row's place, left by a longer row's padding, are never seen."""
    model, short, long = tiny.model(), PROMPTS[2], PROMPTS[0]
    width = len(long)
    tokens = jnp.array([short + [7] * (width - 3), long])
    positions = jnp.broadcast_to(jnp.arange(width), (2, width))
    _, cache = model(tokens, positions=positions, cache=empty_cache(CONFIG, 2, 16, model.dtype))
    out, _ = model(jnp.array([[12], [13]]), positions=jnp.array([[3], [width]]), cache=cache)
    for row, text in enumerate(([*short, 12], [*long, 13])):
        expected, _ = model(jnp.array([text]))
        np.testing.assert_allclose(out[row, 0], expected[0, -1], atol=1e-5)


def test_depth_and_last_logits():
    model, tokens = tiny.model(), jnp.array([PROMPTS[0]])
    assert model(tokens, depth=1) == (None, None)
    whole, _ = model(tokens)
    some, _ = model(tokens, logits_at=jnp.array([4]))
    assert some.shape == (1, 1, CONFIG.vocab_size)
    np.testing.assert_allclose(some[0, 0], whole[0, 4], atol=1e-6)


@pytest.mark.parametrize("bad", [-1, CONFIG.vocab_size, CONFIG.vocab_size + 5])
def test_an_unknown_id_gives_nan_in_a_trace(bad):
    """Outside a trace it raises; inside, no other token's row stands in for it."""
    found = jax.jit(lambda t: jaxtc.run(tiny.model(), t).logits)(jnp.array([[2, bad], [2, 5]]))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_padding_may_hold_anything_in_a_trace():
    lengths = jnp.array([2, 3])
    run = jax.jit(lambda t, n: jaxtc.run(tiny.model(), t, lengths=n, logits="last").logits)
    found = run(jnp.array([[2, 5, -1], [2, 5, 6]]), lengths)
    expected = jaxtc.run(tiny.model(), [[2, 5], [2, 5, 6]], logits="last").logits
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(dtype):
    model = Gemma2(CONFIG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    assert model.dtype == dtype
    assert {leaf.dtype for leaf in parameters(model)} == {jnp.dtype(dtype)}
    logits, cache = model(jnp.ones((1, 2), jnp.int32), cache=empty_cache(CONFIG, 1, 4, dtype))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}


def test_the_embedding_scale_is_rounded_to_the_weights_dtype():
    """sqrt(3584) = 59.87 is 59.75 in bfloat16, as the released models were trained."""
    config = dataclasses.replace(CONFIG, hidden_size=3584, num_hidden_layers=1, layer_types=None)
    embed = Gemma2.abstract(config, jnp.bfloat16).embed
    embed.weight.set_value(jnp.ones((config.vocab_size, 3584), jnp.bfloat16))
    assert (embed.encode(jnp.array([[2]])) == 59.75).all()


def is_rounded_once(found, exact):
    """Whether bfloat16 values are the nearest to float64 ones, but for ties that float32 breaks."""
    nearest = np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float64)
    return (np.asarray(found, np.float64) == nearest).mean() > 0.995


@pytest.fixture(scope="module")
def narrow():
    """A bfloat16 model with random gains."""
    model = Gemma2(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    draw = jax.random.normal(jax.random.key(0), (CONFIG.hidden_size,), jnp.bfloat16)
    model.layers[0].mlp_in_norm.weight[...] = draw
    return model


def test_a_norm_in_bfloat16_is_rounded_once(narrow):
    norm, x = narrow.layers[0].mlp_in_norm, jax.random.normal(jax.random.key(1), (2, 99, 24))
    x = x.astype(jnp.bfloat16)
    found = jax.jit(lambda x: norm(x, lambda site, x: x, "mlp_in_scale", "mlp_in"))(x)
    wide = np.asarray(x, np.float64)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps)
    assert is_rounded_once(found, wide * (1 + np.asarray(norm.weight[...], np.float64)))


def test_gelu_in_bfloat16_is_rounded_once(narrow):
    """Rows of `gate` read coordinate 0 and rows of `up` coordinate 1, which is 1."""
    mlp = narrow.layers[0].mlp
    unit = jnp.eye(CONFIG.hidden_size, dtype=jnp.bfloat16)
    kept = {}
    v = jnp.linspace(-5, 5, 999).astype(jnp.bfloat16)
    x = v[None, :, None] * unit[0] + unit[1]
    for param, row in ((mlp.gate, unit[0]), (mlp.up, unit[1])):
        param[...] = jnp.broadcast_to(row, param.shape)
    mlp(x, lambda site, x: kept.setdefault(site, x))
    v = np.asarray(v, np.float64)
    exact = v / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    # Far below 0, tanh is so near -1 in float32 that the difference keeps few digits.
    assert is_rounded_once(kept["mlp_act"][0, v > -2, 0], exact[v > -2])


def test_abstract_allocates_nothing_and_has_the_same_structure():
    huge = jaxtc.Gemma2Config(num_hidden_layers=46, hidden_size=4608, intermediate_size=36864)
    leaves = jax.tree.leaves(Gemma2.abstract(huge))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert len(leaves) == 2 + 46 * 11
    ours, abstract = jax.tree.leaves(tiny.model()), jax.tree.leaves(Gemma2.abstract(CONFIG))
    assert [x.shape for x in ours] == [x.shape for x in abstract]


def test_every_parameter_names_its_axes():
    for path, param in nnx.to_flat_state(nnx.state(tiny.model())):
        assert len(param.logical_axes) == param.ndim, path


def test_a_changed_structure_is_refused():
    model = Gemma2(CONFIG, rngs=nnx.Rngs(0))
    model.layers[1].mlp = model.layers[1].attn_in_norm
    with pytest.raises(SiteError, match="mlp was changed after it was built"):
        jaxtc.run(model, PROMPTS)


def test_new_weights_are_used_at_once():
    model = Gemma2(CONFIG, rngs=nnx.Rngs(0))
    before = jaxtc.run(model, PROMPTS[2]).logits
    model.final_norm.weight[...] = jnp.ones(CONFIG.hidden_size)
    assert np.abs(jaxtc.run(model, PROMPTS[2]).logits - before).max() > 1e-2


@pytest.mark.parametrize("cap", [None, 0.5])
def test_softcaps_are_optional(cap):
    config = dataclasses.replace(CONFIG, attn_logit_softcapping=cap, final_logit_softcapping=cap)
    model = Gemma2(config, rngs=nnx.Rngs(0))
    result = jaxtc.run(model, PROMPTS[0], capture=["layers.1.attn_scores"])
    scores = np.asarray(result.activations["layers.1.attn_scores"])
    largest = max(np.abs(result.logits).max(), np.abs(scores[scores > -1e30]).max())
    assert largest > 0.5 if cap is None else largest <= 0.5


def test_softcap():
    x = jnp.array([-1000.0, -1.0, 0.0, 0.3, 1000.0])
    np.testing.assert_allclose(softcap(x, 50.0), [50 * math.tanh(v / 50) for v in x], rtol=1e-6)
    assert softcap(x, None) is x


def test_rotation_depends_on_distance_only():
    draw = np.random.default_rng(0).standard_normal
    q, k = (jnp.asarray(draw((1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def score(i, j):
        a, b = (rotate(x, jnp.array([[p]]), 10000.0) for x, p in ((q, i), (k, j)))
        return np.einsum("bthd,bthd->h", a, b)

    np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(rotate(q, jnp.array([[0]]), 10000.0), q)
    assert np.abs(score(7, 3) - score(7, 4)).max() > 1e-2


def test_rotation_counts_beyond_256_in_bfloat16():
    """Angles are float32: rounding 257 to bfloat16 would make it 256."""
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    a, b = (rotate(x, jnp.array([[p]], jnp.int32), 10000.0) for p in (256, 257))
    assert (a[..., 0] != b[..., 0]).all()


def test_a_block_by_hand():
    """One layer, one token: attention is the identity on values, so NumPy can say it all."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, layer_types=None)
    model = Gemma2(config, rngs=nnx.Rngs(3))
    for norm in (model.final_norm, model.layers[0].mlp_in_norm, model.layers[0].attn_out_norm):
        norm.weight[...] = jnp.linspace(-0.5, 0.5, config.hidden_size)
    block, token = model.layers[0], 5

    def norm(x, module):
        gain = 1 + np.asarray(module.weight[...], np.float64)
        return x / np.sqrt((x**2).mean() + config.rms_norm_eps) * gain

    def weights(param):
        return np.asarray(param[...], np.float64)

    x = weights(model.embed.weight)[token] * math.sqrt(config.hidden_size)
    v = np.einsum("d,khd->kh", norm(x, block.attn_in_norm), weights(block.attn.v))
    heads = np.repeat(v, config.num_attention_heads // config.num_key_value_heads, axis=0)
    x = x + norm(np.einsum("nh,dnh->d", heads, weights(block.attn.o)), block.attn_out_norm)
    h = norm(x, block.mlp_in_norm)
    gate = h @ weights(block.mlp.gate).T
    gate = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    act = gate * (h @ weights(block.mlp.up).T)
    x = x + norm(act @ weights(block.mlp.down).T, block.mlp_out_norm)
    logits = norm(x, model.final_norm) @ weights(model.embed.weight).T
    logits = 30 * np.tanh(logits / 30)
    np.testing.assert_allclose(jaxtc.run(model, [token]).logits[0, 0], logits, atol=1e-5)
