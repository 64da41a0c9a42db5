"""Edits of where information flows: between prompts, between tokens, along attention.

Axis letters: B batch, N heads, T query position, S key position.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits.base import TARGETS, Edit, Index, Tokens, register_edit
from jaxtc.errors import EditError
from jaxtc.tap.context import Context
from jaxtc.tap.positions import FOREVER, Places


@register_edit()
class Copy(Edit):
    """Copy from another batch row or another position: clean and corrupted prompts in one pass.

    ``Copy(from_row=0, row=1, site="resid_post", layer=5, position=-1)`` patches the clean prompt's
    residual stream (row 0) into the corrupted one's (row 1).

    Attributes:
        from_row: batch row (or one for each row, (B,)) to copy from; each row itself, by default.
        from_position: position to copy from, spelled as ``position``, counted in the row that is
            copied from; as many as ``position`` names, or one. By default the same position; where
            ``position`` counts from the end, counted from the end of the other row.

    Where rows or lengths are traced, a token whose source does not exist becomes NaN.
    """

    from_row: Any = None
    from_position: Any = None

    targets = TARGETS | {
        "from_row": Index("B", back=False),
        "from_position": Tokens(rows="from_row"),
    }

    def check(self, sizes):
        if self.from_row is None and self.from_position is None:
            raise EditError(f"{self} copies nothing: give from_row, from_position or both.")
        if np.shape(self.from_row) not in ((), (sizes["B"],)):
            raise EditError(
                f"{self}: from_row is one row or one for each of the {sizes['B']} rows, got "
                f"{self.from_row!r}."
            )
        if self.from_position is not None:
            if not isinstance(self.from_position, Places):
                raise EditError(f"{self}: from_position must be whole numbers or a jaxtc.Token.")
            pairs = self.position.at.shape[1] if isinstance(self.position, Places) else 1
            count = self.from_position.at.shape[1]
            if count not in (1, pairs):
                raise EditError(
                    f"{self}: from_position names {count} positions, expected 1 or {pairs}, as "
                    "many as `position`."
                )

    def fits(self, lengths):
        """Whether the row that each is copied from has the same tokens."""
        if self.from_position is not None:
            return None
        froms = np.atleast_1d(np.clip(self.from_row, 0, len(lengths) - 1))
        froms = np.broadcast_to(froms, (*froms.shape[:-1], len(lengths)))
        if not isinstance(self.position, Places):
            return lengths[froms] == lengths
        at, froms = np.broadcast_arrays(self.position.at, froms[..., None])
        taken = np.take_along_axis(at, froms, axis=-2)
        # A whole prompt is read at once, so any of its tokens can be copied to any. What follows is
        # generated one by one, so there both must come at the same step.
        step, step_there = at - lengths[:, None], taken - lengths[froms]
        paired = np.where(step_there < 0, step < 0, step_there == step)
        return ((taken >= 0) & paired).all(-1)

    def misfit(self, row, lengths):
        source = int(np.broadcast_to(self.from_row, lengths.shape)[row])
        what = "all"
        if isinstance(self.position, Places):
            what = f"position {', '.join(map(str, self.position.at[source]))}"
        return (
            f"it copies {what} of row {source}, which has {lengths[source]} tokens, into row {row} "
            f"of {lengths[row]}. Count from the end (position=-1), say where to copy from "
            "(from_position=...), or use prompts of one length."
        )

    @property
    def needs_prompt(self) -> bool:
        return self.from_position is not None

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        here = context.positions
        batch, width = here.shape
        froms = jnp.arange(batch) if self.from_row is None else jnp.asarray(self.from_row)
        rows = jnp.broadcast_to(froms, (batch,))
        known = (rows >= 0) & (rows < batch)
        rows = jnp.clip(rows, 0, batch - 1)
        wanted = here
        if isinstance(self.position, Places) or self.from_position is not None:
            at = jnp.asarray((self.from_position or self.position).at)[rows]
            if isinstance(self.position, Places):
                named = here[:, :, None] == self.position.at[:, None, :]
                at = jnp.broadcast_to(at, (batch, named.shape[-1]))
                chosen = jnp.take_along_axis(at, named.argmax(-1), axis=1)
                wanted = jnp.where(named.any(-1), chosen, wanted)
            else:
                wanted = jnp.broadcast_to(at[:, :1], wanted.shape)
        # In decode the pass starts past the prompt, and holds no padding.
        ends = jnp.where(here[:, 0] < context.lengths, context.lengths, FOREVER)
        source = wanted - here[rows, :1]
        there = (source >= 0) & (source < width) & (wanted < ends[rows, None]) & known[:, None]
        axis = context.site.sequence_axis
        moved = jnp.moveaxis(x, axis, 1)[rows[:, None], jnp.clip(source, 0, width - 1)]
        lost = (here < ends[:, None]) & ~there
        moved = jnp.where(lost.reshape(batch, width, *[1] * (x.ndim - 2)), jnp.nan, moved)
        return jnp.moveaxis(moved, 1, axis).astype(x.dtype)


@register_edit()
class KnockOut(Edit):
    """Cut attention edges, or whole heads: which tokens does the answer have to look at?

    ``KnockOut(key=2, position=-1)`` keeps the last token from attending to token 2 in every layer
    and head; what is left of the attention is renormalised, as if the scores had been masked (Geva
    et al. 2023, arXiv 2304.14767, "attention knockout"). A query with nothing left to attend to
    gets nothing: so does a head without ``key``, ``KnockOut(head=3, layer=5)``.

    Attributes:
        key: the positions that are not attended to; every one, by default.
    """

    site: str = "attn_pattern"
    handles_key = True

    def check(self, sizes):
        if self.site != "attn_pattern":
            raise EditError(f"{self} works at attn_pattern only; use jaxtc.Zero at other sites.")
        if self.key is None and self.head is None:
            raise EditError(
                f"{self} would cut all attention: say which edges (key=...) or heads (head=...); "
                "jaxtc.Zero(site='attn_out') removes attention altogether."
            )

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        if self.key is None:
            return jnp.zeros_like(x)
        batch, width = x.shape[0], x.shape[-1]
        keys = jnp.broadcast_to(jnp.arange(width), (batch, width))
        cut = self.key.selects(keys)[:, None, None, :]
        wide = x.astype(jnp.float32)
        left = jnp.where(cut, 0, wide)
        mass = left.sum(-1, keepdims=True)
        safe = jnp.where(mass > 0, mass, 1)
        return jnp.where(mass > 0, left * (wide.sum(-1, keepdims=True) / safe), 0).astype(x.dtype)
