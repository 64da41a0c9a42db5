"""The lines of a plan: what of each kind of array one device of a mesh holds, from shapes alone.

Axis letters: B batch, T tokens, W tokens with the padding up to a bucket, S cache slots, L layers,
D hidden, N heads, K key/value heads, H head dim, F MLP width, V vocabulary, M transcoder features.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtc.captures.base import Reducer
from jaxtc.captures.reducers import At, Features, Mean, Norm, Project, TopK
from jaxtc.captures.request import Asked
from jaxtc.memory.account import Size, kept_of
from jaxtc.model.config import FULL, Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket
from jaxtc.sharding.rules import CACHE, LETTERS, partition, variables
from jaxtc.tap.sites import BY_NAME, LOGITS
from jaxtc.transcoders.transcoder import Transcoder

# How many arrays of a kind are there at once, as XLA's memory_analysis() counts them: scores, their
# exponentials, the pattern; gate, up, their product; features before and after the threshold.
_AT_ONCE = {"attention scores": 3, "the MLP": 3, "transcoder features": 2, "logits": 2}
_DRAWING = 6  # logits of the tokens to be drawn

# A mapping as a hashable tuple of its items.
Items = tuple[tuple[str, Any], ...]
# Bytes: (of whole arrays, of what each device holds).
Bytes = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of a plan; numbers are bytes.

    Attributes:
        name: "weights", "transcoders", "kv cache", "activations", "logits" or "workspace".
        total: of the whole arrays, each counted once.
        per_device: of what one device holds of them; all devices hold the same.
        detail: what it is made of.
    """

    name: str
    total: int
    per_device: int
    detail: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What is planned: the arguments of :func:`jaxtc.plan`, with every default filled in.

    ``asked`` are its captures, ``transcoders`` the layers that have one, ``features`` is M.
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
        """The lines that are not empty. Raises ShardingError where an axis does not divide."""
        config, count, over = self.config, len(self.transcoders), (self.mesh, self.rules)
        made = _transcoder(config.hidden_size, self.features, self.skip)
        made = _divided(made, np.dtype(self.transcoder_dtype).itemsize, *over)
        layers = "layer" if count == 1 else "layers"
        rows = {"all": f"{self.length:,} tokens", "last": "last token", None: ""}[self.logits]
        cache, kept = self._cache(self.slots), self._activations(cut=True)
        work, widest = self._workspace()
        found = (
            (
                "weights",
                _divided(_parameters(config), np.dtype(self.dtype).itemsize, *over),
                f"{count_parameters(config):,} parameters in {self.dtype}",
            ),
            (
                "transcoders",
                [count * number for number in made],
                f"{count} {layers} of {self.features:,} features in {self.transcoder_dtype}",
            ),
            ("kv cache", cache, f"{self.batch} × {self.slots:,} tokens in {self.dtype}"),
            ("activations", kept, _names(self.asked)),
            ("logits", self._logits(self.length), f"{rows} in float32"),
            ("workspace", work, f"estimated; most of it {widest}"),
        )
        return tuple(Part(name, *held, detail) for name, held, detail in found if held[0])

    @property
    def needed(self) -> int:
        """Bytes that each device must have."""
        return sum(part.per_device for part in self.parts())

    def _split(self, total: int, *axes: str) -> Bytes:
        """Of arrays of so many bytes with these logical axes."""
        sizes = {**{LETTERS[k]: n for k, n in self.config.sizes.items()}, "batch": self.batch}
        sizes |= {"features": self.features}
        shape = tuple(sizes[axis] for axis in axes)
        return total, total // _ways(axes, shape, self.mesh, self.rules) if total else 0

    def _logits(self, tokens: int) -> Bytes:
        return self._split(self.size.logits(self.logits, tokens), "batch", "vocab")

    def _cache(self, slots: int) -> Bytes:
        """A generation's, with room for so many tokens."""
        config = self.config
        shape = (self.batch, slots, config.num_key_value_heads, config.head_dim)
        arrays = 2 * config.num_hidden_layers * bool(self.new_tokens)
        total = arrays * math.prod(shape) * np.dtype(self.dtype).itemsize
        return total, total // _ways(CACHE, shape, self.mesh, self.rules, "the cache")

    def _activations(self, cut: bool) -> Bytes:
        generated = bool(self.new_tokens)
        return _activations(self.asked, self.size, cut, generated, self.mesh, self.rules)

    def _workspace(self) -> tuple[Sequence[int], str]:
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
        most = max(held, key=lambda name: (*held[name][::-1], name))
        stream = self._split(2 * self.batch * self.width * self.config.hidden_size * 4, "batch")
        # A generation also holds the prompts' own cache, before it gets room for more.
        work = [
            sum(counts) for counts in zip(held[most], stream, self._cache(self.width), strict=True)
        ]
        if self.size.length < self.size.width:
            # What is given back is padded at first; then there are both, but nothing else.
            every = self.logits == "all"
            pad, cut = (
                [
                    a + b * every
                    for a, b in zip(self._activations(cut), self._logits(n), strict=True)
                ]
                for cut, n in ((False, self.width), (True, self.length))
            )
            work = [max(w + p - c, p) for w, p, c in zip(work, pad, cut, strict=True)]
        return work, most


def count_parameters(config: Gemma2Config) -> int:
    """Of the whole model; the tied embedding counts once."""
    return sum(times * math.prod(shape) for _, _, shape, times in _parameters(config))


@functools.lru_cache(maxsize=16)
def _parameters(config: Gemma2Config) -> tuple[tuple[str, tuple, tuple, int], ...]:
    """(name, logical axes, shape, how many there are): layers are alike, so one is made."""
    one = dataclasses.replace(config, num_hidden_layers=1, layer_types=(FULL,))
    layers = config.num_hidden_layers
    return tuple(
        (name, param.logical_axes, param.shape, layers if name.startswith("layers.") else 1)
        for name, param in variables(Gemma2.abstract(one))
    )


@functools.lru_cache(maxsize=16)
def _transcoder(d: int, features: int, skip: bool) -> tuple[tuple[str, tuple, tuple, int], ...]:
    found = variables(Transcoder.abstract(d, features, skip=skip))
    return tuple((name, param.logical_axes, param.shape, 1) for name, param in found)


@functools.lru_cache(maxsize=512)
def _divided(parameters: tuple, item: int, mesh: Items, rules: Items) -> Bytes:
    """Of parameters with ``item`` bytes a number."""
    total = share = 0
    for name, axes, shape, times in parameters:
        whole = times * item * math.prod(shape)
        total, share = total + whole, share + whole // _ways(axes, shape, mesh, rules, name)
    return total, share


@functools.lru_cache(maxsize=512)
def _activations(
    asked: Asked, size: Size, cut: bool, generated: bool, mesh: Items, rules: Items
) -> Bytes:
    """Of what is kept, after the padding is cut off or before."""
    axes = {str(address): BY_NAME[address.site].axes.split() for address in asked.addresses}
    for name, reducer in zip(asked.names, asked.reducers, strict=True):
        # A generation keeps what is reduced by rows only.
        axes[name] = ["L"] * reducer.every_layer + (["B"] if generated else _left(reducer))
    total = share = 0
    for name, tree in kept_of(asked, size, cut).items():
        for x in jax.tree.leaves(tree):
            names = [LETTERS.get(letter, "tokens") for letter in axes[name]]
            names += ["tokens"] * (len(x.shape) - len(names))
            # Of features (values, ids and a count) the last has an axis less.
            ways = _ways(names[: len(x.shape)], x.shape, mesh, rules, name)
            whole = math.prod(x.shape) * x.dtype.itemsize
            total, share = total + whole, share + whole // ways
    return total, share


def _left(reducer: Reducer) -> list[str]:
    """Axis letters of what it keeps of one layer; of unknown kinds only B is known."""
    letters = reducer.site.axes.split()
    axis = reducer.site.sequence_axis
    match reducer:
        case At(single=False):
            return [*letters[:axis], "P", *letters[axis + 1 :]]
        case At() | Mean():
            return [*letters[:axis], *letters[axis + 1 :]]
        case Norm() | TopK() | Project() | Features():
            return letters[:-1]
    return ["B"]


def _ways(axes, shape, mesh: Items, rules: Items, what: str = "an activation") -> int:
    """Into how many parts an array with these logical axes is divided.

    Raises:
        ShardingError: an axis that the mesh does not divide.
    """
    sizes = dict(mesh)
    spec = partition(axes, shape, sizes, dict(rules), what)
    return math.prod(sizes[axis] for axis in spec if axis is not None)


def _names(asked: Asked) -> str:
    """Layers of one site counted, reducers by name."""
    counts: dict[str, int] = {}
    for address in asked.addresses:
        counts[address.site] = counts.get(address.site, 0) + 1
    named = [f"{site}, {n} layers" if n > 1 else site for site, n in counts.items()]
    return "; ".join([*named, *asked.names])
