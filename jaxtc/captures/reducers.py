"""What to keep of a captured site in place of all of it: each says when one would use it.

A reducer is given to ``run`` where an address would stand, ``capture=[At("resid_post", -1)]``, and
runs inside the compiled program: what it drops is never stored, so memory goes with what is kept.
What those of each token keep at padding (``result.mask`` is false there) each of them says.
``result.activations[str(reducer)]`` holds the outcome, with a leading axis L when its address names
every layer. Axis letters: ... the site's other axes, B batch, T tokens, S keys, L layers, P
positions, K directions, C capacity.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.captures.base import Reducer, register_reducer
from jaxtc.errors import InputError, SiteError
from jaxtc.helpers import pytree, whole_number
from jaxtc.sharding.placement import top_k
from jaxtc.sharding.rules import logical
from jaxtc.tap.context import Context
from jaxtc.tap.positions import Mask, Places, is_traced
from jaxtc.tap.sites import BY_NAME, Address
from jaxtc.tap.tap import along
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder
from jaxtc.transcoders.encoder import Encoder, SparseFeatures
from jaxtc.transcoders.transcoder import nameless

__all__ = [
    "At", "Features", "Mean", "Norm", "Project", "Reducer", "Top", "TopK", "register_reducer",
]  # fmt: skip


@register_reducer("single")
class At(Reducer):
    """Some tokens only, the last by default: where a prompt's answer is read off, or its subject.

    Attributes:
        position: an int (negative from each prompt's own end), ints (P,), ints (B, P), a range, or
            a :class:`jaxtc.Token`.
        single: whether one position was named by itself, so that its axis is dropped; known from
            ``position`` (static).

    Keeps the site's array with P in the place of T (of S, at ``k`` and ``v``), in the site's dtype:
    (B, P, D) of ``resid_post``, (B, D) for a single int; NaN where a position that could not be
    checked before (a traced one) is outside its prompt.

    Raises:
        InputError: a spelling that does not name a fixed number of positions.
    """

    position: Any = -1
    single: bool | None = dataclasses.field(default=None, kw_only=True, repr=False)

    keeps_keys = padded = True

    def __post_init__(self):
        super().__post_init__()
        if self.single is None:
            object.__setattr__(self, "single", np.ndim(self.position) == 0)

    def checked(self, config, prompts):
        checked = super().checked(config, prompts)
        if not isinstance(checked.position, Places):
            raise InputError(
                f"{self} keeps a fixed number of positions, which {self.position!r} does not name: "
                "give an int, ints, range(start, stop) or a Token. Mean takes slices and masks; "
                "for every token, capture the address itself."
            )
        return checked

    def reduce(self, x: jax.Array, context: Context) -> jax.Array:
        axis, at = context.site.sequence_axis, jnp.asarray(self.position.at)
        hits = context.positions[:, None, :] == at[:, :, None]  # (B, P, T), fused away
        found = along(x, hits.any(-1) & (at < context.lengths[:, None]), 0, axis)
        kept = jnp.take_along_axis(x, along(x, jnp.argmax(hits, -1), 0, axis), axis=axis)
        kept = jnp.where(found, kept, jnp.asarray(jnp.nan, x.dtype))
        return kept.squeeze(axis) if self.single else kept


@register_reducer()
class Mean(Reducer):
    """The mean over a prompt's real tokens: a prompt's summary, or the baseline of an ablation.

    Attributes:
        position: which tokens, spelled as in :class:`jaxtc.Edit`; all by default.

    Keeps the site's array without its axis T (S, at ``k`` and ``v``), summed in float32 and kept in
    it: (B, D) of ``resid_post``. Padding never counts.

    Raises:
        InputError: a prompt of which no token is selected.
    """

    position: Any = None

    keeps_keys = sums = padded = True

    def checked(self, config, prompts):
        checked = super().checked(config, prompts)
        if isinstance(checked.position, Mask) and not is_traced(checked.position):
            empty = np.flatnonzero(~checked.position.on.any(-1))
            if empty.size:
                raise InputError(
                    f"{self}: the mask selects no token of prompt {empty[0]}, whose mean "
                    "would be NaN. Leave that prompt out of the batch."
                )
        return checked

    def reduce(self, x: jax.Array, context: Context) -> jax.Array:
        axis, here = context.site.sequence_axis, context.real
        if self.position is not None:
            here &= self.position.selects(context.positions)
        here = along(x, here, 0, axis)
        # Padding may be NaN; the mask keeps it out.
        return jnp.mean(x.astype(jnp.float32), axis, where=here)


@register_reducer()
class Norm(Reducer):
    """The L2 norm over the last axis: how large each token's vector is, as one number.

    Keeps the site's array without its last axis, float32: (B, T) of ``resid_post``, (B, T, N) of
    ``q``; 0 at padding. Its gradient at a vector of zeros is 0.
    """

    per_token = sums = True

    def reduce(self, x: jax.Array, context: Context) -> jax.Array:
        square = jnp.square(x.astype(jnp.float32)).sum(-1)
        # The square root has no gradient at 0.
        return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


@pytree
@dataclasses.dataclass(frozen=True)
class Top:
    """What :class:`TopK` keeps.

    Attributes:
        values: (..., k), largest first, in the site's dtype.
        ids: (..., k) int32, the place of each along the last axis: token ids of ``logits``, neurons
            of ``mlp_act``, key positions of ``attn_pattern``.
    """

    values: jax.Array
    ids: jax.Array


@register_reducer("k")
class TopK(Reducer):
    """The largest entries of the last axis: likely next tokens, strongest neurons, most-read keys.

    Attributes:
        k: how many, from 1 to the length of the axis (static); InputError for others.

    Keeps a :class:`Top` with the site's leading axes: ``TopK("logits", 5)`` has values and ids
    (B, T, 5). At padding values are 0 and ids -1, which is nobody's.
    """

    k: int

    per_token = True

    def __post_init__(self):
        super().__post_init__()
        whole_number(f"{self}: k", self.k, 1)

    def checked(self, config, prompts):
        size = self.last_axis(config, prompts)
        if self.k > size:
            raise InputError(
                f"{self}: k is {self.k}, but the last axis of {self.site.name} "
                f"[{self.site.axes}] has {size} entries here."
            )
        return super().checked(config, prompts)

    def moved(self, kept, starts):
        kept = super().moved(kept, starts)
        if self.site.kind != "pairs":
            return kept
        # The ids are columns too, but for those of padding.
        rows = int(self.every_layer)
        columns = kept.ids.shape[self.site.sequence_axis + rows]
        starts = along(kept.ids, jnp.asarray(starts), rows)
        ids = jnp.where(kept.ids < 0, kept.ids, (kept.ids + starts) % columns)
        return dataclasses.replace(kept, ids=ids)

    def reduce(self, x: jax.Array, context: Context) -> Top:
        values, ids = top_k(x, self.k, context.placement, logical(self.site.axes))
        return Top(values, ids.astype(jnp.int32))

    def blank(self, kept: Top) -> Top:
        return Top(jnp.zeros((), kept.values.dtype), jnp.full((), -1, kept.ids.dtype))


@register_reducer()
class Project(Reducer):
    """Dot products with directions: probes, steering vectors or decoder rows read at every token.

    Attributes:
        directions: (K, D) or (D,), with D the length of the site's last axis; taken to float32.
            Data: other directions run the same program, and gradients flow to them.

    Keeps (..., K), or (...) for a single direction, float32, summed at full precision: (B, T, K) of
    ``resid_post``; 0 at padding. Directions are not normalised; InputError for those of another
    width.
    """

    directions: Any

    per_token = sums = True

    def __post_init__(self):
        super().__post_init__()
        if self.site.axes.endswith("S"):
            raise SiteError(
                f"{self}: the last axis of {self.site.name} [{self.site.axes}] runs over keys and "
                "changes with the prompt, so no direction fits it; TopK or At can reduce it."
            )

    def checked(self, config, prompts):
        given = self.directions
        given = given if isinstance(given, jax.Array) else np.asarray(given)
        size = self.last_axis(config, prompts)
        real = jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)
        if not real or given.ndim not in (1, 2) or given.shape[-1] != size or not given.size:
            raise InputError(
                f"{self}: directions are {given.dtype}{list(given.shape)}, expected real numbers "
                f"(K, {size}) or ({size},): the last axis of {self.site.name} [{self.site.axes}] "
                f"has {size} entries."
            )
        checked = super().checked(config, prompts)
        return dataclasses.replace(checked, directions=given.astype(np.float32))

    def reduce(self, x: jax.Array, context: Context) -> jax.Array:
        directions = jnp.asarray(self.directions, jnp.float32)
        return jnp.matmul(x.astype(jnp.float32), directions.T, precision="highest")


@register_reducer("capacity")
class Features(Reducer):
    """A transcoder's active features, sparse: what a layer says, without its D wide activations.

    ``Features(transcoder=t, capacity=256)`` reads the transcoder's own input site and layer. For
    features of several layers, give one of these for each.

    Attributes:
        address: by default where the transcoder was trained to read.
        transcoder: a :class:`jaxtc.Transcoder`, or one of the layers of a
            :class:`jaxtc.CrossLayerTranscoder`; its arrays are data.
        capacity: C, room for active features of one token (static). <bos> often has the most.

    Keeps a :class:`jaxtc.transcoders.encoder.SparseFeatures`: values and ids (B, T, C), count
    (B, T). A token with more than C active features has NaN values, and ``count`` says how many.
    Padding has none: values and count are 0, as of a token without an active feature.

    Raises:
        InputError: no transcoder, or one of another width.
        CapacityError: a capacity below 1 or above the number of features.
    """

    address: str = ""
    transcoder: Encoder = dataclasses.field(kw_only=True)
    capacity: int = dataclasses.field(kw_only=True)

    per_token = True

    def __post_init__(self):
        given = self.transcoder
        if not self.address and isinstance(given, Encoder):
            once = not BY_NAME[given.input_site].per_layer
            if given.layer is None and not once:
                raise InputError(
                    "This transcoder does not know its layer; name one: "
                    f"Features('layers.20.{given.input_site}', transcoder=..., capacity=...)."
                )
            layer = None if once else given.layer
            object.__setattr__(self, "address", str(Address(given.input_site, layer)))
        super().__post_init__()

    def checked(self, config, prompts):
        given, size = self.transcoder, self.site.width(config.sizes)
        if isinstance(given, CrossLayerTranscoder):
            raise InputError(
                f"{self}: a cross-layer transcoder has features at each layer; give those of one, "
                "transcoder.layers[20], and one of these for each layer."
            )
        if not isinstance(given, Encoder):
            raise InputError(f"{self}: transcoder is a {type(given).__name__}, not a Transcoder.")
        if given.d_in != size:
            raise InputError(
                f"{self}: the transcoder reads D={given.d_in}, but {self.site.name} "
                f"[{self.site.axes}] has {size or 'no'} entries for a token. It belongs to another "
                "model or another site."
            )
        return nameless(super().checked(config, prompts))

    def reduce(self, x: jax.Array, context: Context) -> SparseFeatures:
        x = self.site.join(x)
        return self.transcoder.encode_sparse(x, self.capacity, placement=context.placement)

    def blank(self, kept: SparseFeatures) -> SparseFeatures:
        first = jnp.arange(self.capacity, dtype=kept.ids.dtype)  # as the largest of all zeros
        first = first.reshape((1,) * (kept.ids.ndim - 1) + first.shape)
        return SparseFeatures(jnp.zeros((), kept.values.dtype), first, jnp.zeros((), jnp.int32))
