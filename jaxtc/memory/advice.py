"""Whether a plan fits an accelerator, and which options would make it fit.

Every suggestion is planned again in full; only those that fit are shown.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxtc.captures.reducers import At
from jaxtc.captures.request import understand
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


class _Step(NamedTuple):
    """One option, at one strength: the fields of the request it changes, spelling and meaning."""

    changes: dict[str, Any]
    option: str
    meaning: str


def judge(asked: Request) -> tuple[Verdict, ...]:
    """Whether it fits each accelerator, and what would make it fit.

    Raises:
        ShardingError: an axis of the model that the mesh does not divide.
    """
    needed, verdicts, kinds = asked.needed, [], None
    for device in ACCELERATORS:
        usable, found = int(device.memory * device.usable), []
        fits = needed <= usable
        if not fits:
            kinds = kinds or [*_kinds(asked)]
            if needed <= int(device.memory * device.raised):
                option = f"XLA_CLIENT_MEM_FRACTION={device.raised:g}"
                meaning = f"lets JAX take {device.raised:.0%} of the GPU, not {device.usable:.0%}"
                found = [Suggestion(option, meaning, needed)]
            found = _suggestions(asked, kinds, usable, found)
        verdicts.append(Verdict(device.name, device.memory, usable, needed, fits, tuple(found)))
    return tuple(verdicts)


def _suggestions(
    asked: Request, kinds: Sequence[list[_Step]], usable: int, found: list[Suggestion]
) -> list[Suggestion]:
    """``found``, then the smallest changes that make a plan fit: one option each if one is enough.

    Smaller means, in this order: the same numbers from the same devices, arranged otherwise or
    called more often; less kept; fewer bits; fewer transcoders at a time; more devices.
    """
    *kinds, devices = kinds
    fit = functools.partial(_mildest, asked, usable)
    groups = [[*itertools.combinations(kinds, n)] for n in range(1, len(kinds) + 1)]
    more = [*filter(None, [fit([devices])])]
    for same_size in groups:
        fitting = filter(None, map(fit, same_size))
        found = [*found, *itertools.islice(fitting, _SHOWN - len(found) - len(more))]
        if found:
            break
    last = (fit([devices, *group]) for group in itertools.chain(*groups))
    return [*found, *more] or [*itertools.islice(filter(None, last), 1)]


def _mildest(asked: Request, usable: int, group: Sequence[list[_Step]]) -> Suggestion | None:
    """The mildest steps of these kinds that fit together, None when none do."""

    def taken(steps: Sequence[_Step]) -> Suggestion | None:
        changes = {name: value for step in steps for name, value in step.changes.items()}
        needed = _needed(dataclasses.replace(asked, **changes))
        if needed is None or needed > usable:
            return None
        option = " ".join(step.option for step in steps)
        return Suggestion(option, "; ".join(step.meaning for step in steps), needed)

    if not all(group):
        return None
    # All but meshes, of which each is another trade, only ever take less from step to step.
    ends = [steps if "mesh" in steps[0].changes else steps[-1:] for steps in group]
    if not any(map(taken, itertools.product(*ends))):
        return None
    levels = itertools.product(*(range(len(steps)) for steps in group))
    ordered = sorted(levels, key=lambda chosen: (sum(chosen), chosen))
    tried = ([s[level] for s, level in zip(group, chosen, strict=True)] for chosen in ordered)
    return next(filter(None, map(taken, tried)))


def _needed(asked: Request) -> int | None:
    """Bytes of each device; None when the mesh does not divide the model."""
    try:
        return asked.needed
    except ShardingError:
        return None


def _kinds(asked: Request) -> Iterator[list[_Step]]:
    """Each kind of change at each strength, the mildest first; the last is more devices."""
    same, more, layers = [], [], asked.transcoders
    for data, model in _meshes(asked):
        mesh, count = {DATA: data, MODEL: model}, data * model
        into, meaning = same, "the same devices"
        if count > asked.devices:
            into, meaning = more, f"{count} devices in place of {asked.devices}"
        into.append(_Step({"mesh": tuple(mesh.items())}, f"--mesh {show(mesh)}", meaning))
    yield same
    fewer = "fewer prompts a call, in more calls"
    yield [_Step({"batch": size}, f"--batch {size}", fewer) for size in _halves(asked.batch)]
    if asked.logits == "all":
        meaning = "keeps the logits of each prompt's last token only"
        yield [_Step({"logits": "last"}, "--logits last", meaning)]
    if asked.asked.addresses and not asked.new_tokens:
        yield [_last_tokens(asked)]
    if layers and asked.transcoder_dtype == "float32":
        meaning = "transcoders with 8 bits of mantissa in place of 24"
        yield [_Step({"transcoder_dtype": "bfloat16"}, "--transcoder-dtype bfloat16", meaning)]
    if asked.dtype == "float32":
        yield [_Step({"dtype": "bfloat16"}, "--dtype bfloat16", "weights as they were released")]
    # One by one in every released model.
    counts = range(len(layers) - 1, 0, -len(layers) // _MOST_STEPS or -1)
    yield [
        _Step(
            {"transcoders": layers[:count]},
            f"--transcoders {_spelled(layers[:count])}",
            f"{count} transcoders at a time",
        )
        for count in counts
    ]
    yield more


def _meshes(asked: Request) -> list[tuple[int, int]]:
    """(data, model) of every other mesh that has no fewer devices and divides the model."""
    sizes, batch = dict(asked.mesh), asked.batch
    now = sizes.get(DATA, 1), sizes.get(MODEL, 1)
    rows = {n for n in range(1, min(batch, _MOST_DEVICES) + 1) if batch % n == 0} | {now[0]}
    found = {(data, model) for model in divisors(asked) for data in rows} - {now}
    found = {mesh for mesh in found if asked.devices <= math.prod(mesh) <= _MOST_DEVICES}
    return sorted(found, key=lambda mesh: (math.prod(mesh), mesh))


def divisors(asked: Request) -> list[int]:
    """Sizes of the mesh axis "model" that divide everything the rules put on it."""
    sizes = range(1, min(asked.config.num_attention_heads, _MOST_DEVICES) + 1)
    return [n for n in sizes if _needed(dataclasses.replace(asked, mesh=((MODEL, n),))) is not None]


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
