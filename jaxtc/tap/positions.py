"""Which tokens: every way to name positions of a prompt, brought to one of three forms.

``run`` and ``generate`` call :func:`resolve` once a call, on the host wherever values are known, so
compiled programs only ever see absolute positions of each batch row. Axis letters: B batch, T
tokens, P positions named.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import EditError
from jaxtc.interchange import plain, plain_fields

# No text is as long: the open end of a span.
FOREVER = 2**30
# The position of a token that is not there.
NOWHERE = -FOREVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
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

    def __post_init__(self):
        plain_fields(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slice:
    """Positions from ``start`` to before ``stop``, as a Python slice has them; bounds are data."""

    start: Any = None
    stop: Any = None

    def __post_init__(self):
        plain_fields(self)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Part:
    """All of the prompt, or all generated tokens."""

    name: str


PROMPT, NEW = Part("prompt"), Part("new")
_PARTS = {"prompt": PROMPT, "new": NEW}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Positions one by one. Attributes: at: (B, P) int32, counted from the front of each row."""

    at: Any

    def __str__(self):
        return "(traced)" if is_traced(self.at) else str(np.asarray(self.at).tolist())

    def selects(self, positions: jax.Array) -> jax.Array:
        """(B, T) positions to (B, T) booleans: those named."""
        return (positions[:, :, None] == self.at[:, None, :]).any(-1)

    def exist(self, ends: jax.Array) -> jax.Array:
        """(B,) numbers of tokens to (B,) booleans: every named position is there."""
        return ((self.at >= 0) & (self.at < ends[:, None])).all(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """A range in each row.

    Attributes:
        start, stop: (B,) int32, counted from the front; stop excluded.
        part: "prompt" or "new" where that is what it was named by (static).
    """

    start: Any
    stop: Any
    part: str = dataclasses.field(default="", metadata={"static": True})

    def __str__(self):
        if self.part or is_traced((self.start, self.stop)):
            return self.part or "(traced)"
        ends = ["" if stop >= FOREVER else stop for stop in np.asarray(self.stop).tolist()]
        rows = zip(np.asarray(self.start).tolist(), ends, strict=True)
        return ", ".join(dict.fromkeys(f"{start}:{end}" for start, end in rows))

    def selects(self, positions: jax.Array) -> jax.Array:
        """(B, T) positions to (B, T) booleans: those in the range."""
        return (positions >= self.start[:, None]) & (positions < self.stop[:, None])

    def exist(self, ends: jax.Array) -> jax.Array:
        """(B,) numbers of tokens to (B,) booleans: the range holds a token."""
        return (self.start < self.stop) & (self.start < ends)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Any set of a prompt's tokens. Attributes: on: (B, W) booleans, W the padded length."""

    on: Any

    def __str__(self):
        return "(a mask)"

    def selects(self, positions: jax.Array) -> jax.Array:
        """(B, T) positions to (B, T) booleans: those that are on."""
        width = self.on.shape[1]
        there = jnp.take_along_axis(jnp.asarray(self.on), jnp.clip(positions, 0, width - 1), axis=1)
        return there & (positions < width)

    def exist(self, ends: jax.Array) -> jax.Array:
        """(B,) numbers of tokens to (B,) booleans: nothing but tokens is on."""
        return ~(self.on & (np.arange(self.on.shape[1]) >= ends[:, None])).any(-1)


def spelled(position: Any) -> Any:
    """A position as an edit keeps it: Python's slices, ranges and strings become pytrees.

    Raises:
        EditError: a string other than "prompt" and "new", a slice with a step, or a ragged list.
    """
    if isinstance(position, str):
        if position not in _PARTS:
            raise EditError(f"position is {position!r}, expected 'prompt', 'new', or numbers.")
        return _PARTS[position]
    if isinstance(position, slice):
        if position.step not in (None, 1):
            raise EditError(f"{position} has a step; give a range(...), a list or a mask instead.")
        return Slice(position.start, position.stop)
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
        raise EditError(f"{given!r} is no array: its rows differ in length or in kind.") from None


def is_traced(tree: Any) -> bool:
    """Whether some leaf is known only inside a trace."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def resolve(
    position: Any,
    tokens: Any,
    lengths: Any,
    length: int,
    *,
    extra: int = 0,
    rows: np.ndarray | None = None,
    what: str = "position",
) -> Places | Span | Mask:
    """Absolute positions in each row.

    Args:
        position: an int (negative from each prompt's own end), ints (P,) or (B, P), a slice, a
            mask (T,) or (B, T) of booleans, "prompt", "new", or a :class:`Token`.
        tokens: (B, W) ids, padded.
        lengths: (B,) tokens of each prompt.
        length: T, the longest prompt.
        extra: tokens that will follow the prompts.
        rows: (B,) booleans, the rows that must have these positions; all by default.
        what: who asks, for messages.

    Raises:
        EditError: a position that some prompt does not have, or that names nothing. Where values
            are traced nothing is raised: ``exist`` of the result tells.
    """
    position = spelled(position)
    known = not is_traced((position, lengths, tokens if isinstance(position, Token) else None))
    xp = np if known else jnp
    lengths = xp.asarray(lengths, np.int32)
    if isinstance(position, Part):
        if position == NEW and not extra:
            raise EditError(f"{what}: 'new' names generated tokens, and run generates none.")
        start, stop = (0 * lengths, lengths)
        # Everything after the prompt is new, however many tokens follow.
        return (
            Span(start, stop, "prompt")
            if position == PROMPT
            else Span(stop, start + FOREVER, "new")
        )
    if isinstance(position, Token):
        found = Places(_find(position, tokens, lengths, xp, what)[:, None])
    elif isinstance(position, Slice):
        found = Span(
            _from_front(0 if position.start is None else position.start, lengths, xp, what),
            _from_front(FOREVER if position.stop is None else position.stop, lengths, xp, what),
        )
    else:
        found = _numbers(position, lengths, tokens.shape[1], length, what, xp)
    if known:
        _refuse(found, position, lengths, extra, rows, what)
    return found


def _find(token: Token, tokens: Any, lengths: Any, xp: Any, what: str) -> Any:
    """(B,) where each row has the token, :data:`NOWHERE` if it does not."""
    tokens = xp.asarray(tokens)
    each = [_one_a_row(part, lengths, xp, f"{what}: in {token} the numbers") for part in (
        token.id, token.occurrence, token.offset
    )]  # fmt: skip
    wanted, occurrence, offset = each
    real = xp.arange(tokens.shape[1]) < lengths[:, None]
    hits = (tokens == wanted[:, None]) & real
    count = xp.cumsum(hits, axis=1)
    which = xp.where(occurrence >= 0, occurrence + 1, count[:, -1] + occurrence + 1)
    chosen = hits & (count == which[:, None])
    return xp.where(chosen.any(1), chosen.argmax(1) + offset, NOWHERE).astype(np.int32)


def _from_front(bound: Any, lengths: Any, xp: Any, what: str) -> Any:
    """(B,) a slice's bound, counted from the front and not below 0."""
    bound = _one_a_row(bound, lengths, xp, f"{what}: bounds of a slice")
    return xp.where(bound < 0, xp.maximum(bound + lengths, 0), bound).astype(np.int32)


def _one_a_row(given: Any, lengths: Any, xp: Any, what: str) -> Any:
    """(B,) whole numbers from one, or one a row."""
    numbers = xp.asarray(given)
    if numbers.dtype.kind not in "iu" or numbers.shape not in ((), lengths.shape):
        raise EditError(f"{what} are whole numbers, one or one a prompt; got {given!r}.")
    return xp.broadcast_to(_bounded(numbers, xp), lengths.shape)


def _bounded(numbers: Any, xp: Any) -> Any:
    """Whole numbers that stay what they are, or out of reach, as int32."""
    return numbers if xp is jnp else np.clip(numbers, NOWHERE, FOREVER).astype(np.int32)


def _numbers(position: Any, lengths: Any, width: int, length: int, what: str, xp: Any):
    given = xp.asarray(position)
    batch = len(lengths)
    if given.dtype == bool:
        if given.shape not in ((length,), (batch, length)):
            raise EditError(
                f"{what}: a mask of positions has shape ({length},) or ({batch}, {length}) here, "
                f"one boolean a token; got {given.shape}."
            )
        on = xp.broadcast_to(given, (batch, length))
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
    given = _bounded(given if given.ndim == 2 else xp.atleast_1d(given)[None], xp)
    at = xp.where(given < 0, given + lengths[:, None], given)
    return Places(xp.broadcast_to(at, (batch, at.shape[1])).astype(np.int32))


def _refuse(found, position, lengths, extra, rows, what) -> None:
    """Raise for the first row that lacks what is named."""
    fine = found.exist(lengths + extra)
    wrong = ~fine if rows is None else ~fine & rows
    if isinstance(found, Mask) and not wrong.any():
        on = found.on if rows is None else found.on[rows]
        if not on.any():
            raise EditError(f"{what}: no position of the mask is on, so nothing would change.")
    if not wrong.any():
        return
    row = int(np.argmax(wrong))
    size = int(lengths[row])
    if isinstance(position, Token):
        raise EditError(
            f"{what}: prompt {row} has no token at {position} (its {size} tokens hold the id fewer "
            "times, or the offset leads outside)."
        )
    if isinstance(found, Places):
        at = found.at[row]
        outside = at[(at < 0) | (at >= size + extra)][0]
        given = np.broadcast_to(np.asarray(position), found.at.shape)[row]
        given = given[int(np.argmax(at == outside))] if given.ndim else given
        raise EditError(
            f"{what}: position {int(given)} lies outside prompt {row} of {size} tokens "
            f"(0 to {size - 1}, or -{size} to -1)."
        )
    if isinstance(found, Mask):
        last = int(np.flatnonzero(found.on[row])[-1])
        raise EditError(
            f"{what}: the mask is on at position {last} of prompt {row}, of {size} tokens."
        )
    raise EditError(
        f"{what}: the range {position.start}:{position.stop} holds no token of prompt {row}, of "
        f"{size} tokens."
    )
