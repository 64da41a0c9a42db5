"""A prompt's text as token ids, and what a person should know of how it was tokenized."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtc.errors import InputError, some

_NOTES = 5  # on how prompts were tokenized; one a prompt would bury the rest


def tokenized(tokenizer: Any, text: str, bos: int | None) -> tuple[list[int], list[str]]:
    """The token ids of ``text``, and what is odd about them, a sentence each.

    Said are words that the tokenizer does not know (the model sees ``<unk>`` in their place), a
    ``<bos>`` that is missing or there twice, and an ``<eos>`` at the end, after which a model
    begins another text.

    Args:
        tokenizer: the model's, of ``transformers``; one that does not name its special tokens does
            for the ids, and for what is said of ``<bos>``.
        text: a prompt; the tokenizer puts ``<bos>`` in front.
        bos: the model's ``bos_token_id``.

    Raises:
        InputError: no text.
    """
    if not isinstance(text, str):
        raise InputError(f"A prompt's text is a string, got {type(text).__name__}.")
    # Only fast tokenizers know where in the text a token stands.
    options = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    encoded = tokenizer(text, **options)
    ids, spans = list(encoded["input_ids"]), encoded.get("offset_mapping")
    unk, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "eos"))
    notes = []
    unknown = [index for index, token in enumerate(ids) if token == unk]
    if unknown:
        texts = [text[slice(*spans[index])] if spans else "a word" for index in unknown]
        words = dict.fromkeys(repr(word.strip() or word) for word in texts)
        notes.append(
            f"The tokenizer does not know {some([*words])}: the model sees {tokenizer.unk_token} "
            "there, and what it says is about that."
        )
    if bos is not None and ids[:1] != [bos]:
        notes.append("The tokenizer put no <bos> in front; Gemma-2 is not itself without one.")
    if bos is not None and ids[:2] == [bos, bos]:
        notes.append(
            "The prompt has <bos> twice: the tokenizer adds it, so leave it out of the text."
        )
    if len(ids) > 1 and ids[-1] == eos:
        notes.append(
            f"The prompt ends in {tokenizer.eos_token}, which ends texts: what follows is another "
            "text. Leave it out."
        )
    return ids, notes


def noted(notes: Mapping[int, Sequence[str]]) -> list[str]:
    """What :func:`tokenized` said of prompts, by index: each note with its prompt, and not all."""
    found = [f"Prompt {index + 1}: {one}" for index, odd in notes.items() for one in odd]
    if len(found) > _NOTES:
        found[_NOTES:] = [f"Of the prompts there are {len(found) - _NOTES} more such notes."]
    return found
