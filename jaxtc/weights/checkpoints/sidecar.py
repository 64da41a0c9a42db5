"""``jaxtc.json``: what a converted checkpoint is, and the SHA-256 of the content of each array.

Nothing in it is believed before it was checked: it may come from anywhere.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtc.errors import JaxtcError, WeightsError
from jaxtc.helpers import JAXTC_VERSION, is_whole
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files import local
from jaxtc.weights.files.safetensors import pieces

SIDECAR = "jaxtc.json"
FORMAT, VERSION = "jaxtc-checkpoint", 2
MODEL, TRANSCODERS = "model", "transcoders"

# Of jaxtc.json, or of a file of a tokenizer.
MOST_BYTES = 100_000_000
_DTYPES = {np.dtype(d).name: np.dtype(d) for d in (jnp.bfloat16, "f2", "f4", "f8")}
_ARRAY = ("shape", "dtype", "sha256")
_BROKEN = "It was damaged or changed by hand; convert the checkpoint again, or fetch it again."


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of the tree; ``sha256`` is of its elements, little-endian, in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sha256: str


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What ``jaxtc.json`` says.

    Attributes:
        kind: ``"model"`` or ``"transcoders"``.
        source: what was converted, as it was given.
        revision: its commit on the hub, None for a local one.
        arrays: each array of the tree, by name.
        files: SHA-256 of each file beside the tree (the tokenizer's, ``config.json``), by name.
        config: of a model, the contents of its ``config.json``; None for transcoders.
        transcoders: by layer, the :meth:`jaxtc.Transcoder.facts` of each; None for a model.
        jaxtc: the version that wrote it.
    """

    kind: str
    source: str
    revision: str | None
    arrays: Mapping[str, Array]
    files: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    transcoders: Mapping[int, Mapping[str, Any]] | None = None
    jaxtc: str = JAXTC_VERSION

    @property
    def dtype(self) -> str:
        """The dtype of the arrays, ``"mixed"`` when there are several."""
        names = {array.dtype.name for array in self.arrays.values()}
        return names.pop() if len(names) == 1 else "mixed"

    @property
    def content(self) -> str:
        """One SHA-256 for all: of the lines of hash and name that ``sha256sum`` prints."""
        hashes = {name: array.sha256 for name, array in self.arrays.items()} | dict(self.files)
        lines = (f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def encode(self) -> bytes:
        """The bytes of ``jaxtc.json``; the same for the same contents."""
        found = {"format": FORMAT, "version": VERSION}
        found |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found |= {"dtype": self.dtype, "content_sha256": self.content}
        found["arrays"] = {
            name: {"shape": list(one.shape), "dtype": one.dtype.name, "sha256": one.sha256}
            for name, one in sorted(self.arrays.items())
        }
        return (json.dumps(found, indent=1) + "\n").encode()


def hash_bytes(content: bytes) -> str:
    """The SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


def hash_array(array: np.ndarray) -> str:
    """The SHA-256 of an array's elements in C order; JAX runs on little-endian machines only."""
    digest = hashlib.sha256()
    for piece in pieces(array):
        digest.update(piece)
    return digest.hexdigest()


def read_sidecar(folder: Any) -> Sidecar:
    """The sidecar of a converted checkpoint, checked in itself.

    Raises:
        WeightsError: not a sidecar, of another version, or one that contradicts itself.
    """
    path = folder / SIDECAR
    content = read_bytes(path, MOST_BYTES)
    try:
        return _parse(json.loads(content.decode("utf-8")))
    except _Unsound as error:
        raise WeightsError(f"{path} is not sound: {error}. {_BROKEN}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}). {_BROKEN}") from error


def read_bytes(path: Any, most: int) -> bytes:
    """The content of a plain file of at most so many bytes, here or in a bucket.

    Raises:
        WeightsError: it cannot be read, or is larger.
    """
    try:
        if not isinstance(path, Path):
            return path.read_bytes()
        with local.open_plain(path) as file:
            if os.fstat(file.fileno()).st_size <= most:
                return file.read()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    raise WeightsError(f"{path} has more than {most} bytes, which none of ours has.")


class _Unsound(Exception):
    """What is wrong with a sidecar."""


def _parse(raw: Any) -> Sidecar:
    def check(sound: Any, problem: str) -> None:
        if not sound:
            raise _Unsound(problem)

    def get(key: str) -> dict:
        check(isinstance(raw.get(key), dict), f"it has no {key}")
        return raw[key]

    def digest(name: str, value: Any) -> str:
        sound = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
        check(sound, f"the SHA-256 of {name} is {value!r}")
        return value

    def array(name: str, one: Any) -> Array:
        shape, dtype, sha256 = map((one if isinstance(one, dict) else {}).get, _ARRAY)
        sizes = isinstance(shape, list) and all(is_whole(size, 1) for size in shape)
        known = isinstance(dtype, str) and dtype in _DTYPES
        check(
            sizes and known and re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII),
            f"the array {name!r} has shape {shape!r}, dtype {dtype!r}",
        )
        return Array(tuple(shape), _DTYPES[dtype], digest(name, sha256))

    told = isinstance(raw, dict) and raw.get("format") == FORMAT
    check(told, f"it does not say that it is a {FORMAT}")
    check(
        raw.get("version") != 1,
        "it is of version 1, an older layout that is no longer read; run `jaxtc convert` on what "
        f"it was made from ({raw.get('source')}) again",
    )
    check(
        raw.get("version") == VERSION,
        f"it is of version {raw.get('version')!r} (written by jaxtc {raw.get('jaxtc')!r}), and "
        f"this jaxtc reads version {VERSION}; install a newer one",
    )
    kind, source, revision = raw.get("kind"), raw.get("source"), raw.get("revision")
    check(kind in (MODEL, TRANSCODERS), f"its kind is {kind!r}, not {MODEL!r} or {TRANSCODERS!r}")
    texts = isinstance(source, str) and isinstance(revision, str | None)
    check(texts, "its source or revision is not text")
    files = {name: digest(name, value) for name, value in get("files").items()}
    for name in files:
        plain = re.fullmatch(r"\w[\w.-]*", name, re.ASCII)
        check(plain, f"it names the file {name!r}, which is not one right in its folder")
    transcoders = get("transcoders") if kind == TRANSCODERS else None
    for layer, facts in (transcoders or {}).items():
        named = re.fullmatch(r"\d{1,5}", layer, re.ASCII) and isinstance(facts, dict)
        check(named, f"{layer!r} is not a layer with a transcoder")
        try:
            Transcoder.from_facts(facts)
        except JaxtcError as error:
            raise _Unsound(f"the transcoder of layer {layer}: {error}") from error
    found = Sidecar(
        kind, source, revision,
        {name: array(name, one) for name, one in get("arrays").items()}, files,
        get("config") if kind == MODEL else None,
        transcoders and {int(layer): facts for layer, facts in transcoders.items()},
        str(raw.get("jaxtc")),
    )  # fmt: skip
    fits = raw.get("content_sha256") == found.content
    check(fits, "its content_sha256 is not that of its arrays and files")
    return found
