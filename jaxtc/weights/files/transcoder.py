"""Transcoders' files in the formats of :mod:`jaxtc.weights.files.formats`, read."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import JaxtcError, SourceError, WeightsError, did_you_mean, some
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.activations import Activation, activation_in, parameter_names
from jaxtc.weights.files import foreign, layout
from jaxtc.weights.files.beside import describe
from jaxtc.weights.files.cross_layer import is_part
from jaxtc.weights.files.description import Description
from jaxtc.weights.files.folding import Fold, multiplied, norms_of
from jaxtc.weights.files.formats import BY_FORMAT, SITES, Format, account, format_of
from jaxtc.weights.files.npz import NpzFile
from jaxtc.weights.files.safetensors import SafetensorsFile

_GAIN = "scaling_factor"  # SAELens' key
# Keys that only one library gives its arrays.
_TELLING = ("activation_function.threshold", "k")


@dataclasses.dataclass(frozen=True)
class TranscoderFile:
    """An open file whose arrays are those of a transcoder, as ``format`` spells them.

    Attributes:
        said: what a file beside it says, if there is one.
        own: what jaxtc wrote into the file itself: ``input_site``, ``output_site``, ``layer``.
        activation: its activation.
    """

    path: Path
    format: Format
    said: Description | None
    own: Mapping[str, Any]
    activation: Activation
    _file: NpzFile | SafetensorsFile

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of our parameters that it has, in our orientation."""
        return _shapes(self.format, self._file)

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds all its arrays, but for single numbers, as they are."""
        wide = [name for name, shape in self.shapes.items() if shape]
        stored = (self._file.entries[self.format.keys[name][0]].dtype for name in wide)
        return functools.reduce(jnp.promote_types, stored)

    @property
    def sites(self) -> dict[str, str]:
        """``input_site`` and ``output_site``, as far as it, the file beside it, or the names of
        the folders around it say them.

        Raises WeightsError where it and the file beside it differ.
        """
        told = layout.told_sites(self.path.absolute().parts, self.format.name)
        found = dict(zip(SITES, told, strict=True)) if told else {}
        if self.said:
            found |= self.said.sites
        own = {key: self.own[key] for key in SITES if key in self.own}
        differ = [
            key for key in own if self.said and self.said.sites.get(key, own[key]) != own[key]
        ]
        if differ:
            key = differ[0]
            raise WeightsError(
                f"{self.path} says that its {key} is {own[key]!r}, and {self.said.settings.where} "
                f"{self.said.sites[key]!r}; one of the two was changed."
            )
        return found | own

    def reader(self, site: str) -> Callable[..., tuple[np.ndarray | jax.Array, str]]:
        """What reads its parameters, :func:`jaxtc.weights.files.shards.fill`'s ``read``, given the
        site that it reads."""
        return functools.partial(self.read, fold=self._fold(site))

    def _fold(self, site: str) -> Fold:
        scale = self.said.scale if self.said else 1.0
        if site == "embed" and self.format.name == "gemma-scope" and not self.own:
            # Trained on the rows of the table; the site holds them times sqrt(D).
            scale = 1 / math.sqrt(self.shapes["W_enc"][0])
        norms = gains = None
        if self.said and self.said.decoder_norm:
            norms = norms_of(self.read("W_dec", np.dtype(np.float32))[0])
        if _GAIN in self._file.entries and self.format.name == "saelens":
            gains, problem = self._file.read(_GAIN, np.dtype(np.float32))
            if problem or not self.said.gain:
                self._check_gain(gains, problem)
                gains = None
        return Fold(scale, norms, gains)

    def _check_gain(self, gains: np.ndarray, problem: str) -> None:
        """Of gains that the config does not announce, which SAELens takes for none if all are 1."""
        if problem or not np.allclose(gains, 1):
            raise WeightsError(
                f"{self.path} has a {_GAIN} {problem or 'other than 1'}, but the cfg.json beside "
                "it does not say finetuning_scaling_factor: true, so what it is for is not known."
            )

    def read(
        self,
        name: str,
        dtype: np.dtype,
        sharding: NamedSharding | None = None,
        *,
        fold: Fold | None = None,
    ) -> tuple[np.ndarray | jax.Array, str]:
        """One of our parameters, in our orientation, as :func:`jaxtc.weights.files.shards.read`.

        Raises WeightsError when the file ends or fails while it is read.
        """
        key, transposed = self.format.keys[name][0], self.format.transposed(name)
        factor = fold and fold.factors.get(name)
        wide = dtype if factor is None or dtype == np.float64 else np.dtype(np.float32)
        array, problem = self._file.read(key, wide, sharding, transposed=transposed)
        if factor is not None and not problem:
            array, problem = multiplied(array, factor, dtype, sharding)
        if not problem and name == "threshold" and not self.format.negative:
            parts = [array] if sharding is None else [x.data for x in array.addressable_shards]
            if any((part < 0).any() for part in parts):
                problem = "is below 0, where this format lets negative features through"
        return array, f"{key} {problem}" if problem else ""


@contextlib.contextmanager
def open_transcoder(
    path: Path, format: str | None = None, said: Description | None = None
) -> Iterator[TranscoderFile]:
    """A transcoder's file, in whichever format it is; nothing but headers is read.

    Args:
        path: the file.
        format: its format, where nothing else says it.
        said: what is known of it from elsewhere; by default what a file beside it says.

    Raises WeightsError for a damaged file, one of another kind, one of which nothing says whose it
    is, and for arrays that are missing, extra, misshapen or not of floats, all named at once;
    SourceError for a format that does not exist.
    """
    if format is not None and format not in BY_FORMAT:
        raise SourceError(
            f"There is no format {format!r}; give one of {', '.join(map(repr, BY_FORMAT))}."
            f"{did_you_mean(str(format), BY_FORMAT)}"
        )
    foreign.refuse(path)
    kind = SafetensorsFile if path.suffix == ".safetensors" else NpzFile
    with kind(path) as file:
        if is_part(file.entries):
            raise WeightsError(
                f"{path} is one file of a cross-layer transcoder, whose layers belong together: "
                f"give its folder, jaxtc.load_transcoders({str(path.parent)!r}), or with layer=... "
                "to load_transcoder for the features of one layer."
            )
        said = said or describe(path)
        found = said.format if said else _told(path, file, format)
        if format not in (None, found.name):
            raise SourceError(f"{path} is of the format {found.name!r}, not {format!r}.")
        problems = account(found, _without_gain(found, file.entries))
        settings = {
            name: file.whole_number(key)
            for name, key in found.settings.items()
            if key in file.entries
        }
        if not problems:
            shapes = _shapes(found, file)
            activation = _activation(path, found, shapes, settings, said, file.metadata)
            problems = _unlike(said, found, activation, shapes) if said else []
        if problems:
            raise WeightsError(
                f"{path} is not a transcoder that jaxtc can read: {some(problems, 20)}. Its keys "
                f"are taken for the format {found.name!r}, which has {found.describe()}."
            )
        yield TranscoderFile(path, found, said, _own(path, file.metadata), activation, file)


def _shapes(format: Format, file: NpzFile | SafetensorsFile) -> dict[str, tuple[int, ...]]:
    return {
        name: file.entries[key].shape[:: -1 if format.transposed(name) else 1]
        for name, (key, _) in format.keys.items()
        if key in file.entries
    }


def _without_gain(format: Format, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Without SAELens' gains, if they are one for each feature."""
    encoder, gain = entries.get("W_enc"), entries.get(_GAIN)
    whole = encoder and gain and not gain.fault and gain.shape == encoder.shape[1:]
    drop = {_GAIN} if format.name == "saelens" and whole else set()
    return {key: entry for key, entry in entries.items() if key not in drop}


def _told(path: Path, file: NpzFile | SafetensorsFile, format: str | None) -> Format:
    """The format of a file that no other file describes.

    Raises WeightsError for bare arrays that several libraries write and mean different things by.
    """
    found = format_of(f".{file.format}", file.entries)
    if format is not None:
        found = BY_FORMAT[format]
        if found.suffix != f".{file.format}":
            raise SourceError(f"{path} is no file of the format {format!r} ({found.suffix}).")
    if found.config:
        raise WeightsError(
            f"{path} has the arrays of the format {found.name!r}, but no {found.config} is beside "
            "it, which says what they compute (the activation, whether b_dec is taken off the "
            "input). Fetch that file too, into the same folder."
        )
    told = format or "variant" in file.metadata or any(key in file.entries for key in _TELLING)
    bare = found.name == "circuit-tracer" and {"W_enc", "W_dec"} <= file.entries.keys()
    if bare and not told:
        raise WeightsError(
            f"Nothing says whose arrays W_enc, W_dec, b_enc and b_dec in {path} are: several "
            "libraries write these, with other orientations and activations, and some take b_dec "
            "off the input. Put the config that belongs to it beside it (cfg.json of SAELens, with "
            "the file's name sae_weights.safetensors; config.yaml of circuit-tracer). If it is "
            "circuit-tracer's, W_enc (M, D), ReLU, b_dec not taken off the input, say "
            "format='circuit-tracer' (--format circuit-tracer)."
        )
    return found


def _activation(
    path: Path,
    format: Format,
    shapes: Mapping[str, Any],
    settings: Mapping[str, int],
    said: Description | None,
    metadata: Mapping[str, str],
) -> Activation:
    """What the config names, else what the arrays tell, else what the header of ours does.

    Raises WeightsError for settings out of range, and where they differ.
    """
    header = metadata.get("k", "") if "variant" in metadata and "k" in format.settings else ""
    if header.isdecimal() and len(header) < 10 and not settings:
        settings = {"k": int(header)}
    named = said and said.activation
    try:
        found = activation_in(format.name, shapes.keys() & parameter_names(), settings)
        for one in filter(None, (found, named)):
            one.check(shapes["b_enc"][0])
    except JaxtcError as error:
        raise WeightsError(f"{path}: {error}") from error
    if named and settings and named != found:
        raise WeightsError(
            f"{path} is {found and found.facts()}, but {said.settings.where} says {named.facts()}."
        )
    if not (named or found):
        raise WeightsError(f"{path} has both thresholds and k, which no activation has.")
    return named or found


def _unlike(
    said: Description, format: Format, activation: Activation, shapes: Mapping[str, Any]
) -> list[str]:
    """Where the arrays are not those that the file beside them describes."""
    where, problems = said.settings.where, []
    for name in parameter_names():
        if (name in shapes) != (name in activation.parameters):
            key = format.keys.get(name, (name,))[0]
            what = "is missing" if name in activation.parameters else "is not part of it"
            problems.append(f"{key} {what}: {where} says that its activation is {activation.name}")
    if said.skip is not None and said.skip != ("W_skip" in shapes):
        has = "no" if said.skip else "a"
        key = format.keys["W_skip"][0]
        other = "a" if said.skip else "no"
        problems.append(f"it has {has} {key}, and {where} says that it has {other} skip connection")
    sizes = {"I": shapes["W_enc"][0], "M": shapes["W_enc"][1], "O": shapes["W_dec"][1]}
    problems += [
        f"its axis {axis.replace('I', 'D').replace('O', 'D')} is {sizes[axis]}, {where} says {size}"
        for axis, size in said.sizes.items()
        if sizes[axis] != size
    ]
    if said.subtract_b_dec and sizes["I"] != sizes["O"]:
        problems.append("b_dec cannot be taken off an input of another width")
    return problems


def _own(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What jaxtc wrote into the file. Raises WeightsError for sites that there are not, and for
    a layer that is no whole number from 0."""
    found: dict[str, Any] = {key: metadata[key] for key in SITES if key in metadata}
    for key, site in found.items():
        if site not in BY_NAME:
            raise WeightsError(
                f"{path} says that its {key} is {site!r}, which is not a site."
                f"{did_you_mean(site, BY_NAME)} `jaxtc sites` lists them; the file was written "
                "by another version of jaxtc or by hand."
            )
    layer = metadata.get("layer")
    if found and layer is not None:
        # As write_transcoder has it; no model has a million layers.
        if not re.fullmatch(r"\d{1,6}", layer, re.ASCII):
            raise WeightsError(
                f"{path} says that its layer is {layer!r:.100}, expected a whole number from 0; "
                "the file was written by hand."
            )
        found["layer"] = int(layer)
    return found
