"""The file formats of transcoders: one table of keys and orientations, read both ways.

Axis letters: I width of what is read, O width of what is written, M features.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import SourceError, WeightsError, did_you_mean, some
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.activations import (
    Activation,
    activation_in,
    keys_in,
    optional_in,
    parameter_names,
)
from jaxtc.weights.files.layout import sae_site
from jaxtc.weights.files.npz import NpzFile
from jaxtc.weights.files.safetensors import FLOATS, SafetensorsFile

# Our parameters and their axes.
AXES: Mapping[str, str] = MappingProxyType({
    "W_enc": "I M", "W_dec": "M O", "b_enc": "M", "b_dec": "O",
    **{name: "M" for name in parameter_names()}, "W_skip": "O I",
})  # fmt: skip

# What the free text of a safetensors header may say of a transcoder.
SITES = ("input_site", "output_site")


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of file spells a transcoder.

    Attributes:
        name: what ``save_transcoder(format=...)`` calls it.
        suffix: of its files.
        keys: (their key, their order of axes) of each of our parameters that it has.
        sites: (read, written) by such files where nothing says otherwise; None when that differs
            from release to release.
        negative: whether thresholds below 0 mean what they do here.
    """

    name: str
    suffix: str
    keys: Mapping[str, tuple[str, str]]
    sites: tuple[str, str] | None
    negative: bool = True

    @property
    def optional(self) -> frozenset[str]:
        """Our parameters that a file may lack."""
        return optional_in(self.name) | {"W_skip"}

    def describe(self) -> str:
        """Its arrays, for messages."""
        parts = [
            f"{key} {_letters(axes)}" + (" if any" if ours in self.optional else "")
            for ours, (key, axes) in self.keys.items()
        ]
        return ", ".join(parts)


def _letters(axes: str) -> str:
    """As messages have them: both widths are D to a reader."""
    return f"({axes})".replace(" ", ", ").replace("I", "D").replace("O", "D")


def _activations(format: str) -> dict[str, tuple[str, str]]:
    """The parameters of its activations."""
    return {name: (key, AXES[name]) for name, key in keys_in(format).items()}


FORMATS = (
    Format(
        "gemma-scope", ".npz",
        {"W_enc": ("W_enc", "I M"), "W_dec": ("W_dec", "M O"), "b_enc": ("b_enc", "M"),
         "b_dec": ("b_dec", "O"), **_activations("gemma-scope")},
        ("mlp_in_normed", "mlp_out"),
    ),
    # Its JumpReLU is z * (z > threshold), so below a negative threshold z < 0 would pass.
    Format(
        "circuit-tracer", ".safetensors",
        {"W_enc": ("W_enc", "M I"), "W_dec": ("W_dec", "M O"), "b_enc": ("b_enc", "M"),
         "b_dec": ("b_dec", "O"), **_activations("circuit-tracer"), "W_skip": ("W_skip", "O I")},
        None, negative=False,
    ),
    Format(
        "gemma-scope-2", ".safetensors",
        {"W_enc": ("w_enc", "I M"), "W_dec": ("w_dec", "M O"), "b_enc": ("b_enc", "M"),
         "b_dec": ("b_dec", "O"), **_activations("gemma-scope-2"),
         "W_skip": ("affine_skip_connection", "I O")},
        ("mlp_in", "mlp_out"),
    ),
)  # fmt: skip

BY_FORMAT = {format.name: format for format in FORMATS}
SUFFIXES = tuple(sorted({format.suffix for format in FORMATS}))


@dataclasses.dataclass(frozen=True)
class TranscoderFile:
    """An open file whose arrays are those of a transcoder.

    Attributes:
        path: of the file.
        format: how it spells them.
        shapes: of our parameters that it has, in our orientation.
        sites: what the file itself says of ``input_site`` and ``output_site``.
    """

    path: Path
    format: Format
    shapes: Mapping[str, tuple[int, ...]]
    sites: Mapping[str, str]
    _file: NpzFile | SafetensorsFile

    @property
    def activation(self) -> Activation | None:
        """Told by which parameters it has."""
        return activation_in(self.format.name, self.shapes.keys() & parameter_names())

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds all its arrays as they are."""
        stored = (self._file.entries[self.format.keys[name][0]].dtype for name in self.shapes)
        return functools.reduce(jnp.promote_types, (FLOATS.get(one, one) for one in stored))

    def read(self, name: str, dtype: np.dtype) -> tuple[np.ndarray, str]:
        """One of our parameters, in our orientation and in C order, cast to ``dtype``.

        Returns:
            (the array, what is wrong with its values or an empty string).

        Raises:
            WeightsError: the file ended or failed while it was read.
        """
        array, problem = self.read_view(name, dtype)
        return np.ascontiguousarray(array), problem

    def read_view(self, name: str, dtype: np.dtype) -> tuple[np.ndarray, str]:
        """As :meth:`read`, in the file's order in memory: a transpose is a view of it, no copy."""
        key, axes = self.format.keys[name]
        array, problem = self._file.read(key, dtype)
        array = array if axes == AXES[name] else array.T
        return array, self._told(name, problem or self._negative(name, array))

    def read_shards(
        self, name: str, dtype: np.dtype, sharding: NamedSharding
    ) -> tuple[jax.Array, str]:
        """As :meth:`read`, spread over devices; what is wrong is told of this process's shards."""
        key, axes = self.format.keys[name]
        turned = {"transposed": axes != AXES[name]}
        if isinstance(self._file, NpzFile):
            array, problem = self._file.read_shards(key, dtype, sharding, **turned)
        else:
            shape = self.shapes[name]
            array, problem = self._file.read_shards(key, shape, dtype, sharding, **turned)
        for shard in array.addressable_shards:
            problem = problem or self._negative(name, shard.data)
        return array, self._told(name, problem)

    def _negative(self, name: str, array: np.ndarray | jax.Array) -> str:
        if name == "threshold" and not self.format.negative and (array < 0).any():
            return "is below 0, where this format lets negative features through"
        return ""

    def _told(self, name: str, problem: str) -> str:
        return f"{self.format.keys[name][0]} {problem}" if problem else ""


@contextlib.contextmanager
def open_transcoder(path: Path) -> Iterator[TranscoderFile]:
    """A transcoder's file, in whichever format it is; nothing but headers is read.

    Raises:
        WeightsError: a damaged file; arrays that are missing, extra, misshapen or not of floats,
            all of them named at once.
    """
    with contextlib.ExitStack() as stack:
        if path.suffix == ".safetensors":
            file = stack.enter_context(SafetensorsFile(path))
            claims = {name: (entry.shape, _fault(entry)) for name, entry in file.entries.items()}
            sites = _sites(path, file.metadata)
        else:
            file, sites = stack.enter_context(NpzFile(path)), {}
            claims = {name: (entry.shape, entry.fault) for name, entry in file.entries.items()}
        format = _format(path, claims)
        problems, shapes = _account(format, claims)
        if problems:
            raise WeightsError(
                f"{path} is not a transcoder that jaxtc can read: {some(problems, 20)}. Its keys "
                f"are taken for the format {format.name!r}, which has {format.describe()}."
            )
        yield TranscoderFile(path, format, shapes, sites, file)


def read_all(
    file: TranscoderFile, dtype: np.dtype, places: Mapping[str, NamedSharding] | None = None
) -> dict[str, np.ndarray | jax.Array]:
    """All parameters of an open file, in memory or where ``places`` says.

    Raises:
        WeightsError: as :meth:`TranscoderFile.read`; values that are not finite.
    """
    found, problems = {}, []
    for name in file.shapes:
        if places is None:
            found[name], problem = file.read(name, dtype)
        else:
            found[name], problem = file.read_shards(name, dtype, places[name])
        problems += [problem] if problem else []
    if problems:
        raise WeightsError(
            f"{file.path} cannot be used: {some(problems)}. Whatever it computed would be wrong; "
            "fetch or train it again."
        )
    return found


def told_sites(parts: Iterable[str], usual: tuple[str, str] | None) -> dict[str, str]:
    """The sites that folders' names tell, or a format's usual ones; empty when neither does."""
    site = sae_site(parts)
    pair = (site, site) if site else usual
    return dict(zip(SITES, pair, strict=True)) if pair else {}


def _fault(entry) -> str:
    return (
        "" if entry.dtype in FLOATS else f"has dtype {entry.dtype}, not one of {', '.join(FLOATS)}"
    )


def _sites(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    found = {key: metadata[key] for key in SITES if key in metadata}
    for key, site in found.items():
        if site not in BY_NAME:
            raise WeightsError(
                f"{path} says that its {key} is {site!r}, which is no site."
                f"{did_you_mean(site, BY_NAME)} `jaxtc sites` lists them; the file was written by "
                "another version of jaxtc or by hand."
            )
    return found


def _format(path: Path, claims: Mapping[str, tuple]) -> Format:
    """The format of these files with most of the keys."""
    suffix = path.suffix if path.suffix in SUFFIXES else ".npz"

    def known(format: Format) -> int:
        return sum(key in claims for key, _ in format.keys.values())

    return max((f for f in FORMATS if f.suffix == suffix), key=known)


def _account(
    format: Format, claims: Mapping[str, tuple[tuple[int, ...], str]]
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """(everything that keeps these arrays from being a transcoder, shapes of our parameters)."""
    ours = {key: name for name, (key, _) in format.keys.items()}
    problems = [
        f"{key} is missing"
        for key, name in ours.items()
        if key not in claims and name not in format.optional
    ]
    skips = {spelled.keys["W_skip"][0] for spelled in FORMATS if "W_skip" in spelled.keys}
    both = skips <= set(claims)
    if both:
        problems.append(
            f"{' and '.join(sorted(skips))} are two spellings of a skip connection, one the "
            "transpose of the other; keep the one that is meant"
        )
    problems += [
        f"{key} is not part of a transcoder"
        for key in claims
        if key not in ours and not (both and key in skips)
    ]
    problems += [f"{key} {fault}" for key, (_, fault) in claims.items() if key in ours and fault]
    given = {key: shape for key, (shape, fault) in claims.items() if key in ours and not fault}
    problems += _misshapen(format, {ours[key]: shape for key, shape in given.items()})
    if problems:
        return problems, {}
    return [], {
        name: given[key] if axes == AXES[name] else given[key][::-1]
        for name, (key, axes) in format.keys.items()
        if key in given
    }


def _misshapen(format: Format, given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with these shapes, by our names but in the file's order of axes."""

    def told(name: str) -> str:
        key, axes = format.keys[name]
        return f"{key} has shape {given[name]}, not {_letters(axes)}"

    if "W_enc" not in given:
        return []
    if len(given["W_enc"]) != 2 or 0 in given["W_enc"]:
        return [told("W_enc")]
    sizes = dict(zip(format.keys["W_enc"][1].split(), given["W_enc"], strict=True))
    decoder, bias = given.get("W_dec", ()), given.get("b_dec", ())
    if len(decoder) == 3:
        return [told("W_dec") + ": jaxtc does not read cross-layer transcoders"]
    sizes["O"] = sizes["I"]
    if len(decoder) == 2 and decoder[0] == sizes["M"] and bias == decoder[1:] and decoder[1]:
        sizes["O"] = decoder[1]  # a transcoder between two widths: both arrays that say so agree
    expected = {
        name: tuple(sizes[letter] for letter in format.keys[name][1].split()) for name in given
    }
    says = f"({format.keys['W_enc'][0]} says D={sizes['I']}, M={sizes['M']})"
    problems = [
        f"{format.keys[name][0]} has shape {given[name]}, not {expected[name]} {says}"
        for name in given
        if given[name] != expected[name]
    ]
    if problems and given.get("b_enc") == (sizes["I"],) != (sizes["M"],):
        key, axes = format.keys["W_enc"]
        problems.append(f"{key} may be transposed: this format keeps it as {_letters(axes)}")
    return problems


def by_name(name: str | None, path: Path) -> Format:
    """The format that is meant by its name or, without one, by a file's suffix.

    Raises:
        SourceError: no such format, or a file whose suffix belongs to another.
    """
    if name is None:
        return next((f for f in FORMATS if f.suffix == path.suffix), FORMATS[0])
    if name not in BY_FORMAT:
        raise SourceError(
            f"There is no format called {name!r}; transcoders are written as "
            f"{', '.join(map(repr, BY_FORMAT))}.{did_you_mean(str(name), BY_FORMAT)}"
        )
    found = BY_FORMAT[name]
    if path.suffix in SUFFIXES and path.suffix != found.suffix:
        raise SourceError(
            f"{path} cannot be of the format {name!r}, whose files end in {found.suffix}."
        )
    return found
