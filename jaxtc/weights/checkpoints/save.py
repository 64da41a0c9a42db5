"""Saving what is in memory, possibly spread over many processes, as a converted checkpoint."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtc.errors import SourceError
from jaxtc.model.gemma2 import Gemma2
from jaxtc.sharding.processes import agreed
from jaxtc.sharding.rules import variables
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.job import Job
from jaxtc.weights.checkpoints.manifest import MANIFEST, MODEL, TRANSCODERS, Manifest
from jaxtc.weights.checkpoints.tree import Index, Stored, encode, metadata, store

Values = Mapping[str, tuple[Stored, jax.Array]]


def save_checkpoint(
    model: Gemma2 | Mapping[int, Transcoder], folder: str | Path, tokenizer: Any = None
) -> Path:
    """Write a model, or transcoders by layer, so that ``load_model`` or ``load_transcoder`` reads
    it onto any mesh; orbax restores the folder ``orbax`` in it.

    The bytes do not depend on the mesh nor on the number of processes. All processes call this
    with a folder that all of them see; each writes chunks of its own shards, and process 0 the
    rest. Until it is whole it is ``FOLDER.partial``; if a process fails, all raise.

    Args:
        model: in memory, in the dtype it has. An array whose shards do not begin where a chunk
            does (on a mesh with 3 devices along an axis, say) is gathered first, one at a time.
        folder: new or empty.
        tokenizer: of ``transformers``, saved along with a model when given.

    Returns:
        The folder.

    Raises:
        SourceError: the folder exists, cannot be written, or the disk is full.
        OtherProcessError: another process failed.
    """
    kind = MODEL if isinstance(model, Gemma2) else TRANSCODERS
    values = _values(model)
    stored = [one for one, _ in values.values()]
    extra = metadata(stored)
    if kind == MODEL:
        config = model.config.to_dict() | {"dtype": model.dtype.name}
        extra["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    manifest = {"kind": kind, "source": "memory", "revision": None}
    manifest["arrays"] = {one.name: one for one in stored}
    if kind == MODEL:
        manifest["config"] = config
    else:
        manifest["transcoders"] = {layer: describe(one) for layer, one in model.items()}
    what = {"saving": kind, "arrays": len(stored)}
    needed = sum(one.file_bytes for one in stored) + sum(map(len, extra.values()))
    process, everyone = jax.process_index(), Mesh(np.array(jax.devices()), ("all",))
    job = None
    try:
        with agreed(everyone, f"begin to save to {folder}"):
            if process == 0:
                extra |= tokenizer_files(tokenizer)
                job = Job(folder, what, needed, fresh=True)
        with agreed(everyone, f"write its part of {folder}"):
            job = job or Job(folder, what, needed, process=process)
            for one, array in values.values():
                for index, chunk in _own_chunks(one, array):
                    job.write(one.file(index), [encode(chunk, one)])
        with agreed(everyone, f"finish {folder}"):
            if process == 0:
                job.collect()
                for file, content in extra.items():
                    job.write(file, [content])
                job.finish(MANIFEST, Manifest(files=job.done, **manifest).encode())
    finally:
        if job is not None:
            job.close()
    return job.out


def describe(transcoder: Transcoder) -> dict[str, Any]:
    """What a manifest says of a transcoder beside its arrays."""
    names = ("input_site", "output_site", "source", "variant")
    found = {name: getattr(transcoder, name) for name in names}
    return found | {"activation": transcoder.activation.facts()}


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer of ``transformers`` saves, by name."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _values(model: Gemma2 | Mapping[int, Transcoder]) -> Values:
    if isinstance(model, Gemma2):
        modules = {"": model}
    elif isinstance(model, Mapping) and all(isinstance(t, Transcoder) for t in model.values()):
        modules = {f"layers.{layer}.": transcoder for layer, transcoder in model.items()}
    else:
        raise SourceError(
            f"A {type(model).__name__} cannot be saved; expected a Gemma2, or transcoders by "
            "layer: {20: transcoder}."
        )
    return {
        prefix + name: (
            store(prefix + name, array.shape, np.dtype(array.dtype), value.logical_axes),
            array,
        )
        for prefix, module in modules.items()
        for (name, value), array in zip(variables(module), jax.tree.leaves(module), strict=True)
    }


def _own_chunks(stored: Stored, array: jax.Array) -> Iterator[tuple[Index, np.ndarray]]:
    """The chunks that this process is to write; which one does follows from the sharding alone."""
    if array.is_fully_addressable and jax.process_index() != 0:
        return  # each process has all of it
    if not array.is_fully_addressable and not array.is_fully_replicated:
        shares = array.sharding.devices_indices_map(array.shape)
        if any(not _holders(stored, index, shares) for index in stored.indices()):
            array = jax.jit(
                lambda x: x,
                out_shardings=jax.sharding.NamedSharding(
                    array.sharding.mesh, jax.sharding.PartitionSpec()
                ),
            )(array)
    shares = array.sharding.devices_indices_map(array.shape)
    ours = {shard.device: shard for shard in array.addressable_shards}
    host: dict[Any, np.ndarray] = {}
    for number, index in enumerate(stored.indices()):
        holders = _holders(stored, index, shares)
        if not holders:  # all shards are here
            whole = host.setdefault(None, np.asarray(array))
            yield index, whole[stored.region(index)]
            continue
        device = holders[number % len(holders)]
        if device in ours and device.process_index == jax.process_index():
            share = host.setdefault(device, np.asarray(ours[device].data))
            starts = [
                part.indices(n)[0] for part, n in zip(shares[device], array.shape, strict=True)
            ]
            region = stored.region(index)
            inside = (
                slice(part.start - at, part.stop - at)
                for part, at in zip(region, starts, strict=True)
            )
            yield index, share[tuple(inside)]


def _holders(stored: Stored, index: Index, shares: Mapping[Any, Any]) -> list[Any]:
    """The devices that hold all of a chunk, in a fixed order."""
    found = []
    for device, share in shares.items():
        bounds = zip(stored.region(index), share, stored.shape, strict=True)
        if all(
            have.indices(size)[0] <= want.start and want.stop <= have.indices(size)[1]
            for want, have, size in bounds
        ):
            found.append(device)
    return sorted(found, key=lambda device: device.id)
