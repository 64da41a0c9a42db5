"""A random cross-layer transcoder's folder, written with the safetensors library by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxtc.sharding.rules import variables
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder

HOOKS = {
    "resid_mid": "hook_resid_mid", "mlp_in_normed": "ln2.hook_normalized", "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out", "mlp_proj": "mlp.hook_out",
}  # fmt: skip


def arrays(
    layers: int, d: int, features: int, *, threshold: bool = True, skip: bool = False, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Of each layer, by circuit-tracer's keys without the layer, float32."""
    draw = np.random.default_rng(seed).standard_normal
    found = []
    for layer in range(layers):
        one = {
            "W_enc": draw((features, d)) / d**0.5,
            "b_enc": draw(features) * 0.3,
            "b_dec": draw(d) * 0.5,
            "W_dec": draw((features, layers - layer, d)) / features**0.5 * 3,
        }
        one |= {"threshold": np.abs(draw(features)) * 0.4} if threshold else {}
        one |= {"W_skip": draw((d, d)) / d**0.5 * 0.3} if skip else {}
        found.append({key: value.astype(np.float32) for key, value in one.items()})
    return found


def write(
    folder: Path,
    parts: list[dict[str, np.ndarray]],
    reads: str | None = "resid_mid",
    writes: str = "mlp_out",
) -> Path:
    """The folder: two files a layer, and a config.yaml unless ``reads`` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer, one in enumerate(parts):
        held = {f"{key}_{layer}": np.ascontiguousarray(value) for key, value in one.items()}
        decoder = {f"W_dec_{layer}": held.pop(f"W_dec_{layer}")}
        safetensors.numpy.save_file(held, folder / f"W_enc_{layer}.safetensors")
        safetensors.numpy.save_file(decoder, folder / f"W_dec_{layer}.safetensors")
    if reads is not None:
        (folder / "config.yaml").write_text(
            f"model_name: someone/some-model\nmodel_kind: cross_layer_transcoder\n"
            f"feature_input_hook: {HOOKS[reads]}\nfeature_output_hook: {HOOKS[writes]}\n",
            encoding="utf-8",
        )
    return folder


def in_memory(layers: int = 3, d: int = 24, features: int = 50, **options) -> CrossLayerTranscoder:
    """The transcoder of :func:`arrays`, without any file."""
    parts = arrays(layers, d, features, **options)
    made = CrossLayerTranscoder.abstract(
        layers, d, features, skip=options.get("skip", False), source="tiny/cross-layer",
        activation="jumprelu" if options.get("threshold", True) else "relu",
    )  # fmt: skip
    leaves = {f"layers.{n}.{key}": one[key] for n, one in enumerate(parts) for key in one}
    turned = ("W_enc", "W_skip")
    found = [
        jnp.asarray(leaves[name].T if name.endswith(turned) else leaves[name])
        for name, _ in variables(made)
    ]
    return jax.tree.unflatten(jax.tree.structure(made), found)
