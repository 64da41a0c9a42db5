"""Writing a folder: ``OUT.partial/files`` becomes ``OUT`` when it is complete.

``OUT.partial`` survives a kill, and the same job goes on with it: ``job.json`` says which job it
is. Every file there is complete, because it is written under another name and moved into place.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtc.errors import SourceError, some
from jaxtc.helpers import gigabytes
from jaxtc.weights.files import local

try:
    import fcntl
except ImportError:  # Windows: two conversions to one folder at a time are not noticed there
    fcntl = None

# At most what a file takes on disk beside its arrays: a header, the rest of a block.
FILE_BYTES = 4096

_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


class Job:
    """The writing of one folder; nothing happens before :meth:`begin`.

    Args:
        out: the folder, new or empty; ``~`` is the home folder.
        what: everything that decides the result, as JSON; only the same job is taken up again.
        needed: bytes of all files.

    Attributes:
        files: the folder that becomes ``out``.
    """

    def __init__(self, out: str | Path, what: dict[str, Any], needed: int):
        self.out = Path(os.path.abspath(local.expand(out)))
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.files, self.note = self.partial / "files", self.partial / "job.json"
        self.what, self.needed = what, needed

    @contextlib.contextmanager
    def begin(self, *, fresh: bool = False) -> Iterator[bool]:
        """Begin the job, or go on with it unless ``fresh``, and keep others from it meanwhile.

        Yields False if nothing is left to do: a run was killed while it tidied up.

        Raises:
            SourceError: the folder exists or is being written; another job was begun there; the
                disk is full or cannot be written, now or in the body.
        """
        there = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            there = json.loads(self.note.read_bytes())
        try:
            with contextlib.ExitStack() as stack:
                if not os.path.lexists(self.out) or _is_empty(self.out):
                    self.partial.mkdir(parents=True, exist_ok=True)
                    self._lock(stack)
                    self._start(there, fresh)
                    yield True
                elif there == self.what and not fresh and not self.files.exists():
                    self._tidy()
                    yield False
                else:
                    raise SourceError(
                        f"{self.out} exists already and is not overwritten. Give another folder, "
                        "or remove it first."
                    )
        except (OSError, ValueError) as error:  # orbax gives the system's words in a ValueError
            if any(words in str(error) for words in _FULL):
                raise self._no_room() from error
            if isinstance(error, ValueError):
                raise
            raise SourceError(
                f"{self.out} cannot be written: {error.strerror or error}. Give a folder on a disk "
                "that you may write to."
            ) from error

    def _lock(self, stack: contextlib.ExitStack) -> None:
        if fcntl is None:
            return
        lock = os.open(self.partial, os.O_RDONLY)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(
                f"{self.out} is being written by another process. Wait for it, or give another "
                "folder."
            ) from error
        except OSError:
            pass  # a file system without locks

    def _start(self, there: Any, fresh: bool) -> None:
        others = sorted(p.name for p in self.partial.iterdir() if not p.match("writing.*"))
        if not isinstance(there, dict) and others:
            raise SourceError(
                f"{self.partial}, where the conversion would be written, holds something else "
                f"({some(others)}). Remove it, or give another folder."
            )
        if others and there != self.what:
            other = [key for key in self.what if there.get(key) != self.what[key]]
            raise SourceError(
                f"{self.partial} holds the beginning of another conversion ("
                + "; ".join(f"{key} {there.get(key)!r}, not {self.what[key]!r}" for key in other)
                + "). Remove it to start over, or give another folder."
            )
        if not others or fresh:
            self._clear()
            self.write(self.note, json.dumps(self.what, indent=1).encode())
        if self.needed - self._done() > shutil.disk_usage(self.partial).free:
            raise self._no_room()

    def write(self, target: Path, make: bytes | Callable[[Path], Any]) -> None:
        """Write a file below :attr:`partial`, unless it is there: its content, or by a function
        that writes to the path that it is given.
        """
        if target.exists():
            return
        writing = self.partial / f"writing{target.suffix}"  # some writers go by the suffix
        writing.write_bytes(make) if isinstance(make, bytes) else make(writing)
        with writing.open("rb+") as stream:
            os.fsync(stream.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        writing.replace(target)

    def finish(self) -> None:
        """Move the folder into place."""
        self.files.rename(self.out)
        self._tidy()

    def _tidy(self) -> None:
        self._clear()
        self.note.unlink()  # last, because it says that the folder is ours
        self.partial.rmdir()

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path != self.note:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _done(self) -> int:
        paths = self.partial.glob("files*/**/*")
        return sum(path.stat().st_size for path in paths if path.is_file())

    def _no_room(self) -> SourceError:
        done, free = self._done(), shutil.disk_usage(self.partial).free
        return SourceError(
            f"There is no room for {self.out}: {gigabytes(self.needed)} are needed"
            + (f", of which {gigabytes(done)} are done" if done else "")
            + f", and {gigabytes(free)} are free on its disk. Make room and run this again: it "
            f"goes on where it stopped. Or remove {self.partial}, and give a folder elsewhere."
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
