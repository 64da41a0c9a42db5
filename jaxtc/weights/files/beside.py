"""The file beside weights that says what they are: one reader for each library that writes one."""

from pathlib import Path

from jaxtc.errors import SiteError, WeightsError
from jaxtc.transcoders.activations import activation_of
from jaxtc.weights.files import circuit_tracer, gemma_scope, local, saelens, sparsify
from jaxtc.weights.files.description import Description
from jaxtc.weights.files.formats import BY_FORMAT, SITES

# What a config.yaml may list beside circuit-tracer's own files.
_OF_SET = {".npz": "gemma-scope", gemma_scope.PARAMS: "gemma-scope-2"}


def describe(path: Path) -> Description | None:
    """What the file beside the weights ``path`` says of them, None where there is none.

    Raises WeightsError for one that is not sound, and for what jaxtc does not compute, by name.
    """
    if path.suffix != ".safetensors":
        return None
    folder = path.parent
    if local.has(folder, saelens.CONFIG):
        for reader in (saelens, sparsify):
            if found := reader.describe(path):
                return found
        raise WeightsError(
            f"{folder / saelens.CONFIG} is neither SAELens' nor sparsify's, and jaxtc knows no "
            f"other; it describes {path.name}, so that is not read without it."
        )
    if path.name == gemma_scope.PARAMS and local.has(folder, gemma_scope.CONFIG):
        return gemma_scope.describe(path)
    config = circuit_tracer.read_config(folder)
    return config and of_set(config, path)


def of_set(config: circuit_tracer.SetConfig, path: Path) -> Description:
    """What a set's ``config.yaml`` says of one of its transcoders.

    Raises WeightsError for a cross-layer transcoder.
    """
    if config.kind == circuit_tracer.CROSS_LAYER:
        raise WeightsError(
            f"{config.settings.where} says that {path.parent} is a cross-layer transcoder, which "
            "has no transcoder for a single layer."
        )
    format = BY_FORMAT[_OF_SET.get(path.name) or _OF_SET.get(path.suffix, "circuit-tracer")]
    sites, errors = {}, {}
    for name in SITES:
        try:
            if found := config.site(name):
                sites[name] = found
        except SiteError as error:
            errors[name] = error
    activation = None
    if config.activation:
        made = {"name": config.activation} | ({"k": config.k} if config.k else {})
        activation = activation_of(made)
    return Description(config.settings, format, sites, errors, activation=activation)
