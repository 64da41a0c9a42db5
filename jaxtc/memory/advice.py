"""Whether a plan fits an accelerator, and which option would make it fit.

Every suggestion is planned again in full; only those that fit are shown.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

from jaxtc.captures.reducers import At
from jaxtc.captures.request import understand
from jaxtc.helpers import gigabytes
from jaxtc.memory.parts import Request
from jaxtc.sharding.mesh import show
from jaxtc.sharding.rules import DATA, MODEL, ShardingError

# Suggestions for one accelerator.
_SHOWN = 3
# Larger meshes are not searched.
_MOST_DEVICES = 256
# Nor are more counts of transcoders.
_MOST_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device of a kind.

    Attributes:
        name: as people call it.
        memory: bytes, as its maker counts them (10⁹ to a GB; 2³⁰ would be up to 7% more).
        usable: the fraction of it that a plan may fill.
        raised: the fraction that JAX can be configured to take, otherwise ``usable``.
    """

    name: str
    memory: int
    usable: float
    raised: float


# Memory: cloud.google.com/tpu/docs/v5e and /v5p ("HBM2 capacity", per chip), and the data sheets of
# the NVIDIA H100 (SXM) and H200. Fractions: on a GPU JAX takes 75% at its start
# (docs.jax.dev/en/latest/201/gpu-memory.html), more when XLA_CLIENT_MEM_FRACTION says so; on a TPU
# it takes all, of which a tenth is left here to the runtime, compiled programs and fragmentation.
ACCELERATORS = (
    Accelerator("TPU v5e", 16 * 10**9, 0.9, 0.9),
    Accelerator("TPU v5p", 95 * 10**9, 0.9, 0.9),
    Accelerator("H100", 80 * 10**9, 0.75, 0.9),
    Accelerator("H200", 141 * 10**9, 0.75, 0.9),
)


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """One way to make a plan fit.

    Attributes:
        option: as ``jaxtc plan`` takes it; several when none alone is enough.
        meaning: what it changes.
        needed: bytes of each device then.
    """

    option: str
    meaning: str
    needed: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a plan fits one kind of accelerator. Numbers are bytes.

    Attributes:
        device: its name.
        memory: of one.
        usable: how much of it a plan may fill.
        needed: by the plan, on each.
        fits: whether it does.
        suggestions: what would make it fit, the smallest change first; empty when it fits, or when
            nothing that was tried does.
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


@dataclasses.dataclass(frozen=True)
class _Step:
    """One option, at one strength: the fields of the request it changes, spelling and meaning."""

    changes: dict[str, Any]
    option: str
    meaning: str


def judge(asked: Request) -> tuple[Verdict, ...]:
    """Whether it fits each accelerator, and what would make it fit.

    Raises:
        ShardingError: an axis of the model that the mesh does not divide.
    """
    needed, verdicts = asked.needed, []
    kinds = None
    for device in ACCELERATORS:
        usable = int(device.memory * device.usable)
        fits = needed <= usable
        kinds = kinds if fits or kinds else list(_kinds(asked))
        found = () if fits else tuple(suggest(asked, kinds, device))
        verdicts.append(Verdict(device.name, device.memory, usable, needed, fits, found))
    return tuple(verdicts)


def suggest(
    asked: Request, kinds: Sequence[list["_Step"]], device: Accelerator
) -> list[Suggestion]:
    """The smallest changes that make a plan fit a device: one option each where one is enough.

    Smaller means, in this order: the same numbers from the same devices, arranged otherwise or
    called more often; less kept; fewer bits; fewer transcoders at a time; more devices.

    Args:
        asked: what does not fit.
        kinds: each kind of change at each strength, the smallest first; the last is more devices.
        device: to fit.
    """
    found = []
    raised = int(device.memory * device.raised)
    if asked.needed <= raised:
        option = f"XLA_CLIENT_MEM_FRACTION={device.raised:g}"
        meaning = f"lets JAX take {device.raised:.0%} of the GPU in place of {device.usable:.0%}"
        found.append(Suggestion(option, meaning, asked.needed))
    usable = int(device.memory * device.usable)
    *kinds, devices = kinds
    more = _mildest(asked, [devices], usable) if devices else None
    kinds = [steps for steps in kinds if steps]
    for count in range(1, len(kinds) + 1):
        alone = filter(None, (_mildest(asked, g, usable) for g in combinations(kinds, count)))
        found += itertools.islice(alone, _SHOWN - len(found) - (more is not None))
        if found:
            break
    found += [more] if more else []
    if not found and devices:
        groups = (g for n in range(1, len(kinds) + 1) for g in combinations(kinds, n))
        tried = (_mildest(asked, (devices, *group), usable) for group in groups)
        found += itertools.islice(filter(None, tried), 1)
    return found


def _mildest(asked: Request, group: Sequence[list[_Step]], usable: int) -> Suggestion | None:
    """The mildest steps of these kinds that fit together, None when none do."""

    def taken(levels: Sequence[int]) -> Suggestion | None:
        steps = [steps[level] for steps, level in zip(group, levels, strict=True)]
        changes = {name: value for step in steps for name, value in step.changes.items()}
        needed = _needed(dataclasses.replace(asked, **changes))
        if needed is None or needed > usable:
            return None
        option = " ".join(step.option for step in steps)
        return Suggestion(option, "; ".join(step.meaning for step in steps), needed)

    # All but meshes, of which each is another trade, only ever take less from step to step.
    ends = [range(len(s)) if "mesh" in s[0].changes else [len(s) - 1] for s in group]
    if not any(map(taken, itertools.product(*ends))):
        return None
    every = itertools.product(*(range(len(steps)) for steps in group))
    tried = map(taken, sorted(every, key=lambda levels: (sum(levels), levels)))
    return next(filter(None, tried))


def _needed(asked: Request) -> int | None:
    """Bytes of each device; None when the mesh does not divide the model."""
    try:
        return asked.needed
    except ShardingError:
        return None


def _kinds(asked: Request) -> Iterator[list[_Step]]:
    """Each kind of change at each strength, the mildest first; the last is more devices."""

    def meshes(wanted: Callable[[int], bool], meaning: str) -> list[_Step]:
        found = sorted(_meshes(asked), key=lambda mesh: (math.prod(mesh), mesh))
        sizes = [{DATA: data, MODEL: model} for data, model in found if wanted(data * model)]
        return [
            _Step(
                {"mesh": tuple(mesh.items())},
                f"--mesh {show(mesh)}",
                meaning.format(math.prod(mesh.values())),
            )
            for mesh in sizes
        ]

    yield meshes(lambda count: count == asked.devices, "the same devices")
    fewer = "fewer prompts a call, in more calls"
    yield [_Step({"batch": size}, f"--batch {size}", fewer) for size in _halves(asked.batch)]
    if asked.logits == "all":
        meaning = "keeps the logits of each prompt's last token only"
        yield [_Step({"logits": "last"}, "--logits last", meaning)]
    if asked.asked.addresses and not asked.new_tokens:
        yield [_last_tokens(asked)]
    for field, option, held, meaning in (
        ("transcoder_dtype", "--transcoder-dtype", asked.transcoders,
         "transcoders with 8 bits of mantissa in place of 24"),
        ("dtype", "--dtype", True, "weights as they were released"),
    ):  # fmt: skip
        if held and getattr(asked, field) == "float32":
            yield [_Step({field: "bfloat16"}, f"{option} bfloat16", meaning)]
    layers = asked.transcoders
    # One by one in every model that there is.
    step = -(-len(layers) // _MOST_STEPS) or 1
    yield [
        _Step(
            {"transcoders": layers[:count]},
            f"--transcoders {_spelled(layers[:count])}",
            f"{count} transcoders at a time",
        )
        for count in range(len(layers) - 1, 0, -step)
    ]
    more = f"{{}} devices in place of {asked.devices}"
    yield meshes(lambda count: count > asked.devices, more)


def _meshes(asked: Request) -> Iterator[tuple[int, int]]:
    """(data, model) of every other mesh that has no fewer devices and divides the model."""
    sizes = dict(asked.mesh)
    now = sizes.get(DATA, 1), sizes.get(MODEL, 1)
    most = min(asked.batch, _MOST_DEVICES)
    rows = {n for n in range(1, most + 1) if asked.batch % n == 0} | {now[0]}
    for model in divisors(asked):
        for data in rows:
            enough = asked.devices <= data * model <= _MOST_DEVICES
            if enough and (data, model) != now:
                yield data, model


def divisors(asked: Request) -> list[int]:
    """Sizes of the mesh axis "model" that divide everything the rules put on it."""
    found = []
    for size in range(1, min(asked.config.num_attention_heads, _MOST_DEVICES) + 1):
        mesh = ((DATA, 1), (MODEL, size))
        if _needed(dataclasses.replace(asked, mesh=mesh)) is not None:
            found.append(size)
    return found


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count = (count + 1) // 2
        yield count


def _spelled(layers: Sequence[int]) -> str:
    """``0-3,7`` of 0, 1, 2, 3, 7."""
    runs = itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    found = [[layer for _, layer in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def _last_tokens(asked: Request) -> _Step:
    """Every whole capture reduced to the last token's."""
    given, layers = asked.asked, asked.config.num_hidden_layers
    count = collections.Counter(address.site for address in given.addresses)
    # A site at every layer is spelled without one.
    names = [a.site if count[a.site] == layers else str(a) for a in given.addresses]
    names = list(dict.fromkeys(names))
    reducers = (*(At(name, -1) for name in names), *given.reducers)
    reduced = understand({str(i): r for i, r in enumerate(reducers)}, layers)
    option = " ".join(f"--capture {name}@-1" for name in names)
    return _Step({"asked": reduced}, option, "keeps the last token's only")
