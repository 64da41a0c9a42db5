"""Cross-layer transcoders from a source, whole or the features of one layer."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxtc.errors import SiteError
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder, LayerFeatures
from jaxtc.weights.files.circuit_tracer import SetConfig
from jaxtc.weights.files.cross_layer import LayerFiles, check_layers
from jaxtc.weights.files.formats import SITES
from jaxtc.weights.files.safetensors import SafetensorsFile
from jaxtc.weights.files.shards import fill
from jaxtc.weights.sources.cross_layer import CrossLayerSource

_Module = TypeVar("_Module", CrossLayerTranscoder, LayerFeatures)
Places = Callable[[nnx.Module], list[NamedSharding]]


def load_cross_layer(
    found: CrossLayerSource,
    layer: int | None,
    dtype: np.dtype,
    sites: Mapping[str, str | None],
    places: Places | None,
) -> CrossLayerTranscoder | LayerFeatures:
    """The whole, or the features of one layer; see :func:`jaxtc.load_transcoders`.

    One parameter at a time is on the host, of a mesh each process's shards of it only.

    Raises:
        SiteError: nothing says which sites it reads and writes.
        WeightsError: damaged files; arrays missing, extra, misshapen, not finite, or of layers that
            do not belong together; settings that are not known.
    """
    config = found.config()
    told = _sites(found, config, sites)
    wanted = range(found.layers) if layer is None else [layer]
    with _opened(found, wanted) as opened:
        check_layers(opened, found.layers, found.name)
        one = opened[wanted[0]]
        sizes = (one.sizes["I"], one.sizes["M"], one.sizes["O"])
        options = dict(
            activation=_activation(one, config), skip="W_skip" in one.shapes, dtype=dtype,
            source=found.name, **told,
        )  # fmt: skip
        if layer is None:
            declared = CrossLayerTranscoder.abstract(found.layers, *sizes, **options)
        else:
            declared = LayerFeatures.abstract(layer, found.layers, *sizes, **options)

        def read(name: str, dtype: np.dtype, sharding: NamedSharding | None):
            _, of, ours = name.split(".") if layer is None else ("", layer, name)
            return opened[int(of)].read(ours, dtype, sharding)

        return fill(declared, read, found.name, places)


@contextlib.contextmanager
def _opened(found: CrossLayerSource, layers: Iterable[int]) -> Iterator[dict[int, LayerFiles]]:
    with contextlib.ExitStack() as stack:
        yield {
            layer: LayerFiles(
                layer,
                {
                    part: stack.enter_context(SafetensorsFile(path))
                    for part, path in found.files(layer).items()
                },
            )
            for layer in layers
        }


def _sites(
    found: CrossLayerSource, config: SetConfig | None, given: Mapping[str, str | None]
) -> dict[str, str]:
    """What it reads and writes: as given, or as its config.yaml says."""
    sites = {key: given.get(key) or (config and config.site(key)) for key in SITES}
    missing = [key for key, site in sites.items() if not site]
    if missing:
        raise SiteError(
            f"Nothing says which sites {found.name} reads and writes: a config.yaml with "
            f"feature_input_hook and feature_output_hook would. Give {' and '.join(missing)}; "
            "circuit-tracer takes such folders for input_site='resid_mid', output_site='mlp_out'."
        )
    return sites


def _activation(one: LayerFiles, config: SetConfig | None) -> str:
    """By the thresholds, which a config.yaml may not contradict."""
    found = "jumprelu" if "threshold" in one.shapes else "relu"
    said = config and config.activation
    if said not in (None, found):
        has = "has thresholds" if found == "jumprelu" else "has no thresholds"
        raise config.settings.wrong(
            f"it says activation {said!r}, but W_enc_{one.layer}.safetensors {has}; cross-layer "
            "transcoders are read with JumpReLU (with thresholds) or ReLU (without)"
        )
    return found
