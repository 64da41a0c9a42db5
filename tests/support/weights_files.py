"""A small model and a small transcoder, and ways to write and to damage their files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxtc
from jaxtc.weights.sources.resolve import resolve

# No two of D, N*H, K*H, F and V are equal, so a swapped axis cannot pass for the right one.
CONFIG = jaxtc.Gemma2Config(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
    query_pre_attn_scalar=12, max_position_embeddings=64,
)  # fmt: skip


def random_model(dtype=jnp.float32) -> jaxtc.Gemma2:
    """Every parameter random, the norms too."""
    rng = np.random.default_rng(1)  # numpy's: nothing to compile
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype=dtype),
        jaxtc.Gemma2.abstract(CONFIG),
    )


def available_layers(source) -> list[int]:
    """The layers that a source has transcoders for."""
    return resolve(source, "transcoders").layers()


def same(a, b) -> bool:
    """Whether two modules have the same structure, dtypes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def parse(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file, read independently of jaxtc."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def compose(path: Path, header: dict | bytes, data: bytes) -> None:
    """Write a safetensors file from any header, sound or not."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def params(d: int = 24, features: int = 60) -> dict[str, np.ndarray]:
    """The arrays of a random transcoder."""
    rng = np.random.default_rng(0)
    shapes = {
        "W_enc": (d, features), "W_dec": (features, d), "b_enc": (features,), "b_dec": (d,),
        "threshold": (features,),
    }  # fmt: skip
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def write_tier(root: Path, path: str, arrays: dict[str, np.ndarray] | None = None) -> Path:
    """Write ``params.npz`` at a place of Gemma Scope's layout, with numpy itself."""
    folder = root / path
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **(arrays or params()))
    return folder / "params.npz"
