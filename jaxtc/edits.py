"""The edits: what can be done to an activation. Each says when one would use it.

They combine: ``run(..., edits=[...])`` applies them in the order given, each at its own site.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.errors import EditError
from jaxtc.intercept import Context, Edit, register_edit
from jaxtc.sites import parse
from jaxtc.transcoder import Transcoder

__all__ = ["Add", "Detach", "SetTo", "Splice"]


@register_edit()
class Add(Edit):
    """Add ``value`` to the activation: steering, or probing with a small push.

    With ``jax.grad`` over ``value`` (zeros) it also gives the gradient at its site.

    Attributes:
        value: anything that broadcasts to the site, for example (D,).
    """

    value: Any

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        """``x + value``."""
        return x + context.fit(self.value, x, self)


@register_edit()
class SetTo(Edit):
    """Replace the activation by ``value``: patching in what another run had there, or ablating.

    Attributes:
        value: anything that broadcasts to the site; an array captured at the same site fits.
    """

    value: Any

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        """``value``, spread to the shape of ``x``."""
        return jnp.broadcast_to(context.fit(self.value, x, self), x.shape)


@register_edit()
class Detach(Edit):
    """Stop gradients here while keeping the value: to ask what flows *around* a site.

    Detaching ``attn_pattern`` and every ``*_scale`` makes the rest linear, as attribution needs.
    """

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        """``stop_gradient(x)``."""
        return jax.lax.stop_gradient(x)


@register_edit("layer", "reads")
class Splice(Edit):
    """Put a transcoder in place of the MLP: what is lost when only its features speak?

    Reads the transcoder's input site and writes its output site. Where it applies to every token
    the MLP itself is not computed, since nothing needs it; that is why its layer is static.

    Attributes:
        transcoder: a :class:`jaxtc.Transcoder`; its arrays are leaves of this edit.
        layer: defaults to the layer the transcoder was trained on (static).
        site: defaults to the transcoder's output site.
        reads: defaults to the transcoder's input site, as a tuple of one.
    """

    transcoder: Transcoder
    reads: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self):
        given = self.transcoder
        if isinstance(given, Transcoder):
            object.__setattr__(self, "site", self.site or given.output_site)
            reads = (self.reads,) if isinstance(self.reads, str) else self.reads
            reads = tuple(parse(name)[0] for name in reads or (given.input_site,))
            object.__setattr__(self, "reads", reads)
        super().__post_init__()
        if self.layer is None and isinstance(given, Transcoder):
            object.__setattr__(self, "layer", given.layer)
        if not isinstance(self.layer, int):
            raise EditError(
                f"Splice needs one layer as a whole number, got {self.layer!r}; a transcoder "
                "whose file's place names no layer does not know its own: give layer=..."
            )

    def prepared(self) -> "Splice":
        """With a transcoder that names no source, so that another of its shape runs the same."""
        return dataclasses.replace(self, transcoder=self.transcoder.nameless())

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        """The transcoder's output on its input site, in the dtype of ``x``."""
        source = context.read(self.reads[0])
        if source.shape[-1] != self.transcoder.d_in or x.shape[-1] != self.transcoder.d_out:
            raise EditError(
                f"{self}: the transcoder reads D={self.transcoder.d_in} and writes "
                f"D={self.transcoder.d_out}, but this model has {source.shape[-1]} at "
                f"{self.reads[0]} and {x.shape[-1]} at {self.site}. It belongs to another model."
            )
        return self.transcoder(source).astype(x.dtype)
