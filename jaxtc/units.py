"""Numbers for people."""


def gigabytes(count: int) -> str:
    """Bytes as makers of accelerators and disks count them: ``15.2 GB`` are 15.2 · 10⁹."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size * 0.9995:
            return f"{count / size:.{0 if count >= 99.95 * size else 1}f} {unit}"
    return f"{count} B"
