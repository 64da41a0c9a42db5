"""Reading and writing the ``params.npz`` of a transcoder, without pickle and without trust.

An npz is a zip of npy files. What each claims (its shape, its dtype, its size) is checked against
the others and against the bytes that are there before anything large is allocated.
"""

import dataclasses
import os
import secrets
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from jaxtc.errors import WeightsError, some
from jaxtc.weights.arrays import read_array

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")

# What numpy's reader of headers lets through: they are Python literals, parsed as such.
_HEADER_FAULTS = (
    ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError,
)  # fmt: skip

# deflate cannot do better, so a member that claims more is a bomb or damaged.
_BEST_DEFLATE_RATIO = 1032


@dataclasses.dataclass(frozen=True)
class Member:
    """What one npy header says: the array's shape, dtype and order of storage."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


def read_params(path: Path, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The five arrays of a transcoder.

    Args:
        path: a ``params.npz``.
        dtype: to cast to.

    Returns:
        W_enc (D, M), W_dec (M, D), b_enc (M,), b_dec (D,), threshold (M,).

    Raises:
        WeightsError: a damaged file, an array that is missing, extra, misshapen, not of floats, or
            not finite; all that is wrong with the arrays is named at once.
    """
    with _open(path) as archive:
        members = _members(path, archive)
        problems = _account(members)
        if problems:
            raise WeightsError(
                f"{path} is not a transcoder that jaxtc can read: {some(problems, 20)}. It expects "
                "float arrays W_enc (D, M), W_dec (M, D), b_enc (M), b_dec (D), threshold (M), as "
                "in the params.npz files of Gemma Scope."
            )
        arrays = {}
        for key in KEYS:
            arrays[key], problem = _read(path, archive, key, members[key], dtype)
            if problem:
                problems.append(f"{key} {problem}")
    if problems:
        raise WeightsError(
            f"{path} cannot be used: {some(problems)}. Whatever it computed would be wrong; fetch "
            "or train it again."
        )
    return arrays


def write_params(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write ``params.npz``; whole or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.npz")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            for key, array in arrays.items():
                # A ZipInfo of its own has a fixed date, so equal arrays give equal files.
                with archive.open(zipfile.ZipInfo(key + ".npy"), "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _damaged(path: Path, problem: object) -> WeightsError:
    return WeightsError(
        f"{path} is not a sound npz file: {problem}. Most likely a download or copy was cut short "
        "or damaged; fetch the file again."
    )


@contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror}.") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, _sentence(error)) from error
    with archive:
        yield archive


@contextmanager
def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    """An open member of the archive; damage found while it is read becomes a WeightsError."""
    # RuntimeError: encrypted; NotImplementedError: a compression that Python does not know.
    faults = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)
    try:
        with archive.open(info) as stream:
            yield stream
    except faults as error:
        raise _damaged(path, f"{info.filename}: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return str(error).rstrip(". ") or type(error).__name__


def _check_size(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse a member whose claimed size its stored bytes cannot yield."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _damaged(path, f"{info.filename} is compressed in a way that npz files are not")
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _BEST_DEFLATE_RATIO
    there = min(info.compress_size, path.stat().st_size - info.header_offset)
    # A deflated block has a few bytes beside its data.
    if info.file_size > max(there, 0) * ratio + (ratio > 1) * 1024:
        raise _damaged(path, f"{info.filename} claims {info.file_size} bytes, {there} are there")


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, Member | str]:
    """What each array's header says, or what is wrong with it."""
    found = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in found:
            raise _damaged(path, f"it holds {info.filename} twice")
        _check_size(path, info)
        with _member(path, archive, info) as stream:
            try:
                shape, fortran, dtype = _header(stream)
            except _HEADER_FAULTS as error:
                raise _damaged(path, f"{info.filename}: {_sentence(error)}") from error
            size = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject:
            found[name] = f"{name} holds pickled Python objects, which jaxtc never loads"
        elif size != info.file_size or min(shape, default=0) < 0:
            raise _damaged(
                path,
                f"{info.filename} has {info.file_size} bytes, its header of shape {shape} and "
                f"dtype {dtype} would take {size}",
            )
        elif dtype.kind != "f" or dtype.itemsize > 8:
            found[name] = f"{name} has dtype {dtype}, not a float of 16, 32 or 64 bits"
        else:
            found[name] = Member(shape, dtype, fortran)
    return found


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Python 2 wrote it, or that its literals are odd
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy version {version} does not hold plain arrays")


def _account(members: dict[str, Member | str]) -> list[str]:
    problems = [f"{key} is missing" for key in KEYS if key not in members]
    problems += [f"{key} is not part of a transcoder" for key in members if key not in KEYS]
    problems += [m for key, m in members.items() if key in KEYS and isinstance(m, str)]
    shapes = {key: m.shape for key, m in members.items() if key in KEYS and isinstance(m, Member)}
    if "W_enc" not in shapes:
        return [*problems, *(f"{key} has shape {shape}" for key, shape in shapes.items())]
    if len(shapes["W_enc"]) != 2 or 0 in shapes["W_enc"]:
        return [*problems, f"W_enc has shape {shapes['W_enc']}, not (D, M)"]
    d_in, features = shapes["W_enc"]
    d_out = d_in
    decoder, bias = shapes.get("W_dec", ()), shapes.get("b_dec", ())
    if len(decoder) == 2 and decoder[0] == features and bias == decoder[1:]:
        d_out = decoder[1]  # a transcoder between two widths: both arrays that say so agree
    expected = {
        "W_dec": (features, d_out),
        "b_enc": (features,),
        "b_dec": (d_out,),
        "threshold": (features,),
    }
    return problems + [
        f"{key} has shape {shapes[key]}, not {shape} (W_enc says D={d_in}, M={features})"
        for key, shape in expected.items()
        if key in shapes and shapes[key] != shape
    ]


def _read(
    path: Path, archive: zipfile.ZipFile, key: str, member: Member, dtype: np.dtype
) -> tuple[np.ndarray, str]:
    info = _infos(archive)[key]
    with _member(path, archive, info) as stream:
        _header(stream)

        def read_into(view: memoryview) -> None:
            while view:
                count = stream.readinto(view)
                if not count:
                    raise EOFError("it ended early")
                view = view[count:]

        shape = member.shape[::-1] if member.fortran else member.shape
        array, problem = read_array(read_into, member.dtype, shape, dtype)
    return (np.ascontiguousarray(array.T) if member.fortran else array), problem


def _infos(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
