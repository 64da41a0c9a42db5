"""Models, configs and tokenizers from a source: a hub id, a local folder, or the embedded ones."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxtc.errors import SourceError
from jaxtc.helpers import explicit_transfers
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.released import RELEASED
from jaxtc.sharding.mesh import MeshLike, make_mesh
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import RULES, Rules, shardings
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.files import local
from jaxtc.weights.files.arrays import check_dtype
from jaxtc.weights.files.shards import fill
from jaxtc.weights.opening import base_of, config_of, open_weights, refuse_unfit
from jaxtc.weights.sources.hub import TOKENIZER_FILES
from jaxtc.weights.sources.resolve import (
    ADAPTER,
    CONFIG,
    CONVERTED,
    EMBEDDED,
    GOOGLE,
    HUB,
    MODEL,
    TOKENIZER,
    resolve,
)

# Called with (bytes loaded, bytes in all) after each tensor.
Progress: TypeAlias = Callable[[int, int], None]

# Where the instruction-tuned releases stop, by their generation_config.json: <eos> and
# <end_of_turn>.
_IT_STOPS = (1, 107)


@explicit_transfers
def load_model(
    source: str | Path = EMBEDDED,
    *,
    dtype: jnp.dtype | str | None = None,
    revision: str | None = None,
    mesh: MeshLike | None = None,
    rules: Rules = RULES,
    verify: bool = False,
    ignore: str | Sequence[str] = (),
    base: str | Path | None = None,
    config: Gemma2Config | str | Path | None = None,
    progress: Progress | None = None,
) -> Gemma2:
    """A Gemma-2 with its weights, on one device or spread over a mesh of them.

    On a mesh each process reads the bytes of its own devices' shards only and never holds more than
    those (but an output matrix that is stored too is compared whole with the embedding). All
    processes call this; if one of them fails, all raise.

    The output matrix is the embedding, unless ``config.json`` says ``tie_word_embeddings: false``
    or a different ``lm_head.weight`` is stored; then it is ``model.head``, as in transformers 5. A
    tied matrix may be stored under either name. Names of tensors may have the prefixes that
    transformers, PEFT, TRL and torch.compile put there, or none, as in a ``Gemma2Model``. Texts end
    at the ``eos_token_id`` of ``config.json`` and of ``generation_config.json``.

    A LoRA adapter of PEFT is merged into its base model while that is read, a parameter at a time,
    as PEFT's ``merge_and_unload`` has it: ``W + (α / r) B A`` in float32, rounded once.
    ``use_rslora``, ``use_dora``, rank and alpha patterns, ``modules_to_save``, adapters of the
    embedding and trainable tokens are merged too; every other kind of adapter, and every setting
    that is not known, is an error with the lines that merge it in PEFT. Where a LoRA is on an
    embedding that is also the output matrix, it is added to both, with a warning: so does PEFT.

    Of Google's own Flax checkpoint (Kaggle's ``gemma-2/flax``: an orbax tree with
    ``transformer/layer_0/attn/q_einsum``, nested or flat), sizes are read from shapes and the rest
    is the release's of these sizes. Such a tree does not say whether it is instruction-tuned: its
    config stops at ``<eos>`` only, so give ``generate`` ``stop=[1, 107]`` (``<end_of_turn>``), or
    ``config=``. Each process reads every array whole, one at a time.

    Args:
        source: a hub id (``google/gemma-2-2b``), a local folder with ``config.json`` and
            safetensors (one file, or shards and their index), a folder that ``jaxtc convert`` or
            :func:`jaxtc.save_checkpoint` made, a LoRA adapter's (``adapter_config.json`` and
            ``adapter_model.safetensors``), Google's Flax checkpoint, or ``"embedded"``, the small
            model that comes with jaxtc.
        dtype: of the weights; by default float32 on the CPU and bfloat16 on accelerators.
        revision: of a hub id: a branch, tag or commit.
        mesh: such as ``"data=2,model=4"``, see :func:`jaxtc.make_mesh`; the default device if None.
        rules: which axes of the parameters are divided, see :data:`jaxtc.sharding.RULES`.
        verify: hash all files first, on every process, and compare with the hub's own hashes; of
            a converted checkpoint the parts that are read are always compared with its own, with
            ``verify`` all of it.
        ignore: names of tensors to leave out, ``*`` for any characters: a head of another kind,
            such as ``"score.*"`` of a reward model. Refused where there is nothing else to leave
            out: of a converted checkpoint and of Google's.
        base: of an adapter, the model that it is merged into, as ``source``; by default the
            ``base_model_name_or_path`` of its config: a hub id, or a folder, seen from the working
            directory or beside the adapter's.
        config: of Google's checkpoint, where its sizes are no release's: a Gemma2Config, or the
            path of a ``config.json``; by default one that lies in its folder.
        progress: called with (bytes loaded, bytes in all) after each tensor.

    Raises:
        SourceError: nothing there, or no access to it.
        ConfigError: not a Gemma-2.
        WeightsError: a damaged file; tensors missing, extra, misshapen, or not finite; an adapter
            that is not merged here; files that are not the hub's, or of which no hash is known,
            with ``verify``.
        ShardingError: no such mesh, or an axis that does not divide over it.
    """
    if dtype is None:  # bfloat16 is slower on the CPU
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = check_dtype(dtype)
    mesh = None if mesh is None else make_mesh(mesh)
    places = mesh and functools.partial(shardings, mesh=mesh, rules=rules)
    with agreed(mesh, "load the model"):
        found = resolve(source, MODEL, revision=revision)
        if found.format == CONVERTED:
            refuse_unfit(found.name, found.format, base=base, config=config, ignore=ignore)
            checkpoint = Converted(found.path, MODEL, verify)
            return checkpoint.load(checkpoint.model(dtype), places, progress)
        with open_weights(found, base=base, config=config, ignore=ignore, verify=verify) as opened:
            declared = Gemma2.abstract(opened.config, dtype)
            return fill(declared, opened.read, opened.where, places, progress)


def load_config(
    source: str | Path = EMBEDDED,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
) -> Gemma2Config:
    """The config of a model, with the stop tokens of its ``generation_config.json``; nothing else
    is fetched.

    Args:
        source: a hub id, a local folder or ``"embedded"``, as :func:`jaxtc.load_model` takes it;
            or ``"2b"``, ``"9b"`` or ``"27b"``. Those and the hub ids of the released models
            (``google/gemma-2-2b``, ``google/gemma-2-2b-it``, ...) need no network, unless a
            revision is asked for.
        revision: of a hub id: a branch, tag or commit.
        base: of an adapter, as in :func:`jaxtc.load_model`.

    Raises:
        SourceError: nothing there, or no access to it.
        ConfigError: not a Gemma-2.
        WeightsError: an adapter that is not merged, or another tree than Google's.
    """
    size = re.fullmatch(r"(?:(?:google/)?gemma-2-)?(\w+?)(-it)?", str(source).lower())
    if size and size[1] in RELEASED and revision is None and local.find(source) is None:
        refuse_unfit(str(source), HUB, base=base)
        released = RELEASED[size[1]]
        return dataclasses.replace(released, eos_token_id=_IT_STOPS) if size[2] else released
    return config_of(resolve(source, CONFIG, revision=revision), base)


def load_tokenizer(source: str | Path = EMBEDDED, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, as ``transformers`` loads it; code in a repository is never run.

    Args:
        source: as in :func:`load_model`; of an adapter without a tokenizer, its base's; of
            Google's checkpoint, that in its folder or right beside it.
        revision: of a hub id: a branch, tag or commit.

    Raises:
        SourceError: nothing there, no access to it, or not a tokenizer.
    """
    from transformers import AutoTokenizer  # slow to import, and not needed for token ids

    found = resolve(source, TOKENIZER, revision=revision).fetched()
    folder = found.path
    if found.format in (ADAPTER, GOOGLE):
        places = [folder, found.tree.parent] if found.format == GOOGLE else [folder]
        holding = [x for x in places if any(local.has(x, name) for name in TOKENIZER_FILES)]
        if found.format == ADAPTER and not holding:
            below = base_of(found)
            return load_tokenizer(below.name, revision=below.revision)
        folder = next(iter(holding), folder)
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
