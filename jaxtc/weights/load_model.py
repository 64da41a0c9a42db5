"""Models and tokenizers from a source: a hub id, a local folder, or the embedded ones."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtc.errors import SourceError, WeightsError, some
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.mesh import MeshLike, make_mesh
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import RULES, Rules, shardings, variables
from jaxtc.weights.checkpoints.read import Converted, is_converted, load_converted_model
from jaxtc.weights.files import arrays, local
from jaxtc.weights.files.model import Checkpoint, open_checkpoint
from jaxtc.weights.files.safetensors import FLOATS
from jaxtc.weights.names import EMBEDDING, TIED, Name, is_buffer, parameter_names
from jaxtc.weights.sources import hub
from jaxtc.weights.sources.verify import model_files, verify_files

EMBEDDED = "embedded"
EMBEDDED_DATA = Path(str(resources.files("jaxtc"))) / "embedded" / "data"

# Called with (bytes read, bytes in all) after each tensor.
Progress: TypeAlias = Callable[[int, int], None]


def load_model(
    source: str | Path = EMBEDDED,
    *,
    dtype: jnp.dtype | str | None = None,
    revision: str | None = None,
    mesh: MeshLike | None = None,
    rules: Rules = RULES,
    verify: bool = False,
    progress: Progress | None = None,
) -> Gemma2:
    """A Gemma-2 with its weights, on one device or spread over a mesh of them.

    On a mesh each process reads the bytes of its own devices' shards only and never holds more than
    those. All processes call this; if one of them fails, all raise.

    Args:
        source: a hub id (``google/gemma-2-2b``), a local folder with ``config.json`` and
            safetensors (one file, or shards and their index), a folder that ``jaxtc convert`` or
            :func:`jaxtc.save_checkpoint` made, or ``"embedded"``, the small model that comes with
            jaxtc.
        dtype: of the weights; by default float32 on the CPU and bfloat16 on accelerators.
        revision: of a hub id: a branch, tag or commit.
        mesh: such as ``"data=2,model=4"``, see :func:`jaxtc.make_mesh`; the default device if None.
        rules: which axes of the parameters are divided, see :data:`jaxtc.sharding.RULES`.
        verify: hash all files first, on every process, and compare with the hub's own hashes; of
            a converted checkpoint the parts that are read are always compared with its own, with
            ``verify`` all of it.
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        SourceError: nothing there, or no access to it.
        ConfigError: not a Gemma-2.
        WeightsError: a damaged file; tensors missing, extra, misshapen, or not finite; files that
            are not the hub's, or of which no hash is known, with ``verify``.
        ShardingError: no such mesh, or an axis that does not divide over it.
    """
    dtype = arrays.default_dtype() if dtype is None else arrays.check_dtype(dtype)
    mesh = None if mesh is None else make_mesh(mesh)
    with agreed(mesh, "load the model"):
        folder = model_folder(source, revision)
        if is_converted(folder):
            laid_out = None if mesh is None else lambda config: _places(config, mesh, rules)
            return load_converted_model(folder, dtype, laid_out, verify, progress)
        if verify:
            verify_files(model_files(folder))
        config = Gemma2Config.from_file(folder / "config.json")
        places = None if mesh is None else _places(config, mesh, rules)
        with open_checkpoint(folder) as checkpoint:
            check_tensors(checkpoint, config)
            values = _read(checkpoint, parameter_names(config), dtype, places, progress)
        return _assemble(config, dtype, values)


def _places(config: Gemma2Config, mesh: Mesh, rules: Rules) -> dict[str, NamedSharding]:
    """Where each parameter goes, by our names."""
    model = Gemma2.abstract(config)
    names = [name for name, _ in variables(model)]
    return dict(zip(names, shardings(model, mesh, rules), strict=True))


def load_tokenizer(source: str | Path = EMBEDDED, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, as ``transformers`` loads it; code in a repository is never run.

    Args:
        source: as in :func:`load_model`.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError: nothing there, no access to it, or not a tokenizer.
    """
    from transformers import AutoTokenizer  # slow to import, and not needed for token ids

    folder = _find(source, revision, hub.download_tokenizer)
    if not any(local.has(folder, name) for name in hub.TOKENIZER_FILES):
        raise SourceError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer_config.json). Copy those of the "
            "model there, or load the tokenizer from elsewhere."
        )
    if is_converted(folder):
        converted = Converted(folder)
        for name in filter(converted.sidecar.files.__contains__, hub.TOKENIZER_FILES):
            converted.content(name)  # compared with its hash
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise SourceError(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def model_folder(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model's source, downloaded first when it is a hub id.

    Raises:
        SourceError: nothing there, or no access to it.
    """
    folder = _find(source, revision, hub.download_model)
    if not local.has(folder, "config.json") and not is_converted(folder):
        raise SourceError(
            f"{folder} has no config.json, so it is not a model's folder in Hugging Face's format "
            "(config.json beside model.safetensors)."
        )
    return folder


def _find(source: str | Path, revision: str | None, fetch: Callable[..., Path]) -> Path:
    if source == EMBEDDED:
        return embedded_data("model", revision)
    path = local.find(source)
    if path is not None and path.is_dir():
        no_revision(source, revision)
        return path
    if path is not None:
        raise SourceError(f"{source} is a file; give the folder that holds config.json.")
    repo = hub.split_id(source) if isinstance(source, str) else None
    if repo is None:
        raise SourceError(
            f"There is no folder {source}, and it is not a hub id such as google/gemma-2-2b."
        )
    if repo[1]:
        raise SourceError(
            f"{source!r} is neither a local folder nor a hub id: a model's id has two parts, such "
            f"as {repo[0]!r}."
        )
    return fetch(repo[0], revision)


def embedded_data(kind: str, revision: str | None = None) -> Path:
    """The folder of the embedded ``model`` or ``transcoders``.

    Raises:
        SourceError: this copy of jaxtc comes without them.
    """
    no_revision(EMBEDDED, revision)
    folder = EMBEDDED_DATA / kind
    if not folder.is_dir():
        raise SourceError(
            f"This copy of jaxtc has no embedded {kind} ({folder} does not exist). Make them with "
            "`jaxtc embedded train`, or install a released jaxtc, which has them."
        )
    return folder


def no_revision(source: str | Path, revision: str | None) -> None:
    """Refuse a revision of something that has none.

    Raises:
        SourceError: a revision was given.
    """
    if revision is not None:
        raise SourceError(
            f"revision={revision!r} applies to hub ids only, and {str(source)!r} is not one."
        )


def check_tensors(checkpoint: Checkpoint, config: Gemma2Config) -> None:
    """Refuse a checkpoint whose tensors are not exactly a model's parameters.

    Raises:
        WeightsError: they are not; everything that is wrong is named.
    """
    problems = _account(checkpoint, parameter_names(config)) or _untied(checkpoint)
    if problems:
        raise WeightsError(
            f"The tensors in {checkpoint.folder} are not those of the Gemma-2 in its config.json: "
            f"{some(problems, 20)}. Weights and config must come from the same checkpoint."
        )


def _account(checkpoint: Checkpoint, names: list[Name]) -> list[str]:
    """Everything that keeps the tensors from being the parameters, from the headers alone."""
    expected = {name.hf: name for name in names}
    problems = [f"{hf} is missing" for hf in expected if hf not in checkpoint.files]
    for hf in checkpoint.files:
        entry, name = checkpoint.entry(hf), expected.get(hf)
        if hf == TIED:
            name = expected[EMBEDDING]
        elif name is None:
            if not is_buffer(hf):
                problems.append(f"{hf} is not a tensor of this model")
            continue
        if entry.shape != name.hf_shape:
            axes = name.hf_axes.replace(" ", ", ")
            problems.append(f"{hf} has shape {entry.shape}, not {name.hf_shape} ({axes})")
        if entry.dtype not in FLOATS:
            problems.append(f"{hf} has dtype {entry.dtype}, not one of {', '.join(FLOATS)}")
    return problems


def _untied(checkpoint: Checkpoint) -> list[str]:
    """A problem when a stored output matrix is not the embedding that the config says it is.

    Each of several processes compares its part of the two.
    """
    if TIED not in checkpoint.files:
        return []
    part = arrays.CHUNK_BYTES // 8, jax.process_index(), jax.process_count()
    pair = (checkpoint.files[hf].chunks(hf, *part) for hf in (EMBEDDING, TIED))
    if all(
        np.array_equal(a.astype(np.float32), b.astype(np.float32))
        for a, b in zip(*pair, strict=True)
    ):
        return []
    return [f"{TIED} differs from {EMBEDDING}, to which the config ties it"]


def _read(
    checkpoint: Checkpoint,
    names: list[Name],
    dtype: np.dtype,
    places: dict[str, NamedSharding] | None,
    progress: Progress | None,
) -> dict[str, jax.Array]:
    """The parameters by our names; the largest first, while there is most room beside them."""

    def size(name: Name) -> int:
        entry = checkpoint.entry(name.hf)
        return entry.stop - entry.start

    values, problems, done = {}, [], 0
    total = sum(map(size, names))
    for name in sorted(names, key=size, reverse=True):
        file = checkpoint.files[name.hf]
        if places is None:
            array, problem = file.read(name.hf, dtype)
            values[name.ours] = arrays.to_jax(array.reshape(name.shape))
        else:
            place = places[name.ours]
            values[name.ours], problem = file.read_shards(name.hf, name.shape, dtype, place)
        if problem:
            problems.append(f"{name.hf} {problem}")
        done += size(name)
        if progress:
            progress(done, total)
    if problems:
        raise WeightsError(
            f"The weights in {checkpoint.folder} cannot be used: {some(problems, 20)}. Whatever "
            "the model computed would be wrong; fetch the checkpoint again."
        )
    return values


def _assemble(config: Gemma2Config, dtype: np.dtype, values: dict[str, jax.Array]) -> Gemma2:
    """The model around these parameters; each must be there, with the shape the model declares."""
    shapes, structure = jax.tree_util.tree_flatten_with_path(Gemma2.abstract(config, dtype))
    leaves = []
    for path, declared in shapes:
        value = values.pop(parameter_path(path))
        assert value.shape == declared.shape and value.dtype == declared.dtype, path
        leaves.append(value)
    assert not values, sorted(values)
    return jax.tree.unflatten(structure, leaves)


def parameter_path(path: tuple) -> str:
    """A leaf's path in the model's tree as our name for the parameter, ``layers.3.attn.q``."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
