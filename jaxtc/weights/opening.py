"""Opening a model, however it is kept: the one place that knows every way, for loading, converting
and planning. Nothing but headers and configs is read before a parameter is asked for."""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import ConfigError, JaxtcError, SourceError
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.adapters import adapter as adapters
from jaxtc.weights.adapters.settings import SETTINGS, LoraSettings
from jaxtc.weights.checkpoints.google import METADATA, GoogleTree
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.checkpoints.sidecar import SIDECAR
from jaxtc.weights.files import local, shards
from jaxtc.weights.files.generation import GENERATION, choices, read_config, read_generation
from jaxtc.weights.files.model import files_of, open_checkpoint, patterns
from jaxtc.weights.names import parameter_names
from jaxtc.weights.sources import hub
from jaxtc.weights.sources.resolve import (
    ADAPTER,
    CONVERTED,
    GOOGLE,
    MODEL,
    Source,
    in_bucket,
    resolve,
)

# Formats that hold the parameters and nothing beside them, so that there is nothing to ignore.
_WHOLE = {
    CONVERTED: "a checkpoint of jaxtc's own, which holds the parameters of the model only",
    GOOGLE: "Google's Flax tree, which is read whole or not at all",
}

# `ignore` where nothing of an adapter but its base is wanted: whatever head it has.
_ANY_HEAD = ("*",)

# (name of a parameter, dtype, sharding) -> (the array, what is wrong with it or an empty string).
Reader = Callable[[str, np.dtype, NamedSharding | None], tuple[np.ndarray | jax.Array, str]]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model of which no array is read yet.

    Attributes:
        where: its folder, for messages.
        config: of the model that is read.
        dtypes: as its parameters are stored, by our name.
        read: gives a parameter.
        weights: the files that decide what is read.
        folders: where files beside the weights may be, a tokenizer's: those in the first count.
        settings: what its ``config.json`` says.
    """

    where: Path
    config: Gemma2Config
    dtypes: Mapping[str, np.dtype]
    read: Reader
    weights: Sequence[Path]
    folders: Sequence[Path]
    settings: Mapping[str, Any]


def refuse_unfit(
    name: str,
    format: str,
    *,
    base: str | Path | None = None,
    config: Gemma2Config | str | Path | None = None,
    ignore: str | Sequence[str] = (),
) -> None:
    """Raise SourceError for an argument that means nothing for a model that is kept like this.

    ``name`` and ``format`` are a source's; the others are as in :func:`jaxtc.load_model`.
    """
    if base is not None and format != ADAPTER:
        raise SourceError(
            f"base={str(base)!r} is for an adapter's folder ({SETTINGS}), and {name} is a model "
            "of its own."
        )
    if config is not None and format != GOOGLE:
        raise SourceError(
            "config= is for a checkpoint that has none of its own (Google's Flax tree), and "
            f"{name} has one."
        )
    if patterns(ignore) and format in _WHOLE:
        raise SourceError(
            f"ignore={ignore!r} leaves tensors out of a folder in Hugging Face's layout or of an "
            f"adapter's, and {name} is {_WHOLE[format]}. Leave ignore out."
        )


@contextlib.contextmanager
def open_weights(
    source: Source,
    *,
    base: str | Path | None = None,
    config: Gemma2Config | str | Path | None = None,
    ignore: str | Sequence[str] = (),
    verify: bool = False,
    beside: Sequence[str] = (),
) -> Iterator[Opened]:
    """The model of a source, downloaded first when it is on the hub.

    Args:
        source: what :func:`~jaxtc.weights.sources.resolve.resolve` found.
        base, config, ignore, verify: as in :func:`jaxtc.load_model`.
        beside: files of a repository on the hub to fetch too, if they are there.

    Raises:
        SourceError, ConfigError, WeightsError: as :func:`jaxtc.load_model`.
    """
    source = source.fetched()
    ignore = patterns(ignore)
    refuse_unfit(source.name, source.format, base=base, config=config, ignore=ignore)
    for name in beside if source.repo else ():
        hub.download_if_there(source.repo, name, source.path.name)
    with contextlib.ExitStack() as stack:
        if source.format == ADAPTER:
            yield _adapted(source, base, ignore, verify, beside, stack)
        elif source.format == GOOGLE:
            yield _google(source, config, verify)
        elif source.format == CONVERTED:
            yield _converted(source, verify)
        else:
            weights = files_of(source.path)
            if verify:
                hub.verify_files(weights)
            opened = stack.enter_context(open_checkpoint(source.path, ignore))
            dtypes = {ours: opened.entry(name.hf).dtype for ours, name in opened.names.items()}
            where = source.path
            raw = json.loads((where / "config.json").read_bytes())
            yield Opened(where, opened.config, dtypes, opened.read, weights, [where], raw)


def _converted(source: Source, verify: bool) -> Opened:
    checkpoint = Converted(source.path, MODEL, verify)
    dtypes = {name: one.dtype for name, one in checkpoint.sidecar.arrays.items()}

    def read(ours: str, dtype: np.dtype, sharding: NamedSharding | None = None):
        array, problem = checkpoint.read(ours, dtype)
        spread = sharding is not None and not problem
        return (shards.spread(array, sharding) if spread else array), problem

    path, said = source.path, checkpoint.sidecar
    config = checkpoint.model().config
    return Opened(path, config, dtypes, read, [path / SIDECAR], [path], said.config)


def google_tree(source: Source, config: Gemma2Config | str | Path | None = None) -> GoogleTree:
    """Google's tree in a folder, with the config that is given, or that lies there or around it."""
    tree = source.tree
    near = [folder for folder in dict.fromkeys([tree, source.path, tree.parent]) if folder]
    if isinstance(config, str | Path):
        path = local.expand(config)
        config = Gemma2Config.from_file(path / "config.json" if path.is_dir() else path)
    elif config is None:
        here = [folder for folder in near if local.has(folder, "config.json")]
        config = read_config(here[0]) if here else None
    elif not isinstance(config, Gemma2Config):
        raise ConfigError(f"config is {config!r}, expected a Gemma2Config or a config.json.")
    return GoogleTree(tree, config)


def _google(source: Source, config: Gemma2Config | str | Path | None, verify: bool) -> Opened:
    if verify:
        hub.verify_files([source.tree / METADATA])
    opened = google_tree(source, config)
    files = sorted(path for path in source.tree.rglob("*") if path.is_file())
    folders = [source.tree, source.tree.parent]
    config = opened.config
    settings = config.to_dict()
    return Opened(source.path, config, opened.dtypes, opened.read, files, folders, settings)


def base_of(
    source: Source, base: str | Path | None = None, ignore: Sequence[str] = _ANY_HEAD
) -> Source:
    """The base model of an adapter: the one that is given, or that its settings name: a hub id, or
    a folder, seen from here or beside the adapter's.

    Raises:
        SourceError: none is named, or it is not found, or leads to something else than a model.
    """
    settings = LoraSettings.read(source.path, ignore)
    named = settings.base if base is None else base
    advice = (
        f"{source.name} is a LoRA adapter; give the model that it was trained on: "
        f"load_model({source.name!r}, base=...), a hub id or a folder."
    )
    if not named or not str(named).strip():
        raise SourceError(f"{settings.path} names no base model. {advice}")
    revision = settings.revision if base is None else None
    if base is None and (in_bucket(str(named)) or str(named).startswith("~")):
        raise SourceError(f"{settings.path} names {named!r}, which is not followed. {advice}")
    try:
        here = local.find(named)
        if base is None and here is None and (beside := _beside(source, named)):
            named, revision = beside, None
        if here is not None:
            revision = None
        found = resolve(named, MODEL, revision=revision)
        if found.format == ADAPTER:
            raise SourceError(
                f"{named} is an adapter too. Merge that one first: jaxtc.convert({str(named)!r}, "
                "out, to='safetensors')."
            )
        return found
    except JaxtcError as error:
        raise type(error)(f"{error} {advice}") from error


def _beside(source: Source, named: str | Path) -> Path | None:
    """A relative path in an adapter's settings, from its own folder: in it or right beside it.

    A path that leads further up, or a link out of there, is not followed.
    """
    path = Path(named)
    if source.repo or path.is_absolute():
        return None
    around = source.path.resolve().parent
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        for folder in (source.path.resolve(), around):
            target = (folder / path).resolve()
            inside = target.is_relative_to(around) and target not in (around, source.path.resolve())
            if inside and target.is_dir():
                return target
    return None


def _adapted(
    source: Source,
    base: str | Path | None,
    ignore: Sequence[str],
    verify: bool,
    beside: Sequence[str],
    stack: contextlib.ExitStack,
) -> Opened:
    settings = LoraSettings.read(source.path, ignore)
    below = base_of(source, base, ignore)
    files = adapters.files_of(source.path)
    if verify:
        hub.verify_files(files)
    try:
        below = below.fetched()
        of_base = () if below.format in _WHOLE else ignore  # then they are the adapter's alone
        opened = stack.enter_context(
            open_weights(below, ignore=of_base, verify=verify, beside=beside)
        )
    except JaxtcError as error:
        raise type(error)(
            f"{error} It is the base model of the adapter {source.name}; another is given with "
            "base=..., a hub id or a folder (of a quantised one, the model that it was made from)."
        ) from error
    made = stack.enter_context(adapters.open_adapter(source.path, settings, opened.config, ignore))
    if made.doubled:
        warnings.warn(
            f"{source.name} has a LoRA on the embedding or on the output matrix, which are one "
            "matrix in its base model. As in PEFT's merge_and_unload, it is added to that one, so "
            "to both; the model that was trained had it on one side only, and computes otherwise.",
            stacklevel=2,
        )
    names = {name.ours: name for name in parameter_names(made.config)}

    def read(ours: str, dtype: np.dtype, sharding: NamedSharding | None = None):
        return made.read(opened.read, names[ours], dtype, sharding)

    dtypes = {ours: opened.dtypes.get(ours, opened.dtypes["embed.weight"]) for ours in names}
    weights = [*files, *opened.weights]
    folders = [source.path, *opened.folders]
    sizes = made.config.to_dict()
    changed = {key: sizes[key] for key in ("vocab_size", "tie_word_embeddings")}
    settings = {**opened.settings, **changed}
    return Opened(source.path, made.config, dtypes, read, weights, folders, settings)


def choices_of(source: Source) -> dict[str, Any]:
    """What the ``generation_config.json`` of a model asks for and jaxtc does not take from it, see
    :func:`jaxtc.weights.files.generation.choices`; of an adapter, its own one's, else its base's.

    Raises:
        SourceError, ConfigError, WeightsError: as :func:`~jaxtc.weights.load_model.load_config`.
    """
    source = source.fetched()
    if source.format == ADAPTER and not local.has(source.path, GENERATION):
        return choices_of(dataclasses.replace(base_of(source), kind=source.kind))
    if source.format == CONVERTED:  # in a bucket, perhaps
        found = Converted(source.path, MODEL)
        content = found.content(GENERATION) if GENERATION in found.sidecar.files else None
    else:
        content = read_generation(source.path)
    return choices(content, str(source.path / GENERATION))


def config_of(source: Source, base: str | Path | None = None) -> Gemma2Config:
    """The config of a source, of which nothing else is fetched.

    Raises:
        SourceError, ConfigError, WeightsError: as :func:`~jaxtc.weights.load_model.load_config`.
    """
    source = source.fetched()
    refuse_unfit(source.name, source.format, base=base)
    if source.format == GOOGLE:
        return google_tree(source).config
    if source.format != ADAPTER:
        return read_config(source.path)
    below = base_of(source, base)
    config = config_of(dataclasses.replace(below, kind=source.kind))
    if not local.has(source.path, adapters.TENSORS):
        return config
    with adapters.open_adapter(source.path, LoraSettings.read(source.path), config) as made:
        return made.config
