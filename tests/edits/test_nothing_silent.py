"""What could give a wrong number without a word gives an error, or NaN inside a trace."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.experimental.checkify import JaxRuntimeError

import jaxtc
from jaxtc import Add, Scale, SetTo, Splice, Zero
from jaxtc.errors import EditError, InputError, JaxtcError, SiteError
from jaxtc.programs.run import _run
from tests.support import tiny
from tests.support.batch import LAYERS, LENGTHS, PROMPTS, VECTOR, D, logits, near, run

PADDED = jnp.asarray([prompt + [0] * (9 - len(prompt)) for prompt in PROMPTS])


@pytest.mark.parametrize("site", ["attn_scores", "attn_pattern"])
def test_putting_back_what_attention_had_changes_nothing(site):
    before = run(capture=site)
    kept = before.activations[f"layers.1.{site}"]
    near(logits(SetTo(kept, site=site, layer=1)), before.logits, 1e-5)


def test_edited_scores_are_the_same_in_decode():
    edits = [Scale(-1.5, site="attn_scores", layer=LAYERS - 1)]
    made = jaxtc.generate(tiny.model(), PROMPTS, 5, edits=edits, stop=())
    for row, sequence in enumerate(made.sequences):
        for end in range(LENGTHS[row], LENGTHS[row] + 5):
            best = run([sequence[:end]], edits=edits, logits="last").logits.argmax(-1)
            assert best[0] == sequence[end]


@pytest.mark.parametrize("tokens", [10, 12, 16])
def test_a_value_over_other_tokens_than_the_prompt_s_is_refused(tokens):
    value = np.ones((tokens, D), np.float32)
    with pytest.raises(EditError, match=rf"\({tokens}, {D}\).*\(3, 9, {D}\)"):
        run(edits=[Add(value, site="resid_mid", layer=1)])


def test_one_vector_a_prompt_is_not_taken_for_one_a_token():
    value = np.ones((16, D), np.float32)
    with pytest.raises(EditError, match="does not broadcast"):
        run([PROMPTS[0][:6]] * 16, edits=[Add(value, site="resid_mid", layer=1)])


def with_lengths(edit=None, logits="all"):
    edits = [] if edit is None else [edit]

    @jax.jit
    def call(lengths):
        return run(PADDED, lengths=lengths, edits=edits, logits=logits).logits

    return call


def test_traced_lengths_give_what_known_ones_do():
    near(with_lengths(Add(VECTOR, site="resid_mid", layer=1, position=-1))(jnp.asarray(LENGTHS)),
         logits(Add(VECTOR, site="resid_mid", layer=1, position=-1)), 1e-5)  # fmt: skip


def test_traced_lengths_make_a_position_outside_nan():
    call = with_lengths(Add(VECTOR, site="resid_mid", layer=1, position=4))
    assert jnp.isfinite(call(jnp.asarray([9, 5, 5]))).all()
    assert jnp.isnan(call(jnp.asarray([9, 5, 3]))).all()


def test_traced_lengths_still_have_rows_checked():
    with pytest.raises(EditError, match="rows 0 to 2"):
        with_lengths(Add(VECTOR, site="resid_mid", layer=1, row=7))(jnp.asarray(LENGTHS))


@pytest.mark.parametrize("wrong", [0, -1, 10])
def test_a_traced_length_outside_its_row_is_nan(wrong):
    out = with_lengths(logits="last")(jnp.asarray([9, wrong, 3]))
    assert jnp.isfinite(out).all(-1).tolist() == [True, False, True]
    assert jnp.isnan(out[1]).all()


def test_traced_tokens_have_known_lengths_checked():
    with pytest.raises(InputError, match="lengths say 14 tokens for prompt 1, which has 9"):
        jax.jit(lambda t: run(t, lengths=[9, 14, 9]).logits)(PADDED)


def test_traced_tokens_are_whole_numbers():
    with pytest.raises(InputError, match="whole numbers"):
        jax.jit(lambda t: run(t).logits)(PADDED.astype(jnp.float32))


def test_a_length_beyond_its_own_prompt_is_refused():
    with pytest.raises(InputError, match="3 tokens for prompt 1, which has 1"):
        run([[2, 5, 7], [2]], lengths=[3, 3])


@pytest.mark.parametrize("target", ["row", "position"])
def test_a_traced_target_that_misses_in_part_is_nan(target):
    inside, partly = jnp.asarray([0, 2]), jnp.asarray([0, 99])

    def call(chosen):
        return logits(Add(VECTOR, site="resid_mid", layer=1, **{target: chosen}))

    out = jax.vmap(call)(jnp.stack([inside, partly]))
    assert jnp.isfinite(out[0, 0]).all() and jnp.isnan(out[1]).all()


def test_traced_layers_count_from_the_end_and_stop_where_the_pass_does():
    def call(layer):
        edit = Add(VECTOR, site="mlp_out", layer=layer)
        kept = run(edits=[edit], capture="layers.1.mlp_in", logits=None)
        return kept.activations["layers.1.mlp_in"]

    out = jax.vmap(call)(jnp.asarray([0, 1, 2, -LAYERS]))
    near(out[0], out[3])
    assert jnp.isfinite(out[0, 0]).all() and jnp.isnan(out[1:3]).all()


def test_checks_name_the_target_that_misses_inside_a_trace():
    def call(layer):
        return run(edits=[Zero(site="mlp_out", layer=layer)], checks=True).logits

    error, out = checkify.checkify(jax.jit(call))(LAYERS)
    assert re.match(rf"Zero\(mlp_out\) would not fire .*layer.*{LAYERS}", error.get())
    assert jnp.isnan(out).all()
    error, out = checkify.checkify(jax.jit(call))(LAYERS - 1)
    assert error.get() is None and jnp.isfinite(out[0]).all()
    with pytest.raises(JaxRuntimeError, match="would not fire"):
        jax.vmap(call)(jnp.asarray([0, LAYERS]))


def test_nan_goes_through_a_transcoder():
    nan = jnp.full((2, D), jnp.nan)
    made = tiny.transcoder(1)
    assert jnp.isnan(made(nan)).all()
    with pytest.raises(JaxtcError, match="active features"):
        made.encode_sparse(nan, capacity=5)


def test_generate_refuses_nan():
    with pytest.raises(JaxtcError, match="computed NaN for prompt 0"):
        jaxtc.generate(tiny.model(), PROMPTS, 3, edits=[Add(jnp.nan, site="resid_mid", layer=1)])


def test_padding_is_not_looked_up_in_the_config():
    odd = dataclasses.replace(tiny.config(), pad_token_id=tiny.config().vocab_size + 5)
    model = jaxtc.Gemma2(odd, rngs=nnx.Rngs(0))
    alone = jaxtc.run(model, PROMPTS[2]).logits[0]
    np.testing.assert_allclose(jaxtc.run(model, PROMPTS).logits[2, :3], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [7, [7], (7, 8)])
def test_generate_takes_one_stop_token_or_several(stop):
    made = jaxtc.generate(tiny.model(), PROMPTS, 3, stop=stop)
    assert all(len(row) <= 3 for row in made.tokens)


def test_generate_inside_a_gradient_says_so():
    with pytest.raises(InputError, match="cannot run inside"):
        jax.grad(lambda v: jaxtc.generate(
            tiny.model(), PROMPTS, 2, edits=[Add(v, site="resid_mid", layer=1)]
        ))(1.0)  # fmt: skip


def test_prompts_that_a_tokenizer_gave_as_batches_of_one():
    arrays = tuple(np.asarray([prompt]) for prompt in PROMPTS)
    near(run(arrays).logits, run().logits)


def test_other_lengths_of_a_bucket_and_other_spellings_of_a_target_run_one_program():
    run([PROMPTS[0]])
    before = _run.count
    for length in (4, 6, 8):
        run([PROMPTS[0][:length]])
    assert _run.count == before
    logits(Add(VECTOR, site="resid_mid", layer=1, position=1))
    before = _run.count
    for place in (np.int32(2), jnp.int32(0), [1], np.asarray([2])):
        logits(Add(VECTOR, site="resid_mid", layer=2, position=place))
    assert _run.count == before


def test_transcoders_from_other_sources_run_one_program():
    logits(Splice(tiny.transcoder(1)))
    before = _run.count
    other = tiny.transcoder(2)
    assert other.source != tiny.transcoder(1).source
    logits(Splice(other, layer=1))
    assert _run.count == before


def test_a_splice_says_its_layer_in_its_site_or_by_its_transcoder():
    assert Splice(tiny.transcoder(1), site="layers.1.mlp_out").layer == 1
    assert Splice(tiny.transcoder(None), site="blocks.2.hook_mlp_out").layer == 2
    alias = "blocks.1.ln2.hook_normalized"
    assert Splice(tiny.transcoder(1), reads=alias).reads == ("mlp_in_normed",)


def test_a_transcoder_of_no_site_is_refused():
    with pytest.raises(SiteError, match="mlp_in_normed"):
        jaxtc.Transcoder(4, 8, input_site="mlp_in_nromed", rngs=nnx.Rngs(0))


def test_captures_of_a_model_of_one_layer_are_stacked_too():
    config = dataclasses.replace(tiny.config(), num_hidden_layers=1, layer_types=None)
    kept = jaxtc.run(jaxtc.Gemma2(config, rngs=nnx.Rngs(0)), [2, 5, 7], capture="mlp_out")
    assert kept.activations["mlp_out"].shape == (1, 1, 3, D)
    assert kept.activations["layers.0.mlp_out"].shape == (1, 3, D)
    assert "typo" not in kept.activations and "embed" not in kept.activations
