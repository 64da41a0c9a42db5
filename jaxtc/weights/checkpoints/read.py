"""Converted checkpoints: a folder with ``jaxtc.json``, an orbax tree, and a model's own files.

Every byte is compared with the hashes of ``jaxtc.json`` before it is used: a chunk of an array is
read, hashed, and only then cast and copied to where it belongs. A process reads only the chunks
that its devices' shards touch.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import SourceError, WeightsError, some
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.rules import variables
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.manifest import (
    MANIFEST,
    MODEL,
    Manifest,
    check_folder,
    read_manifest,
)
from jaxtc.weights.checkpoints.tree import Index, Stored, decode
from jaxtc.weights.files import arrays, local
from jaxtc.weights.files.layout import check_layer
from jaxtc.weights.files.shards import TOGETHER_BYTES, Box, Parts, boxes_of, place

_RECORDED: Mapping[str, str | None] = MappingProxyType({})

Places = Mapping[str, NamedSharding]


def is_converted(folder: Path) -> bool:
    """Whether this is a folder that ``jaxtc convert`` or :func:`jaxtc.save_checkpoint` made."""
    return local.has(folder, MANIFEST)


class Converted:
    """A converted checkpoint whose files are those that its manifest names; none is read yet.

    Attributes:
        folder: where it is.
        manifest: what it says.

    Raises:
        WeightsError: an unsound manifest; a link; files that are missing, too many, or of
            another size.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        check_folder(folder, self.manifest.files)

    def content(self, file: str) -> bytes:
        """A file's bytes.

        Raises:
            WeightsError: they are not those that were written.
        """
        size, digest = self.manifest.files[file]
        try:
            with (self.folder / file).open("rb") as stream:
                raw = stream.read(size + 1)  # no more than it should be, whatever it is by now
        except OSError as error:
            raise WeightsError(f"{self.folder / file} cannot be read: {error.strerror}.") from error
        self._check(file, len(raw), hashlib.sha256(raw).hexdigest())
        return raw

    def chunk(self, stored: Stored, index: Index) -> np.ndarray:
        """The elements of an array that a chunk covers. Raises WeightsError as :meth:`content`."""
        whole = decode(self.content(stored.file(index)), stored)
        region = stored.region(index)
        return whole[tuple(slice(0, part.stop - part.start) for part in region)]

    def verify(self, only: Iterable[str] | None = None) -> None:
        """Hash every file, or some of them. Raises WeightsError as :meth:`content`."""
        for file in self.manifest.files if only is None else only:
            with (self.folder / file).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                self._check(file, stream.tell(), digest)

    def _check(self, file: str, size: int, digest: str) -> None:
        if (size, digest) != self.manifest.files[file]:
            raise WeightsError(
                f"{self.folder / file} is not the file that was written (SHA-256 {digest[:12]}…, "
                f"in {MANIFEST} {self.manifest.files[file][1][:12]}…): it was damaged or changed. "
                "Copy or convert the checkpoint again."
            )

    def config(self) -> Gemma2Config:
        """The model's sizes. Raises ConfigError when they are not a Gemma-2's."""
        where = f"{self.folder / MANIFEST}, config"
        try:
            same = json.loads(self.content("config.json")) == self.manifest.config
        except (KeyError, ValueError, RecursionError):
            same = False
        if not same:
            raise WeightsError(
                f"{self.folder} does not hold the config.json that {where} repeats. Convert the "
                "checkpoint again."
            )
        return Gemma2Config.from_dict(self.manifest.config, where)

    def account(self, shapes: Mapping[str, Sequence[int]], below: str = "") -> None:
        """Refuse arrays that are not exactly the parameters.

        Args:
            shapes: of the parameters, by name.
            below: only arrays whose names begin so are compared.

        Raises:
            WeightsError: arrays are missing, extra, or misshapen.
        """
        found = {k: one for k, one in self.manifest.arrays.items() if k.startswith(below)}
        problems = [f"{name} is missing" for name in shapes if name not in found]
        problems += [f"{name} is not a parameter" for name in found if name not in shapes]
        problems += [
            f"{name} has shape {one.shape}, not {tuple(shapes[name])}"
            for name, one in found.items()
            if name in shapes and one.shape != tuple(shapes[name])
        ]
        if problems:
            raise WeightsError(
                f"The arrays in {self.folder} are not the parameters that its {MANIFEST} "
                f"describes: {some(problems, 20)}. Convert the checkpoint again."
            )

    def declared(
        self, layer: int, dtype: np.dtype | None = None, sites: Mapping[str, str | None] = _RECORDED
    ) -> Transcoder:
        """The transcoder of a layer that the manifest names, without its values.

        Args:
            layer: one of ``manifest.transcoders``.
            dtype: of its parameters; by default the widest of those that are stored.
            sites: ``input_site`` and ``output_site``, where others are meant than it says.
        """
        found, told = self.manifest.arrays, self.manifest.transcoders[layer]
        stored = {key.split(".")[2]: one for key, one in found.items() if _layer(key) == layer}
        weights = [stored.get(key) for key in ("W_enc", "W_dec")]
        if any(one is None or len(one.shape) != 2 for one in weights):
            raise WeightsError(
                f"{self.folder} has no W_enc (D, M) and W_dec (M, D) for layer {layer}, though "
                f"its {MANIFEST} names a transcoder there. Convert it again."
            )
        (d_in, features), (_, d_out) = (one.shape for one in weights)
        dtypes = [one.dtype for one in stored.values()]
        return Transcoder.abstract(
            d_in,
            features,
            d_out,
            dtype=functools.reduce(jnp.promote_types, dtypes) if dtype is None else dtype,
            activation=told["activation"],
            skip="W_skip" in stored,
            layer=layer,
            input_site=sites.get("input_site") or told["input_site"],
            output_site=sites.get("output_site") or told["output_site"],
            source=told["source"],
        )

    def array(
        self, name: str, dtype: np.dtype, sharding: NamedSharding | None
    ) -> tuple[jax.Array, str]:
        """An array of the tree, on the default device without a sharding.

        Returns:
            (the array, what is wrong with the values read here or an empty string).
        """
        stored = self.manifest.arrays[name]
        if sharding is None:
            box = tuple((0, size) for size in stored.shape)
            parts = self.parts(stored, [box], dtype)
            return arrays.to_jax(parts.arrays.pop(box)), parts.problem()
        boxes = boxes_of(stored.shape, sharding)
        together = sum(np.prod([b - a for a, b in box]) for box in boxes) * dtype.itemsize
        groups = [list(boxes)] if together <= TOGETHER_BYTES else [[box] for box in boxes]
        placed, problems = [], []
        for group in groups:
            parts = self.parts(stored, group, dtype)
            problems.append(parts.problem())
            placed += place(parts, boxes)
        whole = jax.make_array_from_single_device_arrays(stored.shape, sharding, placed)
        return whole, next(filter(None, problems), "")

    def parts(self, stored: Stored, boxes: Sequence[Box], dtype: np.dtype) -> Parts:
        """Some boxes of an array, on the host, cast to ``dtype``."""
        parts = Parts(boxes, dtype)
        for index in sorted({i for box in boxes for i in _touched(stored, box)}):
            corner = tuple(part.start for part in stored.region(index))
            parts.take(self.chunk(stored, index), corner)
        return parts


def _layer(name: str) -> int | None:
    """The layer of a transcoder's array, ``layers.20.W_enc``."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else None


def _touched(stored: Stored, box: Box) -> Iterator[Index]:
    return stored.indices(tuple(slice(*bounds) for bounds in box))


def load_converted_model(
    folder: Path, dtype: np.dtype, places: Any = None, verify: bool = False, progress: Any = None
) -> Gemma2:
    """A model from a converted checkpoint.

    Args:
        folder: of the checkpoint.
        dtype: to cast to.
        places: (config) -> where each parameter goes, by name; None for the default device.
        verify: hash all files first, not only the chunks that are read.
        progress: called with (bytes read, bytes in all) after each array.

    Raises:
        SourceError: it holds transcoders.
        ConfigError: not a Gemma-2.
        WeightsError: as :class:`Converted`; a file with another hash, arrays that are not those of
            the config, or not finite.
    """
    checkpoint = open_model(folder)
    if verify:
        checkpoint.verify()
    config = checkpoint.config()
    model = Gemma2.abstract(config, dtype)
    shapes = {name: leaf.shape for name, leaf in variables(model)}
    checkpoint.account(shapes)
    where = {} if places is None else places(config)
    values = _read(checkpoint, shapes, dtype, where, progress)
    return jax.tree.unflatten(jax.tree.structure(model), [values[name] for name in shapes])


def open_model(folder: Path) -> Converted:
    """A converted checkpoint of a model. Raises SourceError for one of transcoders."""
    checkpoint = Converted(folder)
    if checkpoint.manifest.kind != MODEL:
        raise SourceError(
            f"{folder} holds transcoders, not a model; load them with load_transcoder."
        )
    return checkpoint


def open_transcoders(folder: Path) -> Converted:
    """A converted checkpoint of transcoders. Raises SourceError for one of a model."""
    checkpoint = Converted(folder)
    if checkpoint.manifest.kind == MODEL:
        raise SourceError(f"{folder} holds a model, not transcoders; load it with load_model.")
    return checkpoint


def load_converted_transcoder(
    checkpoint: Converted,
    layer: int | None,
    dtype: np.dtype,
    places: Any = None,
    sites: Mapping[str, str | None] | None = None,
) -> Transcoder:
    """One of the transcoders of a checkpoint.

    Args:
        checkpoint: see :func:`open_transcoders`.
        layer: whose; may be None when there is only one.
        dtype: to cast to.
        places: (abstract transcoder) -> a sharding for each parameter, in their order; None for
            the default device.
        sites: ``input_site`` and ``output_site``, where others are meant than it says.

    Raises:
        SourceError: no such layer, or several and none named.
        WeightsError: as :func:`load_converted_model`.
    """
    known = checkpoint.manifest.transcoders
    if layer is None and len(known) > 1:
        raise SourceError(
            f"{checkpoint.folder} has transcoders for layers {some([*map(str, known)], 50)}; say "
            f"which layer (layer={next(iter(known))})."
        )
    layer = next(iter(known), -1) if layer is None else layer
    check_layer(layer, known, str(checkpoint.folder))
    abstract = checkpoint.declared(layer, dtype, sites or _RECORDED)
    names = [f"layers.{layer}.{name}" for name, _ in variables(abstract)]
    shapes = {n: leaf.shape for n, (_, leaf) in zip(names, variables(abstract), strict=True)}
    checkpoint.account(shapes, f"layers.{layer}.")
    where = {} if places is None else dict(zip(names, places(abstract), strict=True))
    values = _read(checkpoint, shapes, dtype, where, None)
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in names])


def _read(
    checkpoint: Converted,
    names: Iterable[str],
    dtype: np.dtype,
    places: Places,
    progress: Any,
) -> dict[str, jax.Array]:
    """The arrays by name; the largest first, while there is most room beside them."""
    sizes = {name: checkpoint.manifest.arrays[name].file_bytes for name in names}
    values, problems, done = {}, [], 0
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        values[name], problem = checkpoint.array(name, dtype, places.get(name))
        if problem:
            problems.append(f"{name} {problem}")
        done += sizes[name]
        if progress:
            progress(done, sum(sizes.values()))
    if problems:
        raise WeightsError(
            f"The weights in {checkpoint.folder} cannot be used: {some(problems, 20)}. Whatever "
            "they computed would be wrong."
        )
    return values
