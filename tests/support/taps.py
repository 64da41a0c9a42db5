"""Edits at single sites, outside the model, on what the model had there; and token by token."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.check import check_edits
from jaxtc.model.gemma2 import MASKED
from jaxtc.model.prompts import prepare
from jaxtc.tap.sites import BY_NAME, ORDER
from jaxtc.tap.tap import Tap
from tests.support import tiny
from tests.support.batch import LAYERS, PROMPTS, run

# One for each kind of axes; attention's own are last.
SITES = ("resid_post", "q", "v", "mlp_in_scale", "logits", "attn_pattern")
# What lies in the padding, which must never matter.
GARBAGE = 1e4


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def checked(edits, prompts=PROMPTS):
    return check_edits(edits, tiny.config(), (LAYERS, len(ORDER)), prepare(prompts, tiny.config()))[
        0
    ]


@jax.jit
def _through(edits, xs, positions, lengths):
    """Each (layers, B, T, ...) array through its edits."""
    found = {}
    for key, x in xs.items():
        site = key.split("/")[0]
        tap = Tap((), edits[key], positions, lengths)
        taps = [tap.at(layer) for layer in range(LAYERS)] if BY_NAME[site].per_layer else [tap]
        found[key] = jnp.stack([one(site, x[one.layer or 0]) for one in taps])
    return found


def through(edits: dict, xs: dict, prompts=PROMPTS) -> dict:
    """What each site holds after its edits.

    Args:
        edits: by key, "site" or "site/anything": a list of edits.
        xs: by key: (layers, B, T, ...), T that of the prompts, padded here with garbage.
        prompts: whose tokens these are.
    """
    made = prepare(prompts, tiny.config())
    width = made.tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width), made.tokens.shape)
    done = {key: checked(some, prompts) for key, some in edits.items()}
    padded = {key: _padded(key.split("/")[0], x, made.lengths, width) for key, x in xs.items()}
    found = _through(done, padded, positions, jnp.asarray(made.lengths))
    return {key: np.asarray(x, np.float32) for key, x in found.items()}


def _padded(site, x, lengths, width):
    letters = ["L", *BY_NAME[site].letters]
    dtype, x = x.dtype, np.asarray(x, np.float32)
    queries = letters.index("T" if "T" in letters else "S")
    x = np.pad(
        x, [(0, width - n) if c in "TS" else (0, 0) for c, n in zip(letters, x.shape, strict=True)]
    )
    x = np.moveaxis(x, queries, 2)
    for row, n in enumerate(lengths):
        if letters[-1] == "S":  # padding is masked
            x[:, row, ..., n:] = MASKED if site == "attn_scores" else 0
        x[:, row, n:] = GARBAGE
    return jnp.asarray(np.moveaxis(x, 2, queries)).astype(dtype)


@functools.cache
def captured(seed: int = 0):
    """{site: (layers, B, T, ...)} of the prompts, or of others of the same lengths."""
    return {
        site: x if BY_NAME[site].per_layer else x[None]
        for site, x in ((site, np.asarray(stored(seed)[site])) for site in SITES)
    }


@functools.cache
def stored(seed: int = 0):
    prompts = [[2, *((token + seed) % 19 for token in row[1:])] for row in PROMPTS]
    return run(prompts, capture=SITES).activations


def random(site: str, prompts, seed=0) -> np.ndarray:
    """(layers, B, T, ...) of a site."""
    longest = max(map(len, prompts))
    sizes = {**tiny.config().sizes, "B": len(prompts), "T": longest, "S": longest}
    layers = LAYERS if BY_NAME[site].per_layer else 1
    shape = (layers, *BY_NAME[site].shape(sizes))
    return np.abs(np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tokens(
    site: str, x: np.ndarray, prompts=PROMPTS
) -> Iterator[tuple[np.ndarray, SimpleNamespace]]:
    """Each real token of a site: its array (without B and T), and where it stands.

    Padding is cut off the keys too.
    """
    keyed = BY_NAME[site].kind == "pairs"
    x = np.moveaxis(x, BY_NAME[site].sequence_axis + 1, 2)
    for layer in range(len(x)):
        rows = [
            x[layer, b, : len(p), ..., : len(p)] if keyed else x[layer, b, : len(p)]
            for b, p in enumerate(prompts)
        ]
        for b, row in enumerate(rows):
            for t, token in enumerate(row):
                yield (
                    token,
                    SimpleNamespace(
                        layer=layer, row=b, place=t, size=len(row), rows=rows, site=site
                    ),
                )


def same(site, found, before, expected: Callable, prompts=PROMPTS, **tolerance) -> int:
    """Every token is what ``expected(token, where it stands)`` says; how many changed."""
    changed = 0
    pairs = zip(tokens(site, found, prompts), tokens(site, before, prompts), strict=True)
    for (token, _), (was, at) in pairs:
        should = np.broadcast_to(expected(was, at), was.shape)
        message = f"{site}, layer {at.layer}, row {at.row}, position {at.place}"
        np.testing.assert_allclose(token, should, err_msg=message, **tolerance)
        changed += bool((token != was).any())
    return changed


def at_token(array, at):
    """What an array of a site's shape holds for a token."""
    axis = BY_NAME[at.site].sequence_axis
    token = np.moveaxis(array, axis, 1)[at.row, at.place]
    return token[..., : at.size] if BY_NAME[at.site].kind == "pairs" else token


def everywhere(at):
    return True
