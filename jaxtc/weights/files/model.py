"""A model's folder in Hugging Face's layout: one safetensors file, or shards and their index."""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import SourceError, WeightsError, some
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.files import local
from jaxtc.weights.files.foreign import beside, file_kind, prefix_of, quantised_by
from jaxtc.weights.files.generation import GENERATION, read_config
from jaxtc.weights.files.safetensors import Entry, SafetensorsFile
from jaxtc.weights.files.shards import equal
from jaxtc.weights.names import BUFFERS, EMBEDDING, HEAD, Name, parameter_names, published

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PLAIN = re.compile(r"[^/\\:\0]+\.safetensors")  # right in the index's folder, on Windows too


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The open files of the model in a folder, each under the names of its tensors.

    ``stored`` gives the name in the files for each published name. ``config`` is what the files
    hold: where another output matrix than the embedding is stored, it is not tied to it.
    """

    folder: Path
    config: Gemma2Config
    files: dict[str, SafetensorsFile]
    stored: dict[str, str]

    @functools.cached_property
    def names(self) -> dict[str, Name]:
        """The parameters of a model of this config, by our names."""
        return {name.ours: name for name in parameter_names(self.config)}

    def entry(self, tensor: str) -> Entry:
        """What the header of its file says of a tensor, by its published name."""
        stored = self.stored[tensor]
        return self.files[stored].entries[stored]

    def read(
        self, ours: str, dtype: np.dtype, sharding: NamedSharding | None = None
    ) -> tuple[np.ndarray | jax.Array, str]:
        """A parameter by our name, as :func:`jaxtc.weights.files.shards.read`."""
        name = self.names[ours]
        stored = self.stored[name.hf]
        array, problem = self.files[stored].read(stored, dtype, sharding, shape=name.shape)
        return array, problem and f"{stored} {problem}"


@contextlib.contextmanager
def open_checkpoint(folder: Path, ignore: str | Sequence[str] = ()) -> Iterator[Checkpoint]:
    """The model in ``folder``; its tensors are exactly the parameters that its config says.

    ``ignore`` names tensors that may be there too, with ``*`` for any characters.

    Raises SourceError for a folder without weights, ConfigError for a config that is not a
    Gemma-2's, WeightsError for unsound files, a missing shard, or other tensors, all of them named.
    """
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        metadata: dict[str, Any] = {}
        if local.has(folder, SINGLE):
            file = stack.enter_context(SafetensorsFile(folder / SINGLE))
            files = dict.fromkeys(file.entries, file)
        elif local.has(folder, INDEX):
            files = _open_shards(folder, stack)
            metadata |= read_index(folder / INDEX)[1]
        else:
            raise SourceError(_no_weights(folder))
        for file in dict.fromkeys(files.values()):
            metadata |= file.metadata
        stored = _stored(folder, files, metadata, patterns(ignore))
        checkpoint = Checkpoint(folder, config, files, stored)
        if problems := _account(checkpoint):
            raise WeightsError(_explained(checkpoint, problems))
        yield _tied(checkpoint)


def patterns(ignore: str | Sequence[str]) -> list[str]:
    """The names in ``ignore``, one or several. Raises SourceError for what is none."""
    found = [ignore] if isinstance(ignore, str) else ignore
    if not isinstance(found, Sequence) or not all(isinstance(one, str) for one in found):
        raise SourceError(f"ignore is {ignore!r}, expected names of tensors, such as 'score.*'.")
    return list(found)


def _no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir() if file_kind(path))
    others = [name for name in others if not name.endswith(".model")]
    found = f"; what it has is {some(others)}" if others else ""
    if others and all(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in others):
        found += f" (shards without {INDEX}, which says what they hold; fetch that too)"
    elif others and not others[0].endswith(".safetensors"):
        found += f" ({file_kind(others[0])})"
    return (
        f"{folder} has neither {SINGLE} nor {INDEX}{found}. jaxtc reads Hugging Face "
        "checkpoints in safetensors format; save_pretrained of transformers writes one."
    )


def _stored(
    folder: Path,
    files: Mapping[str, SafetensorsFile],
    metadata: Mapping[str, Any],
    ignore: Sequence[str],
) -> dict[str, str]:
    """The name in the files of each tensor, by its published name.

    Of tensors that share their memory, safetensors.torch.save_model writes one, and the name of
    each other in the metadata, with the one that was written.
    """
    found: dict[str, list[str]] = {}
    for name in files:
        known = published(name)
        if any(fnmatch.fnmatchcase(x, one) for one in ignore for x in (name, known)):
            continue
        if not BUFFERS.fullmatch(known):
            found.setdefault(known, []).append(name)
    several = [" and ".join(names) for names in found.values() if len(names) > 1]
    if several:
        raise WeightsError(
            f"{folder} holds several tensors for one parameter: {some(several)}. It may hold two "
            "models; save one of them alone, or leave the other's out with ignore='PREFIX.*'."
        )
    stored = {known: name for known, [name] in found.items()}
    for name, kept in metadata.items():
        if isinstance(kept, str) and kept in files and published(name) in (EMBEDDING, HEAD):
            stored.setdefault(published(name), kept)
    return stored


def files_of(folder: Path) -> list[Path]:
    """The files of the model in a folder that are read: its configs and its weights.

    Raises WeightsError for an unsound index of shards.
    """
    names = [SINGLE]
    if not local.has(folder, SINGLE) and local.has(folder, INDEX):
        names = [INDEX, *sorted(set(read_index(folder / INDEX)[0].values()))]
    names = ["config.json", GENERATION, *names]
    return [folder / name for name in names if local.has(folder, name)]


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The ``weight_map`` of an index, the file name of each tensor, and its ``metadata``.

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
    metadata = raw.get("metadata")
    return shards, metadata if isinstance(metadata, dict) else {}


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
    shards, _ = read_index(folder / INDEX)
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
    stored = checkpoint.stored
    absent = [hf for hf in expected if hf not in stored]
    if checkpoint.config.tie_word_embeddings:
        # Either name will do, and either may be there.
        expected[HEAD] = expected[EMBEDDING]
        if HEAD in stored and EMBEDDING in absent:
            absent.remove(EMBEDDING)
    problems = [f"{hf} is missing" for hf in absent]
    for hf, inside in stored.items():
        entry, name = checkpoint.entry(hf), expected.get(hf)
        if name is None:
            problems.append(f"{inside} is not a tensor of this model")
            continue
        if entry.shape != name.hf_shape:
            axes = name.hf_axes.replace(" ", ", ")
            problems.append(f"{inside} has shape {entry.shape}, not {name.hf_shape} ({axes})")
        if entry.fault:
            problems.append(f"{inside} {entry.fault}")
    return problems


def _explained(checkpoint: Checkpoint, problems: Sequence[str]) -> str:
    """The message for tensors that are not the parameters: what they are, where they tell."""
    folder, stored = checkpoint.folder, checkpoint.stored
    expected = {name.hf for name in checkpoint.names.values()}
    others = [hf for hf in stored if hf not in expected | {HEAD}]
    method, example = quantised_by(stored[hf] for hf in others)
    if method:
        return (
            f"The weights in {folder} are quantised ({method}, by {example}), and jaxtc reads only "
            "weights that are not: float32, bfloat16 or float16. Give the checkpoint that this was "
            "made from, or its dequantised weights."
        )
    tops = {hf.split(".")[0] for hf in others}
    if len(others) == len(problems) and not tops & {"model", HEAD.split(".")[0]}:
        kinds = dict.fromkeys(filter(None, map(beside, others)))
        what = f", {' and '.join(kinds)}" if kinds else ""
        names = [stored[hf] for hf in others]
        given = names if len(names) < 4 else [f"{top}.*" for top in sorted(tops)]
        return (
            f"{folder} holds a Gemma-2, and beside it {some(names, 20)}{what}, which jaxtc does "
            f"not run. To load the Gemma-2 without: load_model(..., ignore={given}), or "
            f"`jaxtc convert --to safetensors --ignore {' --ignore '.join(map(repr, given))}`."
        )
    text = (
        f"The tensors in {folder} are not those of the Gemma-2 in its config.json: "
        f"{some(problems, 20)}. Weights and config must come from the same checkpoint."
    )
    if any(" has dtype " in problem for problem in problems):
        text += (
            " Weights in whole numbers or 8-bit floats are quantised: give the checkpoint that "
            "they were made from."
        )
    if HEAD not in stored and not checkpoint.config.tie_word_embeddings:
        text += (
            f" config.json says tie_word_embeddings = false, so {HEAD} must be there; a backbone "
            "that was saved alone has none."
        )
    if HEAD in stored and EMBEDDING not in stored and not checkpoint.config.tie_word_embeddings:
        text += (
            f" config.json says tie_word_embeddings = false, so {HEAD} is not the embedding; if it "
            "is, change that to true."
        )
    prefix = prefix_of(others)
    if prefix:
        text += (
            f" The names begin with {prefix!r}, which is not a prefix that jaxtc knows; write the "
            "tensors again without it (safetensors.torch.load_file and save_file)."
        )
    return text


def _tied(checkpoint: Checkpoint) -> Checkpoint:
    """The same, where the config ties the output matrix to the embedding, as the tensors are.

    As in transformers 5: one of the two names will do; two different matrices are both used.
    """
    config, stored = checkpoint.config, dict(checkpoint.stored)
    if not config.tie_word_embeddings or HEAD not in stored:
        return checkpoint
    if EMBEDDING in stored:
        one, other = (checkpoint.files[stored[hf]].raw(stored[hf]) for hf in (EMBEDDING, HEAD))
        if stored[EMBEDDING] != stored[HEAD] and not equal(one, other):
            config = dataclasses.replace(config, tie_word_embeddings=False)
            return dataclasses.replace(checkpoint, config=config)
    stored.setdefault(EMBEDDING, stored[HEAD])
    del stored[HEAD]
    return dataclasses.replace(checkpoint, stored=stored)
