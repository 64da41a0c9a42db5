"""Writing text files whole or not at all."""

import contextlib
import os
from pathlib import Path

from jaxtc.errors import SourceError


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there when whole; what no UTF-8 has is escaped.

    Raises:
        SourceError: it cannot be written.
    """
    real = Path(os.path.realpath(path))
    device = real.exists() and not real.is_file()  # /dev/null must stay what it is
    beside = real if device else real.with_name(f".{real.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(real)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        if not device:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
