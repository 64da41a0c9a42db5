"""The errors a user can cause. Each message says what was given, what was expected, and what to do.

The command line prints the message of a :class:`JaxtcError` and exits with 2; anything else that
escapes is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence


class JaxtcError(ValueError):
    """Anything wrong with what the user gave; the message is one paragraph meant for a person.

    It may quote names out of a file, so unprintable characters are escaped and the middle of what
    is longer than any message of ours about sane names is cut.
    """

    def __init__(self, message: str = ""):
        message, most = str(message), 4000
        if len(message) > most:
            message = f"{message[: most // 2]} … {message[-most // 2 :]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class ConfigError(JaxtcError):
    """A ``config.json`` that is not a Gemma-2, or whose sizes contradict each other."""


class SiteError(JaxtcError):
    """An address that names no activation of this model."""


class EditError(JaxtcError):
    """An edit that cannot apply: wrong shape, out of range, or one that would never fire."""


class InputError(JaxtcError):
    """Token ids, lengths or prompts that the model cannot run."""


class WeightsError(JaxtcError):
    """A checkpoint file that is damaged, incomplete, or not what it says it is."""


class SourceError(JaxtcError):
    """A source (hub id, folder, file) that cannot be found or may not be read."""


class CapacityError(JaxtcError):
    """More active features than the sparse path has room for, or more memory than there is."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """The tail of an error message: `` Did you mean 'x' or 'y'?``, or nothing when none is near."""
    close = difflib.get_close_matches(given, list(valid), cutoff=0.4)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def some(items: Sequence[str], limit: int = 8) -> str:
    """``items`` as a comma-separated list, cut after ``limit`` with the count of the rest."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
