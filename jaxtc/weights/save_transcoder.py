"""Writing transcoders in the formats of :mod:`jaxtc.weights.files.formats`."""

from pathlib import Path

import jax

from jaxtc.errors import SourceError
from jaxtc.helpers import explicit_transfers
from jaxtc.sharding.processes import check_here
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files import local
from jaxtc.weights.files.formats import Format, by_name
from jaxtc.weights.files.saelens import config_of
from jaxtc.weights.files.write_transcoder import write_transcoder
from jaxtc.weights.save_cross_layer import save_cross_layer


@explicit_transfers
def save_transcoder(
    transcoder: Transcoder | CrossLayerTranscoder,
    path: str | Path,
    *,
    format: str | None = None,
) -> Path:
    """Write a transcoder in one of the formats of :data:`jaxtc.weights.files.formats.FORMATS`.

    The file is written whole or not at all, and says which sites the transcoder reads and writes,
    and its layer:
    in the header of safetensors, in SAELens' ``cfg.json``, in the comment of the zip that
    ``params.npz`` is (which NumPy and others leave alone).

    What a format cannot hold is refused: a skip connection (``params.npz``), TopK
    (``params.npz``, Gemma Scope 2's), ``subtract_b_dec`` (all but SAELens').

    In ``params.npz`` parameters are float32, and a ReLU has thresholds of 0; in safetensors they
    keep their dtype. circuit-tracer's ``z·(z > threshold)`` lets negative values pass a negative
    threshold: it is written as 0 there, which computes the same.

    Args:
        transcoder: to be saved. A cross-layer one is written as circuit-tracer keeps it: a folder
            with two files a layer and a config.yaml, in the dtype it has.
        path: the file, or the folder to write ``params.npz`` (or circuit-tracer's
            ``layer_N.safetensors``, or SAELens' two files) in; folders are made. Of a
            cross-layer one, a folder that is new, empty, or holds an earlier one, which is
            replaced.
        format: ``"gemma-scope"``, ``"circuit-tracer"``, ``"gemma-scope-2"`` or ``"saelens"``; by
            default the one that the file's name ends like, or the first.

    Returns:
        The file; of a cross-layer one, the folder.

    Raises:
        SourceError: it cannot be written there, or not in this format.
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
    check_savable(transcoder, made)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_transcoder(
            made, file, transcoder, lambda name: jax.device_get(getattr(transcoder, name)[...])
        )
    except OSError as error:
        raise SourceError(f"{file} cannot be written: {error.strerror}.") from error
    return file


def check_savable(transcoder: Transcoder, made: Format) -> None:
    """Raise, as :func:`save_transcoder`, for a file that could not give the transcoder back."""
    if made.name == "saelens":
        config_of(transcoder)
    if transcoder.W_skip is not None and "W_skip" not in made.keys:
        raise SourceError(
            f"The format {made.name!r} has no skip connection, and this transcoder has one. Give "
            "format='circuit-tracer' (a .safetensors file)."
        )
    if transcoder.subtract_b_dec and made.name != "saelens":
        raise SourceError(
            f"This transcoder takes b_dec off its input, which the format {made.name!r} cannot "
            "say. Give format='saelens', or keep it in a checkpoint (save_checkpoint)."
        )
    activation = transcoder.activation
    if made.name not in activation.files and activation.as_threshold is None:
        raise SourceError(
            f"The format {made.name!r} has no activation {activation.name!r}, so other programs "
            "would compute something else from the file. Give format='circuit-tracer' or "
            f"'saelens' if that has it, or keep the transcoder in a checkpoint, "
            f"save_checkpoint({{{transcoder.layer or 0}: transcoder}}, folder); load_transcoder "
            "reads it."
        )
