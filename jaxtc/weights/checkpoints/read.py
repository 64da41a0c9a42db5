"""Converted checkpoints: an orbax checkpoint with ``jaxtc.json`` and a model's own files in it.

Names, shapes and dtypes are compared with those in ``jaxtc.json`` before orbax reads an array;
contents with its hashes on ``verify``, and whenever a checkpoint is converted.
"""

import functools
import json
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

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
from jaxtc.weights.checkpoints.sidecar import SIDECAR, read_bytes, read_sidecar, sha256
from jaxtc.weights.files import arrays
from jaxtc.weights.files.generation import GENERATION, with_stops
from jaxtc.weights.files.layout import check_layer

_Module = TypeVar("_Module", Gemma2, Transcoder)

_OTHERS = {
    "model": "transcoders, not a model; load them with load_transcoder",
    "transcoders": "a model, not transcoders; load it with load_model",
}


class Converted:
    """A converted checkpoint, of which only the sidecar has been read.

    Args:
        folder: a :class:`pathlib.Path`, or its like from etils.
        kind: "model" or "transcoders", if only that will do.
        verify: compare the content of everything with its hash.

    Raises:
        SourceError: it holds the other kind.
        WeightsError: an unsound sidecar; a link, a pipe or a device in the folder; a wrong hash.
    """

    def __init__(self, folder: Any, kind: str | None = None, verify: bool = False):
        self.folder, self.sidecar = folder, read_sidecar(folder)
        if isinstance(folder, Path):
            check_plain(folder)
        if kind not in (None, self.sidecar.kind):
            raise SourceError(f"{folder} holds {_OTHERS[kind]}.")
        if verify:
            for file in self.sidecar.files:
                self.content(file)
            for part in tree.parts(self.sidecar.arrays):
                self.fetch(part)

    def content(self, file: str) -> bytes:
        """The bytes of a file beside the tree. Raises WeightsError if its hash is another."""
        return self._checked(file, read_bytes(self.folder / file), self.sidecar.files.get(file))

    def fetch(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Arrays as they were written. Raises WeightsError if the hash of one is another."""
        said = self.sidecar.arrays
        found = self._load({name: said[name] for name in names})
        return {name: self._checked(name, found[name], said[name].sha256) for name in names}

    def read(self, name: str, dtype: np.dtype) -> tuple[np.ndarray, str]:
        """An array as :meth:`fetch`, cast; and what is wrong with its values or an empty string."""
        stored = self.fetch([name])[name]
        if stored.dtype == dtype:
            array, problem = stored, arrays.problem_of(stored, stored)
        else:
            array, problem = arrays.converted(stored, dtype)
        return array, problem and f"{name} {problem}"

    def _checked(self, name: str, found: Any, expected: str | None) -> Any:
        if sha256(found) != expected:
            raise WeightsError(
                f"{name} in {self.folder} is not what was written (SHA-256 {sha256(found)[:12]}…, "
                f"in {SIDECAR} {(expected or 'none')[:12]}…): it was damaged or changed. Copy or "
                "convert the checkpoint again."
            )
        return found

    def model(self, dtype: np.dtype | None = None) -> Gemma2:
        """The model without its values.

        Raises:
            ConfigError: its sizes are not a Gemma-2's.
            WeightsError: the arrays are not those of its config.
        """
        where = f"{self.folder / SIDECAR}, config"
        if json.loads(self.content("config.json")) != self.sidecar.config:
            raise WeightsError(
                f"{self.folder} does not hold the config.json that {where} repeats. Convert the "
                "checkpoint again."
            )
        config = Gemma2Config.from_dict(self.sidecar.config, where)
        if GENERATION in self.sidecar.files:
            content = self.content(GENERATION)
            config = with_stops(config, content, str(self.folder / GENERATION))
        return self._declared(Gemma2.abstract(config, dtype or np.dtype(np.float32)))

    def transcoder(
        self,
        layer: int | None,
        dtype: np.dtype | None = None,
        sites: Mapping[str, str | None] | None = None,
    ) -> Transcoder:
        """A transcoder without its values.

        Args:
            layer: whose; may be None when there is only one.
            dtype: of its parameters; by default the widest of those that are stored.
            sites: ``input_site`` and ``output_site``, to replace those that it says.

        Raises:
            SourceError: no such layer, or several and none named.
            WeightsError: the arrays are not those of that transcoder.
        """
        known = self.sidecar.transcoders
        if layer is None and len(known) > 1:
            raise SourceError(
                f"{self.folder} has transcoders for layers {some([*map(str, known)], 50)}; say "
                f"which layer (layer={next(iter(known))})."
            )
        layer = next(iter(known), -1) if layer is None else layer
        check_layer(layer, known, str(self.folder))
        facts = {**known[layer], "layer": layer}
        facts |= {name: site for name, site in (sites or {}).items() if site}
        below = f"layers.{layer}."
        stored = [one.dtype for name, one in self.sidecar.arrays.items() if name.startswith(below)]
        widest = functools.reduce(jnp.promote_types, stored or [np.dtype(np.float32)])
        return self._declared(Transcoder.from_facts(facts, dtype=dtype or widest), below)

    def _declared(self, abstract: _Module, below: str = "") -> _Module:
        """The module, if the arrays of the sidecar that begin with ``below`` are its own."""
        own = {k: one.shape for k, one in self.sidecar.arrays.items() if k.startswith(below)}
        expected = {name: leaf.shape for name, leaf in named(abstract).items()}
        self._compare(own, expected, "is not a parameter")
        return abstract

    @functools.cached_property
    def _load(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """:func:`tree.load` of this folder, if it has exactly the arrays of the sidecar."""
        load, said = functools.partial(tree.load, self.folder), self.sidecar.arrays
        found = tree.stored(self.folder)
        for name in said if not found else ():
            load({name: said[name]})  # raises, and tells which
        described = (
            {k: f"{x.dtype} {tuple(x.shape)}" for k, x in y.items()} for y in (found, said)
        )
        self._compare(*described, f"is not in {SIDECAR}")
        return load

    def _compare(self, found: Mapping, expected: Mapping, extra: str) -> None:
        """Refuse differences between arrays, each with its description."""
        problems = [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{name} {extra}" for name in found if name not in expected]
        problems += [
            f"{name} has {'shape ' * isinstance(one, tuple)}{found[name]}, not {one}"
            for name, one in expected.items()
            if found.get(name, one) != one
        ]
        if problems:
            raise WeightsError(
                f"{self.folder} is not the checkpoint that its {SIDECAR} describes: "
                f"{some(problems, 20)}. A copy was cut short, or files were changed; copy or "
                "convert it again."
            )

    def load(
        self,
        abstract: _Module,
        places: Callable[[_Module], list[NamedSharding]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> _Module:
        """What :meth:`model` or :meth:`transcoder` gave with its values, read a layer at a time.

        Arguments and errors are those of :func:`jaxtc.weights.files.shards.fill`.
        """
        leaves = named(abstract)
        where = [None] * len(leaves) if places is None else places(abstract)
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for (name, leaf), place in zip(leaves.items(), where, strict=True)
        }
        sizes = {name: one.size * one.dtype.itemsize for name, one in wanted.items()}
        values: dict[str, jax.Array] = {}
        problems, done = [], 0
        for names in sorted(tree.parts(sizes), key=lambda part: -sum(map(sizes.get, part))):
            found = self._load({name: wanted[name] for name in names})
            for name in names:
                array = found.pop(name)
                if not _is_finite(array):
                    problems.append(f"{name} holds {self._not_finite(name, wanted[name])}")
                values[name] = arrays.to_jax(array) if isinstance(array, np.ndarray) else array
                done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))
        if problems:
            raise WeightsError(
                f"The weights in {self.folder} cannot be used: {some(problems, 20)}. Whatever "
                "they computed would be wrong."
            )
        return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in wanted])

    def _not_finite(self, name: str, wanted: jax.ShapeDtypeStruct) -> str:
        """What is wrong with an array that has values that are not finite as it was ``wanted``."""
        given, dtype = self.sidecar.arrays[name].dtype, wanted.dtype
        if not np.can_cast(given, dtype):
            as_stored = jax.ShapeDtypeStruct(wanted.shape, given, sharding=wanted.sharding)
            if _is_finite(self._load({name: as_stored})[name]):
                return f"values too large for {dtype.name}"
        return "NaN or infinity"


def named(module: Gemma2 | Transcoder) -> dict[str, Any]:
    """The parameters of a module by their names in the tree."""
    below = f"layers.{module.layer}." if isinstance(module, Transcoder) else ""
    return {below + name: leaf for name, leaf in variables(module)}


def _is_finite(array: Any) -> bool:
    """Whether the parts of an array that this process holds are finite."""
    if isinstance(array, np.ndarray):
        return arrays.all_finite(array)
    return all(bool(jnp.isfinite(shard.data).all()) for shard in array.addressable_shards)


def check_plain(folder: Path) -> None:
    """Refuse links, which may lead anywhere, and pipes and devices, where reading hangs."""
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            kind = "a link" if stat.S_ISLNK(mode) else "not a plain file"
            raise WeightsError(
                f"{path} is {kind}, which no converted checkpoint contains. Copy or convert the "
                "checkpoint again."
            )
