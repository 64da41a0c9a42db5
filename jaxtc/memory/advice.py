"""Whether a plan fits an accelerator, and which options would make it fit.

Every suggestion is planned again in full; only those that fit are shown.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtc.helpers import gigabytes
from jaxtc.memory.parts import Request
from jaxtc.sharding.mesh import show
from jaxtc.sharding.rules import DATA, MODEL, ShardingError

_SHOWN = 3  # suggestions for one accelerator
# The largest mesh, and the most counts of transcoders, that are tried.
_MOST_DEVICES, _MOST_STEPS = 256, 64


class Accelerator(NamedTuple):
    """One device of a kind; ``memory`` in bytes, as its maker counts them (10⁹ to a GB).

    A plan may fill the fraction ``usable`` of it; JAX can be configured to take ``raised``.
    """

    name: str
    memory: int
    usable: float
    raised: float


# Memory: cloud.google.com/tpu/docs/v5e and /v5p ("HBM2 capacity", per chip), and the data sheets of
# the NVIDIA H100 (SXM) and H200. Fractions: on a GPU JAX takes 75% at its start
# (docs.jax.dev/en/latest/201/gpu-memory.html), more when XLA_CLIENT_MEM_FRACTION says so; on a TPU
# it takes all, of which a tenth is left to the runtime, compiled programs and fragmentation.
ACCELERATORS = (
    Accelerator("TPU v5e", 16 * 10**9, 0.9, 0.9),
    Accelerator("TPU v5p", 95 * 10**9, 0.9, 0.9),
    Accelerator("H100", 80 * 10**9, 0.75, 0.9),
    Accelerator("H200", 141 * 10**9, 0.75, 0.9),
)


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """One way to make a plan fit: options of ``jaxtc plan``, what they change, bytes per device."""

    option: str
    meaning: str
    needed: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a plan fits one kind of accelerator; sizes are bytes of one device.

    ``suggestions`` come smallest change first; there are none when it fits, or when nothing that
    was tried does.
    """

    device: str
    memory: int
    usable: int
    needed: int
    fits: bool
    suggestions: tuple[Suggestion, ...]

    @property
    def advice(self) -> str:
        """The suggestions in a line."""
        if self.fits:
            return f"{self.needed / self.memory:.0%} of {gigabytes(self.memory)}"
        found = [f"{one.option} ({gigabytes(one.needed)})" for one in self.suggestions]
        return "; or ".join(found) or "nothing that was tried would fit"


class _Change(NamedTuple):
    """Another value of one field of a request, and what that means for the user."""

    field: str
    value: Any
    meaning: str
    spelled: str = ""

    @property
    def option(self) -> str:
        """As the command line takes it."""
        return f"--{self.field.replace('_', '-')} {self.spelled or self.value}"


def judge(asked: Request) -> tuple[Verdict, ...]:
    """Whether it fits each accelerator, and what would make it fit.

    Raises:
        ShardingError: an axis of the model that the mesh does not divide.
    """
    needed, kinds, verdicts = asked.needed, [*_kinds(asked)], []
    for device in ACCELERATORS:
        usable = int(device.memory * device.usable)
        found = [] if needed <= usable else _suggestions(asked, kinds, usable)
        if usable < needed <= int(device.memory * device.raised):
            option = f"XLA_CLIENT_MEM_FRACTION={device.raised:g}"
            meaning = f"lets JAX take {device.raised:.0%} of the GPU, not {device.usable:.0%}"
            found = [Suggestion(option, meaning, needed), *found]
        sizes = device.memory, usable, needed, needed <= usable
        verdicts.append(Verdict(device.name, *sizes, tuple(found[:_SHOWN])))
    return tuple(verdicts)


def _suggestions(asked: Request, kinds: Sequence[list[_Change]], usable: int) -> list[Suggestion]:
    """The changes that are enough by themselves, else the least that are together.

    Smaller means, in this order: the same numbers from the same devices, arranged otherwise or
    called more often; fewer logits; fewer bits; fewer transcoders at a time; more devices.
    """
    *same, devices = kinds
    least = functools.partial(_least, asked, usable)
    alone = [*filter(None, (least([kind]) for kind in same))]
    found = [*(alone or [least(same)])[: _SHOWN - 1], least([devices])]
    return [*filter(None, found)] or [*filter(None, [least(kinds)])]


def _least(asked: Request, usable: int, kinds: Iterable[list[_Change]]) -> Suggestion | None:
    """The first kinds of change that together make it fit, each as mild as it may be.

    None when all of them are not enough.
    """

    def needed(*changes: _Change) -> float:
        return _needed(dataclasses.replace(asked, **{one.field: one.value for one in changes}))

    kinds, taken = [kind for kind in kinds if kind], []
    for kind in kinds:
        taken.append(min(kind, key=lambda one: needed(*taken, one)))
        if needed(*taken) <= usable:
            break
    else:
        return None
    # Then each as mild as the others allow, or left out; the last kinds first.
    for at in reversed(range(len(taken))):
        choices = [], *([one] for one in kinds[at])
        milder = ([*taken[:at], *choice, *taken[at + 1 :]] for choice in choices)
        taken = next(changes for changes in milder if needed(*changes) <= usable)
    option = " ".join(one.option for one in taken)
    return Suggestion(option, "; ".join(one.meaning for one in taken), needed(*taken))


@functools.lru_cache(maxsize=4096)
def _needed(asked: Request) -> float:
    """Bytes of each device; infinite when the mesh does not divide the model."""
    try:
        return asked.needed
    except ShardingError:
        return math.inf


def _kinds(asked: Request) -> Iterator[list[_Change]]:
    """Each kind of change at each strength, the mildest first; the last is more devices."""
    same, more = _meshes(asked)
    yield same
    fewer = "fewer prompts a call, in more calls"
    sizes = [1 << power for power in reversed(range((asked.batch - 1).bit_length()))]
    yield [_Change("batch", size, fewer) for size in sizes]
    if asked.logits == "all":
        yield [_Change("logits", "last", "keeps the logits of each prompt's last token only")]
    layers = asked.transcoders
    if layers and asked.transcoder_dtype == "float32":
        meaning = "transcoders with 8 bits of mantissa in place of 24"
        yield [_Change("transcoder_dtype", "bfloat16", meaning)]
    if asked.dtype == "float32":
        yield [_Change("dtype", "bfloat16", "weights as they were released")]
    # One by one in every released model.
    counts = range(len(layers) - 1, 0, -len(layers) // _MOST_STEPS or -1)
    counts = () if asked.cross_layer else counts  # none of its layers works alone
    yield [
        _Change("transcoders", layers[:n], f"{n} transcoders at a time", _spelled(layers[:n]))
        for n in counts
    ]
    yield more


def _meshes(asked: Request) -> tuple[list[_Change], list[_Change]]:
    """Meshes that divide model and batch: of the same devices, and of more, the fewest first."""
    rows = [n for n in range(1, min(asked.batch, _MOST_DEVICES) + 1) if asked.batch % n == 0]
    same, more = [], []
    for count, data, model in sorted((n * m, n, m) for n in rows for m in divisors(asked)):
        mesh = {DATA: data, MODEL: model}
        into, meaning = more, f"{count} devices in place of {asked.devices}"
        if count == asked.devices:
            into, meaning = same, "the same devices"
        if asked.devices <= count <= _MOST_DEVICES:
            into.append(_Change("mesh", tuple(mesh.items()), meaning, show(mesh)))
    return same, more


def divisors(asked: Request) -> list[int]:
    """Sizes of the mesh axis "model" that divide everything the rules put on it."""
    sizes = range(1, min(asked.config.num_attention_heads, _MOST_DEVICES) + 1)
    return [n for n in sizes if _needed(dataclasses.replace(asked, mesh=((MODEL, n),))) < math.inf]


def _spelled(layers: Sequence[int]) -> str:
    """``0-3,7`` of 0, 1, 2, 3, 7."""
    runs = itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    found = [[layer for _, layer in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
