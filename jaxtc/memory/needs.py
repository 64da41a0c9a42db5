"""What a run needs, estimated before it runs, and whether that much memory is available."""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtc.captures.base import Reducer
from jaxtc.captures.reducers import Features
from jaxtc.captures.request import Captures, check_logits, understand
from jaxtc.edits.base import Edit
from jaxtc.edits.features import Splice
from jaxtc.errors import CapacityError, InputError
from jaxtc.helpers import columns, explicit_transfers, gigabytes, is_whole
from jaxtc.memory.account import Size, bytes_of
from jaxtc.memory.available import available
from jaxtc.memory.parts import count_parameters
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket, prepare
from jaxtc.tap.sites import LOGITS, ORDER, Address
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder

# Below this, the machine is not asked.
_SMALL = 64 * 2**20


def check_fits(bytes_needed: int, what: str, devices: Collection[jax.Device] | None = None) -> None:
    """Refuse what cannot fit, before it is computed.

    Args:
        bytes_needed: at least, over all devices.
        what: what needs them, for the message: "What this run keeps".
        devices: where, such as those of the weights; arrays are assumed to be spread evenly over
            them. The first one of this process by default.

    Raises:
        CapacityError: less than that is available.
    """
    devices = devices or jax.local_devices()[:1]
    mine = [device for device in devices if device.process_index == jax.process_index()]
    free = available(mine[0]) if mine and bytes_needed >= _SMALL else None
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
        workspace: of the largest intermediate array (scores, the MLP's hidden layer, a transcoder's
            features, or logits that are not returned); the compiled program holds some more.
        padding: of what the program returns, until it is cut to the prompts' length.
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
        return columns([(name, shape, gigabytes(size)) for name, shape, size in rows], "<<>")


@explicit_transfers
def estimate(
    model: Gemma2 | Gemma2Config,
    tokens: Any,
    *,
    lengths: Any = None,
    attention_mask: Any = None,
    tokenizer: Any = None,
    capture: Captures = (),
    logits: str | None = "all",
    edits: Sequence[Any] = (),
) -> Estimate:
    """What ``run`` with these arguments would keep and need. Nothing is run or allocated.

    Args:
        model: a model, an abstract one (``Gemma2.abstract(config, dtype)``), or a config, which
            stands for a model in float32.
        tokens: as ``run`` takes them; or a tuple (B, T), for any prompts of that size.
        lengths, attention_mask, tokenizer, capture, logits, edits: as ``run`` takes them.

    Raises:
        InputError, SiteError: as ``run``.
    """
    if isinstance(model, Gemma2Config):
        config, dtype, weights = model, np.dtype(np.float32), 4 * count_parameters(model)
    else:
        config, dtype, weights = model.config, model.dtype, bytes_of(model)
    check_logits(logits)
    asked = understand(capture, config.num_hidden_layers)
    if isinstance(tokens, tuple):
        if lengths is not None or attention_mask is not None:
            raise InputError("A size (B, T) has no lengths or mask; give token ids as lists.")
        if len(tokens) != 2 or not all(is_whole(n, 1) for n in tokens):
            raise InputError(
                f"A size is a tuple (B, T) of prompts and tokens, got {tokens!r}; token ids are "
                "given as lists or arrays."
            )
        batch, length = map(int, tokens)
    else:
        prompts = prepare(
            tokens, config, lengths, attention_mask=attention_mask, tokenizer=tokenizer
        )
        batch, length = len(prompts.tokens), prompts.length
    size = Size(config, dtype, batch, length, bucket(length))
    reducers = size.checked(asked) if isinstance(tokens, tuple) else asked.checked(config, prompts)
    by_site = sorted(asked.addresses, key=lambda address: ORDER[address.site])
    parts = {str(address): address for address in by_site}
    parts |= zip(asked.names, reducers, strict=True)
    return _measure(size, parts, logits, _beyond(parts.values(), edits), weights)


def check_run(
    config: Gemma2Config,
    leaves: Sequence[jax.Array],
    shape: tuple[int, int],
    captures: tuple[Address, ...],
    reducers: Sequence[Reducer],
    logits: str | None,
    edits: Sequence[Any] = (),
) -> None:
    """Refuse a run that cannot fit. Takes microseconds: the estimate is cached.

    Args:
        config: of the model.
        leaves: the model's arrays, for their dtype and devices; may be traced.
        shape: (B, T).
        captures: resolved addresses.
        reducers: checked.
        logits, edits: as given to the run.

    Raises:
        CapacityError: less than :attr:`Estimate.needed` is available.
    """
    data, structure = jax.tree.flatten(tuple(reducers))
    size = Size(config, leaves[0].dtype, *shape, bucket(shape[1]))
    beyond = _beyond((*captures, *reducers), edits)
    total = _needed(size, captures, structure, tuple(map(jax.typeof, data)), logits, beyond)
    if total >= _SMALL:
        traced = isinstance(leaves[0], jax.core.Tracer)
        check_fits(total, "What this run keeps", None if traced else leaves[0].devices())


@functools.lru_cache(maxsize=256)
def _needed(size, captures, structure, avals, logits, beyond) -> int:
    parts = (*captures, *structure.unflatten(avals))
    return _measure(size, dict(enumerate(parts)), logits, beyond, 0).needed


def _measure(size: Size, parts: dict[str, Any], logits, beyond, weights: int) -> Estimate:
    """The estimate for addresses and checked reducers, by name."""
    shapes = {name: size.kept(part, cut=True) for name, part in parts.items()}
    padding = 0
    if size.length < size.width:
        padding = size.logits(logits, size.width).total if logits == "all" else 0
        padding += sum(bytes_of(size.kept(part, cut=False)) for part in parts.values())
    sites, features = beyond
    widest = size.widest(features, sites - {*LOGITS} if logits == "all" else sites)
    work = max(one.total for one in widest)
    return Estimate(shapes, size.logits(logits, size.length).total, weights, work, padding)


def _beyond(
    parts: Iterable[Address | Reducer], edits: Sequence[Edit]
) -> tuple[frozenset[str], int]:
    """The sites of these, and the features of their widest transcoder."""
    both = [*parts, *edits]
    sites = frozenset(part.site.name if isinstance(part, Reducer) else part.site for part in both)
    # Edits of single features compute only those.
    held = [part.transcoder for part in both if isinstance(part, Features | Splice)]
    each = [item for one in held for item in (one.values() if isinstance(one, Mapping) else [one])]
    # Those of all layers of a cross-layer one are there at the last.
    counts = (
        item.features * (len(item.layers) if isinstance(item, CrossLayerTranscoder) else 1)
        for item in each
    )
    return sites, max(counts, default=0)


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
