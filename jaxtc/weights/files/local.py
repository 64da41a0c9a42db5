"""Looking for a source on this machine; what the file system refuses becomes a SourceError."""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

from jaxtc.errors import SourceError, WeightsError, some


def expand(source: str | Path) -> Path:
    """A path with the home folder for ``~``. Raises SourceError when there is no such folder."""
    with _explained(source):
        return Path(source).expanduser()


def find(source: str | Path) -> Path | None:
    """The file or folder that a source names, None when there is none.

    Raises SourceError when it cannot be looked up: too long a name, no permission.
    """
    path = expand(source)
    with _explained(source):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return path


def open_plain(path: Path) -> BinaryIO:
    """A regular file opened for reading, unbuffered.

    Raises WeightsError, without waiting, when it cannot be opened, or is a folder, pipe or device.
    """

    at_once = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for a writer
    try:
        file = open(  # noqa: SIM115
            path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | at_once)
        )
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise WeightsError(f"{path} is a pipe or a device, not a regular file, and is not read.")
    return file


class PlainFile:
    """A regular file of ``size`` bytes open for reading, to be used in a ``with`` statement.

    Raises WeightsError as :func:`open_plain`, and for a file that is damaged.
    """

    format: ClassVar[str]

    def __init__(self, path: Path):
        self.path, self.file = path, open_plain(path)
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            self.read_header()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def read_header(self) -> None:
        """Check what the file claims. Raises WeightsError when its bytes cannot hold it."""
        raise NotImplementedError

    def unsound(self, problem: str) -> WeightsError:
        """The error for a damaged file."""
        return WeightsError(
            f"{self.path} is not a sound {self.format} file: {problem}. Most likely a download or "
            "copy was cut short or damaged; fetch the file again."
        )


def has(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name. Raises SourceError as :func:`find`."""
    found = find(folder / name)
    return found is not None and found.is_file()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when nothing was raised."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, files: Collection[str], what: str) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, which takes its place when nothing was raised.

    ``files`` are patterns of what may be in one that is replaced, ``what`` they are for messages.
    Raises SourceError for a folder that holds other things.
    """
    if folder.exists():
        if not folder.is_dir():
            raise SourceError(f"{folder} is a file; give a folder to save {what} in.")
        others = sorted(
            path.name
            for path in folder.iterdir()
            if path.is_dir() or not any(path.match(pattern) for pattern in files)
        )
        if others:
            raise SourceError(
                f"{folder} holds other things than {what} ({some(others)}). Saving replaces the "
                "whole folder, so give a new one."
            )
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    # RuntimeError: ~ of an unknown user; ValueError: a zero byte.
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        given, reason = str(source), getattr(error, "strerror", None) or str(error)
        short = given if len(given) <= 100 else f"{given[:100]}…"
        raise SourceError(
            f"{short!r} cannot be looked up on this machine: {reason.rstrip('.')}. Give a folder "
            "or file that you may read, or a hub id such as google/gemma-2-2b."
        ) from error
