"""Writing transcoders in the formats of :mod:`jaxtc.weights.files.formats`."""

from pathlib import Path

import jax

from jaxtc.errors import SiteError, SourceError
from jaxtc.sharding.processes import check_here
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files import local
from jaxtc.weights.files.formats import SITES, Format, by_name, sites_of
from jaxtc.weights.files.layout import sae_site
from jaxtc.weights.files.transcoder import write_transcoder
from jaxtc.weights.save_cross_layer import save_cross_layer


def save_transcoder(
    transcoder: Transcoder | CrossLayerTranscoder,
    path: str | Path,
    *,
    format: str | None = None,
    without_sites: bool = False,
) -> Path:
    """Write a transcoder in one of the formats of :data:`jaxtc.weights.files.formats.FORMATS`.

    The file is written whole or not at all. Those in safetensors say which sites the transcoder
    reads and writes. ``params.npz`` has no place for that (nor for the layer, which the folder
    ``layer_N`` around it names): a transcoder that would be taken for one of other sites is refused
    there unless you say that you will remember them.

    Args:
        transcoder: to be saved. A cross-layer one is written as circuit-tracer keeps it: a folder
            with two files a layer and a config.yaml, in the dtype it has.
            In ``params.npz`` parameters are float32, and a ReLU has thresholds of 0; in
            safetensors they keep their dtype. circuit-tracer's
            ``z·(z > threshold)`` lets negative values pass a negative threshold: it is written as
            0 there, which computes the same.
        path: the file, or the folder to write ``params.npz`` (or circuit-tracer's
            ``layer_N.safetensors``) in; folders are made. Of a cross-layer one, a folder that is
            new, empty, or holds an earlier one, which is replaced.
        format: ``"gemma-scope"``, ``"circuit-tracer"`` or ``"gemma-scope-2"``; by default the one
            that the file's name ends like, or the first.
        without_sites: write ``params.npz`` though the sites are lost; they must then be given to
            :func:`load_transcoder` each time, as ``input_site`` and ``output_site``.

    Returns:
        The file.

    Raises:
        SourceError: it cannot be written there, or not in this format.
        SiteError: ``params.npz`` of other sites than would be read from it, and ``without_sites``
            is false.
    """
    if isinstance(transcoder, CrossLayerTranscoder):
        if format not in (None, "circuit-tracer"):
            raise SourceError(
                f"A cross-layer transcoder is written as 'circuit-tracer' keeps it, not {format!r}."
            )
        return save_cross_layer(transcoder, path)
    if not isinstance(transcoder, Transcoder):
        raise SourceError(
            f"A {type(transcoder).__name__} cannot be saved; expected a jaxtc.Transcoder or a "
            "jaxtc.CrossLayerTranscoder, whose layers are saved together."
        )
    check_here(transcoder, "transcoder")
    file = local.expand(path)
    made = by_name(format, file)
    if file.suffix != made.suffix:
        if "{layer}" in made.file and transcoder.layer is None:
            raise SourceError(
                "This transcoder does not know its layer, which names its file in a folder of this "
                "format; give the file: path='layer_20.safetensors'."
            )
        file /= made.file.format(layer=transcoder.layer)
    check_savable(transcoder, made, file, without_sites)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_transcoder(
            made, file, transcoder, lambda name: jax.device_get(getattr(transcoder, name)[...])
        )
    except OSError as error:
        raise SourceError(f"{file} cannot be written: {error.strerror}.") from error
    return file


def check_savable(
    transcoder: Transcoder, made: Format, file: Path, without_sites: bool = False
) -> None:
    """Raise, as :func:`save_transcoder`, for a file that could not give the transcoder back."""
    if transcoder.W_skip is not None and "W_skip" not in made.keys:
        raise SourceError(
            f"The format {made.name!r} has no skip connection, and this transcoder has one. Give "
            "format='circuit-tracer' (a .safetensors file)."
        )
    activation = transcoder.activation
    if made.name not in activation.files and activation.as_threshold is None:
        raise SourceError(
            f"The format {made.name!r} has no activation {activation.name!r}, so other programs "
            "would compute something else from the file. Keep the transcoder in a checkpoint, "
            f"save_checkpoint({{{transcoder.layer or 0}: transcoder}}, folder); load_transcoder "
            "reads it."
        )
    own = {key: getattr(transcoder, key) for key in SITES}
    usual = sites_of(sae_site(file.absolute().parts), made)
    if made.suffix == ".npz" and own != usual and not without_sites:
        given = ", ".join(f"{key}={value!r}" for key, value in own.items())
        raise SiteError(
            f"params.npz has no place for this transcoder's sites ({given}); loaded again it would "
            f"be taken for {usual['input_site']} to {usual['output_site']}. Save it as safetensors "
            f"(format='circuit-tracer'); or with without_sites=True, and give {given} to "
            "load_transcoder."
        )
