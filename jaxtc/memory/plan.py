"""What each device of a mesh will hold, from shapes alone: nothing is loaded, nothing allocated."""

import dataclasses
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxtc.captures.request import Captures, check_logits, check_per_token, understand
from jaxtc.errors import InputError, did_you_mean
from jaxtc.helpers import columns, for_json, gigabytes, is_whole, whole_number
from jaxtc.memory.advice import Verdict, divisors, judge
from jaxtc.memory.parts import Part, Request
from jaxtc.model.config import Gemma2Config
from jaxtc.sharding.mesh import MeshLike, mesh_sizes
from jaxtc.sharding.rules import DATA, MODEL, RULES, ShardingError
from jaxtc.tap.sites import check_layer
from jaxtc.weights.files.arrays import check_dtype
from jaxtc.weights.files.layout import DEFAULT_WIDTH
from jaxtc.weights.load_model import load_config

# Gemma Scope's names of widths are powers of two.
_NAMES = "16k", "32k", "65k", "131k", "262k", "524k", "1m"
WIDTHS = {name: 2**power for power, name in enumerate(_NAMES, 14)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``print`` it for a table.

    Attributes:
        model: the name that was given.
        request: what is planned.
        parts: what each device holds, a line each.
        verdicts: for each accelerator, whether that fits, and what would make it fit.
        notes: what the mesh means for this model, a sentence each.
    """

    model: str
    request: Request
    parts: tuple[Part, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def per_device(self) -> int:
        """Bytes that each device must have."""
        return sum(part.per_device for part in self.parts)

    @property
    def total(self) -> int:
        """Bytes of the whole arrays, each counted once."""
        return sum(part.total for part in self.parts)

    def __getitem__(self, name: str) -> Part:
        return {part.name: part for part in self.parts}.get(name) or Part(name, 0, 0, "")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it; numbers are bytes."""
        asked = self.request
        fields = {name: value for name, value in vars(asked).items() if name != "config"}
        return for_json({
            "model": self.model,
            **fields,
            "mesh": dict(asked.mesh),
            "rules": dict(asked.rules),
            "devices": asked.devices,
            "capture": [*map(str, asked.capture.addresses), *asked.capture.names],
            "parts": [*map(dataclasses.asdict, self.parts)],
            "per_device": self.per_device,
            "total": self.total,
            "fits": [*map(dataclasses.asdict, self.verdicts)],
            "notes": self.notes,
        })  # fmt: skip

    def __str__(self):
        rows = [(part.name, gigabytes(part.per_device), part.detail) for part in self.parts]
        rows.append(("each device", gigabytes(self.per_device), ""))
        rows += [
            (one.device, "fits" if one.fits else "does not fit", one.advice)
            for one in self.verdicts
        ]
        return columns(rows, "<><")


def plan(
    model: str | Gemma2Config,
    mesh: MeshLike = "data=1,model=1",
    *,
    rules: Mapping[str, str | None] = RULES,
    dtype: Any = "bfloat16",
    batch: int = 1,
    length: int | None = None,
    new_tokens: int = 0,
    capture: Captures = (),
    logits: str | None = "unset",
    transcoders: str | Iterable[int] = (),
    width: str | int = DEFAULT_WIDTH,
    transcoder_dtype: Any = "float32",
    skip: bool = False,
    cross_layer: bool = False,
) -> Plan:
    """What each device of a mesh will hold, whether that fits, and what would make it fit.

    Weights, transcoders, cache, captures and logits are exact; "workspace" is an estimate of what
    the compiled program holds besides, from the widest arrays of a layer. Values of edits are not
    counted, nor are a sweep's variants, which are as many rows more.

    Args:
        model: "2b", "9b", "27b", a hub id, a folder, "embedded", or a config.
        mesh: "data=2,model=4", the sizes by name, or a mesh.
        rules: logical axes to mesh axes.
        dtype: of the weights.
        batch: B, prompts of a call.
        length: T, tokens of the longest prompt; by default 1024, or what the context has room for.
        new_tokens: to plan a :func:`jaxtc.generate`, with its cache; 0 plans a :func:`jaxtc.run`.
        capture: as :func:`jaxtc.run` takes it.
        logits: as :func:`jaxtc.run` takes it; a generation returns none.
        transcoders: of which layers, or "all".
        width: M, features of each, or Gemma Scope's name of it, such as "16k".
        transcoder_dtype: of their parameters.
        skip: whether they have a skip connection.
        cross_layer: whether they are one cross-layer transcoder of all layers, ``width`` features
            each; ``transcoders`` is left out or "all".

    Raises:
        ShardingError: a malformed mesh, or one that does not divide an axis of the model.
        InputError: sizes that no call could have.
        SourceError, ConfigError, SiteError, WeightsError: as the functions that would be called.
    """
    config = model if isinstance(model, Gemma2Config) else load_config(model)
    sizes = mesh_sizes(mesh)
    new_tokens = whole_number("new_tokens", new_tokens)
    if length is None:
        length = max(min(1024, config.max_position_embeddings - new_tokens), 1)
    batch = whole_number("batch", batch, 1)
    length = whole_number("length", length, 1)
    if length + new_tokens > config.max_position_embeddings:
        raise InputError(
            f"{length} tokens and {new_tokens} new ones exceed this model's context of "
            f"{config.max_position_embeddings}."
        )
    if logits == "unset":
        logits = None if new_tokens else "all"
    check_logits(logits)
    if logits and new_tokens:
        raise InputError("A generation gives no logits back; capture='logits' keeps them.")
    understood = understand(capture, config.num_hidden_layers)
    if new_tokens:
        check_per_token(understood)
    if cross_layer and transcoders not in ((), "all"):
        raise InputError(
            f"transcoders is {transcoders!r}, but a cross-layer transcoder is of all layers: leave "
            "it out."
        )
    asked = Request(
        config, tuple(sizes.items()), tuple(rules.items()), check_dtype(dtype).name, batch, length,
        new_tokens, understood, logits,
        _layers("all" if cross_layer else transcoders, config.num_hidden_layers),
        features_of(width), check_dtype(transcoder_dtype).name, skip, cross_layer,
    )  # fmt: skip
    name = model if isinstance(model, str) else "this model"
    return Plan(name, asked, _checked(asked), judge(asked), tuple(_notes(asked)))


def features_of(width: str | int) -> int:
    """M of a width: ``"16k"`` is 16384.

    Raises:
        InputError: neither a name nor a positive number.
    """
    found = WIDTHS.get(width.lower(), width) if isinstance(width, str) else width
    if isinstance(found, str) and re.fullmatch(r"\d{1,9}", found):
        found = int(found)
    if not is_whole(found, 1):
        raise InputError(
            f"width is {width!r}, expected a number of features or Gemma Scope's name of it: "
            f"{', '.join(WIDTHS)}.{did_you_mean(str(width), WIDTHS)}"
        )
    return int(found)


def _layers(given: str | Iterable[int], count: int) -> tuple[int, ...]:
    """The layers that have a transcoder."""
    everywhere = isinstance(given, str) and given == "all"
    try:
        layers = range(count) if everywhere else [*map(operator.index, given)]
    except TypeError:  # letters of another word, too
        raise InputError(
            f"transcoders is {given!r}, expected 'all' or numbers of layers."
        ) from None
    return tuple(sorted({check_layer(layer, count, "transcoders") for layer in layers}))


def _checked(asked: Request) -> tuple[Part, ...]:
    """Its parts; the error of a mesh that does not divide the model names those that do."""
    try:
        return asked.parts()
    except ShardingError as error:
        good = " or ".join(map(str, divisors(asked)))
        hint = f" With these rules, everything here divides over model={good}." if good else ""
        raise ShardingError(f"{error}{hint}") from error


def _notes(asked: Request) -> Iterator[str]:
    """What the mesh means for this model, where that is unusual."""
    sizes, rules, heads = dict(asked.mesh), dict(asked.rules), asked.config.num_key_value_heads
    count = sizes.get(MODEL, 1)
    if heads % count and rules.get("kv_heads") == MODEL:
        yield (
            f"The model has {heads} key/value heads and the mesh {MODEL}={count}: every device "
            "holds their weights and their cache whole."
        )
    if asked.batch % sizes.get(DATA, 1):
        prompts = "1 prompt does" if asked.batch == 1 else f"{asked.batch} prompts do"
        yield f"{prompts} not divide over {DATA}={sizes[DATA]}: every device runs all of them."
    whole = [axis for axis, to in RULES.items() if to is not None and rules.get(axis) is None]
    if whole:
        yield f"Held whole by every device, as the rules say: {', '.join(whole)}."
