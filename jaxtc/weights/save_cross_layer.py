"""Writing a cross-layer transcoder as circuit-tracer keeps it: a folder, two files a layer."""

from pathlib import Path

import jax
import numpy as np

from jaxtc.errors import SourceError
from jaxtc.sharding.processes import check_here
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder, LayerFeatures
from jaxtc.weights.files import local
from jaxtc.weights.files.circuit_tracer import CONFIG, CROSS_LAYER, write_config
from jaxtc.weights.files.cross_layer import DECODER, ENCODER, write_layer
from jaxtc.weights.files.settings import HOOKS

# What may be in a folder that is replaced.
_FILES = tuple(part.format(layer="*") for part in (ENCODER, DECODER))


def save_cross_layer(transcoder: CrossLayerTranscoder, folder: str | Path) -> Path:
    """Write the folder, whole or not at all; see :func:`jaxtc.save_transcoder`.

    Raises:
        SourceError: the folder holds other things, or cannot be written; an activation that such
            files do not have; arrays of which this process has only a part.
    """
    check_here(transcoder, "cross-layer transcoder")
    activation = transcoder.layers[0].activation
    if activation.name not in ("jumprelu", "relu") and activation.as_threshold is None:
        raise SourceError(
            f"Files of a cross-layer transcoder have no activation {activation.name!r}, only "
            "JumpReLU and ReLU; other programs would compute something else from them."
        )
    sites = transcoder.input_site, transcoder.output_site
    hooks = [HOOKS.get(site, site) for site in sites]
    folder = local.expand(folder).resolve()
    try:
        with local.replacing_folder(folder, (*_FILES, CONFIG), "a cross-layer transcoder") as made:
            for one in transcoder.layers:
                write_layer(made, one, lambda name, one=one: _value(one, name))
            (made / CONFIG).write_bytes(write_config(CROSS_LAYER, *hooks))
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


def _value(one: LayerFeatures, name: str) -> np.ndarray:
    value = jax.device_get(getattr(one, name)[...])
    # One threshold for all features is written as one for each.
    return np.broadcast_to(value, one.features) if name == "threshold" else value
