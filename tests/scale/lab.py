"""What the tests of meshes share: a small model, what to compute with it, how results compare.

Imported by processes with 1, 2 and 8 devices alike; random numbers are NumPy's, the same in all.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtc
from jaxtc.captures.reducers import Features, Mean, Norm, TopK
from tests.support import tiny, unspared

MOST = 1e-6

# K = 4 kv heads: fewer than the devices of model=8.
CONFIG = jaxtc.Gemma2Config(
    vocab_size=256, hidden_size=24, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=8, query_pre_attn_scalar=12,
    sliding_window=4, max_position_embeddings=64,
)  # fmt: skip
FEATURES = 512
LAYERS = range(CONFIG.num_hidden_layers)
ROWS = np.random.default_rng(5).integers(3, 256, (8, 11))
LENGTHS = np.array([11, 7, 11, 3, 9, 11, 2, 10])


def _random(shapes: Any, seed: int, spread: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[1:]) if len(leaf.shape) > 1 else 4
        return jnp.asarray(rng.normal(size=leaf.shape) * spread * fan_in**-0.5, jnp.float32)

    return jax.tree.map(draw, shapes)


@tiny.handed_out
def model() -> jaxtc.Gemma2:
    return _random(jaxtc.Gemma2.abstract(CONFIG), 1)


@functools.cache
def transcoder(layer: int = 1, activation="jumprelu") -> jaxtc.Transcoder:
    """With ties: its features come in pairs that are always equal, one in each half."""
    made = jaxtc.Transcoder.abstract(24, FEATURES, activation=activation, layer=layer, source="lab")
    made = _random(made, 7 + layer)
    own = [name for name, axes in made.activation.parameters.items() if axes]
    for name, axis in (("W_enc", 1), ("b_enc", 0), *((name, 0) for name in own)):
        value = np.array(getattr(made, name)[...])
        half = np.split(value, 2, axis=axis)[0]
        getattr(made, name)[...] = jnp.asarray(np.concatenate([half, half], axis=axis))
    made.W_enc[...] = made.W_enc[...] * 3
    if activation == "batchtopk":
        made.threshold[...] = jnp.ones(())
    return made


def edits(transcoder: jaxtc.Transcoder) -> list[jaxtc.Edit]:
    """Of every kind that moves something between devices in its own way."""
    rng = np.random.default_rng(9)
    return [
        jaxtc.Add(rng.normal(size=24).astype(np.float32), site="resid_mid", layer=0, position=-1),
        jaxtc.Scale(0.5, site="attn_heads", layer=1, head=[0, 5]),
        jaxtc.Zero(site="mlp_act", layer=0, coordinate=[3, 40], position=0),
        jaxtc.KnockOut(position=-1, key=0, layer=1),
        jaxtc.Copy(site="resid_post", layer=0, row=1, from_row=0, position=0),
        unspared.Splice(transcoder, layer=1),
        unspared.SetFeature(
            transcoder, feature=[3, 400], value=2.0, layer=1, position=slice(1, None)
        ),
    ]


def run_with_everything(model, transcoder, **options) -> dict[str, Any]:
    """Captures at every site, reducers, and edits."""
    capture = [
        *(site.name for site in jaxtc.SITES),
        TopK("logits", 5), TopK("mlp_act", 7), TopK("attn_pattern", 2), Mean("resid_post"),
        Norm("q"), Features(transcoder=transcoder, capacity=FEATURES),
    ]  # fmt: skip
    given = {"lengths": LENGTHS, "capture": capture, "edits": edits(transcoder)} | options
    result = jaxtc.run(model, ROWS, **given)
    return {"logits": result.logits} | {
        name: result.activations[name] for name in capture_of(result)
    }


def capture_of(result: Any) -> list[str]:
    return list(result.activations)


def generation(model, transcoder, **options) -> dict[str, Any]:
    """Greedy, with an edit in each phase and captures of each kind."""
    chosen = [edits(transcoder)[i] for i in (0, 1, 5)]
    capture = ["k", "attn_pattern", "resid_post", TopK("logits", 3)]
    made = jaxtc.generate(
        model, ROWS, 5, lengths=LENGTHS, edits=chosen, capture=capture, stop=(), **options
    )
    return {"tokens": np.array(made.tokens)} | {n: made.activations[n] for n in capture_of(made)}


def sweep(model, transcoder, **options) -> dict[str, Any]:
    """15 variants (no multiple of the devices), and one of features."""
    over = jaxtc.Over
    zeroed = jaxtc.Zero(site="mlp_out", layer=over(LAYERS), position=over(range(3)))
    first = jaxtc.sweep(model, ROWS[:3], [zeroed, *edits(transcoder)[1:2]], **options)
    return {"logits": first.values}


def dictionary(transcoder, x) -> dict[str, Any]:
    """Everything a transcoder does by itself, on (B, T, D)."""
    sparse = transcoder.encode_sparse(x, FEATURES // 2)
    return {
        "encode": transcoder.encode(x),
        "call": transcoder(x),
        "sparse": sparse,
        "decode_sparse": transcoder.decode_sparse(sparse),
    }


def numbers(x: Any) -> Any:
    return jaxtc.to_numpy(x)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, relative L2 distance); infinity where whole numbers or shapes are not the same."""
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        pairs = zip(jax.tree.leaves(numbers(found[name])), jax.tree.leaves(wanted), strict=True)
        free = np.False_
        for a, b in pairs:
            a, b = np.asarray(a), np.asarray(b)
            if a.shape != b.shape or b.dtype.kind in "iub":
                ordered = ~free if free.shape == b.shape else np.True_  # ids follow their values
                same = a.shape == b.shape and (a == b)[ordered].all()
                yield name, 0.0 if same else np.inf
                continue
            free = swappable(b)
            # attn_scores: the mask is the same huge number in both, and would hide the rest.
            assert ((a < -1e30) == (b < -1e30)).all(), name
            a, b = (np.where(x < -1e30, 0, x).astype(np.float64) for x in (a, b))
            yield name, np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def swappable(values: np.ndarray) -> np.ndarray:
    """Where rounding may choose the order of sorted values: near each other, and not all tied."""
    step = np.abs(np.diff(values, axis=-1, prepend=np.inf))
    apart = step > 10 * MOST * np.nanmax(np.abs(values))
    group = np.cumsum(apart).reshape(values.shape)
    return np.isin(group, group[~apart & (step > 0)])


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Fail where they differ by more than :data:`MOST`; the largest difference."""
    told = list(differences(found, expected))
    wrong = {name: value for name, value in told if not value <= MOST}
    assert not wrong, wrong
    return max(value for _, value in told)
