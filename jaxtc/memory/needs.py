"""How much memory a run's captures need, told before running, and whether that much is there.

Axis letters: B batch, T tokens, W tokens with the padding up to a bucket, N heads, F MLP width, V
vocabulary, M transcoder features.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtc.captures.base import Reducer
from jaxtc.captures.reducers import Features
from jaxtc.captures.request import Asked, Captures, check_logits, understand
from jaxtc.edits.features import Splice
from jaxtc.errors import CapacityError, InputError
from jaxtc.helpers import is_whole, pretty
from jaxtc.memory.available import available
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket, prepare
from jaxtc.tap.context import Context
from jaxtc.tap.sites import BY_NAME, ORDER, Address, parse

# Needs below this are not worth a look at the machine.
_SMALL = 64 * 2**20


def check_fits(bytes_needed: int, what: str, devices: Collection[jax.Device] | None = None) -> None:
    """Refuse what cannot fit, before it is computed.

    Args:
        bytes_needed: at the least, over all devices.
        what: needs them, for the message: "What this run keeps".
        devices: where, those of the weights say; over several, arrays are taken to be spread
            evenly. The first one of this process by default.

    Raises:
        CapacityError: less than that is available.
    """
    if bytes_needed < _SMALL:
        return
    devices = devices or jax.local_devices()[:1]
    mine = [device for device in devices if device.process_index == jax.process_index()]
    free = available(mine[0]) if mine else None
    if free is None:
        return
    # Devices of other processes cannot be asked; those of one CPU share its memory.
    cpu = mine[0].platform == "cpu"
    count = len({device.process_index for device in devices} if cpu else devices)
    if bytes_needed <= free * count:
        return
    place = "this machine" if cpu else f"{mine[0].platform} {mine[0].id}"
    raise CapacityError(
        f"{what} needs at least {pretty(-(-bytes_needed // count))} of memory, and {pretty(free)} "
        f"are available on {place}. Keep less: a reducer "
        "(capture=jaxtc.reducers.At('resid_post', -1) keeps the last token only), logits='last' or "
        "None in place of 'all', fewer layers ('layers.20.mlp_out' in place of 'mlp_out'), or "
        "fewer or shorter prompts a call. print(jaxtc.estimate(...)) shows what each part "
        "takes."
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found; ``print`` it for a table. All numbers are bytes.

    Attributes:
        shapes: what is kept, by its key in ``result.activations``: arrays' shapes and dtypes.
        logits: of the returned logits.
        weights: of the model, which are there already once it is loaded.
        workspace: of the largest array that one layer makes on the way (scores, the MLP's hidden
            layer, a transcoder's features, or logits that are not returned); the compiled program
            holds some more.
        padding: of what the program gives back, until it is cut to the prompts' length; 0 where
            that fills its bucket.
    """

    shapes: Mapping[str, Any]
    logits: int
    weights: int
    workspace: int
    padding: int

    @property
    def activations(self) -> dict[str, int]:
        """Bytes by key of ``result.activations``."""
        return {name: _bytes(kept) for name, kept in self.shapes.items()}

    @property
    def kept(self) -> int:
        """What the result holds: activations and logits."""
        return sum(self.activations.values()) + self.logits

    @property
    def needed(self) -> int:
        """What must be free for the run, at the least; the weights are not counted."""
        return self.kept + self.padding + self.workspace

    def __str__(self):
        rows = list(_grouped(self.shapes))
        rows += [("logits", "", self.logits)] if self.logits else []
        rows += [("kept", "", self.kept), ("needed to run, at least", "", self.needed)]
        rows += [("weights (besides)", "", self.weights)]
        width, shape = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{n:<{width}}  {s:<{shape}}  {pretty(b):>9}" for n, s, b in rows)


def estimate(
    model: Gemma2 | Gemma2Config,
    tokens: Any,
    *,
    lengths: Any = None,
    capture: Captures = (),
    logits: str | None = "all",
    edits: Sequence[Any] = (),
) -> Estimate:
    """What ``run`` with these arguments would keep and need. Nothing is run or allocated.

    Args:
        model: a model, an abstract one (``Gemma2.abstract(config, dtype)``), or a config, which
            stands for a model in float32.
        tokens: as ``run`` takes them; or a tuple (B, T), for any prompts of that size.
        lengths: as ``run`` takes them.
        capture: as ``run`` takes it: addresses, reducers, or a dict of them.
        logits: "all", "last" or None.
        edits: as ``run`` takes them; those that need logits or features of their own count.

    Raises:
        InputError: prompts, a capture or a reducer that ``run`` would refuse.
        SiteError: an address that names nothing here.
    """
    config = model if isinstance(model, Gemma2Config) else model.config
    dtype = jnp.dtype(jnp.float32 if model is config else model.dtype)
    check_logits(logits)
    asked = understand(capture, config.num_hidden_layers)
    if isinstance(tokens, tuple):
        batch, length = _shape(tokens)
        ids = jax.ShapeDtypeStruct((batch, bucket(length)), jnp.int32)
        ends = jax.ShapeDtypeStruct((batch,), jnp.int32)
        # Traced: positions are not looked up in prompts that nobody knows.
        trace = jax.eval_shape
    else:
        prompts = prepare(tokens, config, lengths)
        ids, ends, length = prompts.tokens, prompts.lengths, prompts.length
        trace = _call
    reducers = [
        trace(lambda ids, ends, r=reducer: r.checked(config, ids, ends, length), ids, ends)
        for reducer in asked.reducers
    ]
    size = Size(config, dtype, ids.shape[0], length, ids.shape[1])
    addresses = sorted(asked.addresses, key=lambda address: ORDER[address.site])
    kept = {str(address): address for address in addresses}
    kept |= dict(zip(asked.names, reducers, strict=True))
    leaves = jax.tree.leaves(_abstract(model) if model is config else model)
    return _measure(size, kept, logits, _beyond(reducers, edits), sum(map(_bytes, leaves)))


def check_run(
    config: Gemma2Config,
    leaves: Sequence[jax.Array],
    shape: tuple[int, int, int],
    captures: tuple[Address, ...],
    reducers: Sequence[Reducer],
    logits: str | None,
    edits: Sequence[Any] = (),
) -> None:
    """Refuse a run that cannot fit. Takes microseconds: the estimate is cached.

    Args:
        config: of the model.
        leaves: the model's arrays, which say the dtype and the devices; perhaps traced.
        shape: (B, T, W).
        captures: resolved addresses.
        reducers: as :meth:`jaxtc.reducers.Reducer.checked` gives them.
        logits: "all", "last" or None.
        edits: as given to the run.

    Raises:
        CapacityError: less than :attr:`Estimate.needed` is available.
    """
    data, structure = jax.tree.flatten(tuple(reducers))
    kinds = map(jax.typeof, data)
    shapes = tuple((kind.shape, kind.dtype, kind.weak_type) for kind in kinds)
    size = Size(config, leaves[0].dtype, *shape)
    total = _needed(size, captures, structure, shapes, logits, _beyond(reducers, edits))
    if total >= _SMALL:
        traced = isinstance(leaves[0], jax.core.Tracer)
        check_fits(total, "What this run keeps", None if traced else leaves[0].devices())


@functools.lru_cache(maxsize=256)
def _needed(size, captures, structure, shapes, logits, beyond) -> int:
    reducers = structure.unflatten(
        [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in shapes]
    )
    kept = {str(index): part for index, part in enumerate((*captures, *reducers))}
    return _measure(size, kept, logits, beyond, 0).needed


def kept_by(asked: Asked, size: "Size") -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of what captures keep of prompts of this size, whatever they say.

    Args:
        asked: the captures.
        size: of the run.

    Returns:
        (by name, cut to T tokens; the same still padded to W).

    Raises:
        SiteError, InputError, CapacityError: a reducer that does not fit.
    """
    ids = jax.ShapeDtypeStruct((size.batch, size.width), jnp.int32)
    ends = jax.ShapeDtypeStruct((size.batch,), jnp.int32)
    parts: dict[str, Any] = {str(address): address for address in asked.addresses}
    for name, given in zip(asked.names, asked.reducers, strict=True):
        # Traced: positions are not looked up in prompts that nobody knows.
        check = lambda ids, ends, r=given: r.checked(size.config, ids, ends, size.length)  # noqa: E731
        parts[name] = jax.eval_shape(check, ids, ends)
    return tuple(
        {name: _kept(size, part, cut) for name, part in parts.items()} for cut in (True, False)
    )


def _measure(size: "Size", parts: dict[str, Any], logits, beyond, weights: int) -> Estimate:
    """The estimate for addresses and checked reducers, by name."""
    cut = {name: _kept(size, part, cut=True) for name, part in parts.items()}
    padding = 0
    if size.length < size.width:
        padding = size.logits(logits, size.width) if logits == "all" else 0
        padding += sum(_bytes(_kept(size, part, cut=False)) for part in parts.values())
    whole, features = beyond
    whole |= Address("logits") in parts.values()
    work = size.workspace(whole and logits != "all", features)
    return Estimate(cut, size.logits(logits, size.length), weights, work, padding)


def _beyond(reducers: Sequence[Reducer], edits: Sequence[Any]) -> tuple[bool, int]:
    """Whether all logits are made for these, and the features of their widest transcoder."""
    whole = any(r.site.name == "logits" for r in reducers) or any(e.site == "logits" for e in edits)
    widest = 0
    for part in (*reducers, *edits):
        if isinstance(part, Features | Splice):  # edits of single features need no other
            held = part.transcoder
            for item in held.values() if isinstance(held, Mapping) else [held]:
                widest = max(widest, item.features)
    return whole, widest


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes that a run's arrays depend on. Attributes: T is ``length``, W is ``width``."""

    config: Gemma2Config
    dtype: Any
    batch: int
    length: int
    width: int

    def array(self, address: Address, tokens: int) -> jax.ShapeDtypeStruct:
        """The array of a site, of so many tokens."""
        site = BY_NAME[address.site]
        sizes = {**self.config.sizes, "B": self.batch, "T": tokens, "S": tokens, "1": 1}
        shape = tuple(sizes[letter] for letter in site.axes.split())
        return jax.ShapeDtypeStruct(shape, jnp.float32 if site.float32 else self.dtype)

    def logits(self, which: str | None, tokens: int) -> int:
        """Bytes of the logits that are returned."""
        rows = {"all": tokens, "last": 1, None: 0}[which]
        return self.batch * rows * self.config.vocab_size * 4

    def workspace(self, whole: bool, features: int) -> int:
        """See :attr:`Estimate.workspace`; ``whole``: with logits that are not returned."""
        scores, hidden = Address("attn_scores", 0), Address("mlp_act", 0)
        largest = [_bytes(self.array(address, self.width)) for address in (scores, hidden)]
        largest.append(self.batch * self.width * features * 4)
        largest.append(self.logits("all" if whole else None, self.width))
        return max(largest)


def _kept(size: Size, part: Any, cut: bool) -> Any:
    """Shapes of what is kept of an address or by a checked reducer, before or after the cut."""
    tokens = size.length if cut else size.width
    if isinstance(part, Address):
        return size.array(part, tokens)
    address = Address(*parse(part.address))
    if part.every_layer:
        address = dataclasses.replace(address, layer=0)

    def reduce(reducer, x, positions, lengths):
        def read(name):
            other = size.array(Address(name, address.layer), size.width)
            return jnp.zeros(other.shape, other.dtype)

        context = Context(BY_NAME[address.site], address.layer, positions, lengths, read)
        return reducer.reduce(x, context)

    positions = jax.ShapeDtypeStruct((size.batch, size.width), jnp.int32)
    lengths = jax.ShapeDtypeStruct((size.batch,), jnp.int32)
    full = jax.eval_shape(reduce, part, size.array(address, size.width), positions, lengths)
    if part.every_layer:
        layers = size.config.num_hidden_layers
        full = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), full)
    return jax.eval_shape(lambda kept: part.cut(kept, size.length), full) if cut else full


def _bytes(tree: Any) -> int:
    """Bytes of all arrays, or their shapes, in a pytree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=8)
def _abstract(config: Gemma2Config) -> Gemma2:
    return Gemma2.abstract(config)


def _call(function, *args):
    return function(*args)


def _shape(given: tuple) -> tuple[int, int]:
    if len(given) != 2 or not all(is_whole(size, 1) for size in given):
        raise InputError(
            f"A size is a tuple (B, T) of prompts and tokens, got {given!r}; token ids are given "
            "as lists or arrays."
        )
    return int(given[0]), int(given[1])


def _grouped(shapes: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Rows of the table: layers of one site share a row, with the shape of one of them."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, kept in shapes.items():
        site = re.sub(r"^layers\.\d+\.", "", name)
        shape = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(kept))
        groups.setdefault((site, shape), []).append(_bytes(kept))
    for (name, shape), sizes in groups.items():
        layers = f", {len(sizes)} layers" if len(sizes) > 1 else ""
        yield name + layers, shape, sum(sizes)
