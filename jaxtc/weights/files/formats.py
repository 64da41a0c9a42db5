"""The file formats of transcoders: one table of keys and orientations, read both ways.

Axis letters: I width of what is read, O width of what is written, M features.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

from jaxtc.errors import SourceError, did_you_mean
from jaxtc.transcoders.activations import keys_in, optional_in, parameter_names, settings_in

# Our parameters and their axes.
AXES: Mapping[str, str] = {
    "W_enc": "I M", "W_dec": "M O", "b_enc": "M", "b_dec": "O",
    **dict.fromkeys(parameter_names(), "M"), "W_skip": "O I",
}  # fmt: skip

# What transcoders read and write; a safetensors header may say it.
SITES = ("input_site", "output_site")


@dataclasses.dataclass(frozen=True)
class Format:
    """How one library spells a transcoder.

    Attributes:
        file: what its files are called in a folder.
        keys: (their key, their order of axes) of each of our parameters that it has.
        config: the file beside the weights that says the rest, without which they are not read;
            empty where the weights say enough.
        negative: whether thresholds below 0 mean what they do here.
        written: whether ``save_transcoder(format=name)`` writes it.
    """

    name: str
    file: str
    keys: Mapping[str, tuple[str, str]]
    config: str = ""
    negative: bool = True
    written: bool = True

    @property
    def suffix(self) -> str:
        """``.npz`` or ``.safetensors``."""
        return PurePath(self.file).suffix

    @property
    def optional(self) -> frozenset[str]:
        """Our parameters that a file may lack."""
        return optional_in(self.name) | {"W_skip"}

    def transposed(self, name: str) -> bool:
        """Whether it keeps this parameter with its axes reversed."""
        axes = self.keys[name][1]
        return " " in axes and axes != AXES[name]

    @property
    def settings(self) -> Mapping[str, str]:
        """The keys of an activation's settings that it keeps as arrays, by our names."""
        return settings_in(self.name)

    def describe(self) -> str:
        """Its arrays, for messages."""
        return ", ".join(
            f"{key} {_letters(axes)}" + (" if any" if ours in self.optional else "")
            for ours, (key, axes) in self.keys.items()
        )


def _letters(axes: str) -> str:
    """As messages have them: both widths are D to a reader."""
    return f"({axes})".replace(" ", ", ").replace("I", "D").replace("O", "D")


def _keys(format: str, **others: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """A format's (key, axes) by our names: as ours but for its activations' and ``others``."""
    spelled = {name: (name, AXES[name]) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return spelled | {name: (key, AXES[name]) for name, key in keys_in(format).items()} | others


FORMATS = (
    Format("gemma-scope", "params.npz", _keys("gemma-scope")),
    # Its JumpReLU is z * (z > threshold), so below a negative threshold z < 0 would pass.
    Format(
        "circuit-tracer", "layer_{layer}.safetensors",
        _keys("circuit-tracer", W_enc=("W_enc", "M I"), W_skip=("W_skip", "O I")),
        negative=False,
    ),
    Format(
        "gemma-scope-2", "params.safetensors",
        _keys("gemma-scope-2", W_enc=("w_enc", "I M"), W_dec=("w_dec", "M O"),
              W_skip=("affine_skip_connection", "I O")),
    ),
    Format(
        "saelens", "sae_weights.safetensors", _keys("saelens", W_skip=("W_skip", "O I")),
        config="cfg.json",
    ),
    Format(
        "sparsify", "sae.safetensors",
        _keys("sparsify", W_enc=("encoder.weight", "M I"), b_enc=("encoder.bias", "M"),
              W_skip=("W_skip", "O I")),
        config="cfg.json", written=False,
    ),
)  # fmt: skip

BY_FORMAT = {format.name: format for format in FORMATS}


def by_name(name: str | None, path: Path) -> Format:
    """The format of this name or, without one, of a file's suffix.

    Raises SourceError for no such format, or a file whose suffix belongs to another.
    """
    if name is None:
        return next((f for f in FORMATS if f.suffix == path.suffix), FORMATS[0])
    known = [format.name for format in FORMATS if format.written]
    if name not in known:
        raise SourceError(
            f"There is no format called {name!r} to write; transcoders are written as "
            f"{', '.join(map(repr, known))}.{did_you_mean(str(name), known)}"
        )
    found = BY_FORMAT[name]
    if path.suffix in {format.suffix for format in FORMATS} - {found.suffix}:
        raise SourceError(
            f"{path} cannot be of the format {name!r}, whose files end in {found.suffix}."
        )
    return found


def format_of(suffix: str, keys: Collection[str]) -> Format:
    """The format with this suffix that has most of these keys."""
    fitting = [format for format in FORMATS if format.suffix == suffix]
    return max(fitting, key=lambda format: sum(key in keys for key, _ in format.keys.values()))


def account(format: Format, entries: Mapping[str, Any]) -> list[str]:
    """Everything that keeps arrays from being a transcoder; ``entries`` have a shape and a fault,
    why the array cannot be read or "".
    """
    ours = {key: name for name, (key, _) in format.keys.items()}
    entries = {key: one for key, one in entries.items() if key not in format.settings.values()}
    problems = [
        f"{key} is missing"
        for key, name in ours.items()
        if key not in entries and name not in format.optional
    ]
    problems += [f"{key} is not part of a transcoder" for key in entries if key not in ours]
    known = {key: entry for key, entry in entries.items() if key in ours}
    problems += [f"{key} {entry.fault}" for key, entry in known.items() if entry.fault]
    shapes = {ours[key]: entry.shape for key, entry in known.items() if not entry.fault}
    return problems + _misshapen(format, shapes)


def _misshapen(format: Format, given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with these shapes, by our names but in the file's order of axes."""
    encoder, decoder = given.get("W_enc"), given.get("W_dec", ())
    if encoder is None:
        return []
    key, axes = format.keys["W_enc"]
    if len(encoder) != 2 or 0 in encoder:
        return [f"{key} has shape {encoder}, not {_letters(axes)}"]
    if len(decoder) == 3:
        name, order = format.keys["W_dec"]
        return [
            f"{name} has shape {decoder}, not {_letters(order)}: it is of a cross-layer "
            "transcoder, which jaxtc reads as circuit-tracer keeps it, a folder of W_enc_N and "
            "W_dec_N files"
        ]
    sizes = dict(zip(axes.split(), encoder, strict=True))
    # A transcoder between two widths: both arrays that say so agree.
    wide = len(decoder) == 2 and decoder[0] == sizes["M"] and given.get("b_dec") == decoder[1:]
    sizes["O"] = decoder[1] if wide and decoder[1] else sizes["I"]
    problems = []
    for name, shape in given.items():
        spelled, order = format.keys[name]
        expected = tuple(sizes[letter] for letter in order.split())
        if shape != expected:
            source = f"({key} says D={sizes['I']}, M={sizes['M']})"
            problems.append(f"{spelled} has shape {shape}, not {expected} {source}")
    if problems and given.get("b_enc") == (sizes["I"],) != (sizes["M"],):
        problems.append(f"{key} may be transposed: this format keeps it as {_letters(axes)}")
    return problems
