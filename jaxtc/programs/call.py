"""A call of the model: what its program takes, the program's body, its results."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.captures.activations import Activations
from jaxtc.captures.base import Reducer
from jaxtc.captures.request import Asked
from jaxtc.edits.base import Edit, spares
from jaxtc.edits.check import check_edits
from jaxtc.edits.judge import all_there
from jaxtc.errors import InputError
from jaxtc.helpers import explicit_transfers, pytree
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import Prompts, among_ids, last_tokens
from jaxtc.programs.leaves import rebuild
from jaxtc.programs.recording import finish
from jaxtc.sharding.placement import Placement
from jaxtc.tap.columns import tokens_of
from jaxtc.tap.sites import LOGITS, ORDER, Address
from jaxtc.tap.tap import Tap


@pytree
@dataclasses.dataclass(frozen=True)
class RunResult:
    """What :func:`jaxtc.run` returns.

    Attributes:
        logits: (B, T, V) float32 for "all", (B, V) for "last", None otherwise.
        activations: what was captured, by address; aliases work as keys.
        tokens: (B, T) int32, the ids that were run; 0 on padding.
        lengths: (B,) int32, real tokens of each prompt.
        length: T, the longest prompt, or the width of the array that was given (static).
        starts: (B,) int32, the column of each prompt's first token where some were padded on the
            left; None where every prompt begins in the first column.
        special_ids: of the tokens that stand for no text (static).
        spared: whether an edit of the run spares special tokens (static).

    Arrays with an axis T have each prompt where it stood as it was given: prompts padded on the
    left come back on the right, and padding between is meaningless.
    """

    logits: jax.Array | None
    activations: Activations
    tokens: jax.Array
    lengths: jax.Array
    length: int = dataclasses.field(metadata={"static": True})
    starts: jax.Array | None = None
    special_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    spared: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    @explicit_transfers
    def mask(self) -> jax.Array:
        """(B, T) booleans, true on real tokens."""
        return tokens_of(self.length, self.lengths, self.starts)

    @property
    def last(self) -> jax.Array:
        """(B,) the column of each prompt's last token."""
        return (self.lengths if self.starts is None else self.starts + self.lengths) - 1

    @property
    def counted(self) -> jax.Array:
        """(B, T) booleans, true on tokens of text: what metrics should be of.

        Special tokens (``<bos>``, what ends texts, padding) are left out by their ids.
        """
        return self.mask & ~self._special

    @property
    def left_out(self) -> jax.Array:
        """(B, T) booleans: the run's special tokens, if any of its edits spares them.

        Edits of transcoders do, but with ``special_tokens=True``; all false where no edit does.
        Which layers, rows and positions the edits name makes no difference here. A metric's
        ``left_out`` is a count of other tokens, see :mod:`jaxtc.transcoders.metrics`.
        """
        return self.mask & self._special & self.spared

    def answers(self, special_tokens: bool = False) -> jax.Array:
        """(B, T−1) booleans: which columns t + 1 are tokens that column t has to predict.

        Special tokens are no answers, unless ``special_tokens``.
        """
        given = self.mask if special_tokens else self.counted
        return self.mask[:, :-1] & given[:, 1:]

    @property
    def _special(self) -> Any:
        return among_ids(self.tokens, self.special_ids)


@dataclasses.dataclass(frozen=True)
class Key:
    """The static half of a call: a program is compiled for each one and each set of shapes."""

    config: Gemma2Config
    captures: tuple[Address, ...]
    logits: str | None
    reach: tuple[int, int]
    unsure: bool
    placement: Placement | None
    prompt_lengths: tuple[int, ...] | None  # where a reducer of a user's own sees no padding


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of :func:`jaxtc.run`, checked: what its program takes, and its results."""

    key: Key
    prompts: Prompts
    asked: Asked
    edits: tuple[Edit, ...]
    reducers: tuple[Reducer, ...]

    @classmethod
    def of(
        cls,
        config: Gemma2Config,
        prompts: Prompts,
        asked: Asked,
        edits: Sequence[Edit],
        logits: str | None,
        placement: Placement | None = None,
        prompt_lengths: tuple[int, ...] | None = None,
    ) -> "Call":
        """Check edits and captures against the model and the prompts, as :func:`jaxtc.run` does.

        ``prompt_lengths`` are those of another call's key, for prompts that are traced by now.
        """
        if logits is None and not asked:
            raise InputError(
                "Nothing was asked for: give capture=[...], or logits='all' or 'last'."
            )
        layers = config.num_hidden_layers
        reach = (layers, len(ORDER)) if logits else asked.reach(layers)
        checked, unsure = check_edits(edits, config, reach, prompts)
        own = asked.prompt_lengths(prompts) if prompt_lengths is None else prompt_lengths
        key = Key(config, asked.addresses, logits, reach, unsure, placement, own)
        return cls(key, prompts, asked, checked, asked.checked(config, prompts))

    def arguments(self, leaves: Sequence[jax.Array]) -> tuple:
        """Of :func:`forward`."""
        prompts = self.prompts
        return self.key, leaves, prompts.tokens, prompts.lengths, self.edits, self.reducers

    def on_mesh(self, leaves: Sequence[jax.Array]) -> tuple:
        """:meth:`arguments`, each where the program expects it."""
        key, _, *rows, edits, reducers = given = self.arguments(leaves)
        place = key.placement
        if place is None:
            return given
        return key, leaves, *map(place.put_rows, rows), *place.put_whole((edits, reducers))

    def result(self, kept: tuple) -> RunResult:
        """Of what :func:`forward` gave, without the padding up to the bucket."""
        (logits, *record), prompts = kept, self.prompts
        config, whole = self.key.config, self.key.logits == "all"
        found, cut = finish(
            record, self.asked, self.reducers, config.num_hidden_layers, prompts,
            prompts.length < prompts.tokens.shape[1], logits if whole else None,
        )  # fmt: skip
        spared = spares(self.edits)
        return RunResult(
            cut if whole else logits, found, prompts.given, prompts.lengths, prompts.length,
            prompts.starts, config.special_ids, spared,
        )  # fmt: skip


def forward(key: Key, leaves, tokens, lengths, edits, reducers, resume=None):
    """Logits, captured arrays and what reducers kept, all still padded: what ``run`` compiles.

    Args:
        key: the static half.
        leaves: of the model, as :func:`jaxtc.programs.leaves.parameters` gives them.
        tokens: (B, W) ids.
        lengths: (B,).
        edits, reducers: checked.
        resume: see :class:`jaxtc.model.gemma2.Gemma2`.
    """
    model, layers = rebuild(key.config, leaves), key.config.num_hidden_layers
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    tap = Tap(
        key.captures, edits, positions, lengths, reducers=reducers, placement=key.placement,
        special=among_ids(tokens, key.config.special_ids),
        prompt_lengths=key.prompt_lengths,
    )  # fmt: skip
    depth = key.reach[0] + 1 if key.reach[0] < layers else None
    options = dict(positions=positions, tap=tap, depth=depth, resume=resume)
    ask = functools.partial(last_logits, model) if key.logits == "last" else model
    out, _ = ask(tokens, **options)
    kept = out if key.logits else None, tap.activations, tap.stacked()
    if key.unsure:
        fine = all_there(edits, key.config, key.reach, lengths, tokens)
        kept = jax.tree.map(lambda x: jnp.where(fine, x, nothing(x)), kept)
    return kept


def last_logits(model: Gemma2, tokens, *, tap: Tap, **options) -> tuple[jax.Array, Any]:
    """As the model itself, but logits (B, V) of each prompt's last token only.

    The others are not computed unless something is asked of them.
    """
    if any(map(tap.touches, LOGITS)):
        logits, cache = model(tokens, tap=tap, **options)
        return last_tokens(logits, tap.lengths - 1), cache
    logits, cache = model(tokens, tap=tap, logits_at=tap.lengths - 1, **options)
    return logits[:, 0], cache


def nothing(x: jax.Array) -> jax.Array:
    """NaN in the dtype of ``x``; -1 where that holds whole numbers."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(jnp.nan if floating else -1).astype(x.dtype)
