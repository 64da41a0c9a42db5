"""The edits: what can be done to an activation. Each says when one would use it.

They combine: ``run(..., edits=[...])`` applies them in the order given, each at its own site. The
fields that all share say where (layer, position, row, head, ...), see :class:`jaxtc.Edit`. Edits of
where information flows are in :mod:`jaxtc.edits.flow`, those that need a transcoder in
:mod:`jaxtc.edits.features`.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.captures.activations import Activations
from jaxtc.edits.base import Edit, own_shape, register_edit
from jaxtc.errors import EditError
from jaxtc.interchange import plain
from jaxtc.tap.columns import from_first_column
from jaxtc.tap.context import Context, PerLayer, own
from jaxtc.tap.positions import is_traced
from jaxtc.tap.sites import BY_NAME, Address
from jaxtc.tap.tap import along


@register_edit()
class Add(Edit):
    """Add ``value`` to the activation: steering, or probing with a small push.

    With ``jax.grad`` over ``value`` (zeros) it also gives the gradient at its site.

    Attributes:
        value: anything that broadcasts to the site, for example (D,).
    """

    value: Any
    values = ("value",)

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        return x + context.fit(self.value, x)


@register_edit()
class SetTo(Edit):
    """Replace the activation by ``value``: patching in what another run had there, or ablating.

    Attributes:
        value: anything that broadcasts to the site; an array captured at the same site fits.

    At ``attn_scores`` what a query may not see (later tokens, those outside the window) stays
    masked, whatever is set, unless ``key=`` names it: ``SetTo(5.0, site="attn_scores", position=2,
    key=4)`` lets token 2 see token 4. Padding is never seen. To cut edges use
    :class:`jaxtc.KnockOut`.
    """

    value: Any
    values = ("value",)

    @property
    def unmasks(self) -> bool:
        return self.key is not None

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        return context.fit(self.value, x)


@register_edit()
class Zero(Edit):
    """Replace the activation by zeros: does the model need this at all?

    Zero is far from what the later layers are used to; :class:`MeanAblate` takes away only what is
    particular to this text.
    """

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        return jnp.zeros_like(x)


@register_edit()
class Scale(Edit):
    """Multiply the activation: turn a component up or down, or flip its sign.

    Attributes:
        factor: a number, or anything that broadcasts to the site.
    """

    factor: Any
    values = ("factor",)

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * context.fit(self.factor, wide)).astype(x.dtype)


@register_edit()
class Interpolate(Edit):
    """Go part of the way from one value to another: how much of a patch is enough?

    Integrated gradients take the gradient at several weights between a baseline and the activation.

    Attributes:
        end: the value at weight 1; broadcasts to the site.
        weight: 0 is the start, 1 the end; beyond them extrapolates.
        start: the value at weight 0; what the model computed, by default.
    """

    end: Any
    weight: Any
    start: Any = None
    values = ("end", "weight", "start")

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        wide = x.astype(jnp.float32)
        start = wide if self.start is None else context.fit(self.start, wide)
        moved = context.fit(self.end, wide) - start
        return (start + context.fit(self.weight, wide) * moved).astype(x.dtype)


@register_edit("over")
class MeanAblate(Edit):
    """Replace the activation by a mean: take away what is particular here, keep what is usual.

    Attributes:
        value: a mean over a dataset (what one should report); broadcasts to the site. By default
            the mean over this run itself, as ``over`` says.
        over: "batch": all tokens of all prompts; "prompt": the tokens of the same prompt; "rows":
            the same position in all prompts (static). Padding does not count, <bos> does.
    """

    value: Any = None
    over: Literal["batch", "prompt", "rows"] = "batch"
    values = ("value",)

    def check(self, sizes):
        if self.over not in ("batch", "prompt", "rows"):
            raise EditError(f"{self}: over is {self.over!r}, expected 'batch', 'prompt' or 'rows'.")
        if self.value is None and self.site == "attn_scores":
            raise EditError(
                f"{self}: scores are masked, so they have no mean; ablate attn_pattern instead, or "
                "give a value."
            )

    @property
    def needs_prompt(self) -> bool:
        return self.value is None

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        if self.value is not None:
            return context.fit(self.value, x)
        tokens = context.site.sequence_axis
        real = along(x, context.real, 0, tokens)
        axes = {"batch": (0, tokens), "prompt": (tokens,), "rows": (0,)}[self.over]
        mean = jnp.mean(x.astype(jnp.float32), axes, keepdims=True, where=real)
        # A position that no prompt has keeps its padding.
        mean = jnp.where(jnp.isnan(mean) & ~real.any(axes, keepdims=True), 0, mean)
        return jnp.broadcast_to(mean, x.shape).astype(x.dtype)


@register_edit()
class ProjectOut(Edit):
    """Remove a direction, or a subspace: can the model still do it without this information?

    Attributes:
        direction: (D,), or (K, D) for the span of K linearly independent directions, where D is the
            size of the site's last axis. Their lengths do not matter.
    """

    direction: Any
    amounts = ("direction",)

    def check(self, sizes):
        shape = own_shape(self, self.direction, sizes["L"])
        size = BY_NAME[self.site].shape(sizes)[-1]
        if BY_NAME[self.site].kind == "pairs":
            raise EditError(f"{self}: {self.site}'s last axis runs over tokens, not directions.")
        if len(shape) not in (1, 2) or shape[-1] != size:
            raise EditError(
                f"{self} was given directions of shape {shape}, expected ({size},) or (K, {size}): "
                f"{self.site}'s last axis."
            )
        if is_traced(self.direction):
            return
        (known,) = jax.tree.leaves(self.direction)
        known = np.asarray(known, np.float64).reshape(-1, *(1, *shape)[-2:])
        known = known[np.isfinite(known).all((1, 2))]
        norms, count = np.linalg.norm(known, axis=-1, keepdims=True), known.shape[1]
        rank = np.linalg.matrix_rank(known / np.where(norms > 0, norms, 1)).min(initial=count)
        if rank < count:
            raise EditError(
                f"{self}: the {count} directions span only {rank} dimensions (a direction "
                "of zeros spans none); give linearly independent ones."
            )

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        span = jnp.atleast_2d(jnp.asarray(own(self.direction, context.layer), jnp.float32))
        span = span / jnp.linalg.norm(span, axis=-1, keepdims=True)
        wide = x.astype(jnp.float32)
        dots = jnp.einsum("...d,kd->...k", wide, span, precision="highest")
        gram = jnp.einsum("kd,jd->kj", span, span, precision="highest")
        # The right sides as one matrix: (K, tokens).
        flat = dots.reshape(-1, len(span)).T
        parts = jnp.linalg.solve(gram, flat).T.reshape(dots.shape)
        inside = jnp.einsum("...k,kd->...d", parts, span, precision="highest")
        return (wide - inside).astype(x.dtype)


@register_edit()
class Noise(Edit):
    """Add Gaussian noise: corrupt a token and see what the model can still recover.

    Causal tracing (Meng et al. 2022, arXiv 2202.05262, §2) adds it to the embeddings of a prompt's
    subject with three times their standard deviation. A token's noise depends on the seed, its
    layer, row and position only: not on other prompts, padding, or whether it was generated.

    Attributes:
        seed: an int or a ``jax.random.key``.
        scale: standard deviation.
    """

    seed: Any
    scale: Any = 1.0
    values = ("scale",)

    def check(self, sizes):
        kind = getattr(self.seed, "dtype", np.dtype(object))
        fine = jnp.issubdtype(kind, jax.dtypes.prng_key) or jnp.issubdtype(kind, jnp.integer)
        if not fine or np.ndim(self.seed):
            raise EditError(
                f"{self}: seed is a whole number or a jax.random.key(...), got {self.seed!r}."
            )

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        key = jnp.asarray(self.seed)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key(key)
        key = jax.random.fold_in(key, 0 if context.layer is None else context.layer + 1)
        axis = context.site.sequence_axis
        shape = jnp.moveaxis(x, axis, 1).shape[2:]

        def draw(row, position):
            token = jax.random.fold_in(jax.random.fold_in(key, row), position)
            if context.site.kind != "pairs":
                return jax.random.normal(token, shape, jnp.float32)
            # How many keys there are depends on the padding, so each has a draw of its own.
            edge = lambda s: jax.random.normal(jax.random.fold_in(token, s), shape[:-1])  # noqa: E731
            return jax.vmap(edge, out_axes=-1)(jnp.arange(shape[-1]))

        noise = jax.vmap(jax.vmap(draw, (None, 0)))(jnp.arange(len(x)), context.positions)
        wide = x.astype(jnp.float32)
        noise = context.fit(self.scale, wide) * jnp.moveaxis(noise, 1, axis)
        return (wide + noise).astype(x.dtype)


@register_edit()
class Detach(Edit):
    """Stop gradients here while keeping the value: to ask what flows *around* a site.

    Detaching ``attn_pattern`` and every ``*_scale`` makes the rest linear, as attribution needs.
    """

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        return jax.lax.stop_gradient(x)


@register_edit("laid")
class Freeze(Edit):
    """Hold a site at what a stored run had there: to ask what flows through the others.

    Freezing ``attn_pattern`` to the clean run's while patching the residual stream shows what the
    patch does by other ways than by changing where heads look. Gradients stop here.

    Attributes:
        activations: ``result.activations`` of a run that captured the site; each layer gets its
            own. Also one array for the site, or a :class:`jaxtc.PerLayer`. Those of a result are
            held by each prompt's own tokens, however the two runs' prompts were padded.
        laid: whether they begin with each prompt's first token; known from a result (static).
    """

    activations: Any
    laid: bool = dataclasses.field(default=False, kw_only=True, repr=False)
    values = ("activations",)

    def __post_init__(self):
        super().__post_init__()
        stored = self.activations
        if not isinstance(stored, Activations):
            return
        per_layer = BY_NAME[self.site].per_layer
        single = per_layer and isinstance(self.layer, int | np.integer)
        try:
            value = plain(stored[Address(self.site, self.layer if single else None)])
        except KeyError as error:
            raise EditError(f"{self}: the stored run lacks this site: {error.args[0]}.") from None
        rows = int(per_layer and not single)
        for axis in (i for i, letter in enumerate(BY_NAME[self.site].letters) if letter in "TS"):
            value = from_first_column(value, stored.starts, axis + rows, rows)
        object.__setattr__(self, "laid", True)
        if per_layer and not single:
            if value.shape[0] < stored.layers:
                raise EditError(
                    f"{self}: the stored run captured {self.site!r} at {value.shape[0]} of "
                    f"{stored.layers} layers. Capture it at all, or freeze one layer: layer=..."
                )
            value = PerLayer(value)
        object.__setattr__(self, "activations", value)

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        return jax.lax.stop_gradient(context.fit(self.activations, x))


@register_edit()
class Apply(Edit):
    """Any change of your own: ``Apply(function, site=...)`` puts ``function(x)`` there.

    Attributes:
        function: a callable that takes the site's array and gives one of the same shape and dtype.
            Where it is a pytree (``jax.tree_util.Partial``, a Flax or Equinox module) its arrays
            are data; a plain function is part of the compile key: define it once, outside loops.
            The array has padding behind each prompt's tokens, up to a bucket of lengths: a function
            that mixes tokens (a mean over T, say) must not take it for them. To tell it apart, to
            know positions or to read other sites, subclass :class:`jaxtc.Edit` in its place.
    """

    function: Any

    def __post_init__(self):
        super().__post_init__()
        if callable(self.function) and jax.tree_util.all_leaves([self.function]):
            object.__setattr__(self, "function", jax.tree_util.Partial(self.function))

    def check(self, sizes):
        if not callable(self.function):
            raise EditError(f"{self}: expected a function, got {type(self.function).__name__}.")

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        return self.function(x)
