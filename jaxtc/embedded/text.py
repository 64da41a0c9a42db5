"""A user's own small text as training data, in place of the generated corpus."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxtc.embedded.corpus import is_held_out
from jaxtc.errors import InputError

_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class UserText:
    """Paragraphs (separated by empty lines) of a text, drawn at random; one in 20 is held out.

    A text without empty lines is taken line by line.

    Raises:
        InputError: too little text to train on.
    """

    text: str
    seed: int = 0

    def __post_init__(self):
        if len(self.train) < 10 or not self.held_out:
            raise InputError(
                f"The text has {len(self.train) + len(self.held_out)} paragraphs (or lines, where "
                "no line is empty); training needs at least some tens, a part of them held out for "
                "testing. Give a longer text, or put an empty line between its documents."
            )

    @classmethod
    def from_file(cls, path: str | Path, seed: int = 0) -> "UserText":
        """Read a UTF-8 text file. Raises InputError where it is not one."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"), seed)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from error

    @cached_property
    def _paragraphs(self) -> list[str]:
        lines = self.text.replace("\r\n", "\n")
        parts = lines.split("\n\n") if "\n\n" in lines.strip() else lines.split("\n")
        return list(dict.fromkeys(part.strip() for part in parts if part.strip()))

    @cached_property
    def train(self) -> list[str]:
        """Paragraphs to train on."""
        return [p for p in self._paragraphs if not is_held_out(p, _HELD_OUT_ONE_IN)]

    @cached_property
    def held_out(self) -> list[str]:
        """Paragraphs that training never sees."""
        return [p for p in self._paragraphs if is_held_out(p, _HELD_OUT_ONE_IN)]

    def documents(self, stream: int, batch: int, count: int, held_out: bool = False) -> list[str]:
        """As those of the corpus, but of the held-out text each paragraph at most once."""
        rng = np.random.default_rng([self.seed, 4, stream, batch, held_out])
        if held_out:
            return [self.held_out[i] for i in rng.permutation(len(self.held_out))[:count]]
        return [self.train[i] for i in rng.integers(len(self.train), size=count)]
