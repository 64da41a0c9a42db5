"""``jaxtc.json``: what a converted checkpoint is, and the SHA-256 of the content of each array.

It may come from anywhere, so all of it is checked.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
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

# The most that jaxtc.json, or a file of a tokenizer, may have.
_MOST_BYTES = 100_000_000
_DTYPES = {np.dtype(d).name: np.dtype(d) for d in (jnp.bfloat16, "f2", "f4", "f8")}
_FIELDS = ("shape", "dtype", "sha256")
_BROKEN = "It was damaged or changed by hand; convert the checkpoint again, or fetch it again."


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of the tree; ``sha256`` is of its elements, little-endian, in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sha256: str


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What ``jaxtc.json`` says; arrays, files and transcoders by name or layer."""

    kind: str  # "model" or "transcoders"
    source: str  # what was converted, as it was given
    revision: str | None  # its commit on the hub
    arrays: Mapping[str, Array]
    files: Mapping[str, str]  # SHA-256 of those beside the tree (the tokenizer's, config.json)
    config: Mapping[str, Any] | None = None  # of a model
    transcoders: Mapping[int, Mapping[str, Any]] | None = None  # Transcoder.facts()
    jaxtc: str = JAXTC_VERSION  # that wrote it

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
            name: dataclasses.asdict(one) | {"dtype": one.dtype.name}
            for name, one in sorted(self.arrays.items())
        }
        return (json.dumps(found, indent=1) + "\n").encode()


def describe(
    arrays: Mapping[str, Array],
    files: Mapping[str, bytes],
    transcoders: Mapping[int, Transcoder] | None = None,
    source: str = "memory",
    revision: str | None = None,
) -> Sidecar:
    """The sidecar of a model, if it has no transcoders, or of transcoders by layer."""
    hashes = {name: sha256(content) for name, content in files.items()}
    if transcoders is None:
        config = json.loads(files["config.json"])
        return Sidecar(MODEL, source, revision, arrays, hashes, config=config)
    facts = {layer: one.facts() for layer, one in transcoders.items()}
    return Sidecar(TRANSCODERS, source, revision, arrays, hashes, transcoders=facts)


def sha256(content: bytes | np.ndarray) -> str:
    """Of bytes, or of elements in C order (JAX runs on little-endian machines only)."""
    digest = hashlib.sha256()
    for piece in [content] if isinstance(content, bytes) else pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def read_bytes(path: Any) -> bytes:
    """The content of a plain file, here or in a bucket. Raises WeightsError if it is too large."""
    try:
        if not isinstance(path, Path):
            return path.read_bytes()
        with local.open_plain(path) as file:
            if os.fstat(file.fileno()).st_size <= _MOST_BYTES:
                return file.read()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    raise WeightsError(f"{path} has more than {_MOST_BYTES} bytes, which none of ours has.")


def read_sidecar(folder: Any) -> Sidecar:
    """The sidecar of a converted checkpoint, checked in itself.

    Raises:
        WeightsError: not a sidecar, of another version, or one that contradicts itself.
    """
    path = folder / SIDECAR
    try:
        raw = json.loads(read_bytes(path).decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}). {_BROKEN}") from error

    def check(sound: Any, problem: str) -> None:
        if not sound:
            raise WeightsError(f"{path} is not sound: {problem}. {_BROKEN}")

    def each(key: str, pattern: str, problem: str, make: Callable[[str, Any], Any]) -> dict:
        check(isinstance(raw.get(key), dict), f"it has no {key}")
        for name in raw[key]:
            check(re.fullmatch(pattern, name, re.ASCII), f"{name!r} {problem}")
        return {name: make(name, value) for name, value in raw[key].items()}

    def digest(name: str, value: Any) -> str:
        sound = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
        check(sound, f"the SHA-256 of {name} is {value!r}")
        return value

    def array(name: str, one: Any) -> Array:
        shape, dtype, hashed = map((one if isinstance(one, dict) else {}).get, _FIELDS)
        sizes = isinstance(shape, list) and all(is_whole(size, 1) for size in shape)
        known = isinstance(dtype, str) and dtype in _DTYPES
        check(sizes and known, f"the array {name!r} has shape {shape!r}, dtype {dtype!r}")
        return Array(tuple(shape), _DTYPES[dtype], digest(name, hashed))

    def facts(layer: str, one: Any) -> Any:
        try:
            Transcoder.from_facts(one)
        except (JaxtcError, AttributeError) as error:
            check(False, f"the transcoder of layer {layer}: {error}")
        return one

    ours = isinstance(raw, dict) and raw.get("format") == FORMAT
    check(ours, f"it does not say that it is a {FORMAT}")
    version, kind, source, revision = map(raw.get, ("version", "kind", "source", "revision"))
    check(version == VERSION, (
        f"it is of version {version!r} of jaxtc {raw.get('jaxtc')!r}, and this reads version "
        f"{VERSION}; install a newer jaxtc, or run `jaxtc convert` on {source!r} again"
    ))  # fmt: skip
    check(kind in (MODEL, TRANSCODERS), f"its kind is {kind!r}, not {MODEL!r} or {TRANSCODERS!r}")
    texts = isinstance(source, str) and isinstance(revision, str | None)
    check(texts, "its source or revision is not text")
    files = each("files", r"\w[\w.-]*", "is a file that is not one right in its folder", digest)
    arrays = each("arrays", r"\w+(\.\w+)*", "is no name of an array", array)
    config = transcoders = None
    if kind == MODEL:
        config = raw.get("config")
        check(isinstance(config, dict), "it has no config")
    else:
        layers = each("transcoders", r"\d{1,5}", "is not a layer", facts)
        transcoders = {int(layer): one for layer, one in layers.items()}
    wrote = str(raw.get("jaxtc"))
    found = Sidecar(kind, source, revision, arrays, files, config, transcoders, wrote)
    fits = raw.get("content_sha256") == found.content
    check(fits, "its content_sha256 is not that of its arrays and files")
    return found
