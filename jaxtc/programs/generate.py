"""Generation: the prompts once (prefill), then one compiled step a token, with a cache."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.captures.activations import Activations
from jaxtc.captures.request import Captures, check_per_token, understand
from jaxtc.edits.base import Edit, spares
from jaxtc.edits.check import check_edits, of_phase
from jaxtc.errors import InputError, JaxtcError
from jaxtc.helpers import explicit_transfers, is_whole, whole_number
from jaxtc.interchange import plain
from jaxtc.memory.needs import check_run
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2, empty_cache
from jaxtc.model.prompts import among_ids, bucket, prepare
from jaxtc.programs import recording
from jaxtc.programs.call import last_logits
from jaxtc.programs.leaves import parameters, placed, rebuild
from jaxtc.programs.program import Program
from jaxtc.programs.sampling import EVERY, draw
from jaxtc.sharding.mesh import MeshLike
from jaxtc.sharding.placement import Placement
from jaxtc.sharding.rules import CACHE
from jaxtc.tap.sites import ORDER, Address
from jaxtc.tap.tap import Tap

# Called with the number of a new token and its id in each row, None where a row has ended before.
Stream = Callable[[int, list[int | None]], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What :func:`generate` returns.

    Attributes:
        prompts: the ids of each prompt, without padding.
        tokens: the new ids of each prompt, up to and including its stop token.
        activations: what was captured at the tokens of prompt and continuation, (B, T, ...) as
            :func:`jaxtc.run` has it, but for the last token of a row, which is never run.
        lengths: (B,) int32, how many of those T tokens are each row's own; the rest is padding.
        length: T.
        starts, special_ids, spared: as of :class:`jaxtc.programs.call.RunResult`.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    activations: Activations
    lengths: np.ndarray
    length: int
    starts: np.ndarray | None = None
    special_ids: tuple[int, ...] = ()
    spared: bool = False

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and continuation of each row."""
        return [[*a, *b] for a, b in zip(self.prompts, self.tokens, strict=True)]

    @property
    def mask(self) -> np.ndarray:
        """(B, T) booleans, true on the tokens of prompt and continuation that were run."""
        return self._columns(lambda row: True)

    @property
    def left_out(self) -> np.ndarray:
        """(B, T) booleans: special tokens, if any edit spares them (``RunResult.left_out``)."""
        return self._columns(lambda row: self.spared & np.isin(row, self.special_ids))

    def _columns(self, of: Callable[[np.ndarray], Any]) -> np.ndarray:
        """``of`` each row's tokens, where their activations are; false on padding."""
        starts = np.zeros(len(self.tokens), int) if self.starts is None else self.starts
        found = np.zeros((len(self.tokens), self.length), bool)
        for row, ids, start, count in zip(found, self.sequences, starts, self.lengths, strict=True):
            row[start : start + count] = of(np.array(ids[:count]))
        return found


@dataclasses.dataclass(frozen=True)
class Key:
    """The static half of a call: programs are compiled for each one and each set of shapes."""

    config: Gemma2Config
    captures: tuple[Address, ...]
    slots: int
    placement: Placement | None


@explicit_transfers
def generate(
    model: Gemma2,
    tokens: Any,
    max_new_tokens: int,
    *,
    lengths: Any = None,
    attention_mask: Any = None,
    tokenizer: Any = None,
    edits: Sequence[Edit] = (),
    capture: Captures = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | jax.Array = 0,
    stop: int | Sequence[int] | None = None,
    stream: Stream | None = None,
    mesh: MeshLike | None = None,
) -> Generation:
    """Continue each prompt, token by token, greedily or by sampling.

    Two programs serve all calls of a batch size and a bucket of lengths: one for the prompts, one
    for a step. Other edits of the same kinds, temperatures, k, p, seeds and stop tokens run the
    same ones.

    Args:
        model, tokens, lengths, attention_mask, tokenizer, mesh: as for :func:`jaxtc.run`. All
            processes of a mesh call this alike, and get the same tokens.
        max_new_tokens: how many to add at most; a prompt that stops earlier waits for the others.
        edits: applied to prompts and new tokens alike, unless their ``position`` is "prompt" or
            "new"; a number counts from the prompt's start, or its end when negative, and may name
            a new token.
        capture: as for :func:`jaxtc.run`, but only reducers of each token; kept over the prompt
            and the new tokens.
        temperature: divides the logits; 0 takes the argmax, whatever the other options.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to this only. Applied
            after ``temperature`` and ``top_k``.
        seed: a whole number or a jax key. The same one gives the same tokens; each row and each
            position has its own random numbers, whatever the other rows are.
        stop: id or ids that end a text; the config's ``eos_token_id`` by default (where a model was
            loaded, those of its ``config.json`` and its ``generation_config.json``), none when
            empty. Nothing else is taken from ``generation_config.json``: these arguments say how
            tokens are chosen.
        stream: called with the number of each step and its new ids, as soon as they are known; when
            it returns ``True`` no more follow.

    Raises:
        InputError: as :func:`jaxtc.run`; more tokens than the model's context; an option out of
            its range.
        SiteError, EditError, CapacityError, ShardingError: as :func:`jaxtc.run`.
        JaxtcError: the model computed NaN.
    """
    config = model.config
    sampling = _sampling(max_new_tokens, temperature, top_k, top_p, seed)
    leaves, layers = parameters(model), config.num_hidden_layers
    given = (tokens, lengths, attention_mask, edits, leaves, sampling)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
        raise InputError("generate loops in Python and cannot run inside jit, vmap or grad.")
    stops = _stops(stop, config)
    asked = understand(capture, layers)
    check_per_token(asked)
    prompts = prepare(
        tokens, config, lengths, max_new_tokens, attention_mask=attention_mask, tokenizer=tokenizer
    )
    # The last new token is never fed back, so an edit at its position would not fire.
    checked, _ = check_edits(edits, config, (layers, len(ORDER)), prompts, max_new_tokens - 1)
    reducers = asked.checked(config, prompts)
    place = placed(model, leaves, mesh)
    slots = bucket(prompts.length + max_new_tokens)
    key = Key(config, asked.addresses, slots, place)
    if asked:
        size = len(prompts.tokens), slots
        check_run(config, leaves, size, asked.addresses, reducers, None, checked)
    rows = (lambda x: x) if place is None else place.put_rows
    lengths, early, later = rows(prompts.lengths), *(of_phase(checked, new=n) for n in (0, 1))
    if place is not None:
        early, later, reducers, sampling = place.put_whole((early, later, reducers, sampling))
    ids, *state = _PREFILL(key, leaves, rows(prompts.tokens), lengths, early, reducers, sampling)

    new: list[list[int]] = [[] for _ in prompts.tokens]
    running = np.ones(len(new), bool)
    for step in range(max_new_tokens):
        known = ids
        if step + 1 < max_new_tokens:
            # Before the ids are read, so that no device waits for the host: when all texts stop,
            # that is one step too many.
            places = rows(prompts.lengths + step)
            given = ids, places, lengths, *state, later, reducers, sampling
            ids, *state = _STEP(key, leaves, *given)
        found = _read(known)
        shown = [int(i) if on else None for i, on in zip(found, running, strict=True)]
        for row, i in zip(new, shown, strict=True):
            row.extend([i] if i is not None else [])
        running &= ~np.isin(found, stops)
        ended = stream is not None and stream(step, shown) is True
        if ended or not running.any():
            break
    whole = dataclasses.replace(prompts, length=prompts.length + step)
    texts = np.asarray(prompts.tokens)
    ends = (prompts.lengths + [len(row) - 1 for row in new]).astype(np.int32)
    # A row that ended ran on beside the others.
    known = rows(ends) if (ends < whole.length).any() else None
    activations, _ = recording.finish(state[1], asked, reducers, layers, whole, ends=known)
    given = [texts[i, :n].tolist() for i, n in enumerate(prompts.lengths)]
    spared = spares(checked)
    return Generation(
        given, new, activations, ends, whole.length, prompts.starts, config.special_ids, spared
    )


def _sampling(max_new_tokens, temperature, top_k, top_p, seed) -> tuple:
    """(key, temperature, top_k, top_p) as programs take them; raises InputError for bad options."""
    whole_number("max_new_tokens", max_new_tokens, 1)
    if not _real(temperature) or not 0 <= temperature < np.inf:
        raise InputError(
            f"temperature is {temperature!r}, expected a number of at least 0: 0 takes the "
            "argmax, 1 samples from the model's own distribution."
        )
    top_k = EVERY if top_k is None else whole_number("top_k", top_k, 1, ", or None for all tokens")
    top_p = 1 if top_p is None else top_p
    if not _real(top_p) or not 0 < top_p <= 1:
        raise InputError(
            f"top_p is {top_p!r}, expected a probability above 0 and up to 1, or None for all "
            "tokens."
        )
    temperature = np.float32(min(temperature, np.finfo(np.float32).max))
    return _key(seed), temperature, np.int32(min(top_k, EVERY)), np.float32(top_p)


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _key(seed: Any) -> jax.Array:
    """One key whose numbers do not depend on how many are drawn at once, as those of rbg do."""
    kind = "threefry2x32"
    if is_whole(seed) and seed < 2**32:
        return jax.random.key(int(seed), impl=kind)
    one = jax.random.key(0, impl=kind)
    if isinstance(seed, jax.Array) and (seed.dtype, seed.shape) == (one.dtype, ()):
        return seed
    raise InputError(
        f"seed is {seed!r}, expected a whole number from 0 to {2**32 - 1} or a single "
        f"jax.random.key(number, impl={kind!r})."
    )


def _stops(stop: Any, config: Gemma2Config) -> list[int]:
    """The ids that end a text."""
    if stop is None:
        stop = () if config.eos_token_id is None else config.eos_token_id
    stop = plain(stop)
    ids = np.atleast_1d(np.asarray(stop, object)).tolist()
    if not all(is_whole(i) and i < config.vocab_size for i in ids):
        raise InputError(
            f"stop is {stop!r}, expected token ids, 0 to {config.vocab_size - 1} in this model; an "
            "empty list for none."
        )
    return [int(i) for i in ids]


def _read(token: jax.Array) -> np.ndarray:
    """(B,) ids on the host; refuses what :func:`jaxtc.programs.sampling.draw` marked."""
    ids = np.asarray(token)
    if (ids < 0).any():
        raise JaxtcError(
            f"The model computed NaN for prompt {int(np.argmin(ids))} (or no logit above -inf), so "
            "it has no next token. An edit put NaN or something too large there, or the weights' "
            "dtype overflows (float16 does, with Gemma-2's activations): use bfloat16 or float32."
        )
    return ids


def _prefill(key: Key, leaves, tokens, lengths, edits, reducers, sampling):
    """The prompts at once: (B, W) ids to each row's next id (B,), the cache and the record."""
    model = rebuild(key.config, leaves)
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    tap = Tap(
        key.captures, edits, positions, lengths, reducers=reducers, placement=key.placement,
        special=among_ids(tokens, key.config.special_ids),
    )  # fmt: skip
    cache = empty_cache(key.config, batch, width, model.dtype)
    logits, cache = last_logits(model, tokens, positions=positions, cache=cache, tap=tap)
    # Made no longer than the prompts at first, so that these see no more keys than in `run`.
    more = [(0, 0), (0, key.slots - width), (0, 0), (0, 0)]
    cache = jax.tree.map(lambda x: jnp.pad(x, more), cache)
    rng, *settings = sampling
    token = draw(logits, rng, lengths, *settings)
    return _settled(key, token, cache, recording.begin(tap, key.slots), reducers)


def _settled(key: Key, token, cache, record, reducers) -> tuple:
    """What a program hands to the next, laid out on the mesh in the same way each time."""
    place = key.placement
    if place is None:
        return token, cache, record
    # Every process reads the ids.
    token = jax.lax.with_sharding_constraint(token, place.whole)
    cache = jax.tree.map(lambda x: place.constrain(x, CACHE), cache)
    return token, cache, recording.settled(record, reducers, place)


def _step(key, leaves, tokens, places, lengths, cache, record, edits, reducers, sampling):
    """One token more: (B,) ids at positions (B,) to the next ids, the cache and the record."""
    model = rebuild(key.config, leaves)
    positions = places[:, None]
    # NaN was marked by the id -1, which raises once it is read.
    tokens = jnp.maximum(tokens, 0)[:, None]
    tap = Tap(
        key.captures, edits, positions, lengths, ends=places + 1, reducers=reducers,
        placement=key.placement, special=among_ids(tokens, key.config.special_ids),
    )  # fmt: skip
    logits, cache = model(tokens, positions=positions, cache=cache, tap=tap)
    rng, *settings = sampling
    token = draw(logits[:, 0], rng, places + 1, *settings)
    return _settled(key, token, cache, recording.proceed(record, tap, places), reducers)


_PREFILL = Program("generate: prefill", _prefill, static_argnums=0)
_STEP = Program("generate: step", _step, static_argnums=0, donate_argnums=(5, 6))
