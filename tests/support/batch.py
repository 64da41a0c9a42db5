"""One batch of prompts through the tiny model, as the tests of edits run it."""

import jax.numpy as jnp
import numpy as np

import jaxtc
from tests.support import tiny

LAYERS, D = tiny.config().num_hidden_layers, tiny.config().hidden_size
PROMPTS = [[2, 5, 7, 9, 4, 11, 6, 8, 3], [2, 6, 4, 10, 12], [2, 13, 5]]
LENGTHS = [len(prompt) for prompt in PROMPTS]
VECTOR = jnp.asarray(np.random.default_rng(0).standard_normal(D), jnp.float32)


def run(prompts=PROMPTS, **options):
    return jaxtc.run(tiny.model(), prompts, **options)


def logits(*edits, prompts=PROMPTS):
    return run(prompts, edits=edits).logits


def real(x):
    """The real tokens of a (B, T, ...) array, in one row."""
    return np.concatenate([row[:n] for row, n in zip(np.asarray(x), LENGTHS, strict=True)])


def near(a, b, tolerance=1e-6):
    np.testing.assert_allclose(real(a), real(b), rtol=tolerance, atol=tolerance)
