"""Reading and writing the ``params.npz`` of a transcoder, without pickle and without trust.

An npz is a zip of npy files. What each claims (its shape, its dtype, its size) is checked against
the others and against the bytes that are there before anything large is allocated.
"""

import dataclasses
import math
import os
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

# What numpy's reader of headers lets through: they are Python literals, parsed as such.
_HEADER_FAULTS = (
    ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError,
)  # fmt: skip

# What Python's zip reader lets through. RuntimeError: encrypted; NotImplementedError: a compression
# or a feature of zip that it does not know.
_ZIP_FAULTS = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError,
    NotImplementedError,
)  # fmt: skip

# A zip file begins with its first member, or with its end if it has none.
_STARTS = (b"PK\x03\x04", b"PK\x05\x06")

# Weights hardly shrink when they are compressed; a few arrays that are all zeros do.
_MOST_RATIO, _FREE_BYTES = 20, 64 << 20

# deflate cannot do better, so a member that claims more is a bomb or damaged.
_BEST_DEFLATE_RATIO = 1032


@dataclasses.dataclass(frozen=True)
class Member:
    """What one npy header says of an array, and where in the zip it is.

    Attributes:
        shape: of the array.
        dtype: as stored.
        fortran: whether the first axis is the fastest.
        fault: why it cannot be read as numbers, or empty.
        info: its entry in the zip's directory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    fault: str
    info: zipfile.ZipInfo


class NpzFile:
    """An open npz file, to be used in a ``with`` statement.

    Attributes:
        path: of the file.
        entries: what the headers say, by array name.

    Raises:
        WeightsError: the file is damaged, or a header claims what its bytes cannot hold.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, local.open_plain(path)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            # Python's reader lets anything stand before a zip, and other programs do not.
            if self._file.read(4) not in _STARTS:
                raise self._damaged("it does not begin as a zip file does")
            self._archive = zipfile.ZipFile(self._file)
            self.entries = self._members()
        except BaseException as error:
            self._file.close()
            if isinstance(error, _ZIP_FAULTS) and not isinstance(error, WeightsError):
                raise self._damaged(first_line(error)) from error
            raise

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_) -> None:
        self._archive.close()
        self._file.close()

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

        Raises:
            WeightsError: the file ended or failed while it was read.
        """
        member = self.entries[name]
        shape = member.shape[::-1] if member.fortran else member.shape
        with self._open(member.info) as stream:
            _header(stream)

            def read_at(_: int, view: memoryview) -> None:
                while view:
                    count = stream.readinto(view)
                    if not count:
                        raise EOFError("it ended early")
                    view = view[count:]

            raw = Raw(read_at, 0, member.dtype, shape, stream=True)
            return shards.read(raw, dtype, sharding, transposed=member.fortran != transposed)

    def _damaged(self, problem: str) -> WeightsError:
        return WeightsError(
            f"{self.path} is not a sound npz file: {problem}. Most likely a download or copy was "
            "cut short or damaged; fetch the file again."
        )

    @contextmanager
    def _open(self, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
        """An open member; damage found while it is read becomes a WeightsError."""
        try:
            with self._archive.open(info) as stream:
                yield stream
        except WeightsError:
            raise
        except _ZIP_FAULTS as error:
            raise self._damaged(f"{info.filename}: {first_line(error)}") from error

    def _check_size(self, info: zipfile.ZipInfo) -> None:
        """Refuse a member whose claimed size its stored bytes cannot yield."""
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._damaged(f"{info.filename} is compressed in a way that npz files are not")
        ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _BEST_DEFLATE_RATIO
        there = min(info.compress_size, self._size - info.header_offset)
        # A deflated block has a few bytes beside its data.
        if info.file_size > max(there, 0) * ratio + (ratio > 1) * 1024:
            raise self._damaged(f"{info.filename} claims {info.file_size} bytes, {there} are there")

    def _members(self) -> dict[str, Member]:
        found: dict[str, Member] = {}
        infos = self._archive.infolist()
        for info in infos:
            self._check_size(info)
        unpacked = sum(info.file_size for info in infos)
        if unpacked > max(_FREE_BYTES, _MOST_RATIO * self._size):
            raise self._damaged(
                f"its {self._size} bytes claim to unpack to {unpacked}, which no weights do"
            )
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise self._damaged(f"it holds {info.filename} twice")
            with self._open(info) as stream:
                try:
                    shape, fortran, dtype = _header(stream)
                except _HEADER_FAULTS as error:
                    raise self._damaged(f"{info.filename}: {first_line(error)}") from error
                size = stream.tell() + math.prod(shape) * dtype.itemsize
            fault = ""
            if dtype.hasobject:
                fault = "holds pickled Python objects, which jaxtc never loads"
            elif size != info.file_size or min(shape, default=0) < 0:
                raise self._damaged(
                    f"{info.filename} has {info.file_size} bytes, its header of shape {shape} and "
                    f"dtype {dtype} would take {size}"
                )
            elif dtype.kind != "f" or dtype.itemsize > 8:
                fault = f"has dtype {dtype}, not a float of 16, 32 or 64 bits"
            found[name] = Member(shape, dtype, fortran, fault, info)
        return found


def write_params(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write ``params.npz``; whole or not at all. Each array is written when its turn comes."""
    with local.replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for key, array in arrays:
            # A ZipInfo of its own has a fixed date, so equal arrays give equal files.
            with archive.open(zipfile.ZipInfo(key + ".npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
            del array  # before the next one is made


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Python 2 wrote it, or that its literals are odd
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy version {version} does not hold plain arrays")
