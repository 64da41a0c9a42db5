"""Conversions between the formats of checkpoints: of models, and of transcoders.

A killed conversion goes on when it is called again. What is in memory is a layer (or the embedding,
or a parameter of a transcoder), and a few hundred MB.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtc.errors import SourceError, WeightsError, did_you_mean
from jaxtc.helpers import JAXTC_VERSION, explicit_transfers
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.job import FILE_BYTES, Job
from jaxtc.weights.checkpoints.read import Converted
from jaxtc.weights.checkpoints.sidecar import SIDECAR, Array, describe, sha256
from jaxtc.weights.conversion.files import model_files, transcoder_files
from jaxtc.weights.conversion.source import Content, open_model, open_transcoders
from jaxtc.weights.files import arrays
from jaxtc.weights.files.model import patterns
from jaxtc.weights.load_model import Progress
from jaxtc.weights.sources.resolve import MODEL, TRANSCODERS, resolve

TARGETS = {
    "orbax": (MODEL, TRANSCODERS),
    "safetensors": (MODEL,),
    "npz": (TRANSCODERS,),
    "circuit-tracer": (TRANSCODERS,),
}


@explicit_transfers
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
    l0: int | str | Mapping[int, int | str] | Sequence[int | str] | None = None,
    format: str | None = None,
    input_site: str | None = None,
    output_site: str | None = None,
    model_name: str | None = None,
    max_shard_size: int = 5 * 10**9,
    verify: bool = False,
    ignore: str | Sequence[str] = (),
    base: str | Path | None = None,
    config: Gemma2Config | str | Path | None = None,
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
        layers, width, l0, format, input_site, output_site: of transcoders, as
            :func:`jaxtc.load_transcoders` takes them.
        model_name: for circuit-tracer's ``config.yaml``, such as ``google/gemma-2-2b``.
        max_shard_size: most bytes of tensors in a safetensors file of a model.
        verify: compare the source with the hub's hashes first; a converted one is always compared
            with its own, with ``verify`` before anything is written.
        ignore: tensors of a model to leave out, as in :func:`jaxtc.load_model`.
        base: of an adapter, which is merged, as in :func:`jaxtc.load_model`.
        config: of Google's Flax checkpoint, as in :func:`jaxtc.load_model`.
        progress: called with (bytes read, bytes in all) after each array that is not there yet.

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
    if model_name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_name):
        raise SourceError(f"model_name is {model_name!r}, expected one such as google/gemma-2-2b.")
    if not 1 <= max_shard_size < math.inf:
        raise SourceError(f"max_shard_size is {max_shard_size} bytes, expected at least 1.")
    if "://" in str(out):
        raise SourceError(f"{out} is not on this machine. Convert to a folder here, and copy it.")
    dtype = None if dtype is None else arrays.check_dtype(dtype)
    if to == "npz" and dtype not in (None, np.float32):
        raise WeightsError(f"A params.npz is float32, so it cannot be written as {dtype.name}.")
    sites = {"input_site": input_site, "output_site": output_site}
    options = {"layers": None if str(layers) == "all" else layers, "width": width}
    options |= sites | {"l0": None if l0 is None else str(l0)}
    options |= {"model_name": model_name, "format": format}
    ignore = patterns(ignore)
    if kind == TRANSCODERS and ignore:
        raise SourceError(f"ignore is for models, and {source} are transcoders.")
    if kind == TRANSCODERS and (base is not None or config is not None):
        raise SourceError(f"base and config are for models, and {source} are transcoders.")
    unfit = [key for key, value in options.items() if value is not None]
    if kind == MODEL and unfit:
        raise SourceError(f"{unfit[0]} is for transcoders, and {source} is a model.")
    with contextlib.ExitStack() as stack:
        if kind == MODEL:
            content = stack.enter_context(open_model(found, dtype, verify, ignore, base, config))
        else:
            content = open_transcoders(found, dtype, verify, layers, (width, l0), sites, format)
            options["layers"] = list(content.transcoders)
        what = options | {
            "source": content.source, "revision": content.revision,
            "state of its files": content.state, "to": to, "dtype": dtype and dtype.name,
            "max_shard_size": int(max_shard_size), "ignore": ignore, "jaxtc": JAXTC_VERSION,
        }  # fmt: skip
        return _write(content, out, what, progress)


def _write(
    content: Content, out: str | Path, what: dict[str, Any], progress: Progress | None
) -> Path:
    sizes = {name: one.size * one.dtype.itemsize for name, one in content.arrays.items()}
    total, done, to = sum(sizes.values()), 0, what["to"]

    def fetch(name: str) -> np.ndarray:
        nonlocal done
        array = content.fetch(name)
        done += sizes[name]
        if progress:
            progress(done, total)
        return array

    job = Job(out, what, total + FILE_BYTES * len(sizes))
    files = {}
    if to == "safetensors":
        files = model_files(content, fetch, what["max_shard_size"])
    elif to != "orbax":
        files = transcoder_files(content, fetch, to, what["model_name"])
    with job.begin() as unfinished:
        if unfinished:
            for file, make in files.items():
                job.write(job.files / file, make)
            if to == "orbax":
                _write_orbax(job, content, fetch)
            job.finish()
    return job.out


def _write_orbax(job: Job, content: Content, fetch: Callable[[str], np.ndarray]) -> None:
    """A converted checkpoint a layer at a time, the layers of a killed conversion kept; what orbax
    wrote is compared with what was fetched."""
    kept = job.partial / SIDECAR  # there when all parts are
    if not kept.exists():
        hashes = tree.saved_notes(job.files)
        for names in tree.parts(content.arrays):
            if not hashes.keys() >= set(names):
                values = {name: fetch(name) for name in names}
                new = {name: sha256(value) for name, value in values.items()}
                tree.save_part(job.files, values, new)
                del values  # before the next layer is fetched
                hashes |= new
        arrays = {n: Array(x.shape, x.dtype, hashes[n]) for n, x in content.arrays.items()}
        origin = content.source, content.revision
        sidecar = describe(arrays, content.files, content.transcoders, *origin)
        job.write(kept, sidecar.encode())
    if not job.files.exists():
        tree.finalize(job.files)
    for name, raw in {**content.files, SIDECAR: kept.read_bytes()}.items():
        job.write(job.files / name, raw)
    try:
        Converted(job.files, verify=True)
    except WeightsError as error:
        raise WeightsError(
            f"What was written does not read back as it was: {error} Remove the folder that this "
            "is about, and convert again."
        ) from error
