"""The lines of a plan: what one device of a mesh holds of each kind of array, from shapes alone.

Axis letters: B batch, T tokens, W tokens with the padding up to a bucket, S cache slots, D hidden,
K key/value heads, H head dim, V vocabulary, M transcoder features.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from jaxtc.captures.request import Asked
from jaxtc.memory.account import Arrays, Size, activations
from jaxtc.model.config import FULL, Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket
from jaxtc.sharding.rules import variables
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder
from jaxtc.transcoders.transcoder import Transcoder

# How many arrays of a kind exist at once, as XLA's memory_analysis() counts them: scores, their
# exponentials, the pattern; gate, up, their product; features before and after the threshold; what
# drawing a token makes of its logits.
_AT_ONCE = {"attention scores": 3, "the MLP": 3, "transcoder features": 2, "logits": 2,
            "heads' outputs": 2, "drawing a token": 6}  # fmt: skip

# A mapping as a hashable tuple of its items.
Items = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of a plan; numbers are bytes.

    Attributes:
        name: "weights", "transcoders", "kv cache", "activations", "logits" or "workspace".
        total: of the whole arrays, on a single device.
        per_device: of the share of one device; all devices have the same.
        detail: what it consists of.
    """

    name: str
    total: int
    per_device: int
    detail: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What is planned: the arguments of :func:`jaxtc.plan`, with every default filled in.

    ``transcoders`` are the layers that have one, ``features`` is M of each; or of all layers of one
    that is ``cross_layer``.
    """

    config: Gemma2Config
    mesh: Items
    rules: Items
    dtype: str
    batch: int
    length: int
    new_tokens: int
    capture: Asked
    logits: str | None
    transcoders: tuple[int, ...]
    features: int
    transcoder_dtype: str
    skip: bool
    cross_layer: bool = False

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return math.prod(dict(self.mesh).values())

    @property
    def slots(self) -> int:
        """S, of the cache; the padded prompts where there is none."""
        return bucket(self.length + self.new_tokens)

    def parts(self) -> tuple[Part, ...]:
        """The lines that are not empty; raises ShardingError where an axis does not divide."""
        count, arrays = len(self.transcoders), self._held()
        layers = "layer" if count == 1 else "layers"
        rows = {"all": f"{self.length:,} tokens", "last": "last token", None: ""}[self.logits]
        kept = (
            f"{one.name}, {one.count} layers" if one.count > 1 else one.name
            for one in arrays["activations"]
        )
        details = {
            "weights": f"{count_parameters(self.config):,} parameters in {self.dtype}",
            "transcoders": f"{count} {layers} of {self.features:,} features in "
                f"{self.transcoder_dtype}" + ", cross-layer" * self.cross_layer,
            "kv cache": f"{self.batch} × {self.slots:,} tokens in {self.dtype}",
            "activations": "; ".join(dict.fromkeys(kept)),
            "logits": f"{rows} in float32",
        }  # fmt: skip
        found = [
            Part(name, sum(one.total for one in held), self._share(held), details[name])
            for name, held in arrays.items()
        ]
        work, widest = self._workspace()
        whole, _ = dataclasses.replace(self, mesh=())._workspace()
        found.append(Part("workspace", whole, work, f"estimated; most of it {widest}"))
        return tuple(part for part in found if part.total)

    @property
    def needed(self) -> int:
        """Bytes that each device must have."""
        return sum(map(self._share, self._held().values())) + self._workspace()[0]

    def _share(self, held: Iterable[Arrays]) -> int:
        """Bytes of one device."""
        mesh, rules = dict(self.mesh), dict(self.rules)
        return sum(one.share(mesh, rules) for one in held)

    @property
    def _size(self) -> Size:
        """Of the run, or of what a generation records: its last token is never run."""
        length = self.length + max(self.new_tokens - 1, 0)
        return Size(self.config, np.dtype(self.dtype), self.batch, length, self.slots)

    def _held(self) -> dict[str, list[Arrays]]:
        """All but the workspace."""
        size, layers = self.config.hidden_size, len(self.transcoders)
        given = size, self.features, self.transcoder_dtype, self.skip
        if self.cross_layer:
            transcoders = _cross_layer(layers, *given)
        else:
            one = _transcoder(*given) if layers else []
            transcoders = [array._replace(count=layers) for array in one]
        return {
            "weights": _parameters(self.config, self.dtype),
            "transcoders": transcoders,
            "kv cache": self._cache(self.slots),
            "activations": self._activations(cut=True),
            "logits": [self._size.logits(self.logits, self.length)],
        }

    def _cache(self, slots: int) -> list[Arrays]:
        """A generation's, with room for so many tokens."""
        item, count = np.dtype(self.dtype).itemsize, 2 * self.config.num_hidden_layers
        one = self._size.arrays("the cache", "B S K H", slots, item, count)
        return [one] if self.new_tokens else []

    def _activations(self, cut: bool) -> list[Arrays]:
        return activations(self.capture, self._size, cut, generated=bool(self.new_tokens))

    def _workspace(self) -> tuple[int, str]:
        """What the program holds besides, about, and what most of it is; see :data:`_AT_ONCE`."""
        # As if all were computed in float32.
        size, width = self._size, bucket(self.length)
        run = dataclasses.replace(size, width=width, dtype=np.dtype(np.float32))
        reduced = {reducer.site.name for reducer in self.capture.reducers}
        # Those of all layers of a cross-layer one are there at the last.
        at_once = len(self.transcoders) if self.cross_layer else bool(self.transcoders)
        widest = run.widest(self.features * at_once, reduced)
        if self.new_tokens:
            widest.append(run.arrays("drawing a token", "B V", 1))
        held = {one.name: self._share([one._replace(count=_AT_ONCE[one.name])]) for one in widest}
        most = max(held, key=held.get)
        # A generation also holds the prompts' own cache, before it is enlarged.
        stream = run.arrays("the residual stream", "B T D", width, count=2)
        work = held[most] + self._share([stream, *self._cache(width)])
        if size.length < size.width:
            # Results are padded at first; then there are both, but nothing else.
            padded, kept = self._activations(cut=False), self._activations(cut=True)
            if self.logits == "all":
                padded = [*padded, size.logits("all", width)]
                kept = [*kept, size.logits("all", self.length)]
            work = max(work + self._share(padded) - self._share(kept), self._share(padded))
        return work, most


def count_parameters(config: Gemma2Config) -> int:
    """Of the whole model; an embedding that is the output matrix too counts once."""
    return sum(one.count * math.prod(one.shape) for one in _parameters(config, "float32"))


@functools.lru_cache(maxsize=16)
def _parameters(config: Gemma2Config, dtype: str) -> list[Arrays]:
    # Layers are alike, so one is made.
    one = dataclasses.replace(config, num_hidden_layers=1, layer_types=(FULL,))
    return [
        array._replace(count=config.num_hidden_layers if array.name.startswith("layers.") else 1)
        for array in _arrays(Gemma2.abstract(one, np.dtype(dtype)))
    ]


@functools.lru_cache(maxsize=16)
def _transcoder(d: int, features: int, dtype: str, skip: bool) -> list[Arrays]:
    return _arrays(Transcoder.abstract(d, features, dtype=np.dtype(dtype), skip=skip))


@functools.lru_cache(maxsize=16)
def _cross_layer(layers: int, d: int, features: int, dtype: str, skip: bool) -> list[Arrays]:
    return _arrays(
        CrossLayerTranscoder.abstract(layers, d, features, dtype=np.dtype(dtype), skip=skip)
    )


def _arrays(module: nnx.Module) -> list[Arrays]:
    return [
        Arrays(name, param.logical_axes, param.shape, param.dtype.itemsize)
        for name, param in variables(module)
    ]
