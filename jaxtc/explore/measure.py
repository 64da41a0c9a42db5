"""One layer of ``explain``: figures and features of a transcoder on what the model computed.

Axis letters: T tokens of the prompt, D hidden, M features, W layers that features write at.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import JaxtcError
from jaxtc.model.prompts import bucket
from jaxtc.transcoders.cross_layer import LayerFeatures
from jaxtc.transcoders.encoder import Encoder
from jaxtc.transcoders.metrics import FVU, Mean, notebook_score, relative_error
from jaxtc.transcoders.transcoder import nameless

#: The site the Gemma Scope tutorial notebook feeds its transcoder: what the MLP reads, with the
#: norm's gain. Gemma Scope's weights were trained on ``mlp_in_normed``.
NOTEBOOK_SITE = "mlp_in"

_CHUNK = 1024  # tokens encoded at once: bounds the dense (tokens, M) array


class Written:
    """What a cross-layer transcoder's features write at each layer, added up layer by layer."""

    def __init__(self):
        self.layers, self.sums = 0, {}

    def add(self, features: LayerFeatures, layer: int, parts: np.ndarray, x: Any) -> np.ndarray:
        """(T, D) the reconstruction at this layer, once this one's ``parts`` (T, W, D) are added.

        ``x`` (T, D) is what it reads. Raises JaxtcError when earlier layers were left out.
        """
        if not layer == features.layer == self.layers:
            raise JaxtcError(
                f"The reconstruction at layer {layer} is made of the features of layers 0 to "
                f"{layer} of a cross-layer transcoder, and layer {self.layers} was not given. Give "
                "the whole: jaxtc.load_transcoders(folder)."
            )
        self.layers += 1
        for part, at in zip(np.moveaxis(parts, 1, 0), features.writes, strict=True):
            self.sums[at] = self.sums.get(at, 0) + part
        return np.asarray(features.finish(self.sums.pop(layer), x))


def measure(
    transcoder: Encoder,
    layer: int,
    site: str,
    read: Mapping[str, Any],
    keep: np.ndarray,
    top: int,
    written: Written,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of a layer's report, from activations by site, and those of its tokens.

    Raises:
        JaxtcError: NaN or infinity in the reconstruction, or a layer left out before this one.
    """
    got, cross = _encoded(transcoder, read[site], top), isinstance(transcoder, LayerFeatures)
    if cross:
        got["y"] = written.add(transcoder, layer, got["y"], read[site])
    check_finite(got["y"], f"What the transcoder of layer {layer} computes", transcoder.W_dec.dtype)
    target = read[transcoder.output_site]
    got["relative_error"] = relative_error(target, got["y"])
    fvu = FVU().update(target, got["y"], keep)
    score = math.nan
    imitates = transcoder.output_site == "mlp_out" and transcoder.input_site != "mlp_out"
    if imitates and not cross and transcoder.d_in == read[NOTEBOOK_SITE].shape[-1]:
        score = notebook_score(target, _encoded(transcoder, read[NOTEBOOK_SITE], top)["y"])
    figures = {
        "layer": layer,
        "transcoder": transcoder.source,
        "width": transcoder.features,
        "input_site": site,
        "output_site": transcoder.output_site,
        "fvu": fvu.fvu,
        "explained_variance": fvu.explained_variance,
        "notebook_score": score,
        **{name: Mean().update(got[name], keep).mean for name in ("l0", "relative_error")},
    }
    return figures, got


def check_finite(x: Any, what: str, dtype: Any) -> None:
    """Refuse overflow (JaxtcError): comparisons with NaN are false, so L0 would be 0."""
    if np.isfinite(np.asarray(x)).all():
        return
    name = np.dtype(dtype).name
    wider = {"float16": "'float32' or 'bfloat16'", "bfloat16": "'float32'"}.get(name)
    remedy = wider and (
        f"{name} may be too narrow for it: load it with dtype={wider} (--dtype, for the model, on "
        "the command line)."
    )
    raise JaxtcError(
        f"{what} is NaN or infinite somewhere on this prompt, so its figures would mean nothing. "
        f"It was computed in {name}. {remedy or 'The weights are broken; load others.'}"
    )


@functools.partial(jax.jit, static_argnames=("top", "chunk"))
def _encode(transcoder: Encoder, x: jax.Array, top: int, chunk: int) -> dict[str, jax.Array]:
    def one(x):
        a = transcoder.encode(x)
        values, ids = jax.lax.top_k(a, top)
        counts = {"l0": (a > 0).sum(), "above_one": (a > 1).sum()}
        cross = isinstance(transcoder, LayerFeatures)
        y = jnp.moveaxis(transcoder.write_all(a), 0, -2) if cross else transcoder.decode(a, x)
        return {"values": values, "ids": ids, "y": y, **counts}

    return jax.lax.map(one, x, batch_size=chunk)


def _encoded(transcoder: Encoder, x: jax.Array, top: int) -> dict[str, np.ndarray]:
    """Strongest features, counts and reconstruction of (T, D) inputs, as (T, ...) on the host.

    In the place of the reconstruction, what one layer of a cross-layer transcoder writes at each.

    Padded, and without layer and source: few compiled programs serve all prompts and all layers.
    """
    T = len(x)
    padded = np.pad(np.asarray(x, np.float32), ((0, bucket(T) - T), (0, 0)))
    found = _encode(nameless(transcoder), padded, top, _CHUNK)
    return {name: np.asarray(value)[:T] for name, value in found.items()}
