"""Models, configs and tokenizers from a source: a hub id, a local folder, or the embedded ones."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxtc.errors import SourceError
from jaxtc.helpers import explicit_transfers
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.mesh import MeshLike, make_mesh
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import RULES, Rules, shardings
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.files import local
from jaxtc.weights.files.arrays import check_dtype
from jaxtc.weights.files.model import files_of, open_checkpoint
from jaxtc.weights.files.shards import fill
from jaxtc.weights.sources.hub import TOKENIZER_FILES, verify_files
from jaxtc.weights.sources.resolve import CONFIG, CONVERTED, EMBEDDED, MODEL, TOKENIZER, resolve

# What the config.json of the released checkpoints say; everything else in them is the default of
# Gemma2Config. Base and instruction-tuned models share sizes.
RELEASED: dict[str, Gemma2Config] = {
    "2b": Gemma2Config(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
    ),
    "9b": Gemma2Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
    ),
    "27b": Gemma2Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
        num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144,
    ),
}  # fmt: skip

# Called with (bytes loaded, bytes in all) after each tensor.
Progress: TypeAlias = Callable[[int, int], None]


@explicit_transfers
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
    those (but an output matrix that is stored too is compared whole with the embedding). All
    processes call this; if one of them fails, all raise.

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
        progress: called with (bytes loaded, bytes in all) after each tensor.

    Raises:
        SourceError: nothing there, or no access to it.
        ConfigError: not a Gemma-2.
        WeightsError: a damaged file; tensors missing, extra, misshapen, or not finite; files that
            are not the hub's, or of which no hash is known, with ``verify``.
        ShardingError: no such mesh, or an axis that does not divide over it.
    """
    if dtype is None:  # bfloat16 is slower on the CPU
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = check_dtype(dtype)
    mesh = None if mesh is None else make_mesh(mesh)
    places = mesh and functools.partial(shardings, mesh=mesh, rules=rules)
    with agreed(mesh, "load the model"):
        found = resolve(source, MODEL, revision=revision)
        folder = found.fetch()
        if found.format == CONVERTED:
            checkpoint = Converted(folder, MODEL, verify)
            return checkpoint.load(checkpoint.model(dtype), places, progress)
        if verify:
            verify_files(files_of(folder))
        with open_checkpoint(folder) as opened:
            declared = Gemma2.abstract(opened.config, dtype)
            return fill(declared, opened.read, folder, places, progress)


def load_config(source: str | Path = EMBEDDED, *, revision: str | None = None) -> Gemma2Config:
    """The config of a model; nothing is fetched but its ``config.json``.

    Args:
        source: a hub id, a local folder or ``"embedded"``, as :func:`jaxtc.load_model` takes it;
            or ``"2b"``, ``"9b"`` or ``"27b"``. Those and the hub ids of the released models
            (``google/gemma-2-2b``, ``google/gemma-2-2b-it``, ...) need no network, unless a
            revision is asked for.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError: nothing there, or no access to it.
        ConfigError: not a Gemma-2.
    """
    size = re.fullmatch(r"(?:(?:google/)?gemma-2-)?(\w+)(?:-it)?", str(source).lower())
    if size and size[1] in RELEASED and revision is None and local.find(source) is None:
        return RELEASED[size[1]]
    folder = resolve(source, CONFIG, revision=revision).fetch()
    return Gemma2Config.from_file(folder / "config.json")


def load_tokenizer(source: str | Path = EMBEDDED, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, as ``transformers`` loads it; code in a repository is never run.

    Args:
        source: as in :func:`load_model`.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError: nothing there, no access to it, or not a tokenizer.
    """
    from transformers import AutoTokenizer  # slow to import, and not needed for token ids

    found = resolve(source, TOKENIZER, revision=revision)
    folder = found.fetch()
    if not any(local.has(folder, name) for name in TOKENIZER_FILES):
        raise SourceError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer_config.json). Copy those of the "
            "model there, or load the tokenizer from elsewhere."
        )
    if found.format == CONVERTED:
        converted = Converted(folder)
        for name in filter(converted.sidecar.files.__contains__, TOKENIZER_FILES):
            converted.content(name)  # compared with its hash
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise SourceError(f"The tokenizer in {folder} cannot be loaded: {error}") from error
