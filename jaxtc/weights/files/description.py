"""What a file beside weights may say of them."""

import dataclasses
import re
from collections.abc import Mapping

from jaxtc.errors import SiteError
from jaxtc.transcoders.activations import Activation
from jaxtc.weights.files.formats import Format
from jaxtc.weights.files.settings import Settings

_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file beside weights says of them.

    Attributes:
        settings: that file.
        format: how the weights are spelled.
        sites: ``input_site`` and ``output_site``, as far as it says them.
        no_sites: for those that it says but jaxtc has not, the error.
        layer: which layer's, if it says.
        activation: None if the arrays tell.
        subtract_b_dec: whether the decoder's bias is taken off the input.
        skip: whether there is a skip connection; None if the arrays tell.
        sizes: of axes, by letter (I, M, O), as far as it says them.
        scale: what the input is multiplied with, and the output divided by.
        decoder_norm: whether pre-activations are multiplied with the norms of the decoder's rows,
            and activations divided by them.
        gain: whether an array ``scaling_factor`` multiplies activations before they are decoded.
    """

    settings: Settings
    format: Format
    sites: Mapping[str, str]
    no_sites: Mapping[str, SiteError] = dataclasses.field(default_factory=dict)
    layer: int | None = None
    activation: Activation | None = None
    subtract_b_dec: bool = False
    skip: bool | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    scale: float = 1.0
    decoder_norm: bool = False
    gain: bool = False


def described(settings: Settings, hooks: Mapping[str, tuple[str, str] | None], **facts) -> dict:
    """The sites and the layer that ``hooks`` name: (key of the file, hook) by our names.

    Raises WeightsError for hooks of two layers.
    """
    sites, errors, layers = {}, {}, set()
    for name, hook in hooks.items():
        if hook is None:
            continue
        layers |= {int(number) for number in _LAYER.findall(hook[1])[:1] if len(number) < 6}
        try:
            sites[name] = settings.site(*hook)[0]
        except SiteError as error:
            errors[name] = error
    if len(layers) > 1:
        raise settings.wrong(
            f"it reads layer {min(layers)} and writes layer {max(layers)}; jaxtc runs transcoders "
            "within one layer"
        )
    layer = next(iter(layers), None)
    return {"settings": settings, "sites": sites, "no_sites": errors, "layer": layer, **facts}
