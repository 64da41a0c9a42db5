"""Conversions between the formats of checkpoints: of models, and of transcoders.

Each writes to ``OUT.partial`` and moves it to ``OUT`` when all is there. One that was killed is
continued by calling it again. What is in memory is a layer (or the embedding, or a transcoder),
and a few hundred MB.
"""

from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp

from jaxtc.errors import SourceError, did_you_mean
from jaxtc.weights.conversion.model import convert_model
from jaxtc.weights.conversion.transcoders import check_dtype, check_model_name, convert_transcoders
from jaxtc.weights.files import arrays
from jaxtc.weights.load_model import Progress
from jaxtc.weights.sources.resolve import MODEL, TRANSCODERS, resolve

TARGETS = {
    "orbax": (MODEL, TRANSCODERS),
    "safetensors": (MODEL,),
    "npz": (TRANSCODERS,),
    "circuit-tracer": (TRANSCODERS,),
}


def convert(
    source: str | Path,
    out: str | Path,
    to: str = "orbax",
    *,
    kind: str | None = None,
    dtype: jnp.dtype | str | None = None,
    revision: str | None = None,
    layers: str | Iterable[int] = "all",
    width: str | None = None,
    l0: int | str | None = None,
    input_site: str | None = None,
    output_site: str | None = None,
    without_sites: bool = False,
    model_name: str | None = None,
    max_shard_size: int = 5 * 10**9,
    verify: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint in another format.

    Args:
        source: of a model, as :func:`jaxtc.load_model` takes it; of transcoders, as
            :func:`jaxtc.load_transcoders` does.
        out: the folder to write, new or empty.
        to: ``"orbax"`` (which :func:`jaxtc.load_model` and :func:`jaxtc.load_transcoder` read, and
            orbax restores); of a model ``"safetensors"``, which ``transformers`` loads; of
            transcoders ``"npz"`` (Gemma Scope's layout) or ``"circuit-tracer"``.
        kind: ``"model"`` or ``"transcoders"``, where the source does not tell: by default a
            model, if there is a ``config.json`` and ``to`` is for models.
        dtype: to cast to; by default each array keeps its own.
        revision: of a hub id: a branch, tag or commit.
        layers: which transcoders, ``"all"`` or their layers.
        width: which transcoder of a layer, see :func:`jaxtc.load_transcoder`.
        l0: the same.
        input_site: what transcoders read, where their source does not tell.
        output_site: what they write, likewise.
        without_sites: write ``params.npz`` of transcoders whose sites it cannot hold.
        model_name: for circuit-tracer's ``config.yaml``, such as ``google/gemma-2-2b``.
        max_shard_size: most bytes of tensors in a safetensors file of a model.
        verify: compare the source with the hub's hashes first; a converted one is always compared
            with its own, with ``verify`` before anything is written.
        progress: called with (done, in all): bytes of a model, or transcoders.

    Returns:
        The folder.

    Raises:
        SourceError: nothing to convert there; the folder exists; the disk is full or cannot be
            written; this format is not for this source.
        ConfigError, SiteError, WeightsError: the source is refused, as when it is loaded.
    """
    if to not in TARGETS:
        raise SourceError(
            f"Checkpoints are not converted to {to!r} but to {', '.join(map(repr, TARGETS))}."
            f"{did_you_mean(str(to), TARGETS)}"
        )
    if kind not in (None, MODEL, TRANSCODERS):
        raise SourceError(f"kind is {kind!r}, expected {MODEL!r} or {TRANSCODERS!r}.")
    found = resolve(source, kind, revision=revision, default=TARGETS[to][0])
    kind = found.kind
    if kind not in TARGETS[to]:
        fitting = [name for name, kinds in TARGETS.items() if kind in kinds]
        raise SourceError(
            f"{to!r} is not a format for {'a ' if kind == MODEL else ''}{kind}, which {source} "
            f"{'is' if kind == MODEL else 'are'}; choose {' or '.join(map(repr, fitting))}."
        )
    options = {"width": width, "l0": l0, "input_site": input_site, "output_site": output_site}
    if kind == TRANSCODERS:
        return convert_transcoders(
            found, out, to, layers=layers, dtype=check_dtype(dtype, to),
            without_sites=without_sites, model_name=check_model_name(model_name), verify=verify,
            progress=progress, **{key: value for key, value in options.items() if value},
        )  # fmt: skip
    options |= {"without_sites": without_sites, "model_name": model_name}
    options |= {"layers": None if layers == "all" else layers}
    unfit = [key for key, value in options.items() if value]
    if unfit:
        raise SourceError(f"{unfit[0]} is for transcoders, and {source} is a model.")
    if max_shard_size < 1:
        raise SourceError(f"max_shard_size is {max_shard_size} bytes, expected at least 1.")
    return convert_model(
        found, out, to, dtype=None if dtype is None else arrays.check_dtype(dtype),
        verify=verify, max_shard_size=max_shard_size, progress=progress,
    )  # fmt: skip
