"""The lines of a plan: what one device of a mesh holds of each kind of array, from shapes alone.

Axis letters: B batch, T tokens, W tokens with the padding up to a bucket, S cache slots, L layers,
D hidden, N heads, K key/value heads, H head dim, F MLP width, V vocabulary, M transcoder features.
"""

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtc.captures.base import Reducer
from jaxtc.captures.reducers import At, Features, Mean, Norm, Project, TopK
from jaxtc.captures.request import Asked
from jaxtc.memory.account import Size, bytes_of, kept_of
from jaxtc.model.config import FULL, Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket
from jaxtc.sharding.rules import CACHE, LETTERS, logical, partition, variables
from jaxtc.tap.sites import BY_NAME, LOGITS
from jaxtc.transcoders.transcoder import Transcoder

# How many arrays of a kind exist at once, as XLA's memory_analysis() counts them: scores, their
# exponentials, the pattern; gate, up, their product; features before and after the threshold.
_AT_ONCE = {"attention scores": 3, "the MLP": 3, "transcoder features": 2, "logits": 2}
_DRAWING = 6  # logits of the tokens to be drawn

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

    ``asked`` are its captures, ``transcoders`` the layers that have one, ``features`` is M. Numbers
    are bytes of one device; each method raises ShardingError where an axis does not divide.
    """

    config: Gemma2Config
    mesh: Items
    rules: Items
    dtype: str
    batch: int
    length: int
    new_tokens: int
    asked: Asked
    logits: str | None
    transcoders: tuple[int, ...]
    features: int
    transcoder_dtype: str
    skip: bool

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return math.prod(dict(self.mesh).values())

    @property
    def width(self) -> int:
        """W, the padded prompts."""
        return bucket(self.length)

    @property
    def slots(self) -> int:
        """S, of the cache; the padded prompts where there is none."""
        if not self.new_tokens:
            return self.width
        return max(bucket(self.length + self.new_tokens), self.width)

    @property
    def size(self) -> Size:
        """Of the run, or of what a generation records: its last token is never run."""
        length = self.length + max(self.new_tokens - 1, 0)
        return Size(self.config, np.dtype(self.dtype), self.batch, length, self.slots)

    def parts(self) -> tuple[Part, ...]:
        """The lines that are not empty."""
        count, whole = len(self.transcoders), dataclasses.replace(self, mesh=())
        held, totals = self._held(), whole._held()
        held["workspace"], widest = self._workspace()
        totals["workspace"], _ = whole._workspace()
        layers = "layer" if count == 1 else "layers"
        rows = {"all": f"{self.length:,} tokens", "last": "last token", None: ""}[self.logits]
        kept = collections.Counter(address.site for address in self.asked.addresses)
        sites = [f"{site}, {n} layers" if n > 1 else site for site, n in kept.items()]
        details = {
            "weights": f"{count_parameters(self.config):,} parameters in {self.dtype}",
            "transcoders":
                f"{count} {layers} of {self.features:,} features in {self.transcoder_dtype}",
            "kv cache": f"{self.batch} × {self.slots:,} tokens in {self.dtype}",
            "activations": "; ".join([*sites, *self.asked.names]),
            "logits": f"{rows} in float32",
            "workspace": f"estimated; most of it {widest}",
        }  # fmt: skip
        return tuple(
            Part(name, totals[name], held[name], detail)
            for name, detail in details.items()
            if held[name]
        )

    @property
    def needed(self) -> int:
        """Bytes that each device must have."""
        return sum(self._held().values()) + self._workspace()[0]

    def _held(self) -> dict[str, int]:
        """All but the workspace, by name."""
        over = self.mesh, self.rules
        one = _transcoder(self.config.hidden_size, self.features, self.skip)
        one = _divided(one, np.dtype(self.transcoder_dtype).itemsize, *over)
        return {
            "weights": _divided(_parameters(self.config), np.dtype(self.dtype).itemsize, *over),
            "transcoders": len(self.transcoders) * one,
            "kv cache": self._cache(self.slots),
            "activations": self._activations(cut=True),
            "logits": self._logits(self.length),
        }

    def _split(self, total: int, *axes: str) -> int:
        """Of ``total`` bytes in arrays with these logical axes."""
        sizes = {**{LETTERS[k]: n for k, n in self.config.sizes.items()}, "batch": self.batch}
        sizes |= {"features": self.features}
        shape = tuple(sizes[axis] for axis in axes)
        return total and total // _ways(axes, shape, self.mesh, self.rules)

    def _logits(self, tokens: int) -> int:
        return self._split(self.size.logits(self.logits, tokens), "batch", "vocab")

    def _cache(self, slots: int) -> int:
        """A generation's, with room for ``slots`` tokens."""
        config = self.config
        shape = (self.batch, slots, config.num_key_value_heads, config.head_dim)
        arrays = 2 * config.num_hidden_layers * bool(self.new_tokens)
        total = arrays * math.prod(shape) * np.dtype(self.dtype).itemsize
        return total // _ways(CACHE, shape, self.mesh, self.rules, "the cache")

    def _activations(self, cut: bool) -> int:
        generated = bool(self.new_tokens)
        return _activations(self.asked, self.size, cut, generated, self.mesh, self.rules)

    def _workspace(self) -> tuple[int, str]:
        """What the program holds besides, about, and what most of it is; see :data:`_AT_ONCE`."""
        # As if all were computed in float32.
        run = dataclasses.replace(self.size, width=self.width, dtype=np.dtype(np.float32))
        widest = run.widest(self.features * bool(self.transcoders))
        if not any(reducer.site.name in LOGITS for reducer in self.asked.reducers):
            del widest["logits"]
        held = {name: self._split(_AT_ONCE[name] * n, *axes) for name, (n, axes) in widest.items()}
        if self.new_tokens:
            drawn = _DRAWING * run.logits("last", 1)
            held["drawing a token"] = self._split(drawn, "batch", "vocab")
        most = max(held, key=held.get)
        stream = self._split(2 * self.batch * self.width * self.config.hidden_size * 4, "batch")
        # A generation also holds the prompts' own cache, before it is enlarged.
        work = held[most] + stream + self._cache(self.width)
        if self.size.length < self.size.width:
            # Results are padded at first; then there are both, but nothing else.
            every = self.logits == "all"
            padded = self._activations(cut=False) + every * self._logits(self.width)
            cut = self._activations(cut=True) + every * self._logits(self.length)
            work = max(work + padded - cut, padded)
        return work, most


def count_parameters(config: Gemma2Config) -> int:
    """Of the whole model; the tied embedding counts once."""
    return sum(times * math.prod(shape) for _, _, shape, times in _parameters(config))


@functools.lru_cache(maxsize=16)
def _parameters(config: Gemma2Config) -> tuple:
    # Layers are alike, so one is made.
    one = dataclasses.replace(config, num_hidden_layers=1, layer_types=(FULL,))
    return _rows(Gemma2.abstract(one), config.num_hidden_layers)


@functools.lru_cache(maxsize=16)
def _transcoder(d: int, features: int, skip: bool) -> tuple:
    return _rows(Transcoder.abstract(d, features, skip=skip))


def _rows(module: nnx.Module, layers: int = 1) -> tuple[tuple[str, tuple, tuple, int], ...]:
    """(name, logical axes, shape, how many there are) of each parameter."""
    return tuple(
        (name, param.logical_axes, param.shape, layers if name.startswith("layers.") else 1)
        for name, param in variables(module)
    )


@functools.lru_cache(maxsize=512)
def _divided(parameters: tuple, item: int, mesh: Items, rules: Items) -> int:
    """Of parameters with ``item`` bytes a number."""
    return sum(
        times * item * math.prod(shape) // _ways(axes, shape, mesh, rules, name)
        for name, axes, shape, times in parameters
    )


@functools.lru_cache(maxsize=512)
def _activations(
    asked: Asked, size: Size, cut: bool, generated: bool, mesh: Items, rules: Items
) -> int:
    """Of what is kept, after the padding is cut off or before."""
    axes = {str(address): BY_NAME[address.site].axes.split() for address in asked.addresses}
    for name, reducer in zip(asked.names, asked.reducers, strict=True):
        # A generation keeps what is reduced by rows only.
        axes[name] = ["L"] * reducer.every_layer + (["B"] if generated else _left(reducer))
    share = 0
    for name, tree in kept_of(asked, size, cut).items():
        for x in jax.tree.leaves(tree):
            names = logical(" ".join(axes[name]))
            names += ("tokens",) * (len(x.shape) - len(names))
            # Of features (values, ids and a count) the last has an axis less.
            share += bytes_of(x) // _ways(names[: len(x.shape)], x.shape, mesh, rules, name)
    return share


def _left(reducer: Reducer) -> list[str]:
    """Axis letters of what it keeps of one layer; of unknown kinds only B is known."""
    letters, axis = reducer.site.axes.split(), reducer.site.sequence_axis
    match reducer:
        case At(single=False):
            return [*letters[:axis], "P", *letters[axis + 1 :]]
        case At() | Mean():
            return [*letters[:axis], *letters[axis + 1 :]]
        case Norm() | TopK() | Project() | Features():
            return letters[:-1]
    return ["B"]


def _ways(axes, shape, mesh: Items, rules: Items, what: str = "an activation") -> int:
    """Into how many parts an array with these logical axes is divided."""
    sizes = dict(mesh)
    spec = partition(axes, shape, sizes, dict(rules), what)
    return math.prod(sizes[axis] for axis in spec if axis is not None)
