"""Files on their way to a folder: beside it until all are there, kept when the work is cut short.

``OUT.partial/`` holds ``job.json`` (what is being made), ``done.N.jsonl`` (a line for each file
that process N has finished, with its size and SHA-256), ``writing.N`` (the file it is at) and
``files/``, which becomes ``OUT``.
"""

import contextlib
import errno
import hashlib
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

_JOB, _FILES = "job.json", "files"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Size and SHA-256 of a file, by its path below the folder.
Record = tuple[int, str]


class Job:
    """The writing of one folder.

    Args:
        out: the folder; it must not exist, or be empty.
        what: all that decides the bytes of the result, as JSON; earlier work is continued only
            when it was on the same.
        needed: bytes of all files together.
        process: which of several writes; the first begins and finishes.
        fresh: begin anew whatever is there of an earlier job of this kind.

    Attributes:
        done: the files that are finished.
        finished: the folder is there already; an earlier run was killed while it tidied up.

    Raises:
        SourceError: the folder exists, or is being written; the work begun is on something else;
            not enough room on the disk.
    """

    def __init__(
        self, out: Path, what: dict[str, Any], needed: int, *, process: int = 0, fresh: bool = False
    ):
        self.out = Path(os.path.abspath(local.expand(out)))
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.needed, self._process, self._lock = needed, process, None
        self.done: dict[str, Record] = {}
        self.finished = False
        try:
            with self._explained():
                if process == 0:
                    self._begin(what, fresh)
                elif self._found() != what:
                    raise SourceError(
                        f"Process {process} does not see {self.partial}, which process 0 made. All "
                        "processes must save to one folder on a file system that they share."
                    )
        except BaseException:
            self.close()
            raise

    def _begin(self, what: dict[str, Any], fresh: bool) -> None:
        there = self._found()
        if os.path.lexists(self.out) and not _is_empty_folder(self.out):
            self.finished = there == what and not (self.partial / _FILES).exists()
            if self.finished:
                return self._tidy()
            raise SourceError(
                f"{self.out} exists already and is not written over. Give another folder, or "
                "remove it first."
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if there not in (None, what) and not (fresh and there.keys() == what.keys()):
            other = [key for key in what if there.get(key) != what[key]]
            raise SourceError(
                f"{self.partial} holds the beginning of another conversion ("
                + "; ".join(f"{key} {there.get(key)!r}, not {what[key]!r}" for key in other)
                + "). Remove it to begin anew, or give another folder."
            )
        self._check_ours(there)
        if there is None or fresh:
            for path in self.partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._put(self.partial / _JOB, json.dumps(what, indent=1).encode())
        self.done = self._resumed()
        self.check_room()

    def _found(self) -> dict[str, Any] | None:
        """What the job says that is there, None when there is none."""
        try:
            found = json.loads((self.partial / _JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _check_ours(self, there: dict[str, Any] | None) -> None:
        """Refuse a folder that something else has made."""
        if there is None:
            others = sorted(
                p.name for p in self.partial.iterdir() if not p.name.startswith("writing.")
            )
            if others:
                raise SourceError(
                    f"{self.partial}, where the conversion would be written, holds something else "
                    f"({some(others)}). Remove it, or give another folder."
                )

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
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

    def check_room(self) -> None:
        """Refuse to begin what the disk has no room for."""
        missing = self.needed - sum(size for size, _ in self.done.values())
        if missing > shutil.disk_usage(self.partial).free:
            raise SourceError(self._full())

    def write(self, file: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write one file, unless it is done. Raises SourceError when it cannot be."""
        if file in self.done:
            return
        writing = self.partial / f"writing.{self._process}"
        with self._explained():
            digest, size = hashlib.sha256(), 0
            with writing.open("wb") as stream:
                for piece in pieces:
                    stream.write(piece)
                    digest.update(piece)
                    size += len(piece)
                _sync(stream)
            self._take(writing, file, (size, digest.hexdigest()))

    def place(self, file: str, make: Callable[[Path], None]) -> None:
        """As :meth:`write`, of a file that ``make`` writes to the path that it is given."""
        if file in self.done:
            return
        writing = self.partial / f"writing.{self._process}{Path(file).suffix}"
        with self._explained():
            make(writing)
            with writing.open("rb+") as stream:
                _sync(stream)
            self._take(writing, file, _hash(writing))

    def _take(self, writing: Path, file: str, record: Record) -> None:
        target = self.partial / _FILES / file
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(writing, target)
        with self._log(self._process).open("a", encoding="utf-8") as log:
            log.write(_line(file, record))
        self.done[file] = record

    def collect(self) -> None:
        """Take over what the other processes have done."""
        for log in self.partial.glob("done.*.jsonl"):
            self.done |= _read_log(log)

    def finish(self, last: str = "", content: bytes = b"") -> Path:
        """Write a last file, if there is one, and move the folder into its place; the folder."""
        with self._explained():
            files = self.partial / _FILES
            there = {p.relative_to(files).as_posix() for p in files.rglob("*") if not p.is_dir()}
            for stray in there - set(self.done) - {last}:
                (files / stray).unlink()  # its line in the log was not written any more
            if last:
                self._put(files / last, content)
            for folder in (p for p in (files, *files.rglob("*")) if p.is_dir()):
                _sync_folder(folder)
            os.rename(files, self.out)
            _sync_folder(self.out.parent)
            self._tidy()
        return self.out

    def _tidy(self) -> None:
        """Remove what is left when the folder is in place; what tells that it was ours, last."""
        for path in self.partial.iterdir():
            if path.name != _JOB:
                path.unlink()
        (self.partial / _JOB).unlink()
        self.partial.rmdir()
        self.close()

    def _resumed(self) -> dict[str, Record]:
        """The files that an earlier run has finished, hashed again."""
        files = self.partial / _FILES
        self.collect()
        kept = {file: one for file, one in self.done.items() if one == _hash(files / file)}
        # The last line may be half a line.
        self._put(self._log(0), "".join(_line(file, one) for file, one in kept.items()).encode())
        return kept

    def _log(self, process: int) -> Path:
        return self.partial / f"done.{process}.jsonl"

    def _put(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        writing = self.partial / f"writing.{self._process}"
        with writing.open("wb") as stream:
            stream.write(content)
            _sync(stream)
        os.replace(writing, path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise SourceError(self._full()) from error
            raise SourceError(
                f"{self.out} cannot be written: {error.strerror or error}. Give a folder on a disk "
                "that you may write to."
            ) from error

    def _full(self) -> str:
        done = sum(size for size, _ in self.done.values())
        free = shutil.disk_usage(self.partial).free
        return (
            f"There is no room for {self.out}: {gigabytes(self.needed)} are needed"
            + (f", of which {gigabytes(done)} are done" if done else "")
            + f", and {gigabytes(free)} are free on its disk. Make room for "
            f"{gigabytes(max(self.needed - done - free, 0))} more and run this again: it goes on "
            f"where it stopped. Or give a folder on another disk, and remove {self.partial}."
        )


def _line(file: str, record: Record) -> str:
    return json.dumps([file, *record]) + "\n"


def _read_log(log: Path) -> dict[str, Record]:
    """What a log says; a line that was cut off is left out."""
    found = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            file, size, digest = json.loads(line)
            found[file] = size, digest
    return found


def _hash(path: Path) -> Record | None:
    """Size and SHA-256 of a file, None when there is none."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError:
        return None


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def room_for(sizes: Iterable[int]) -> int:
    """What files of these sizes take on a disk with the notes on them: blocks of 4096 bytes."""
    return sum(-(-size // 4096) * 4096 + 512 for size in sizes)
