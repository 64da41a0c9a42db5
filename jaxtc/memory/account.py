"""The memory of a run, from shapes alone: what is kept, and the widest arrays on the way.

Axis letters: B batch, T tokens, W tokens padded up to a bucket, L layers, N heads, F MLP width, V
vocabulary, M transcoder features.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtc.captures.base import Reducer
from jaxtc.captures.request import Asked
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.sharding.rules import Rules, logical, partition
from jaxtc.tap.context import Context
from jaxtc.tap.sites import BY_NAME, LOGITS, Address, parse


class Arrays(NamedTuple):
    """``count`` arrays alike: logical axes and shape of one, and bytes of one number."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    item: int
    count: int = 1

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.count * self.item * math.prod(self.shape)

    def share(self, mesh: dict[str, int], rules: Rules) -> int:
        """Bytes of one device; raises ShardingError where an axis does not divide."""
        spec = partition(self.axes, self.shape, mesh, rules, self.name)
        return self.total // math.prod(mesh[axis] for axis in spec if axis is not None)


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes of a run's arrays depend on: the model, the weights' dtype, and B, T, W."""

    config: Gemma2Config
    dtype: Any
    batch: int
    length: int
    width: int

    def arrays(
        self, name: str, letters: str, tokens: int, item: int = 4, count: int = 1, features: int = 0
    ) -> Arrays:
        """Arrays with these axis letters, for so many tokens (T or S) and features (M)."""
        own = {"B": self.batch, "T": tokens, "S": tokens, "M": features, "1": 1}
        sizes = self.config.sizes | own
        shape = tuple(sizes[letter] for letter in letters.split())
        return Arrays(name, logical(letters), shape, item, count)

    def site(self, name: str, tokens: int) -> jax.ShapeDtypeStruct:
        """The array of a site for this many tokens."""
        row = BY_NAME[name]
        dtype = jnp.float32 if row.float32 else self.dtype
        return jax.ShapeDtypeStruct(self.arrays(name, row.axes, tokens).shape, dtype)

    def logits(self, which: str | None, tokens: int) -> Arrays:
        """The logits that are returned."""
        return self.arrays("logits", "B T V", {"all": tokens, "last": 1, None: 0}[which])

    def widest(self, features: int, asked: Collection[str]) -> list[Arrays]:
        """A pass's largest intermediates.

        ``features`` is M of the widest transcoder in the pass; ``asked`` are the sites that are
        read or edited, of which some are only made then.
        """
        item = jnp.dtype(self.dtype).itemsize
        found = [
            self.arrays("attention scores", "B N T S", self.width),
            self.arrays("the MLP", "B T F", self.width, item),
            self.arrays("transcoder features", "B T M", self.width, features=features),
        ]
        if "head_out" in asked:
            found.append(self.arrays("heads' outputs", "B T N D", self.width, item))
        return found + [self.logits("all", self.width)] * any(site in LOGITS for site in asked)

    def checked(self, asked: Asked) -> tuple[Reducer, ...]:
        """The reducers for unknown prompts of this size.

        Raises:
            SiteError, InputError, CapacityError: a reducer that does not fit.
        """

        def check(ids, ends):
            return asked.checked(self.config, Prompts(ids, ends, self.length))

        # Traced, so that positions are not looked up in the prompts.
        return jax.eval_shape(check, *self._ids)

    def kept(self, part: Address | Reducer, cut: bool) -> Any:
        """Shapes of what is kept of an address or by a checked reducer: T tokens, or all W."""
        if isinstance(part, Address):
            return self.site(part.site, self.length if cut else self.width)
        site, layer = parse(part.address)

        def reduce(reducer, x, positions, ends):
            def read(name):
                other = self.site(name, self.width)
                return jnp.zeros(other.shape, other.dtype)

            context = Context(BY_NAME[site], layer or 0, positions, ends, read)
            # What is kept of a prompt has one shape for all lengths.
            kept = reducer.kept(x, context, (self.length,) * self.batch)
            if reducer.every_layer:
                stacked = self.config.num_hidden_layers
                kept = jax.tree.map(lambda x: jnp.broadcast_to(x, (stacked, *x.shape)), kept)
            return reducer.cut(kept, self.length) if cut else kept

        return jax.eval_shape(reduce, part, self.site(site, self.width), *self._ids)

    @property
    def _ids(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of ids (or positions) and lengths."""
        shapes = (self.batch, self.width), (self.batch,)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)


@functools.lru_cache(maxsize=64)
def activations(asked: Asked, size: Size, cut: bool, generated: bool) -> list[Arrays]:
    """What captures keep of unknown prompts: of T tokens, or all W; with their logical axes."""
    found = []
    sites = collections.Counter(address.site for address in asked.addresses)
    for site, count in sites.items():
        x = size.kept(Address(site), cut)
        found.append(Arrays(site, logical(BY_NAME[site].axes), x.shape, x.dtype.itemsize, count))
    for name, reducer in zip(asked.names, size.checked(asked), strict=True):
        for x in jax.tree.leaves(size.kept(reducer, cut)):
            # A generation keeps what is reduced by rows only.
            rank = x.ndim - reducer.every_layer
            letters = "B" if generated else _left(reducer, rank)
            axes = ("tokens",) * reducer.every_layer + logical(letters)
            # Of features (values, ids and a count) the last has an axis less.
            axes = (axes + ("tokens",) * x.ndim)[: x.ndim]
            found.append(Arrays(name, axes, x.shape, x.dtype.itemsize))
    return found


def _left(reducer: Reducer, rank: int) -> str:
    """Axis letters of what a reducer keeps of one layer, with this many axes; others are whole."""
    letters, axis = [*reducer.site.letters], reducer.site.sequence_axis
    if reducer.per_token:
        letters.pop()
    elif reducer.keeps_keys:
        # One position or a mean has no such axis.
        letters[axis : axis + 1] = ["P"] * (rank == len(letters))
    else:
        letters = ["B"]
    return " ".join(letters)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays, or their shapes, in a pytree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
