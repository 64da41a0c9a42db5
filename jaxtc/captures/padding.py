"""Reducers and padding: a prompt at a time without any, and what is kept in its place.

Axis letters: B batch, T tokens, S keys, W tokens with the padding up to a bucket, L layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError
from jaxtc.tap.context import Context
from jaxtc.tap.sites import BY_NAME, Site
from jaxtc.tap.tap import along


def by_prompt(reducer: Any, x: jax.Array, context: Context, lengths: Sequence[int]) -> Any:
    """What ``reducer.reduce`` keeps of each prompt by itself, without padding, along B again.

    Args:
        reducer: checked.
        x: the site's value, (B, ...) with axes T and S of W.
        context: of the whole batch.
        lengths: tokens of each prompt, known on the host (they are part of shapes).

    Raises:
        InputError: what is kept of a prompt has no axis B, or its shape depends on the length.
    """
    placement = context.placement and context.placement.but(batch=None)
    groups = {n: np.flatnonzero(np.equal(lengths, n)) for n in sorted(set(lengths))}
    found = {}
    for length, rows in groups.items():

        def one(row, length=length):
            def own(leaf):
                return jax.lax.dynamic_slice_in_dim(leaf, row, 1)

            def cut(site: Site, value: jax.Array) -> jax.Array:
                ends = (slice(length if letter in "TS" else None) for letter in site.letters)
                return own(value)[tuple(ends)]

            alone, position = reducer, getattr(reducer, "position", None)
            if position is not None:
                alone = dataclasses.replace(reducer, position=jax.tree.map(own, position))
            here = dataclasses.replace(
                context, positions=own(context.positions)[:, :length], placement=placement,
                lengths=own(context.lengths), ends=None,
                read=lambda name: cut(BY_NAME[name], context.read(name)),
            )  # fmt: skip
            return alone.reduce(cut(context.site, x), here)

        # One program text for all prompts of a length.
        found[length] = jax.vmap(one)(rows)
    _check(reducer, found)
    back = np.argsort(np.concatenate(list(groups.values())))

    def join(*parts):
        whole = jnp.concatenate([part[:, 0] for part in parts])
        return whole if (back == np.arange(len(back))).all() else whole[back]

    return jax.tree.map(join, *found.values())


def _check(reducer: Any, found: dict[int, Any]) -> None:
    """Refuse what cannot be put together along B."""
    shapes = {n: jax.tree.map(lambda leaf: leaf.shape[1:], kept) for n, kept in found.items()}
    shown = {n: str(shape) for n, shape in shapes.items()}
    remedy = (
        "Reduce over the tokens; or say `per_token = True` on the class if each token is reduced "
        "by itself; or `padded = True`, to be given the whole batch with its padding, which "
        "context.real tells from tokens."
    )
    for length, kept in found.items():
        for leaf in jax.tree.leaves(kept):
            if leaf.shape[1:2] != (1,):
                raise InputError(
                    f"{reducer} keeps {shown[length]} of one prompt, of {length} tokens; its "
                    "`reduce` is called for each prompt by itself, and what it keeps must have the "
                    f"axis B in front, of length 1 there. {remedy}"
                )
    first, *others = shown
    for other in others:
        if shown[other] != shown[first]:
            raise InputError(
                f"{reducer} keeps {shown[first]} of a prompt of {first} tokens and {shown[other]} "
                f"of one of {other}, which cannot lie in one array. {remedy}"
            )


def blanked(reducer: Any, kept: Any, there: jax.Array, stacked: bool = False) -> Any:
    """What a reducer of each token kept, with its ``blank`` where ``there`` (B, T) is false.

    ``stacked`` says whether layers, L, are in front.

    Raises:
        InputError: an array that does not have the site's axes up to T.
    """
    rows, axis = int(stacked), reducer.site.sequence_axis + stacked

    def one(leaf: Any, blank: Any) -> jax.Array:
        shape = jnp.shape(leaf)
        if len(shape) <= axis or (shape[rows], shape[axis]) != there.shape:
            letters = " ".join(reducer.site.letters[: reducer.site.sequence_axis + 1])
            raise InputError(
                f"{reducer} says `per_token = True`, so each array that it keeps must begin with "
                f"the axes {letters} of {reducer.site.name} (here B, T = {there.shape}); got "
                f"{shape[rows:]}."
            )
        return jnp.where(along(leaf, there, rows, axis), leaf, blank)

    return jax.tree.map(one, kept, reducer.blank(kept))


@functools.partial(jax.jit, static_argnums=(0,))
def blanked_after(stacked: bool, reducer: Any, kept: Any, ends: jax.Array) -> Any:
    """:func:`blanked` past the end of each text: of (B, T) tokens whose ``ends`` (B,) are known."""
    leaf = jax.tree.leaves(kept)[0]
    length = leaf.shape[reducer.site.sequence_axis + stacked]
    return blanked(reducer, kept, jnp.arange(length)[None] < ends[:, None], stacked)
