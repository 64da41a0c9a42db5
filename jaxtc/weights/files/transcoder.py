"""Transcoders' files in the formats of :mod:`jaxtc.weights.files.formats`, read and written."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import WeightsError, did_you_mean, some
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.activations import Activation, activation_in, parameter_names
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files.cross_layer import is_part
from jaxtc.weights.files.formats import SITES, Format, account, format_of
from jaxtc.weights.files.npz import NpzFile, write_params
from jaxtc.weights.files.safetensors import SafetensorsFile, write_tensors


@dataclasses.dataclass(frozen=True)
class TranscoderFile:
    """An open file whose arrays are those of a transcoder, as ``format`` spells them.

    ``sites`` are what the file itself says of ``input_site`` and ``output_site``.
    """

    path: Path
    format: Format
    sites: Mapping[str, str]
    _file: NpzFile | SafetensorsFile

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of our parameters that it has, in our orientation."""
        held = self._file.entries
        return {
            name: held[key].shape[:: -1 if self.format.transposed(name) else 1]
            for name, (key, _) in self.format.keys.items()
            if key in held
        }

    @property
    def activation(self) -> Activation | None:
        """Recognised by the parameters in the file."""
        return activation_in(self.format.name, self.shapes.keys() & parameter_names())

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds all its arrays as they are."""
        stored = (self._file.entries[self.format.keys[name][0]].dtype for name in self.shapes)
        return functools.reduce(jnp.promote_types, stored)

    def read(
        self, name: str, dtype: np.dtype, sharding: NamedSharding | None = None
    ) -> tuple[np.ndarray | jax.Array, str]:
        """One of our parameters, in our orientation, as :func:`jaxtc.weights.files.shards.read`.

        Raises WeightsError when the file ends or fails while it is read.
        """
        key, transposed = self.format.keys[name][0], self.format.transposed(name)
        array, problem = self._file.read(key, dtype, sharding, transposed=transposed)
        if not problem and name == "threshold" and not self.format.negative:
            parts = [array] if sharding is None else [x.data for x in array.addressable_shards]
            if any((part < 0).any() for part in parts):
                problem = "is below 0, where this format lets negative features through"
        return array, f"{key} {problem}" if problem else ""


@contextlib.contextmanager
def open_transcoder(path: Path) -> Iterator[TranscoderFile]:
    """A transcoder's file, in whichever format it is; nothing but headers is read.

    Raises WeightsError for a damaged file, and for arrays that are missing, extra, misshapen or not
    of floats, all of them named at once.
    """
    kind = SafetensorsFile if path.suffix == ".safetensors" else NpzFile
    with kind(path) as file:
        if is_part(file.entries):
            raise WeightsError(
                f"{path} is one file of a cross-layer transcoder, whose layers belong together: "
                f"give its folder, jaxtc.load_transcoders({str(path.parent)!r}), or with layer=... "
                "to load_transcoder for the features of one layer."
            )
        format = format_of(f".{kind.format}", file.entries)
        if problems := account(format, file.entries):
            raise WeightsError(
                f"{path} is not a transcoder that jaxtc can read: {some(problems, 20)}. Its keys "
                f"are taken for the format {format.name!r}, which has {format.describe()}."
            )
        metadata = getattr(file, "metadata", {})
        sites = {key: metadata[key] for key in SITES if key in metadata}
        for key, site in sites.items():
            if site not in BY_NAME:
                raise WeightsError(
                    f"{path} says that its {key} is {site!r}, which is not a site."
                    f"{did_you_mean(site, BY_NAME)} `jaxtc sites` lists them; the file was written "
                    "by another version of jaxtc or by hand."
                )
        yield TranscoderFile(path, format, sites, file)


def write_transcoder(
    format: Format, path: Path, declared: Transcoder, fetch: Callable[[str], np.ndarray]
) -> None:
    """Write the file, whole or not at all; one parameter, as ``fetch`` gives it, is in memory.

    A safetensors file has the transcoder's dtype and says its layer and its sites; an npz is
    float32. Of ``declared`` no values are read.
    """
    npz, dtype = format.suffix == ".npz", np.dtype(declared.W_enc.dtype)
    activation = declared.activation
    made = {} if format.name in activation.files else {"threshold"}
    names = [name for name in format.keys if name in made or getattr(declared, name) is not None]

    def value_of(name: str) -> np.ndarray:
        if name in made:
            own = {parameter: fetch(parameter) for parameter in activation.parameters}
            value = np.broadcast_to(activation.as_threshold(own), declared.features).astype(dtype)
        else:
            value = fetch(name)
        if name == "threshold" and not format.negative:
            value = np.maximum(value, 0)  # which has no effect on what it computes
        value = value.T if format.transposed(name) else value
        # NumPy would write a transposed view in the order that it has in memory.
        return np.ascontiguousarray(value, np.float32) if npz else value

    if npz:
        return write_params(path, ((format.keys[name][0], value_of(name)) for name in names))
    sizes = {"I": declared.d_in, "M": declared.features, "O": declared.d_out}
    tensors = [
        (key, dtype, [sizes[axis] for axis in axes.split()])
        for key, axes in map(format.keys.get, names)
    ]
    facts = {key: str(getattr(declared, key)) for key in ("variant", *SITES, "layer")}
    if declared.layer is None:
        del facts["layer"]
    write_tensors(path, tensors, map(value_of, names), **facts)
