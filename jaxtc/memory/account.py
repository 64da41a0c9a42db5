"""The memory of a run, from shapes alone: what is kept, and the widest arrays on the way.

Axis letters: B batch, T tokens, W tokens padded up to a bucket, L layers, N heads, F MLP width, V
vocabulary, M transcoder features.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.captures.base import Reducer
from jaxtc.captures.request import Asked
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.tap.context import Context
from jaxtc.tap.sites import BY_NAME, Address, parse


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes of a run's arrays depend on: the model, the weights' dtype, and B, T, W."""

    config: Gemma2Config
    dtype: Any
    batch: int
    length: int
    width: int

    def array(self, site: str, tokens: int) -> jax.ShapeDtypeStruct:
        """The array of a site for this many tokens."""
        row = BY_NAME[site]
        shape = row.shape({**self.config.sizes, "B": self.batch, "T": tokens, "S": tokens})
        return jax.ShapeDtypeStruct(shape, jnp.float32 if row.float32 else self.dtype)

    def logits(self, which: str | None, tokens: int) -> int:
        """Bytes of the logits that are returned."""
        rows = {"all": tokens, "last": 1, None: 0}[which]
        return self.batch * rows * self.config.vocab_size * 4

    def widest(self, features: int = 0) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Bytes and logical axes of a pass's largest intermediates, by what they hold.

        ``features`` is M of the widest transcoder in the pass.
        """
        heads, hidden = (self.array(site, self.width) for site in ("attn_scores", "mlp_act"))
        return {
            "attention scores": (bytes_of(heads), ("batch", "heads")),
            "the MLP": (bytes_of(hidden), ("batch", "mlp")),
            "transcoder features": (self.batch * self.width * features * 4, ("batch", "features")),
            "logits": (self.logits("all", self.width), ("batch", "vocab")),
        }

    def checked(self, asked: Asked) -> dict[str, Address | Reducer]:
        """What is kept, by its key in the result, for unknown prompts of this size.

        Raises:
            SiteError, InputError, CapacityError: a reducer that does not fit.
        """

        def check(ids, ends):
            return asked.checked(self.config, Prompts(ids, ends, self.length))

        # Traced, so that positions are not looked up in the prompts.
        return parts_of(asked, jax.eval_shape(check, *self._ids))

    def kept(self, part: Address | Reducer, cut: bool) -> Any:
        """Shapes of what is kept of an address or by a checked reducer: T tokens, or all W."""
        if isinstance(part, Address):
            return self.array(part.site, self.length if cut else self.width)
        site, layer = parse(part.address)

        def reduce(reducer, x, positions, ends):
            def read(name):
                other = self.array(name, self.width)
                return jnp.zeros(other.shape, other.dtype)

            context = Context(BY_NAME[site], layer or 0, positions, ends, read)
            kept = reducer.reduce(x, context)
            if reducer.every_layer:
                stacked = self.config.num_hidden_layers
                kept = jax.tree.map(lambda x: jnp.broadcast_to(x, (stacked, *x.shape)), kept)
            return reducer.cut(kept, self.length) if cut else kept

        return jax.eval_shape(reduce, part, self.array(site, self.width), *self._ids)

    @property
    def _ids(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of ids (or positions) and lengths."""
        shapes = (self.batch, self.width), (self.batch,)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)


def parts_of(asked: Asked, reducers: Sequence[Reducer]) -> dict[str, Address | Reducer]:
    """What is kept, by its key in the result; ``reducers`` as a program takes them."""
    whole = {str(address): address for address in asked.addresses}
    return whole | dict(zip(asked.names, reducers, strict=True))


@functools.lru_cache(maxsize=64)
def kept_of(asked: Asked, size: Size, cut: bool) -> dict[str, Any]:
    """Shapes of what captures keep of unknown prompts, by key; see :meth:`Size.kept`."""
    return {name: size.kept(part, cut) for name, part in size.checked(asked).items()}


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays, or their shapes, in a pytree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
