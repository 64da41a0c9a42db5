"""Whether a plan fits an accelerator, and which option would make it fit.

Every suggestion is a plan of its own, computed anew; only those that fit are shown.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from jaxtc.captures.reducers import At
from jaxtc.captures.request import understand
from jaxtc.helpers import gigabytes
from jaxtc.memory.parts import Request
from jaxtc.sharding.mesh import show
from jaxtc.sharding.rules import DATA, MODEL, ShardingError

# Shown for one accelerator.
_SHOWN = 3
# Larger meshes are not looked for.
_MOST_DEVICES = 256
# Nor are more numbers of transcoders.
_MOST_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device of a kind.

    Attributes:
        name: as people call it.
        memory: bytes, as its maker counts them (10⁹ to a GB; 2³⁰ would be up to 7% more).
        usable: the fraction of it that a plan may fill.
        raised: the fraction that JAX can be told to take; ``usable`` where nothing is to be told.
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
            nothing that is tried would.
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
    """One option, at one strength: the request with it, its spelling and its meaning."""

    change: Callable[[Request], Request]
    option: str
    meaning: str
    is_mesh: bool = False


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
        device: that it shall fit.
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
        needed = _needed(functools.reduce(lambda changed, step: step.change(changed), steps, asked))
        if needed is None or needed > usable:
            return None
        option = " ".join(step.option for step in steps)
        return Suggestion(option, "; ".join(step.meaning for step in steps), needed)

    # All but meshes, of which each is another trade, only ever take less from step to step.
    ends = [range(len(s)) if s[0].is_mesh else [len(s) - 1] for s in group]
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
    """Each kind of change at each strength, the mildest first."""
    meshes = sorted(_meshes(asked), key=lambda mesh: (math.prod(mesh), mesh))
    same = [mesh for mesh in meshes if math.prod(mesh) == asked.devices]
    more = [mesh for mesh in meshes if math.prod(mesh) > asked.devices]
    yield [_mesh(mesh, "the same devices") for mesh in same]
    yield [_batch(size) for size in _halves(asked.batch)]
    if asked.logits == "all":
        meaning = "keeps the logits of each prompt's last token only"
        yield [_Step(lambda r: dataclasses.replace(r, logits="last"), "--logits last", meaning)]
    if asked.asked.addresses and not asked.new_tokens:
        yield [_last_tokens(asked)]
    if asked.transcoders and asked.transcoder_dtype == "float32":
        meaning = "transcoders with 8 bits of mantissa in place of 24"
        option = "--transcoder-dtype bfloat16"
        change = lambda r: dataclasses.replace(r, transcoder_dtype="bfloat16")  # noqa: E731
        yield [_Step(change, option, meaning)]
    if asked.dtype == "float32":
        meaning = "weights as they were released"
        change = lambda r: dataclasses.replace(r, dtype="bfloat16")  # noqa: E731
        yield [_Step(change, "--dtype bfloat16", meaning)]
    layers = asked.transcoders
    # One by one in every model that there is.
    step = -(-len(layers) // _MOST_STEPS) or 1
    yield [_layers(layers[:count]) for count in range(len(layers) - 1, 0, -step)]
    yield [_mesh(mesh, f"{math.prod(mesh)} devices in place of {asked.devices}") for mesh in more]


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


def _mesh(mesh: tuple[int, int], meaning: str) -> _Step:
    sizes = {DATA: mesh[0], MODEL: mesh[1]}
    changed = tuple(sizes.items())
    change = lambda r: dataclasses.replace(r, mesh=changed)  # noqa: E731
    return _Step(change, f"--mesh {show(sizes)}", meaning, is_mesh=True)


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count = (count + 1) // 2
        yield count


def _batch(size: int) -> _Step:
    return _Step(
        lambda r: dataclasses.replace(r, batch=size),
        f"--batch {size}",
        "fewer prompts a call, in more calls",
    )


def _layers(layers: tuple[int, ...]) -> _Step:
    spelled = ",".join(
        f"{first}-{last}" if last > first else str(first) for first, last in _ranges(layers)
    )
    return _Step(
        lambda r: dataclasses.replace(r, transcoders=layers),
        f"--transcoders {spelled}",
        f"{len(layers)} transcoders at a time",
    )


def _ranges(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of following numbers as (first, last)."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    for _, run in runs:
        held = [number for _, number in run]
        yield held[0], held[-1]


def _last_tokens(asked: Request) -> _Step:
    """Every whole capture reduced to the last token's."""
    given, layers = asked.asked, asked.config.num_hidden_layers
    by_site: dict[str, int] = {}
    for address in given.addresses:
        by_site[address.site] = by_site.get(address.site, 0) + 1
    names = []
    for address in given.addresses:
        if by_site[address.site] == layers:
            names += [address.site] if address.layer in (0, None) else []
        else:
            names.append(str(address))
    reducers = (*(At(name, -1) for name in names), *given.reducers)
    reduced = understand({str(i): r for i, r in enumerate(reducers)}, layers)
    option = " ".join(f"--capture {name}@-1" for name in names)
    return _Step(
        lambda r: dataclasses.replace(r, asked=reduced), option, "keeps the last token's only"
    )
