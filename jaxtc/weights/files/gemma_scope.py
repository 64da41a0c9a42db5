"""Gemma Scope 2's ``config.json`` beside each ``params.safetensors``."""

from pathlib import Path

from jaxtc.weights.files.description import Description, described
from jaxtc.weights.files.formats import BY_FORMAT
from jaxtc.weights.files.settings import read_json

CONFIG, PARAMS = "config.json", "params.safetensors"
_HARMLESS = ("model_name", "l0", "width", "dtype", "d_model", "d_sae", "layer")


def describe(path: Path) -> Description:
    """What ``config.json`` says of the weights beside it.

    Raises WeightsError as :func:`jaxtc.weights.files.beside.describe`.
    """
    config = read_json(path.parent / CONFIG)
    kind = config.one_of("type", ("sae", "transcoder", "crosscoder", "clt"))
    if kind in ("crosscoder", "clt"):
        raise config.wrong(f"it is a {kind}, which reads or writes several layers at once")
    config.one_of("architecture", ("jump_relu", "jumprelu"))
    keys = {"input_site": "hf_hook_point_in", "output_site": "hf_hook_point_out"}
    hooks = {ours: config.get(key, "text") for ours, key in keys.items()}
    if kind == "sae" and hooks["output_site"] is None:
        hooks["output_site"] = hooks["input_site"]
    affine = config.get("affine_connection", "switch")
    config.finish(_HARMLESS)
    given = {ours: (keys[ours], hook) for ours, hook in hooks.items() if hook is not None}
    found = Description(**described(config, given, format=BY_FORMAT["gemma-scope-2"], skip=affine))
    if kind == "sae" and len(set(found.sites.values())) > 1:
        raise config.wrong("it is an autoencoder ('sae'), but reads and writes different places")
    return found
