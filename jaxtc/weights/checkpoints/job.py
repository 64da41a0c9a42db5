"""Files on their way to a folder: beside it until all are there, kept when the work is cut short.

``OUT.partial/`` holds ``job.json`` (what is being made), ``writing.*`` (the file at work), and
``files/``, which becomes ``OUT``. A file in it is whole: it was written elsewhere and moved there.
In a bucket, where folders cannot be moved, the files are written to ``OUT`` itself, and a
checkpoint is whole when its last file is there.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtc.errors import SourceError, some
from jaxtc.helpers import gigabytes
from jaxtc.weights.files import local

try:
    import fcntl
except ImportError:  # Windows: two conversions to one folder at a time are not noticed there
    fcntl = None

# What a file takes on a disk beside its arrays, at the most: a header, the rest of a block.
FILE_BYTES = 4096

_JOB = "job.json"
_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


def is_remote(path: Any) -> bool:
    """Whether this is a path in a bucket, such as ``gs://bucket/folder``."""
    return "://" in str(path)


def destination(out: str | Path) -> Any:
    """A folder to write to, absolute; ``~`` at its start is the home folder.

    Returns:
        A :class:`pathlib.Path`, or its like from etils (which comes with orbax) for a bucket.
    """
    if is_remote(out):
        from etils import epath

        return epath.Path(out)
    return Path(os.path.abspath(local.expand(out)))


def files_of(out: Any) -> Any:
    """Where the files are written that are to be in ``out``, a :func:`destination`."""
    return out if is_remote(out) else _partial(out) / "files"


def describes(out: Any, what: dict[str, Any]) -> bool:
    """Whether a job on ``what`` has begun to write ``out``, a :func:`destination`."""
    return _found(_partial(out)) == what


class Job:
    """The writing of one folder.

    Args:
        out: the folder; it must not exist, or be empty.
        what: all that decides the result, as JSON; earlier work is continued only when it was on
            the same.
        needed: bytes of all files together.
        fresh: begin anew whatever is there of an earlier job of this kind.

    Attributes:
        out: the folder.
        files: where files are written.
        finished: the folder is there already; an earlier run was killed while it tidied up.

    Raises:
        SourceError: the folder exists, or is being written; the work begun is on something else;
            not enough room on the disk.
    """

    def __init__(self, out: str | Path, what: dict[str, Any], needed: int, *, fresh: bool = False):
        self.out = destination(out)
        self.files, self._partial = files_of(self.out), _partial(self.out)
        self.needed, self.finished, self._lock = needed, False, None
        try:
            with self.explained():
                self._begin(what, fresh)
        except BaseException:
            self.close()
            raise

    def _begin(self, what: dict[str, Any], fresh: bool) -> None:
        there = _found(self._partial)
        if _is_taken(self.out) and not (is_remote(self.out) and there == what):
            self.finished = there == what and not self.files.exists()
            if self.finished:
                self._tidy()
            if self.finished and not fresh:
                return
            raise SourceError(
                f"{self.out} exists already and is not overwritten. Give another folder, or "
                "remove it first."
            )
        self._partial.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if there not in (None, what) and not (fresh and there.keys() == what.keys()):
            other = [key for key in what if there.get(key) != what[key]]
            raise SourceError(
                f"{self._partial} holds the beginning of another conversion ("
                + "; ".join(f"{key} {there.get(key)!r}, not {what[key]!r}" for key in other)
                + "). Remove it to start over, or give another folder."
            )
        others = sorted(p.name for p in self._partial.iterdir() if not p.match("writing.*"))
        if there is None and others:
            raise SourceError(
                f"{self._partial}, where the conversion would be written, holds something else "
                f"({some(others)}). Remove it, or give another folder."
            )
        if there is None or fresh:
            self._clear()
            self.note(_JOB, json.dumps(what, indent=1))
        self._check_room()

    def _take_lock(self) -> None:
        if fcntl is None or is_remote(self.out):
            return
        self._lock = os.open(self._partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(
                f"{self.out} is being written by another process. Wait for it, or give another "
                "folder."
            ) from error
        except OSError:
            self.close()  # a file system without locks

    def close(self) -> None:
        """Let others go on with the job; what is done stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check_room(self) -> None:
        """Refuse to begin what the disk has no room for."""
        if not is_remote(self.out) and self.needed - self._done() > self._free():
            raise SourceError(self._full())

    def write(self, file: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write one file, unless it is done. Raises SourceError when it cannot be."""

        def make(path: Any) -> None:
            with path.open("wb") as stream:
                for piece in pieces:
                    stream.write(piece)

        self.place(file, make)

    def place(self, file: str, make: Callable[[Any], None]) -> None:
        """As :meth:`write`, of a file that ``make`` writes to the path that it is given."""
        target = self.files / file
        with self.explained():
            if target.exists():
                return
            # Writers of some formats go by the suffix.
            writing = self._partial / f"writing{target.suffix or '.tmp'}"
            make(writing)
            _sync(writing)
            target.parent.mkdir(parents=True, exist_ok=True)
            writing.replace(target)

    def note(self, name: str, text: str) -> None:
        """Keep a text while the job goes on."""
        writing = self._partial / "writing.note"
        writing.write_text(text)
        _sync(writing)
        writing.replace(self._partial / name)

    def noted(self, name: str) -> str | None:
        """A text that was kept, None when none was."""
        path = self._partial / name
        return path.read_text() if path.exists() else None

    def finish(self) -> Any:
        """Move the folder into its place; the folder."""
        with self.explained():
            if not is_remote(self.out):
                os.rename(self.files, self.out)
            self._tidy()
        return self.out

    def _tidy(self) -> None:
        """Remove what is left when the folder is in place; what tells that it was ours, last."""
        self._clear()
        (self._partial / _JOB).unlink()
        self._partial.rmdir()
        self.close()

    def _clear(self) -> None:
        from etils import epath

        for path in map(epath.Path, self._partial.iterdir()):
            if path.name != _JOB:
                path.rmtree() if path.is_dir() else path.unlink()

    def _done(self) -> int:
        """The bytes that are written."""
        paths = self._partial.glob("files*/**/*")
        return sum(path.stat().st_size for path in paths if path.is_file())

    def _free(self) -> int:
        return shutil.disk_usage(self._partial).free

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what goes wrong while files are written into a SourceError."""
        try:
            yield
        except (OSError, ValueError) as error:  # orbax gives the system's words in a ValueError
            if any(words in str(error) for words in _FULL):
                raise SourceError(self._full()) from error
            if isinstance(error, ValueError):
                raise
            raise SourceError(
                f"{self.out} cannot be written: {error.strerror or error}. Give a folder on a disk "
                "that you may write to."
            ) from error

    def _full(self) -> str:
        done, free = self._done(), self._free()
        return (
            f"There is no room for {self.out}: {gigabytes(self.needed)} are needed"
            + (f", of which {gigabytes(done)} are done" if done else "")
            + f", and {gigabytes(free)} are free on its disk. Make room for "
            f"{gigabytes(max(self.needed - done - free, 0))} more and run this again: it goes on "
            f"where it stopped. Or give a folder on another disk, and remove {self._partial}."
        )


def _partial(out: Any) -> Any:
    return out.with_name(f"{out.name}.partial")


def _found(partial: Any) -> dict[str, Any] | None:
    """What the job says that is there, None when there is none."""
    try:
        found = json.loads((partial / _JOB).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_taken(path: Any) -> bool:
    if is_remote(path):
        return path.exists()
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return os.path.lexists(path)


def _sync(path: Any) -> None:
    if isinstance(path, Path):
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
