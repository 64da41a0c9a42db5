"""Small things that every package uses: whole numbers, byte counts, files, frozen pytrees."""

import contextlib
import dataclasses
import importlib.metadata
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtc.errors import SourceError

try:
    JAXTC_VERSION = importlib.metadata.version("jaxtc")
except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    JAXTC_VERSION = "0+unknown"


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether this is a whole number of at least ``least``, of Python's or NumPy's; no bool is."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


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


def frozen_pytree(*static: str) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass, and a pytree whose fields are leaves but ``static``."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in names if name not in static]
        return jax.tree_util.register_dataclass(cls, data, [n for n in names if n in static])

    return register


def gigabytes(count: int) -> str:
    """Bytes as makers of accelerators and disks count them: ``15.2 GB`` are 15.2 · 10⁹."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size * 0.9995:
            return f"{count / size:.{0 if count >= 99.95 * size else 1}f} {unit}"
    return f"{count} B"
