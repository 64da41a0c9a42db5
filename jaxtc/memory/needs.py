"""What a run needs, estimated before it runs, and whether that much memory is available."""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxtc.captures.base import Reducer
from jaxtc.captures.reducers import Features
from jaxtc.captures.request import Captures, check_logits, understand
from jaxtc.edits.features import Splice
from jaxtc.errors import CapacityError, InputError
from jaxtc.helpers import gigabytes, is_whole
from jaxtc.memory.account import Size, bytes_of, parts_of
from jaxtc.memory.available import available
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket, prepare
from jaxtc.tap.sites import LOGITS, ORDER, Address

# Below this, the machine is not asked.
_SMALL = 64 * 2**20


def check_fits(bytes_needed: int, what: str, devices: Collection[jax.Device] | None = None) -> None:
    """Refuse what cannot fit, before it is computed.

    Args:
        bytes_needed: at least, over all devices.
        what: what needs them, for the message: "What this run keeps".
        devices: where, such as those of the weights; arrays are assumed to be spread evenly over
            several. The first one of this process by default.

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
    needed, there = gigabytes(-(-bytes_needed // count)), gigabytes(free)
    raise CapacityError(
        f"{what} needs at least {needed} of memory, and {there} are available on {place}. Keep "
        "less: a reducer (capture=jaxtc.reducers.At('resid_post', -1) keeps the last token only), "
        "logits='last' or None in place of 'all', fewer layers ('layers.20.mlp_out' in place of "
        "'mlp_out'), or fewer or shorter prompts a call. print(jaxtc.estimate(...)) shows what "
        "each part takes."
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found; ``print`` it for a table. All numbers are bytes.

    Attributes:
        shapes: what is kept, by its key in ``result.activations``: arrays' shapes and dtypes.
        logits: of the returned logits.
        weights: of the model, already allocated once it is loaded.
        workspace: of the largest intermediate array of one layer (scores, the MLP's hidden
            layer, a transcoder's features, or logits that are not returned); the compiled program
            holds some more.
        padding: of what the program returns, until it is cut to the prompts' length; 0 where
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
        return {name: bytes_of(kept) for name, kept in self.shapes.items()}

    @property
    def kept(self) -> int:
        """What the result holds: activations and logits."""
        return sum(self.activations.values()) + self.logits

    @property
    def needed(self) -> int:
        """What must at least be free for the run; the weights are not counted."""
        return self.kept + self.padding + self.workspace

    def __str__(self):
        rows = list(_grouped(self.shapes))
        rows += [("logits", "", self.logits)] if self.logits else []
        rows += [("kept", "", self.kept), ("needed to run, at least", "", self.needed)]
        rows += [("weights (besides)", "", self.weights)]
        width, shape = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{n:<{width}}  {s:<{shape}}  {gigabytes(b):>9}" for n, s, b in rows)


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
        edits: as ``run`` takes them; those that need logits or features count.

    Raises:
        InputError: prompts, a capture or a reducer that ``run`` would refuse.
        SiteError: an address that names nothing here.
    """
    config = model if isinstance(model, Gemma2Config) else model.config
    check_logits(logits)
    asked = understand(capture, config.num_hidden_layers)
    by_site = sorted(asked.addresses, key=lambda address: ORDER[address.site])
    asked = dataclasses.replace(asked, addresses=tuple(by_site))
    model = _abstract(config) if model is config else model
    if isinstance(tokens, tuple):
        batch, length = _shape(tokens)
        size = Size(config, model.dtype, batch, length, bucket(length))
        reducers = size.checked(asked)
    else:
        prompts = prepare(tokens, config, lengths)
        size = Size(
            config, model.dtype, len(prompts.tokens), prompts.length, prompts.tokens.shape[1]
        )
        reducers = asked.checked(config, prompts)
    parts = parts_of(asked, reducers)
    return _measure(size, parts, logits, _beyond(reducers, edits), bytes_of(model))


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
        leaves: the model's arrays, for their dtype and devices; may be traced.
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
    parts = {str(index): part for index, part in enumerate((*captures, *reducers))}
    return _measure(size, parts, logits, beyond, 0).needed


def _measure(size: Size, parts: dict[str, Any], logits, beyond, weights: int) -> Estimate:
    """The estimate for addresses and checked reducers, by name."""
    shapes = {name: size.kept(part, cut=True) for name, part in parts.items()}
    padding = 0
    if size.length < size.width:
        padding = size.logits(logits, size.width) if logits == "all" else 0
        padding += sum(bytes_of(size.kept(part, cut=False)) for part in parts.values())
    all_logits, features = beyond
    widest = size.widest(features)
    all_logits |= any(address in parts.values() for address in map(Address, LOGITS))
    if logits == "all" or not all_logits:
        del widest["logits"]
    work = max(total for total, _ in widest.values())
    return Estimate(shapes, size.logits(logits, size.length), weights, work, padding)


def _beyond(reducers: Sequence[Reducer], edits: Sequence[Any]) -> tuple[bool, int]:
    """Whether all logits are made for these, and the features of their widest transcoder."""
    whole = any(
        site in LOGITS for site in [*(r.site.name for r in reducers), *(e.site for e in edits)]
    )
    widest = 0
    for part in (*reducers, *edits):
        if isinstance(part, Features | Splice):  # edits of single features need no other
            held = part.transcoder
            for item in held.values() if isinstance(held, Mapping) else [held]:
                widest = max(widest, item.features)
    return whole, widest


@functools.lru_cache(maxsize=8)
def _abstract(config: Gemma2Config) -> Gemma2:
    return Gemma2.abstract(config)


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
        groups.setdefault((site, shape), []).append(bytes_of(kept))
    for (name, shape), sizes in groups.items():
        layers = f", {len(sizes)} layers" if len(sizes) > 1 else ""
        yield name + layers, shape, sum(sizes)
