"""The two files of each layer of a cross-layer transcoder, as circuit-tracer keeps it.

``W_enc_{l}.safetensors`` holds what layer l reads with, the bias of its reconstruction and its skip
connection; ``W_dec_{l}.safetensors`` what its features write at layer l and at every later one.

Axis letters: L layers, I width of what is read, O width of what is written, M features, W = L − l
layers written at.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import WeightsError, some
from jaxtc.transcoders.cross_layer import LayerFeatures
from jaxtc.weights.files.safetensors import SafetensorsFile, write_tensors

ENCODER, DECODER = "W_enc_{layer}.safetensors", "W_dec_{layer}.safetensors"
_NAME = re.compile(r"W_(enc|dec)_(0|[1-9]\d{0,5})\.safetensors")
_KEY = re.compile(r"W_(enc|dec)_\d+")

# Of each of our parameters: its file, its order of axes there, and whether it may be missing.
_KEYS: Mapping[str, tuple[str, str, bool]] = {
    "W_enc": (ENCODER, "M I", False),
    "b_enc": (ENCODER, "M", False),
    "b_dec": (ENCODER, "O", False),
    "threshold": (ENCODER, "M", True),
    "W_skip": (ENCODER, "I O", True),
    "W_dec": (DECODER, "M W O", False),
}
_TRANSPOSED = ("W_enc", "W_skip")


def layers_of(names: Iterable[str]) -> dict[int, set[str]]:
    """By layer, which of the two files (:data:`ENCODER`, :data:`DECODER`) are among these names."""
    found: dict[int, set[str]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            part = ENCODER if match[1] == "enc" else DECODER
            found.setdefault(int(match[2]), set()).add(part)
    return found


def is_part(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is one of the two of a layer."""
    return any(map(_KEY.fullmatch, keys))


@dataclasses.dataclass(frozen=True)
class LayerFiles:
    """The open files of one layer, of which nothing but headers has been read."""

    layer: int
    files: Mapping[str, SafetensorsFile]

    def _key(self, name: str) -> str:
        return f"{name}_{self.layer}"

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of our parameters that are there, in the files' orientation."""
        return {
            name: self.files[file].entries[self._key(name)].shape
            for name, (file, _, _) in _KEYS.items()
            if self._key(name) in self.files[file].entries
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes, by letter; as W_enc and W_dec have them."""
        (M, I), (_, W, O) = self.shapes["W_enc"], self.shapes["W_dec"]  # noqa: E741
        return {"M": M, "I": I, "W": W, "O": O}

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds all arrays as they are."""
        stored = (self.files[_KEYS[n][0]].entries[self._key(n)].dtype for n in self.shapes)
        return functools.reduce(jnp.promote_types, stored)

    def problems(self) -> list[str]:
        """Everything that keeps these files from being a layer."""
        found = []
        for part, file in self.files.items():
            ours = {self._key(n): n for n, (where, _, _) in _KEYS.items() if where == part}
            found += [
                f"{key} is missing"
                for key, name in ours.items()
                if key not in file.entries and not _KEYS[name][2]
            ]
            found += [f"{key} is not part of it" for key in file.entries if key not in ours]
            found += [f"{k} {e.fault}" for k, e in file.entries.items() if e.fault and k in ours]
        encoder, decoder = self.shapes.get("W_enc", ()), self.shapes.get("W_dec", ())
        if found:
            return found
        for name, shape in (("W_enc", encoder), ("W_dec", decoder)):
            letters = _KEYS[name][1].split()
            if len(shape) != len(letters) or 0 in shape:
                return [f"{self._key(name)} has shape {shape}, not {_letters(letters)}"]
        for name, shape in self.shapes.items():
            letters = _KEYS[name][1].split()
            expected = tuple(self.sizes[letter] for letter in letters)
            one_row = name == "threshold" and shape == (1, *expected)
            if shape != expected and not one_row:
                found.append(
                    f"{self._key(name)} has shape {shape}, not {_letters(letters)} = {expected}"
                )
        return found

    def read(
        self, name: str, dtype: np.dtype, sharding: NamedSharding | None = None
    ) -> tuple[np.ndarray | jax.Array, str]:
        """One of our parameters, in our orientation, as :func:`jaxtc.weights.files.shards.read`.

        Raises WeightsError when a file ends or fails while it is read.
        """
        file, axes, _ = _KEYS[name]
        shape = (self.sizes["M"],) if axes == "M" else None
        array, problem = self.files[file].read(
            self._key(name), dtype, sharding, shape=shape, transposed=name in _TRANSPOSED
        )
        if not problem and name == "threshold":
            # circuit-tracer's JumpReLU is z·(z > threshold), see the format "circuit-tracer".
            parts = [array] if sharding is None else [x.data for x in array.addressable_shards]
            if any((part < 0).any() for part in parts):
                problem = "is below 0, where this format lets negative features through"
        return array, f"{self._key(name)} {problem}" if problem else ""


def _letters(letters: Iterable[str]) -> str:
    """As messages have them."""
    named = ["D" if letter in "IO" else "layers" if letter == "W" else letter for letter in letters]
    return f"({', '.join(named)})"


def check_layers(opened: Mapping[int, LayerFiles], layers: int, folder: str) -> None:
    """Raise WeightsError for layers that are unsound, or do not belong together; all at once.

    ``opened`` are all or some of the ``layers`` that there are.
    """
    problems = [problem for one in opened.values() for problem in one.problems()]
    if not problems:
        first = next(iter(opened.values()))
        for layer, one in opened.items():
            if one.sizes["W"] != layers - layer:
                problems.append(
                    f"W_dec_{layer} writes at {one.sizes['W']} layers, not at {layers - layer} "
                    f"(layers {layer} to {layers - 1})"
                )
            if any(one.sizes[letter] != first.sizes[letter] for letter in "MIO"):
                given = ", ".join(f"{letter}={one.sizes[letter]}" for letter in "MIO")
                problems.append(f"layer {layer} has {given}, unlike layer {first.layer}")
            if one.shapes.keys() != first.shapes.keys():
                odd = sorted(one.shapes.keys() ^ first.shapes.keys())
                problems.append(
                    f"only one of layers {first.layer} and {layer} has {some(odd)}; all layers "
                    "have it, or none"
                )
    if problems:
        raise WeightsError(
            f"{folder} is not a cross-layer transcoder that jaxtc can read: {some(problems, 20)}. "
            "Each layer l of L has W_enc_l (M, D), b_enc_l (M), b_dec_l (D), perhaps threshold_l "
            "(M) and W_skip_l (D, D), and W_dec_l (M, L - l, D)."
        )


def write_layer(folder: Path, one: LayerFeatures, fetch: Callable[[str], np.ndarray]) -> None:
    """Write the two files of a layer; one parameter, as ``fetch`` gives it, is in memory."""
    sizes = {"M": one.features, "I": one.d_in, "O": one.d_out, "W": len(one.writes)}
    dtype = np.dtype(one.W_enc.dtype)

    def arrays(names: list[str]) -> Iterator[np.ndarray]:
        for name in names:
            value = fetch(name)
            if name == "threshold":
                value = np.maximum(value, 0)  # which has no effect on what it computes
            yield np.ascontiguousarray(value.T if name in _TRANSPOSED else value)

    for part in (ENCODER, DECODER):
        names = [n for n, (file, _, _) in _KEYS.items() if file == part]
        names = [name for name in names if getattr(one, name) is not None]
        claims = [
            (f"{name}_{one.layer}", dtype, [sizes[axis] for axis in _KEYS[name][1].split()])
            for name in names
        ]
        write_tensors(folder / part.format(layer=one.layer), claims, arrays(names))
