"""Small things that every package uses: integers, files, frozen pytrees, text for people."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import numbers
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from jaxtc.errors import InputError, SourceError

P, R = ParamSpec("P"), TypeVar("R")

try:
    JAXTC_VERSION = importlib.metadata.version("jaxtc")
except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    JAXTC_VERSION = "0+unknown"


def plain_number(value: Any) -> Any:
    """An array of one whole number and no axes (also torch's) as an int; others as is."""
    if getattr(value, "ndim", None) != 0 or isinstance(value, numbers.Number):
        return value
    try:
        return operator.index(value)
    except TypeError:  # floats, traced numbers
        return value


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether this is an integer of Python's or NumPy's, no bool, and at least ``least``."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def whole_number(name: str, value: Any, least: int = 0, otherwise: str = "") -> int:
    """``value`` as an int, if it is a whole number of at least ``least``, else an InputError.

    ``otherwise`` ends the message: what else is allowed.
    """
    if not is_whole(value, least):
        raise InputError(
            f"{name} is {value!r}, expected a whole number of at least {least}{otherwise}."
        )
    return int(value)


def check_unicode(name: str, text: str) -> None:
    """Raise InputError for text with lone surrogates, which stand for bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not Unicode text: character {error.start} is {text[error.start]!a}, which "
            "stands for a byte that is not UTF-8. Convert the text to UTF-8 first."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name, then move it into place; SourceError where that fails.

    Lone surrogates are escaped.
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


def for_json(value: Any, other: Callable[[float], Any] = lambda number: None) -> Any:
    """Tuples as lists; NaN and infinities, which JSON cannot hold, as ``other`` maps them."""
    if isinstance(value, dict):
        return {key: for_json(item, other) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [for_json(item, other) for item in value]
    return other(value) if isinstance(value, float) and not math.isfinite(value) else value


def pytree(cls: type, static: Sequence[str] = ()) -> type:
    """Class decorator: a dataclass as a pytree whose fields are leaves, but those that are static.

    Not ``jax.tree_util.register_dataclass``: there (jax 0.10.2) structures of two classes with the
    same fields compare equal, so that ``jit`` now and then runs the program of the other class.
    """
    fields = dataclasses.fields(cls)
    meta = tuple(f.name for f in fields if f.name in static or f.metadata.get("static"))
    data = tuple(f.name for f in fields if f.name not in meta)
    keys = tuple(map(jax.tree_util.GetAttrKey, data))

    def flatten(node):
        return tuple(getattr(node, n) for n in data), tuple(getattr(node, n) for n in meta)

    def flatten_with_keys(node):
        leaves, aux = flatten(node)
        return tuple(zip(keys, leaves, strict=True)), aux

    def unflatten(aux, leaves):
        return cls(**dict(zip(meta, aux, strict=True)), **dict(zip(data, leaves, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def frozen_pytree(*static: str) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass, and a pytree whose fields are leaves but ``static``."""

    def register(cls: type) -> type:
        return pytree(dataclasses.dataclass(frozen=True, eq=False)(cls), static)

    return register


def ranked(values: jax.Array, x: jax.Array) -> jax.Array:
    """``values`` of the last axes of ``x``, with as many axes: for ``jax_numpy_rank_promotion``."""
    return jnp.expand_dims(values, range(x.ndim - values.ndim))


def explicit_transfers(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: what the function moves to and from devices, it moves by intent.

    ``jax.transfer_guard("disallow")`` finds arrays that move unnoticed. A public function moves
    what it was given and what it gives back, so inside it the guard is off: ``jax.device_put`` of
    every token id and every number of an edit would take longer than all else in a call.
    """
    guards = (
        jax.transfer_guard_host_to_device,
        jax.transfer_guard_device_to_host,
        jax.transfer_guard_device_to_device,
    )

    @functools.wraps(function)
    def moving(*args: P.args, **kwargs: P.kwargs) -> R:
        into, out, across = guards
        with into("allow"), out("allow"), across("allow"):
            return function(*args, **kwargs)

    return moving


def gigabytes(count: int) -> str:
    """Bytes as makers of accelerators and disks count them: ``15.2 GB`` are 15.2 · 10⁹."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size * 0.9995:
            return f"{count / size:.{0 if count >= 99.95 * size else 1}f} {unit}"
    return f"{count} B"


def columns(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Rows of text as aligned columns, each to the left (``<``) or the right (``>``)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    each = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(each.format(*row).rstrip() for row in rows)
