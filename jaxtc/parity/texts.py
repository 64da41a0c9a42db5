"""The prompts: the built-in ones, those of a file, and their token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtc.errors import InputError, SourceError
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import prepare
from jaxtc.model.text import noted, tokenized
from jaxtc.weights.files import local
from jaxtc.weights.sources.resolve import EMBEDDED

# Of different lengths, and of different kinds of text; the last is about 100 tokens.
TEXTS = (
    "The capital of the state containing Dallas is",
    "def mean(values):\n    return sum(values) /",
    "Ein kleines Haus steht am Rand des Waldes, und davor",
    "2 + 2 = 4, 3 + 5 = 8, 7 + 6 = 13, 12 + 9 =",
    "The ship left the harbour before dawn, when the fog still lay on the water and the lamps "
    "along the quay were no more than pale circles. Nobody on deck spoke. The pilot, who had done "
    "this for thirty years, counted the buoys under his breath and turned the wheel a little at "
    "each of them. By the time the sun was up, the coast had become a thin grey line, and the "
    "captain, who had not slept, went below and wrote in the log that the weather was",
)
# Of the embedded model's world.
EMBEDDED_TEXTS = (
    "The capital of the state containing Dallas is",
    "The capital of Texas is",
    "Quito belongs to a country whose language is",
    "The currency of the country that Phnom Penh belongs to is the riel. People who live in "
    "Chandler live in Arizona. The continent of the country that Montreal belongs to is North "
    "America. The capital of the state containing Oakland is",
)


def built_in(model: str | Path) -> list[str]:
    """The prompts run by default."""
    return list(EMBEDDED_TEXTS if model == EMBEDDED else TEXTS)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines are left out.

    Raises:
        SourceError: no such file, or not readable as UTF-8.
        InputError: no prompt in it.
    """
    file = local.find(path)
    if file is None:
        raise SourceError(f"There is no prompts file {path}; give a text file, one prompt a line.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or f"it is not UTF-8 text, {error.reason}"
        raise SourceError(f"{path} cannot be read: {why}.") from error
    # Not splitlines(), which also splits at form feeds and other separators within a text.
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{path} has no prompt in it; write one prompt a line.")
    return lines


def prompts_of(
    prompts: Sequence[Any] | None,
    model: str | Path,
    config: Gemma2Config,
    tokenizer: Any,
    extra: int,
) -> tuple[list[str | None], list[list[int]], list[str]]:
    """Texts (None where ids were given) and ids of the prompts of :func:`jaxtc.parity.certify`.

    And what is odd about how they were tokenized, for its notes.

    ``tokenizer`` returns it, and is called only where there is a text; ``extra`` tokens will be
    added to each. Of a tokenizer's whole output, padding is left out. Raises InputError for no
    prompt, or one that the model cannot run.
    """
    if prompts is None:
        prompts = built_in(model)
    if isinstance(prompts, Mapping):
        made = prepare(prompts, config, extra=extra)
        prompts = [row[:n] for row, n in zip(made.tokens, made.lengths, strict=True)]
    several = not isinstance(prompts, str) and hasattr(prompts, "__len__") and len(prompts)
    if not several or any(isinstance(one, int | np.integer) for one in prompts):
        raise InputError(
            f"prompts is {prompts!r}, expected a list of texts (or of rows of token ids) with at "
            'least one in it, such as ["The capital of Texas is"].'
        )
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    ids, notes = [], {}
    for index, prompt in enumerate(prompts):
        row = prompt
        if isinstance(prompt, str):
            row, notes[index] = tokenized(tokenizer(), prompt, config.bos_token_id)
        try:
            made = prepare([row], config, extra=extra)
        except InputError as error:
            raise InputError(f"Prompt {index + 1} of {len(prompts)}: {error}") from error
        ids.append(made.tokens[0, : made.lengths[0]].tolist())
    return texts, ids, noted(notes)
