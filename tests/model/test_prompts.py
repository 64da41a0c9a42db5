"""The door between Python lists and arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtc.errors import InputError
from jaxtc.model.prompts import bucket, prepare
from tests.support import tiny

CONFIG = tiny.config()


@given(st.integers(1, 300_000))
def test_bucket_holds_its_length_and_wastes_little(length):
    size = bucket(length)
    assert length <= size and bucket(size) == size and size <= bucket(length + 1)
    assert size - length < 16 or (size - length) / length < 0.25


def test_few_buckets():
    assert len({bucket(length) for length in range(1, 8193)}) <= 64


@pytest.mark.parametrize(
    ("tokens", "lengths", "rows"),
    [
        ([2, 5, 6], None, [[2, 5, 6]]),
        ((2, 5, 6), None, [[2, 5, 6]]),
        ([[2, 5], [2, 5, 6, 7]], None, [[2, 5], [2, 5, 6, 7]]),
        ([np.array([2, 5]), [2]], None, [[2, 5], [2]]),
        (np.array([2, 5, 6]), None, [[2, 5, 6]]),
        (jnp.array([[2, 5], [2, 6]]), None, [[2, 5], [2, 6]]),
        (np.array([[2, 5, 0], [2, 6, 7]], np.uint8), [2, 3], [[2, 5], [2, 6, 7]]),
        # What lies past a length is padding, whatever it holds.
        (np.array([[2, 5, -100], [2, 6, 7]]), np.array([2, 3]), [[2, 5], [2, 6, 7]]),
        ([2, 5, 9], 2, [[2, 5]]),
    ],
)
def test_forms(tokens, lengths, rows):
    made = prepare(tokens, CONFIG, lengths)
    assert made.tokens.dtype == made.lengths.dtype == np.int32
    assert made.tokens.shape == (len(rows), bucket(made.length))
    assert made.lengths.tolist() == list(map(len, rows))
    for row, ids in zip(np.asarray(made.tokens), rows, strict=True):
        assert row[: len(ids)].tolist() == ids
        assert (row[len(ids) :] == CONFIG.pad_token_id).all()


V, CONTEXT = CONFIG.vocab_size, CONFIG.max_position_embeddings


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([], None, "Prompt 0 is empty"),
        ([[]], None, "Prompt 0 is empty"),
        ([[2, 5], []], None, "Prompt 1 is empty"),
        (np.zeros((2, 0), int), None, "is empty"),
        ([[2], [3]], [1, 0], "Prompt 1 is empty"),
        ([2, V], None, f"Token id {V} .prompt 0, position 1. is outside.*0 to {V - 1}"),
        ([[2], [2, 3, -1]], None, r"Token id -1 \(prompt 1, position 2\)"),
        ([2**40], None, "outside the model's vocabulary"),
        ([2.0, 3.0], None, "whole numbers.*float64"),
        ([True, False], None, "whole numbers.*bool"),
        ("the capital", None, "Got text where token ids are expected"),
        (["the", "capital"], None, "Got text"),
        (np.zeros((1, 2, 3), int), None, "shape"),
        (3, None, "one row or several"),
        ([2] * (CONTEXT + 1), None, f"{CONTEXT + 1} tokens is longer than.*context of {CONTEXT}"),
        ([[2, 3]], [3], "lengths say 3 tokens for prompt 0, which has 2"),
        ([[2, 3]], [1, 1], "lengths must be 1 whole numbers"),
        ([[2, 3]], [1.0], "lengths must be 1 whole numbers"),
    ],
)
def test_refused(tokens, lengths, message):
    with pytest.raises(InputError, match=message):
        prepare(tokens, CONFIG, lengths)


def test_room_for_new_tokens():
    assert prepare([2] * (CONTEXT - 4), CONFIG, extra=4).length == CONTEXT - 4
    with pytest.raises(InputError, match="and 5 new ones is longer"):
        prepare([2] * (CONTEXT - 4), CONFIG, extra=5)


def test_inside_a_trace():
    shapes = []

    @jax.jit
    def traced(tokens, lengths):
        made = prepare(tokens, CONFIG, lengths)
        shapes.append((made.tokens.shape, made.lengths.shape, made.length))
        return made.tokens, made.lengths

    tokens, lengths = traced(jnp.array([[2, 5, 6]]), jnp.array([2]))
    assert shapes == [((1, 16), (1,), 3)]
    assert tokens[0, :3].tolist() == [2, 5, CONFIG.pad_token_id] and lengths.tolist() == [2]
    with pytest.raises(InputError, match="context"):
        jax.eval_shape(lambda t: prepare(t, CONFIG).tokens, jnp.zeros((1, CONTEXT + 1), jnp.int32))
