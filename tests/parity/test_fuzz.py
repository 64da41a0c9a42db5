"""Random configs against the reference, and whether the comparison would notice a wrong constant.

Every run takes the first 12 configs, ``pytest -m slow`` the others up to 60;
``JAXTC_FUZZ=500 pytest -m '' tests/parity/test_fuzz.py`` takes 500, ``JAXTC_FUZZ_SEED=1`` others. A
failure prints the config and the command that runs it again.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc.model.config import FULL, SLIDING, Gemma2Config
from jaxtc.model.gemma2 import Embedder
from tests.parity import fuzz, reference
from tests.parity.figures import note

TOLERANCE = 2e-5
# What a wrong constant must do, in tolerances.
CLEARLY = 10
COUNT = int(os.environ.get("JAXTC_FUZZ", 60))
ALWAYS = 12
SEED = int(os.environ.get("JAXTC_FUZZ_SEED", 0))
# Compiled programs are never used again, and a process can map only so many of them.
FORGET_AFTER = 100


@pytest.mark.parametrize(
    "index",
    [pytest.param(n, marks=[pytest.mark.slow] if n >= ALWAYS else []) for n in range(COUNT)],
)
def test_every_site_of_a_random_config(index):
    case = fuzz.draw(SEED, index)
    hf = fuzz.torch_model(case)
    theirs = reference.capture(hf, case.prompts, case.side)
    config = Gemma2Config.from_dict(hf.config.to_dict())
    ours = fuzz.our_model(config, fuzz.weights(hf, config))
    errors = fuzz.errors(case, reference.ours(ours, case.prompts), theirs)
    worst = max(errors, key=errors.get)
    note("float32", "random configs", errors[worst], f"{worst} of {index}")
    again = f"JAXTC_FUZZ={max(COUNT, index + 1)} JAXTC_FUZZ_SEED={SEED} pytest -m '' "
    again += f"'tests/parity/test_fuzz.py::{test_every_site_of_a_random_config.__name__}[{index}]'"
    first = next((f"{a} {e:.1e}" for a, e in errors.items() if not e <= TOLERANCE), "")
    assert not first, f"worst {worst} {errors[worst]:.1e}\nin {case!r}\nagain: {again}"
    if index % FORGET_AFTER == FORGET_AFTER - 1:
        jax.clear_caches()


@pytest.mark.parametrize("count", [ALWAYS, 60])
def test_cases_are_reproducible_and_varied(count):
    cases = [fuzz.draw(SEED, index) for index in range(count)]
    assert cases == [fuzz.draw(SEED, index) for index in range(count)]
    configs = [case.config for case in cases]
    heads = [(c.num_attention_heads, c.num_key_value_heads) for c in configs]
    assert any(n == k > 1 for n, k in heads)  # MHA
    assert any(n > k == 1 for n, k in heads)  # MQA
    assert any(n > k > 1 for n, k in heads)  # between
    assert {c.num_hidden_layers for c in configs} == {1, 2, 3, 4}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        assert {getattr(c, cap) is None for c in configs} == {True, False}
    assert {case.side for case in cases} == {"left", "right"}
    assert {len(case.lengths) for case in cases} == {1, 2, 3}
    assert min(min(case.lengths) for case in cases) == 1
    past = [max(case.lengths) - case.config.sliding_window for case in cases]
    slides = [SLIDING in c.layer_types for c in configs]
    assert sum(p > 0 and s for p, s in zip(past, slides, strict=True)) >= count / 3
    assert any(p < 0 for p in past)


# Every constant of this one shows: a rms_norm_eps that is not lost beside the mean square, caps
# that bite, a window inside the text, both types of layer, heads in groups, H not the query scale.
SHARP = fuzz.Case(
    Gemma2Config(
        vocab_size=131,
        hidden_size=40,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        query_pre_attn_scalar=13,
        sliding_window=5,
        layer_types=(SLIDING, FULL, SLIDING),
        attn_logit_softcapping=12.0,
        final_logit_softcapping=9.0,
        rope_theta=1000.0,
        rms_norm_eps=1e-3,
        max_position_embeddings=64,
    ),
    seed=5,
    lengths=(19, 8),
    side="left",
)

CONSTANTS = {
    "query scale from head_dim": {"query_pre_attn_scalar": 8},
    "query scale off by one": {"query_pre_attn_scalar": 14},
    "attention softcap off by one": {"attn_logit_softcapping": 13.0},
    "attention softcap removed": {"attn_logit_softcapping": None},
    "final softcap off by one": {"final_logit_softcapping": 10.0},
    "final softcap removed": {"final_logit_softcapping": None},
    "window one shorter": {"sliding_window": 4},
    "window one longer": {"sliding_window": 6},
    "window dropped": {"sliding_window": 4096},
    "layer types swapped": {"layer_types": (FULL, SLIDING, FULL)},
    "layer types of the release moved": {"layer_types": (SLIDING, SLIDING, FULL)},
    "rope base": {"rope_theta": 1010.0},
    "eps half as much again": {"rms_norm_eps": 1.5e-3},
    "eps dropped": {"rms_norm_eps": 1e-6},
    # The same matrices, cut into half as many heads of twice the size.
    "heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


@functools.cache
def sharp() -> tuple:
    """(the reference, its activations)."""
    hf = fuzz.torch_model(SHARP)
    return hf, reference.capture(hf, SHARP.prompts, SHARP.side)


def distance(config: Gemma2Config, values: fuzz.Weights | None = None) -> float:
    """The worst error of ours with this config, at the sites whose shapes and masks agree.

    A mask that differs is caught where it is; here what follows from it must be, too.
    """
    hf, theirs = sharp()
    values = fuzz.weights(hf, config) if values is None else values
    errors = fuzz.errors(
        SHARP, reference.ours(fuzz.our_model(config, values), SHARP.prompts), theirs
    )
    return max(error for error in errors.values() if error < np.inf)


def test_the_model_that_is_changed_below_agrees_first():
    hf, theirs = sharp()
    ours = fuzz.our_model(SHARP.config, fuzz.weights(hf, SHARP.config))
    errors = fuzz.errors(SHARP, reference.ours(ours, SHARP.prompts), theirs)
    assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize("change", CONSTANTS)
def test_a_wrong_constant_is_seen(change):
    error = distance(fuzz.changed(SHARP.config, **CONSTANTS[change]))
    assert error >= CLEARLY * TOLERANCE, f"{error:.1e}"


@pytest.mark.parametrize("deal", ["in order", "in turn"])
def test_which_query_heads_share_a_key_head_is_seen(deal):
    """Each query head with a copy of its key head is the same model; of another's, it is not."""
    hf, _ = sharp()
    config = SHARP.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    values = fuzz.weights(hf, config)
    order = np.arange(heads)
    order = order // (heads // kv_heads) if deal == "in order" else order % kv_heads
    for name in values:
        if name.endswith(("attn.k", "attn.v")):
            values[name] = values[name][order]
    error = distance(fuzz.changed(config, num_key_value_heads=heads), values)
    assert error <= TOLERANCE if deal == "in order" else error >= CLEARLY * TOLERANCE


def other_gelu(monkeypatch):
    gelu = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=False))


def silu(monkeypatch):
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: jax.nn.silu(x))


def scaled_twice(monkeypatch):
    encode = Embedder.encode
    root = SHARP.config.hidden_size**0.5
    monkeypatch.setattr(Embedder, "encode", lambda self, tokens: encode(self, tokens) * root)


def scale_rounded_to_bfloat16(monkeypatch):
    encode = Embedder.encode
    root = jnp.float32(SHARP.config.hidden_size**0.5)
    wrong = root.astype(jnp.bfloat16).astype(jnp.float32) / root
    monkeypatch.setattr(Embedder, "encode", lambda self, tokens: encode(self, tokens) * wrong)


def untied(monkeypatch):
    def decode(self, x, tap):
        head = jax.random.normal(jax.random.key(0), self.weight.shape) * 0.1
        logits = tap("logits_uncapped", x @ head.T)
        return tap("logits", jnp.tanh(logits / self.cap) * self.cap)

    monkeypatch.setattr(Embedder, "decode", decode)


CODE = (other_gelu, silu, scaled_twice, scale_rounded_to_bfloat16, untied)


@pytest.mark.parametrize("change", CODE, ids=lambda change: change.__name__)
def test_what_no_config_changes_is_seen_when_it_is_wrong(change, monkeypatch):
    """The constants that are part of the code: activation, embedding scale, tied output."""
    # A context length of its own, which no result depends on, makes it a program of its own.
    config = fuzz.changed(SHARP.config, max_position_embeddings=1000 + CODE.index(change))
    change(monkeypatch)
    with jaxtc.compiles() as compiled:
        error = distance(config)
    assert len(compiled) == 1
    assert error >= CLEARLY * TOLERANCE, f"{error:.1e}"
