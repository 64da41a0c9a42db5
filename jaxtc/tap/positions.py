"""Which tokens: every spelling of a position, brought to one of three forms that become a mask.

:func:`spelled` makes a pytree of what the user wrote, :func:`locate` counts it from the front of
each row (on the host wherever values are known), :func:`present` says whether those tokens exist,
and ``selects`` of the three forms gives the mask. Axis letters: B batch, T tokens, P positions,
"..." the variants of a sweep.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import EditError
from jaxtc.helpers import frozen_pytree
from jaxtc.interchange import plain, plain_fields
from jaxtc.tap.columns import from_first_column

# No text is as long: the open end of a span.
FOREVER = 2**30
# The position of a token that is not there.
NOWHERE = -FOREVER


@frozen_pytree()
class Token:
    """A position found from a token: ``Token(id)`` is where it stands, in each row its own.

    Attributes:
        id: the token's id.
        offset: added to its position: 1 is the token after it.
        occurrence: which, when there are several: 0 the first, -1 the last.
    """

    id: Any
    offset: Any = 0
    occurrence: Any = 0

    __post_init__ = plain_fields


@frozen_pytree()
class Places:
    """Positions one by one. Attributes: at: (B, P) int32, counted from the front of each row."""

    at: Any

    def __str__(self):
        return str(np.asarray(self.at).tolist())

    def selects(self, positions: jax.Array) -> jax.Array:
        """(B, T) positions to (..., B, T) booleans: those named."""
        return (positions[:, :, None] == self.at[..., None, :]).any(-1)

    def exist(self, ends: jax.Array) -> jax.Array:
        """(B,) numbers of tokens to (B,) booleans: every named position is there."""
        return ((self.at >= 0) & (self.at < ends[:, None])).all(-1)


@frozen_pytree("part")
class Span:
    """A range in each row, as a Python slice names it until it is located.

    Attributes:
        start, stop: (B,) int32, counted from the front; stop excluded.
        part: "prompt" or "new" for all of those tokens (static).
    """

    start: Any = None
    stop: Any = None
    part: str = ""

    __post_init__ = plain_fields

    def __str__(self):
        located = np.ndim(self.start) > 0  # in each row elsewhere
        return self.part or ("(a range)" if located else f"{self.start}:{self.stop}")

    def selects(self, positions: jax.Array) -> jax.Array:
        """(B, T) positions to (..., B, T) booleans: those in the range."""
        return (positions >= self.start[..., None]) & (positions < self.stop[..., None])

    def exist(self, ends: jax.Array) -> jax.Array:
        """(B,) numbers of tokens to (B,) booleans: the range holds a token."""
        return (self.start < self.stop) & (self.start < ends)


@frozen_pytree()
class Mask:
    """Any set of a prompt's tokens. Attributes: on: (B, W) booleans, W the padded length."""

    on: Any

    def __str__(self):
        return "(a mask)"

    def selects(self, positions: jax.Array) -> jax.Array:
        """(B, T) positions to (..., B, T) booleans: those that are on."""
        xp, width = jnp if is_traced((self.on, positions)) else np, self.on.shape[-1]
        places = xp.broadcast_to(
            xp.clip(positions, 0, width - 1), (*self.on.shape[:-1], positions.shape[-1])
        )
        return xp.take_along_axis(xp.asarray(self.on), places, axis=-1) & (positions < width)

    def exist(self, ends: jax.Array) -> jax.Array:
        """(B,) numbers of tokens to (B,) booleans: nothing but tokens is on."""
        return ~(self.on & (np.arange(self.on.shape[-1])[None] >= ends[:, None])).any(-1)


def spelled(position: Any) -> Any:
    """A position as an edit keeps it: Python's slices, ranges and strings become pytrees.

    Raises:
        EditError: a string other than "prompt" and "new", a slice with a step, or a ragged list.
    """
    if isinstance(position, str):
        if position not in ("prompt", "new"):
            raise EditError(f"position is {position!r}, expected 'prompt', 'new', or numbers.")
        return Span(part=position)
    if isinstance(position, slice):
        if position.step not in (None, 1):
            raise EditError(f"{position} has a step; give a range(...), a list or a mask instead.")
        return Span(position.start, position.stop)
    return one_array(position)


def one_array(given: Any) -> Any:
    """A list, a tuple or a range as one array, so that it is one leaf of an edit; others as is.

    Raises:
        EditError: rows of different lengths.
    """
    given = plain(given)
    if not isinstance(given, list | tuple | range):
        return given
    try:
        return jnp.asarray(given) if is_traced(given) else np.asarray(given)
    except (TypeError, ValueError):
        raise EditError(f"{given!r} is not an array: its rows differ in length or type.") from None


def is_traced(tree: Any) -> bool:
    """Whether some leaf is known only inside a trace."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def locate(position: Any, prompts: Any, *, new: bool = False, what: Any) -> Places | Span | Mask:
    """Absolute positions in each row, whether or not those tokens exist (see :func:`present`).

    Args:
        position: in any spelling of :class:`jaxtc.Edit`; what is located already stays as it is.
        prompts: :class:`jaxtc.model.prompts.Prompts`.
        new: whether tokens will be generated after the prompts.
        what: the edit or reducer, for messages.

    Raises:
        EditError: not a position, or of the wrong shape.
    """
    position = spelled(position)
    if isinstance(position, Places | Mask):
        return position
    tokens = prompts.tokens if isinstance(position, Token) else None
    xp = jnp if is_traced((position, prompts.lengths, tokens)) else np
    lengths = xp.asarray(prompts.lengths, np.int32)

    def each(given: Any, name: str) -> Any:
        """(B,) whole numbers from one, or one a row."""
        numbers = xp.asarray(given)
        if numbers.dtype.kind not in "iu" or numbers.shape not in ((), lengths.shape):
            raise EditError(
                f"{what}: {name} are whole numbers, one or one a prompt; got {given!r}."
            )
        return xp.broadcast_to(as_int32(numbers), lengths.shape)

    if isinstance(position, Token):
        parts = position.id, position.occurrence, position.offset
        numbers = [each(part, f"in {position} the numbers") for part in parts]
        return Places(_find(*numbers, xp.asarray(tokens), lengths, xp)[:, None])
    if isinstance(position, Span):
        if position.part == "new":
            if not new:
                raise EditError(f"{what}: 'new' names generated tokens, and run generates none.")
            # Everything after the prompt is new, however many tokens follow.
            return Span(lengths, 0 * lengths + FOREVER, "new")
        stop = lengths if position.part else FOREVER
        bounds = zip((position.start, position.stop), (0, stop), strict=True)
        ends = [each(end if given is None else given, "bounds of a slice") for given, end in bounds]
        ends = [xp.where(end < 0, xp.maximum(end + lengths, 0), end) for end in ends]
        return Span(*ends, position.part)
    return _numbers(position, prompts, lengths, what, xp)


def _find(wanted: Any, occurrence: Any, offset: Any, tokens: Any, lengths: Any, xp: Any) -> Any:
    """(B,) where each row has its token, :data:`NOWHERE` if it does not."""
    hits = (tokens == wanted[:, None]) & (xp.arange(tokens.shape[1]) < lengths[:, None])
    count = xp.cumsum(hits, axis=1)
    which = xp.where(occurrence >= 0, occurrence + 1, count[:, -1] + occurrence + 1)
    chosen = hits & (count == which[:, None])
    return xp.where(chosen.any(1), chosen.argmax(1) + offset, NOWHERE).astype(np.int32)


def _numbers(position: Any, prompts: Any, lengths: Any, what: Any, xp: Any) -> Places | Mask:
    given, length = xp.asarray(position), prompts.length
    batch, width = prompts.tokens.shape
    if given.dtype == bool:
        if given.shape not in ((length,), (batch, length)):
            raise EditError(
                f"{what}: a mask of positions has shape ({length},) or ({batch}, {length}) here, "
                f"one boolean a token; got {given.shape}."
            )
        # One boolean a column, wherever the prompts stand there.
        on = from_first_column(xp.broadcast_to(given, (batch, length)), prompts.starts, 1)
        return Mask(xp.pad(on, [(0, 0), (0, width - length)]))
    if given.dtype.kind not in "iu" or given.ndim > 2 or not given.size:
        raise EditError(
            f"{what}: positions are whole numbers, a slice, a mask of booleans, 'prompt', 'new' or "
            f"jaxtc.Token(id); got {position!r}."
        )
    if given.ndim == 2 and given.shape[0] != batch:
        raise EditError(
            f"{what}: positions of shape {given.shape} are a row for each prompt, of which there "
            f"are {batch}."
        )
    at = as_int32(given if given.ndim == 2 else xp.atleast_1d(given)[None])
    at = xp.where(at < 0, at + lengths[:, None], at)
    return Places(xp.broadcast_to(at, (batch, at.shape[1])))


def as_int32(numbers: Any) -> Any:
    """Whole numbers as int32; on the host, those that do not fit stay out of range."""
    if not is_traced(numbers):
        numbers = np.clip(numbers, NOWHERE, FOREVER)
    return numbers.astype(np.int32)


def present(found: Places | Span | Mask, ends: Any, rows: Any) -> Any:
    """(...,) booleans: all of ``rows`` (..., B) have these tokens, and a mask selects some.

    ``ends`` (B,) are the numbers of tokens of each row.
    """
    fine = (found.exist(ends) | ~rows).all(-1)
    if isinstance(found, Mask):
        fine &= (found.on.any(-1) & rows).any(-1)
    return fine


def missing(found: Any, position: Any, lengths: Any, extra: int, rows: Any, what: Any) -> EditError:
    """The error for the first of ``rows`` where ``position``, as written, is not :func:`present`.

    ``extra`` tokens will follow the prompts of ``lengths`` (B,).
    """
    wrong = ~found.exist(lengths + extra) & rows
    row = int(np.argmax(wrong))
    size = int(lengths[row])
    if not wrong.any():
        lacks = "no position of the mask is on, so nothing would change"
    elif isinstance(position, Token):
        lacks = (
            f"prompt {row} has no token at {position} (its {size} tokens hold the id fewer times, "
            "or the offset leads outside)"
        )
    elif isinstance(found, Places):
        at, given = found.at[row], np.broadcast_to(np.asarray(position), found.at.shape)[row]
        outside = given[np.argmax((at < 0) | (at >= size + extra))]
        lacks = (
            f"position {outside} lies outside prompt {row} of {size} tokens (0 to {size - 1}, or "
            f"-{size} to -1)"
        )
    elif isinstance(found, Mask):
        last = np.flatnonzero(found.on[row])[-1]
        lacks = f"the mask is on at position {last} of prompt {row}, of {size} tokens"
    else:
        lacks = f"the range {position} holds no token of prompt {row}, of {size} tokens"
    return EditError(f"{what}: {lacks}.")


def resolve(position: Any, prompts: Any, *, what: Any = "position") -> Places | Span | Mask:
    """:func:`locate`, for positions that every prompt must have.

    Raises:
        EditError: as :func:`locate`; or a prompt lacks them, as far as values are known.
    """
    position, lengths = spelled(position), prompts.lengths
    found, rows = locate(position, prompts, what=what), np.ones(len(lengths), bool)
    if not is_traced((found, lengths)) and not present(found, lengths, rows):
        raise missing(found, position, lengths, 0, rows, what)
    return found
