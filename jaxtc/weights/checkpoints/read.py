"""Converted checkpoints: an orbax checkpoint with ``jaxtc.json`` and a model's own files in it.

Names, shapes and dtypes are compared with those in ``jaxtc.json`` before orbax reads an array;
contents with its hashes when that is asked for, and whenever a checkpoint is converted.
"""

import functools
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
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
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.sidecar import (
    MODEL,
    MOST_BYTES,
    SIDECAR,
    TRANSCODERS,
    Array,
    hash_array,
    hash_bytes,
    read_bytes,
    read_sidecar,
)
from jaxtc.weights.files import arrays, local
from jaxtc.weights.files.layout import check_layer

_RECORDED: Mapping[str, str | None] = MappingProxyType({})


def is_converted(folder: Any) -> bool:
    """Whether this is a folder that ``jaxtc convert`` or :func:`jaxtc.save_checkpoint` made."""
    if isinstance(folder, Path):
        return local.has(folder, SIDECAR)
    return (folder / SIDECAR).exists()


class Converted:
    """A converted checkpoint, of which only the sidecar is read yet.

    Attributes:
        folder: where it is, a :class:`pathlib.Path` or its like from etils.
        sidecar: what it says.

    Raises:
        WeightsError: an unsound sidecar; a link, a pipe or a device in the folder.
    """

    def __init__(self, folder: Any):
        self.folder = folder
        self.sidecar = read_sidecar(folder)
        if isinstance(folder, Path):
            _check_plain(folder)

    def content(self, file: str) -> bytes:
        """The bytes of a file beside the tree.

        Raises:
            WeightsError: they are not those that were written.
        """
        raw = read_bytes(self.folder / file, MOST_BYTES)
        self._check(file, hash_bytes(raw), self.sidecar.files.get(file))
        return raw

    def fetch(self, name: str) -> np.ndarray:
        """An array as it was written, its content compared with its hash. Raises WeightsError."""
        array = self._load({name: self._wanted(name)})[name]
        self._check(name, hash_array(array), self.sidecar.arrays[name].sha256)
        return array

    def verify(self) -> None:
        """Compare the content of everything with its hash. Raises WeightsError."""
        for file in self.sidecar.files:
            self.content(file)
        for name in self.sidecar.arrays:
            self.fetch(name)

    def _check(self, name: str, found: str, expected: str | None) -> None:
        if found != expected:
            raise WeightsError(
                f"{name} in {self.folder} is not what was written (SHA-256 {found[:12]}…, in "
                f"{SIDECAR} {(expected or 'none')[:12]}…): it was damaged or changed. Copy or "
                "convert the checkpoint again."
            )

    def config(self) -> Gemma2Config:
        """The model's sizes. Raises ConfigError when they are not a Gemma-2's."""
        where = f"{self.folder / SIDECAR}, config"
        if json.loads(self.content("config.json")) != self.sidecar.config:
            raise WeightsError(
                f"{self.folder} does not hold the config.json that {where} repeats. Convert the "
                "checkpoint again."
            )
        return Gemma2Config.from_dict(self.sidecar.config, where)

    def account(self, shapes: Mapping[str, Sequence[int]], below: str = "") -> None:
        """Refuse arrays that are not exactly the parameters.

        Args:
            shapes: of the parameters, by name.
            below: only arrays whose names begin so are compared.

        Raises:
            WeightsError: arrays are missing, extra, or misshapen.
        """
        own = {k: one.shape for k, one in self.sidecar.arrays.items() if k.startswith(below)}
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        problems = _differences(own, wanted, "is not a parameter", "shape ")
        if problems:
            raise WeightsError(
                f"The arrays in {self.folder} are not the parameters that its {SIDECAR} "
                f"describes: {some(problems, 20)}. Convert the checkpoint again."
            )

    @functools.cached_property
    def _sound(self) -> bool:
        """That the tree has exactly the arrays of the sidecar. Raises WeightsError otherwise."""
        found, said = tree.stored(self.folder), self.sidecar.arrays
        for name in said if not found else ():
            tree.load(self.folder, {name: self._wanted(name)})  # raises, and tells which
        found, expected = (
            {name: f"{one.dtype} {tuple(one.shape)}" for name, one in arrays.items()}
            for arrays in (found, said)
        )
        problems = _differences(found, expected, f"is not in {SIDECAR}")
        if problems:
            raise WeightsError(
                f"{self.folder} is not the checkpoint that its {SIDECAR} describes: "
                f"{some(problems)}. A copy was cut short, or files were changed; copy or convert "
                "it again."
            )
        return True

    def _wanted(
        self, name: str, dtype: np.dtype | None = None, sharding: NamedSharding | None = None
    ) -> jax.ShapeDtypeStruct:
        one = self.sidecar.arrays[name]
        return jax.ShapeDtypeStruct(one.shape, dtype or one.dtype, sharding=sharding)

    def _load(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        assert self._sound
        return tree.load(self.folder, wanted)

    def declared(
        self, layer: int, dtype: np.dtype | None = None, sites: Mapping[str, str | None] = _RECORDED
    ) -> Transcoder:
        """The transcoder of a layer that the sidecar names, without its values.

        Args:
            layer: one of ``sidecar.transcoders``.
            dtype: of its parameters; by default the widest of those that are stored.
            sites: ``input_site`` and ``output_site``, where others are meant than it says.

        Raises:
            WeightsError: the arrays are not those of that transcoder.
        """
        facts = {**self.sidecar.transcoders[layer], "layer": layer}
        facts |= {name: site for name, site in sites.items() if site}
        below = f"layers.{layer}."
        stored = [one.dtype for name, one in self.sidecar.arrays.items() if name.startswith(below)]
        if dtype is None:
            dtype = functools.reduce(jnp.promote_types, stored, stored[0] if stored else np.float32)
        found = Transcoder.from_facts(facts, dtype=dtype)
        self.account({below + name: leaf.shape for name, leaf in variables(found)}, below)
        return found

    def load(
        self,
        names: Iterable[str],
        dtype: np.dtype,
        places: Mapping[str, NamedSharding],
        progress: Any = None,
    ) -> dict[str, jax.Array]:
        """Arrays of the tree, a layer at a time; the largest first, while there is most room.

        Args:
            names: which.
            dtype: to cast to.
            places: a sharding for each name; the default device for those without one.
            progress: called with (bytes loaded, bytes in all) after each layer.

        Raises:
            WeightsError: arrays that cannot be read, or hold values that are not finite.
        """
        sizes = {name: _bytes(self.sidecar.arrays[name]) for name in names}
        groups = sorted(
            tree.parts(sizes).values(), key=lambda part: sum(map(sizes.get, part)), reverse=True
        )
        values: dict[str, jax.Array] = {}
        problems, done = [], 0
        for part in groups:
            found = self._load({n: self._wanted(n, dtype, places.get(n)) for n in part})
            for name in part:
                array = found.pop(name)
                if not _is_finite(array):
                    problems.append(f"{name} {self._fault(name, dtype, places.get(name))}")
                values[name] = arrays.to_jax(array) if isinstance(array, np.ndarray) else array
                done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))
        if problems:
            raise WeightsError(
                f"The weights in {self.folder} cannot be used: {some(problems, 20)}. Whatever "
                "they computed would be wrong."
            )
        return values

    def _fault(self, name: str, dtype: np.dtype, sharding: NamedSharding | None) -> str:
        """Why an array is not finite."""
        stored = self._load({name: self._wanted(name, sharding=sharding)})[name]
        return f"holds values too large for {dtype}" * _is_finite(stored) or "holds NaN or infinity"


def _differences(found: Mapping, expected: Mapping, extra: str, what: str = "") -> list[str]:
    """What is wrong with arrays, each with its description."""
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} {extra}" for name in found if name not in expected),
        *(
            f"{name} has {what}{found[name]}, not {one}"
            for name, one in expected.items()
            if found.get(name, one) != one
        ),
    ]


def _bytes(array: Array) -> int:
    return int(np.prod(array.shape)) * array.dtype.itemsize


def _is_finite(array: Any) -> bool:
    """Whether the parts of an array that this process holds are finite."""
    if isinstance(array, np.ndarray):
        return arrays.all_finite(array)
    return all(bool(jnp.isfinite(shard.data).all()) for shard in array.addressable_shards)


def _check_plain(folder: Path) -> None:
    """Refuse links, which may lead anywhere, and what nobody writes to, where reading hangs."""
    left = [folder]
    try:
        while left:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    mode = entry.stat(follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode):
                        left.append(Path(entry.path))
                    elif not stat.S_ISREG(mode):
                        kind = "a link" if stat.S_ISLNK(mode) else "not a plain file"
                        raise WeightsError(
                            f"{entry.path} is {kind}, which no converted checkpoint contains. "
                            "Copy or convert the checkpoint again."
                        )
    except OSError as error:
        raise WeightsError(f"{error.filename} cannot be read: {error.strerror}.") from error


def load_converted_model(
    folder: Any, dtype: np.dtype, places: Any = None, verify: bool = False, progress: Any = None
) -> Gemma2:
    """A model from a converted checkpoint.

    Args:
        folder: of the checkpoint.
        dtype: to cast to.
        places: (config) -> where each parameter goes, by name; None for the default device.
        verify: compare all contents with their hashes first.
        progress: called with (bytes loaded, bytes in all) after each layer.

    Raises:
        SourceError: it holds transcoders.
        ConfigError: not a Gemma-2.
        WeightsError: as :class:`Converted`; an array with another hash, arrays that are not those
            of the config, or not finite.
    """
    checkpoint = open_model(folder)
    if verify:
        checkpoint.verify()
    config = checkpoint.config()
    model = Gemma2.abstract(config, dtype)
    shapes = {name: leaf.shape for name, leaf in variables(model)}
    checkpoint.account(shapes)
    values = checkpoint.load(shapes, dtype, {} if places is None else places(config), progress)
    return jax.tree.unflatten(jax.tree.structure(model), [values[name] for name in shapes])


def open_model(folder: Any) -> Converted:
    """A converted checkpoint of a model. Raises SourceError for one of transcoders."""
    return _open(folder, MODEL, "transcoders, not a model; load them with load_transcoder")


def open_transcoders(folder: Any) -> Converted:
    """A converted checkpoint of transcoders. Raises SourceError for one of a model."""
    return _open(folder, TRANSCODERS, "a model, not transcoders; load it with load_model")


def _open(folder: Any, kind: str, otherwise: str) -> Converted:
    checkpoint = Converted(folder)
    if checkpoint.sidecar.kind != kind:
        raise SourceError(f"{folder} holds {otherwise}.")
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
    known = checkpoint.sidecar.transcoders
    if layer is None and len(known) > 1:
        raise SourceError(
            f"{checkpoint.folder} has transcoders for layers {some([*map(str, known)], 50)}; say "
            f"which layer (layer={next(iter(known))})."
        )
    layer = next(iter(known), -1) if layer is None else layer
    check_layer(layer, known, str(checkpoint.folder))
    abstract = checkpoint.declared(layer, dtype, sites or _RECORDED)
    names = [f"layers.{layer}.{name}" for name, _ in variables(abstract)]
    where = {} if places is None else dict(zip(names, places(abstract), strict=True))
    values = checkpoint.load(names, dtype, where)
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in names])
