"""A model's folder in Hugging Face's layout: one safetensors file, or shards and their index."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import SourceError, WeightsError, some
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.files import local
from jaxtc.weights.files.safetensors import Entry, SafetensorsFile
from jaxtc.weights.names import BUFFERS, EMBEDDING, TIED, Name, parameter_names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PLAIN = re.compile(r"[^/\\:\0]+\.safetensors")  # right in the index's folder, on Windows too
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The open files of the model in a folder, each under the names of its tensors."""

    folder: Path
    config: Gemma2Config
    files: dict[str, SafetensorsFile]

    @functools.cached_property
    def names(self) -> dict[str, Name]:
        """The parameters of a model of this config, by our names."""
        return {name.ours: name for name in parameter_names(self.config)}

    def entry(self, tensor: str) -> Entry:
        """What the header of its file says of a tensor."""
        return self.files[tensor].entries[tensor]

    def read(
        self, ours: str, dtype: np.dtype, sharding: NamedSharding | None = None
    ) -> tuple[np.ndarray | jax.Array, str]:
        """A parameter by our name, as :func:`jaxtc.weights.files.shards.read`."""
        name = self.names[ours]
        array, problem = self.files[name.hf].read(name.hf, dtype, sharding, shape=name.shape)
        return array, problem and f"{name.hf} {problem}"


@contextlib.contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """The model in ``folder``; its tensors are exactly the parameters that its config says.

    Raises SourceError for a folder without weights, ConfigError for a config that is not a
    Gemma-2's, WeightsError for unsound files, a missing shard, or other tensors, all of them named.
    """
    config = Gemma2Config.from_file(folder / "config.json")
    with contextlib.ExitStack() as stack:
        if local.has(folder, SINGLE):
            file = stack.enter_context(SafetensorsFile(folder / SINGLE))
            files = dict.fromkeys(file.entries, file)
        elif local.has(folder, INDEX):
            files = _open_shards(folder, stack)
        else:
            others = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
            found = f"; what it has is {some(others)}" if others else ""
            raise SourceError(
                f"{folder} has neither {SINGLE} nor {INDEX}{found}. jaxtc reads Hugging Face "
                "checkpoints in safetensors format; save_pretrained of transformers writes one."
            )
        checkpoint = Checkpoint(folder, config, files)
        problems = _account(checkpoint) or _untied(checkpoint)
        if problems:
            raise WeightsError(
                f"The tensors in {folder} are not those of the Gemma-2 in its config.json: "
                f"{some(problems, 20)}. Weights and config must come from the same checkpoint."
            )
        yield checkpoint


def files_of(folder: Path) -> list[Path]:
    """The files of the model in a folder that are read: its config and its weights.

    Raises WeightsError for an unsound index of shards.
    """
    names = ["config.json", SINGLE]
    if not local.has(folder, SINGLE) and local.has(folder, INDEX):
        names = ["config.json", INDEX, *sorted(set(read_index(folder / INDEX).values()))]
    return [folder / name for name in names if local.has(folder, name)]


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: the file name of each tensor.

    Raises WeightsError when it is not an index, or names files outside its folder.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as an index of shards: {error}.") from error
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"{path} has no weight_map, which says where each tensor is.")
    outside = sorted({repr(name) for name in shards.values() if not _PLAIN.fullmatch(str(name))})
    if outside:
        raise WeightsError(
            f"{path} points to {some(outside)}; an index may only name .safetensors files in its "
            "own folder. Do not use this checkpoint unless you know where it comes from."
        )
    return shards


def _check_inside(folder: Path, name: str) -> None:
    """Refuse a shard that is a link out of the folder, except into the hub cache's own blobs."""
    root, target = folder.resolve(), (folder / name).resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root) and not target.is_relative_to(blobs):
        raise WeightsError(
            f"{folder / name} is a link to {target}, outside its folder, and is not followed. "
            "Copy the file here, or give the folder that holds the files themselves."
        )


def _open_shards(folder: Path, stack: contextlib.ExitStack) -> dict[str, SafetensorsFile]:
    """The shards, by the names of the tensors that they and the index agree on."""
    shards = read_index(folder / INDEX)
    names = sorted(set(shards.values()))
    missing = [name for name in names if not local.has(folder, name)]
    if missing:
        raise WeightsError(
            f"{folder} lacks {some(missing)} of the {len(names)} files that {INDEX} names. "
            "Download or copy them too."
        )
    for name in names:
        _check_inside(folder, name)
    opened = {name: stack.enter_context(SafetensorsFile(folder / name)) for name in names}
    there = {(tensor, name) for name, file in opened.items() for tensor in file.entries}
    said = shards.items()
    problems = [
        f"{tensor} is not in {name}, where the index says it is"
        for tensor, name in sorted(said - there)
    ]
    for tensor, name in sorted(there - said):
        where = f"in {shards[tensor]} by the index" if tensor in shards else "not in the index"
        problems.append(f"{tensor} is in {name} but {where}")
    if problems:
        raise WeightsError(
            f"The files in {folder} do not agree with {INDEX}: {some(problems, 20)}. They may come "
            "from two different checkpoints; fetch them again."
        )
    return {tensor: opened[name] for tensor, name in said}


def _account(checkpoint: Checkpoint) -> list[str]:
    """Everything that keeps the tensors from being the parameters, from the headers alone."""
    expected = {name.hf: name for name in checkpoint.names.values()}
    problems = [f"{hf} is missing" for hf in expected if hf not in checkpoint.files]
    expected[TIED] = expected[EMBEDDING]
    for hf in checkpoint.files:
        entry, name = checkpoint.entry(hf), expected.get(hf)
        if name is None:
            if not BUFFERS.fullmatch(hf):
                problems.append(f"{hf} is not a tensor of this model")
            continue
        if entry.shape != name.hf_shape:
            axes = name.hf_axes.replace(" ", ", ")
            problems.append(f"{hf} has shape {entry.shape}, not {name.hf_shape} ({axes})")
        if entry.fault:
            problems.append(f"{hf} {entry.fault}")
    return problems


def _untied(checkpoint: Checkpoint) -> list[str]:
    """A problem when a stored output matrix is not the embedding that the config says it is."""
    if TIED not in checkpoint.files:
        return []
    ours, theirs = (
        checkpoint.files[hf].read(hf, checkpoint.entry(hf).dtype)[0] for hf in (EMBEDDING, TIED)
    )
    if np.array_equal(ours, theirs):
        return []
    return [f"{TIED} differs from {EMBEDDING}, to which the config ties it"]
