"""Comparing files with the hashes that the Hugging Face hub itself gave for them.

The hub's client keeps them: in its cache a file is a link to ``blobs/HASH``, beside a folder that
was downloaded (``hf download --local-dir``) they are in ``.cache/huggingface``. Large files go by
their SHA-256, small ones by git's SHA-1 of a blob.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from jaxtc.errors import WeightsError, some

_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def verify_files(files: Iterable[Path]) -> None:
    """Hash files as the hub does and compare.

    Raises WeightsError when a file is not what the hub has, or nothing here says what that is.
    """
    expected = {file: hub_hash(file) for file in files}
    unknown = [file for file, digest in expected.items() if digest is None]
    if unknown:
        raise WeightsError(
            f"{unknown[0].parent} cannot be verified: nothing says what the hub's hashes of "
            f"{some([file.name for file in unknown])} are. They are known of a hub id's files in "
            "the hub's own cache, and of a folder that `hf download --local-dir` made; for other "
            "folders leave verify out."
        )
    wrong = [file for file, digest in expected.items() if _hash(file, len(digest)) != digest]
    if wrong:
        raise WeightsError(
            f"{some([file.name for file in wrong])} in {wrong[0].parent} "
            f"{'is' if len(wrong) == 1 else 'are'} not what the Hugging Face hub has "
            f"({wrong[0].name} should hash to {expected[wrong[0]][:12]}…): damaged or changed "
            f"since. Remove {wrong[0].resolve()} and fetch it again."
        )


def hub_hash(file: Path) -> str | None:
    """The hash by which the hub knows a file, None when it is not known here."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and _HASH.fullmatch(blob.name):
        return blob.name
    for folder in file.absolute().parents:
        kept = folder / ".cache/huggingface/download"
        if kept.is_dir():
            relative = file.absolute().relative_to(folder).as_posix()
            try:
                lines = (kept / f"{relative}.metadata").read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                return None
            return lines[1] if len(lines) > 1 and _HASH.fullmatch(lines[1]) else None
    return None


def _hash(file: Path, digits: int) -> str:
    try:
        # git's hash of a blob begins with its size; not for security, but it is the hub's name.
        blob = f"blob {file.stat().st_size}\0".encode()
        start = (
            hashlib.sha256 if digits == 64 else lambda: hashlib.sha1(blob, usedforsecurity=False)
        )
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, start).hexdigest()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}.") from error
