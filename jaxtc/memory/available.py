"""How much memory is free where arrays would be put."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available(device: jax.Device | None = None) -> int | None:
    """Bytes that can still be allocated on ``device`` (the first local one), None where unknown.

    On an accelerator, what its allocator may still take. On the CPU, what the machine has free or
    can free, within the limits of the control groups (containers, batch systems) of this process.
    Outside Linux only the machine's whole memory is known, an upper bound.
    """
    device = device or jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    free = [_machine(), *_control_groups()]
    return min((count for count in free if count is not None), default=None)


def _machine() -> int | None:
    for line in _lines(_PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no sysconf at all, or not these names
        return None


def _control_groups() -> Iterator[int]:
    """What each limited group that this process is in has left.

    A group's page cache can be dropped, so it does not count as used.
    """
    for line in _lines(_PROC / "self" / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit, usage, prefix = _CGROUP, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, prefix = _CGROUP / "memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's; its own group is then mounted at the root.
        place = root / path.lstrip("/")
        while place.is_relative_to(root):
            most, used = _number(place / limit), _number(place / usage)
            # The older interface writes "no limit" as a number beyond any machine.
            if most is not None and used is not None and most < 2**60:
                stat = "\n".join(_lines(place / "memory.stat"))
                cache = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
                yield max(most - used + sum(map(int, cache)), 0)
            place = place.parent


def _number(path: Path) -> int | None:
    """The number in a file; None when there is none, as in ``max``."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
