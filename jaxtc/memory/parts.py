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
from jaxtc.memory.needs import Size, kept_by
from jaxtc.model.config import FULL, Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket
from jaxtc.sharding.rules import CACHE, LETTERS, partition, variables
from jaxtc.tap.sites import BY_NAME, LOGITS
from jaxtc.transcoders.transcoder import Transcoder

# Arrays as large as the widest one of a layer that are there at once. So XLA's memory_analysis()
# has it for a forward pass: scores, their exponentials, the pattern; or gate, up, their product.
_AT_ONCE = 3
# The same for the features of a transcoder: before and after the threshold.
_FEATURES_AT_ONCE = 2
# And for the logits of the tokens to be drawn.
_DRAWING = 6

# A mapping as a hashable tuple of its items.
Items = tuple[tuple[str, Any], ...]


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
    """What is planned, with every default filled in; as the arguments of :func:`jaxtc.plan`.

    Attributes:
        config: of the model.
        mesh: devices along each mesh axis.
        rules: logical axis to mesh axis.
        dtype: of the weights.
        batch: B.
        length: T.
        new_tokens: 0 for a run, more for a generation.
        asked: the captures.
        logits: "all", "last" or None.
        transcoders: layers that have one.
        features: M.
        transcoder_dtype: of their parameters.
        skip: whether they have a skip connection.
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
        over = self.mesh, self.rules
        weights = _weights(self.config, np.dtype(self.dtype).itemsize, *over)
        logits = self.size.logits(self.logits, self.length)
        rows = {"all": f"{self.length:,} tokens", "last": "last token", None: ""}[self.logits]
        kept = _activations(self.asked, self.size, bool(self.new_tokens), *over)
        found = (
            Part(
                "weights", *weights, f"{count_parameters(self.config):,} parameters in {self.dtype}"
            ),
            self._transcoders(),
            self._cache(),
            Part("activations", *kept[0], _names(self.asked)),
            Part("logits", logits, self._split(logits, "batch", "vocab"), f"{rows} in float32"),
            self._workspace(kept),
        )
        return tuple(part for part in found if part.total)

    @property
    def needed(self) -> int:
        """Bytes that each device must have."""
        return sum(part.per_device for part in self.parts())

    def _ways(self, *axes: str) -> int:
        """Into how many parts an array with these logical axes is divided."""
        sizes = {**{LETTERS[k]: n for k, n in self.config.sizes.items()}, "batch": self.batch}
        sizes |= {"features": self.features}
        shape = tuple(sizes[axis] for axis in axes)
        spec = partition(axes, shape, dict(self.mesh), dict(self.rules), "an activation")
        return _ways(spec, self.mesh)

    def _split(self, total: int, *axes: str) -> int:
        return total // self._ways(*axes) if total else 0

    def _transcoders(self) -> Part:
        count, item = len(self.transcoders), np.dtype(self.transcoder_dtype).itemsize
        sizes = self.config.hidden_size, self.features, self.skip
        one = _transcoder(*sizes, item, self.mesh, self.rules)
        layers = "layer" if count == 1 else "layers"
        detail = f"{count} {layers} of {self.features:,} features in {self.transcoder_dtype}"
        return Part("transcoders", *(count * bytes_ for bytes_ in one), detail)

    def _cache(self) -> Part:
        config = self.config
        shape = (self.batch, self.slots, config.num_key_value_heads, config.head_dim)
        spec = partition(CACHE, shape, dict(self.mesh), dict(self.rules), "the cache")
        arrays = 2 * config.num_hidden_layers * bool(self.new_tokens)
        total = arrays * math.prod(shape) * np.dtype(self.dtype).itemsize
        detail = f"{self.batch} × {self.slots:,} tokens in {self.dtype}"
        return Part("kv cache", total, total // _ways(spec, self.mesh), detail)

    def _workspace(self, kept: tuple) -> Part:
        """What the program holds besides, about: see :data:`_AT_ONCE`."""
        config, size = self.config, self.size
        B, W = self.batch, self.width
        N, F, D, V = (config.sizes[letter] for letter in "NFDV")
        widest = [
            ("attention scores", _AT_ONCE * B * N * W * W * 4, ("batch", "heads")),
            ("the MLP", _AT_ONCE * B * W * F * 4, ("batch", "mlp")),
        ]
        if self.transcoders:
            features = _FEATURES_AT_ONCE * B * W * self.features * 4
            widest.append(("transcoder features", features, ("batch", "features")))
        if any(reducer.site.name in LOGITS for reducer in self.asked.reducers):
            widest.append(("logits", 2 * B * W * V * 4, ("batch", "vocab")))
        if self.new_tokens:
            widest.append(("drawing a token", _DRAWING * B * V * 4, ("batch", "vocab")))
        shares = [(self._split(total, *axes), total, name) for name, total, axes in widest]
        share, total, name = max(shares)
        stream = 2 * B * W * D * 4
        total, share = total + stream, share + self._split(stream, "batch")
        if self.new_tokens:
            # The prompts' own cache, before it gets room for more.
            prompt = self._cache()
            total += prompt.total * W // self.slots
            share += prompt.per_device * W // self.slots
        if size.length < size.width:
            # What is given back is padded at first; then there are both, but nothing else.
            more = size.logits(self.logits, W) if self.logits == "all" else 0
            beside = kept[1][0] + more, kept[1][1] + self._split(more, "batch", "vocab")
            less = size.logits(self.logits, self.length) if self.logits == "all" else 0
            cut = kept[0][0] + less, kept[0][1] + self._split(less, "batch", "vocab")
            total = max(total + beside[0] - cut[0], beside[0])
            share = max(share + beside[1] - cut[1], beside[1])
        return Part("workspace", total, share, f"estimated; most of it {name}")


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


@functools.lru_cache(maxsize=512)
def _weights(config: Gemma2Config, item: int, mesh: Items, rules: Items) -> tuple[int, int]:
    return _divided(_parameters(config), item, mesh, rules)


@functools.lru_cache(maxsize=16)
def _transcoder_parameters(
    d: int, features: int, skip: bool
) -> tuple[tuple[str, tuple, tuple, int], ...]:
    found = variables(Transcoder.abstract(d, features, skip=skip))
    return tuple((name, param.logical_axes, param.shape, 1) for name, param in found)


@functools.lru_cache(maxsize=512)
def _transcoder(
    d: int, features: int, skip: bool, item: int, mesh: Items, rules: Items
) -> tuple[int, int]:
    return _divided(_transcoder_parameters(d, features, skip), item, mesh, rules)


def _divided(parameters, item: int, mesh: Items, rules: Items) -> tuple[int, int]:
    """Bytes of parameters: (all, on each device)."""
    total = share = 0
    for name, axes, shape, times in parameters:
        spec = partition(axes, shape, dict(mesh), dict(rules), name)
        whole = times * item * math.prod(shape)
        total, share = total + whole, share + whole // _ways(spec, mesh)
    return total, share


@functools.lru_cache(maxsize=512)
def _activations(asked: Asked, size: Size, generated: bool, mesh: Items, rules: Items) -> tuple:
    """((all, on each device) of what is kept, the same before padding is cut off)."""
    axes = {str(address): BY_NAME[address.site].axes.split() for address in asked.addresses}
    for name, reducer in zip(asked.names, asked.reducers, strict=True):
        # A generation keeps what is reduced by rows only.
        axes[name] = ["L"] * reducer.every_layer + (["B"] if generated else _left(reducer))
    found = []
    for kept in _kept(asked, size):
        total = share = 0
        for name, tree in kept.items():
            for x in jax.tree.leaves(tree):
                names = [LETTERS.get(letter, "tokens") for letter in axes[name]]
                names += ["tokens"] * (len(x.shape) - len(names))
                # Of features (values, ids and a count) the last has an axis less.
                spec = partition(names[: len(x.shape)], x.shape, dict(mesh), dict(rules), name)
                whole = math.prod(x.shape) * x.dtype.itemsize
                total, share = total + whole, share + whole // _ways(spec, mesh)
        found.append((total, share))
    return tuple(found)


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


@functools.lru_cache(maxsize=64)
def _kept(asked: Asked, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    return kept_by(asked, size)


def _ways(spec: Sequence[str | None], mesh: Items) -> int:
    sizes = dict(mesh)
    return math.prod(sizes[axis] for axis in spec if axis is not None)


def _names(asked: Asked) -> str:
    """Layers of one site counted, reducers by name."""
    counts: dict[str, int] = {}
    for address in asked.addresses:
        counts[address.site] = counts.get(address.site, 0) + 1
    named = [f"{site}, {n} layers" if n > 1 else site for site, n in counts.items()]
    return "; ".join([*named, *asked.names])
