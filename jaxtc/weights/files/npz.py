"""Reading and writing the ``params.npz`` of a transcoder, without pickle and without trust.

An npz is a zip of npy files. What each claims (its shape, its dtype, its size) is checked against
the others and against the bytes that are there before anything large is allocated.
"""

import dataclasses
import json
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtc.errors import WeightsError, first_line
from jaxtc.weights.files import local, shards
from jaxtc.weights.files.shards import Raw

# What Python's zip reader raises for damage; RuntimeError also for encryption and unknown features.
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)
# And NumPy's reader of headers, which are Python literals and parsed as such.
_HEADER_FAULTS = (TypeError, SyntaxError, tokenize.TokenError, MemoryError)

# A zip file begins with its first member, or with its end if it has none.
_STARTS = (b"PK\x03\x04", b"PK\x05\x06")

# Weights hardly shrink when they are compressed; a few arrays that are all zeros do.
_MOST_RATIO, _FREE_BYTES = 20, 64 << 20

# deflate cannot do better, so a member that claims more is a bomb or damaged.
_BEST_DEFLATE_RATIO = 1032


@dataclasses.dataclass(frozen=True)
class Member:
    """What one npy header says of an array: ``fault`` is why it cannot be read as numbers, or "".

    In ``fortran`` order the first axis is the fastest. ``info`` is from the zip's directory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    fault: str
    info: zipfile.ZipInfo


class NpzFile(local.PlainFile):
    """An open npz file, see :class:`~jaxtc.weights.files.local.PlainFile`.

    Attributes:
        entries: what the headers say, by array name.
        metadata: what jaxtc wrote into the zip's comment, by key; empty in files of others.
    """

    format = "npz"

    def read_header(self) -> None:
        """Check the zip's directory and each array's header against the bytes that are there."""
        # Python's reader lets anything stand before a zip, and other programs do not.
        if self.file.read(4) not in _STARTS:
            raise self.unsound("it does not begin as a zip file does")
        with self._explained():
            self._archive = zipfile.ZipFile(self.file)
        self.metadata = _comment(self._archive.comment)
        infos = self._archive.infolist()
        for info in infos:
            self._check_size(info)
        unpacked = sum(info.file_size for info in infos)
        if unpacked > max(_FREE_BYTES, _MOST_RATIO * self.size):
            raise self.unsound(
                f"its {self.size} bytes claim to unpack to {unpacked}, which no weights do"
            )
        self.entries: dict[str, Member] = {}
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in self.entries:
                raise self.unsound(f"it holds {info.filename} twice")
            self.entries[name] = self._member(info)

    def read(
        self,
        name: str,
        dtype: np.dtype,
        sharding: NamedSharding | None = None,
        *,
        transposed: bool = False,
    ) -> tuple[np.ndarray | jax.Array, str]:
        """An array without a fault as :func:`~jaxtc.weights.files.shards.read` has it.

        A member of a zip is a stream: every process reads all of it, and keeps its own shards.
        Raises WeightsError when the file ends or fails while it is read.
        """
        member = self.entries[name]
        shape = member.shape[::-1] if member.fortran else member.shape
        with self._explained(member.info), self._archive.open(member.info) as stream:
            _header(stream)

            def read_at(_: int, view: memoryview) -> None:
                if stream.readinto(view) < len(view):
                    raise EOFError("it ended early")

            raw = Raw(read_at, 0, member.dtype, shape, stream=True)
            return shards.read(raw, dtype, sharding, transposed=member.fortran != transposed)

    @contextmanager
    def _explained(self, info: zipfile.ZipInfo | None = None, *more: type) -> Iterator[None]:
        """What Python's reader, or ``more``, raises for a damaged file becomes a WeightsError."""
        try:
            yield
        except WeightsError:
            raise
        except (*_ZIP_FAULTS, *more) as error:
            where = f"{info.filename}: " if info else ""
            raise self.unsound(where + first_line(error)) from error

    def _check_size(self, info: zipfile.ZipInfo) -> None:
        """Refuse a member whose claimed size its stored bytes cannot yield."""
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.unsound(f"{info.filename} is compressed in a way that npz files are not")
        ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _BEST_DEFLATE_RATIO
        there = min(info.compress_size, self.size - info.header_offset)
        # A deflated block has a few bytes beside its data.
        if info.file_size > max(there, 0) * ratio + (ratio > 1) * 1024:
            raise self.unsound(f"{info.filename} claims {info.file_size} bytes, {there} are there")

    def _member(self, info: zipfile.ZipInfo) -> Member:
        with self._explained(info, *_HEADER_FAULTS), self._archive.open(info) as stream:
            shape, fortran, dtype = _header(stream)
            size = stream.tell() + math.prod(shape) * dtype.itemsize
        fault = ""
        if dtype.hasobject:
            fault = "holds pickled Python objects, which jaxtc never loads"
        elif size != info.file_size or min(shape, default=0) < 0:
            raise self.unsound(
                f"{info.filename} has {info.file_size} bytes, its header of shape {shape} and "
                f"dtype {dtype} would take {size}"
            )
        elif dtype.kind != "f" or dtype.itemsize > 8:
            fault = f"has dtype {dtype}, not a float of 16, 32 or 64 bits"
        return Member(shape, dtype, fortran, fault, info)


def write_params(path: Path, arrays: Iterable[tuple[str, np.ndarray]], comment: str = "") -> None:
    """Write ``params.npz``; whole or not at all. Each array is written when its turn comes.

    The comment, a JSON object of texts, is the zip's; other readers leave it alone.
    """
    with local.replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.comment = comment.encode()
        for key, array in arrays:
            # A ZipInfo of its own has a fixed date, so equal arrays give equal files.
            with archive.open(zipfile.ZipInfo(key + ".npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
            del array  # before the next one is made


def _comment(comment: bytes) -> dict[str, str]:
    """Of ours, a JSON object of texts; of others, whatever it says, nothing."""
    try:
        found = json.loads(comment.decode()) if comment[:1] == b"{" else {}
    except (ValueError, RecursionError):
        return {}
    texts = isinstance(found, dict) and all(isinstance(x, str) for x in found.values())
    return found if texts and "variant" in found else {}


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Python 2 wrote it, or that its literals are odd
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy version {version} does not hold plain arrays")
