"""``jaxtc.json``: what a converted checkpoint is, and the size and SHA-256 of each of its files.

Nothing in it is believed before it was checked: a manifest may come from anywhere.
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxtc.errors import JaxtcError, WeightsError, some
from jaxtc.helpers import JAXTC_VERSION, is_whole
from jaxtc.transcoders.activations import activation_of
from jaxtc.weights.checkpoints.job import Record
from jaxtc.weights.checkpoints.tree import ZARR_DTYPES, Stored
from jaxtc.weights.files import local

MANIFEST = "jaxtc.json"
FORMAT, VERSION = "jaxtc-checkpoint", 1
MODEL, TRANSCODERS = "model", "transcoders"

_MOST_BYTES = 100_000_000
_DTYPES = {dtype.name: dtype for dtype in ZARR_DTYPES}
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BROKEN = "It was damaged or changed by hand; convert the checkpoint again, or fetch it again."


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ``jaxtc.json`` says.

    Attributes:
        kind: ``"model"`` or ``"transcoders"``.
        source: what was converted, as it was given.
        revision: its commit on the hub, None for a local one.
        arrays: how each array of the tree is stored, by name.
        files: size and SHA-256 of each file but ``jaxtc.json`` itself, by path.
        config: of a model, the contents of its ``config.json``; None for transcoders.
        transcoders: by layer, the sites and the source of each; None for a model.
        jaxtc: the version that wrote it; this one's by default.
    """

    kind: str
    source: str
    revision: str | None
    arrays: Mapping[str, Stored]
    files: Mapping[str, Record]
    config: Mapping[str, Any] | None = None
    transcoders: Mapping[int, Mapping[str, Any]] | None = None
    jaxtc: str = JAXTC_VERSION

    @property
    def dtype(self) -> str:
        """The dtype of the arrays, ``"mixed"`` when there are several."""
        names = {stored.dtype.name for stored in self.arrays.values()}
        return names.pop() if len(names) == 1 else "mixed"

    @property
    def content(self) -> str:
        """One SHA-256 for all: of the lines of hash and path that ``sha256sum`` prints."""
        lines = (f"{digest}  {file}\n" for file, (_, digest) in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def encode(self) -> bytes:
        """The bytes of ``jaxtc.json``; the same for the same contents."""
        found = {
            "format": FORMAT,
            "version": VERSION,
            "jaxtc": self.jaxtc,
            "kind": self.kind,
            "source": self.source,
            "revision": self.revision,
            "dtype": self.dtype,
            "content_sha256": self.content,
        }
        if self.config is not None:
            found["config"] = dict(self.config)
        if self.transcoders is not None:
            found["transcoders"] = {str(k): dict(v) for k, v in sorted(self.transcoders.items())}
        # A line an array and a file: thousands of them are still a readable file.
        lines = [json.dumps(found, indent=1)[:-2] + ',\n "arrays": {']
        lines.append(",\n".join(
            f'  {json.dumps(name)}: {{"shape": {list(one.shape)}, "dtype": "{one.dtype.name}", '
            f'"chunks": {list(one.chunks)}}}' for name, one in sorted(self.arrays.items())
        ) + '\n },\n "files": {')  # fmt: skip
        lines.append(",\n".join(
            f'  {json.dumps(file)}: {{"size": {size}, "sha256": "{digest}"}}'
            for file, (size, digest) in sorted(self.files.items())
        ) + "\n }\n}\n")  # fmt: skip
        return "\n".join(lines).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a converted checkpoint, checked in itself.

    Raises:
        WeightsError: not a manifest, of a later version, or one that contradicts itself or points
            outside its folder.
    """
    path = folder / MANIFEST
    try:
        with local.open_plain(path) as file:
            if os.fstat(file.fileno()).st_size > _MOST_BYTES:
                raise WeightsError(f"{path} is larger than any manifest ({_MOST_BYTES} bytes).")
            raw = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is not JSON ({error}). {_BROKEN}") from error
    try:
        return _parse(raw)
    except _Unsound as error:
        raise WeightsError(f"{path} is not a sound manifest: {error}. {_BROKEN}") from error


class _Unsound(Exception):
    """What is wrong with a manifest."""


def _parse(raw: Any) -> Manifest:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise _Unsound(f"it does not say that it is a {FORMAT}")
    if raw.get("version") != VERSION:
        raise _Unsound(
            f"it is of version {raw.get('version')!r} (written by jaxtc {raw.get('jaxtc')!r}), "
            f"and this jaxtc, {VERSION}, reads version {VERSION}; install a newer one"
        )
    kind, revision = raw.get("kind"), raw.get("revision")
    if kind not in (MODEL, TRANSCODERS):
        raise _Unsound(f"its kind is {kind!r}, not {MODEL!r} or {TRANSCODERS!r}")
    if not isinstance(raw.get("source"), str) or not isinstance(revision, str | None):
        raise _Unsound("its source or revision is not a text")
    files = {name: _file(name, one) for name, one in _object(raw, "files").items()}
    arrays = {name: _array(name, one, files) for name, one in _object(raw, "arrays").items()}
    config = _object(raw, "config") if kind == MODEL else None
    transcoders = None
    if kind == TRANSCODERS:
        transcoders = dict(_transcoder(*item) for item in _object(raw, "transcoders").items())
    written_by = str(raw.get("jaxtc"))
    found = Manifest(
        kind, raw["source"], revision, arrays, files, config, transcoders, jaxtc=written_by
    )
    if raw.get("content_sha256") != found.content:
        raise _Unsound("its content_sha256 is not that of its files")
    return found


def _object(raw: dict, key: str) -> dict:
    if not isinstance(raw.get(key), dict):
        raise _Unsound(f"it has no {key}")
    return raw[key]


def _file(name: str, claim: Any) -> Record:
    parts = PurePosixPath(name).parts
    plain = "/".join(parts) == name and not set(parts) & {"..", "."} and not name.startswith("/")
    if not plain or not name or name == MANIFEST or re.search(r"[\\:\x00-\x1f]", name):
        raise _Unsound(f"it names the file {name!r}, which is not one inside its folder")
    size, digest = (claim.get(k) if isinstance(claim, dict) else None for k in ("size", "sha256"))
    if not is_whole(size) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise _Unsound(f"it does not give size and sha256 of {name}")
    return size, digest


def _array(name: str, claim: Any, files: Mapping[str, Record]) -> Stored:
    keys = ("shape", "dtype", "chunks")
    shape, dtype, chunks = (claim.get(k) if isinstance(claim, dict) else None for k in keys)
    sound = _NAME.fullmatch(name) and isinstance(dtype, str) and dtype in _DTYPES
    for sizes in (shape, chunks):
        sound = sound and isinstance(sizes, list) and all(is_whole(size, 1) for size in sizes)
    if not sound or not shape or len(shape) != len(chunks):
        raise _Unsound(
            f"the array {name!r} has shape {shape!r}, dtype {dtype!r}, chunks {chunks!r}"
        )
    stored = Stored(name, tuple(shape), _DTYPES[dtype], tuple(chunks))
    if any(c > size for c, size in zip(chunks, shape, strict=True)):
        raise _Unsound(f"the chunks {chunks} of {name} are larger than its shape {shape}")
    # Their number first: a claim of 2**60 chunks is not gone through.
    if int(np.prod(stored.counts, dtype=object)) > len(files):
        raise _Unsound(f"{name} has more chunks than there are files")
    for index in stored.indices():
        size, _ = files.get(stored.file(index), (None, None))
        if size != stored.chunk_bytes:
            raise _Unsound(
                f"{stored.file(index)} has {size} bytes, and a chunk {chunks} of {dtype} has "
                f"{stored.chunk_bytes}"
            )
    return stored


def _transcoder(layer: str, claim: Any) -> tuple[int, dict[str, Any]]:
    if not re.fullmatch(r"\d{1,5}", layer, re.ASCII) or not isinstance(claim, dict):
        raise _Unsound(f"{layer!r} is not a layer with a transcoder")
    for key in ("input_site", "output_site", "source"):
        if not isinstance(claim.get(key), str):
            raise _Unsound(f"the transcoder of layer {layer} does not say its {key}")
    try:
        activation_of(claim.get("activation"))
    except JaxtcError as error:
        raise _Unsound(f"the transcoder of layer {layer}: {error}") from error
    return int(layer), claim


def check_folder(folder: Path, files: Mapping[str, Record]) -> None:
    """Compare what is in a folder with what its manifest says, by name and size; no file is read.

    Raises:
        WeightsError: a link, a file that is missing, of another size, or not in the manifest.
    """
    problems, seen = [], set()
    for path, is_folder, mode, size in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if stat.S_ISLNK(mode):
            problems.append(f"{name} is a link")
        elif is_folder or name == MANIFEST:
            continue
        elif not stat.S_ISREG(mode):
            problems.append(f"{name} is not a plain file")
        elif name not in files:
            problems.append(f"{name} is not in {MANIFEST}")
        elif files[name][0] != size:
            problems.append(f"{name} has {size} bytes, not {files[name][0]}")
        seen.add(name)
    problems += [f"{name} is missing" for name in files if name not in seen]
    if problems:
        raise WeightsError(
            f"{folder} is not the checkpoint that its {MANIFEST} describes: {some(problems)}. A "
            "copy was cut short, or files were changed; copy or convert it again."
        )


def _walk(folder: Path) -> list[tuple[Path, bool, int, int]]:
    """Everything below a folder, links not followed: path, is it a folder, mode, size."""
    found, left = [], [folder]
    try:
        while left:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    seen = entry.stat(follow_symlinks=False)
                    is_folder = stat.S_ISDIR(seen.st_mode)
                    found.append((Path(entry.path), is_folder, seen.st_mode, seen.st_size))
                    if is_folder:
                        left.append(Path(entry.path))
    except OSError as error:
        raise WeightsError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return found
