"""What people bring as prompts: ids, arrays, a tokenizer's batch, text; all become rows of ids."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtc.errors import InputError, some
from jaxtc.interchange import plain
from jaxtc.model.text import noted, tokenized


class Given(NamedTuple):
    """Prompts as they were given, by kind.

    Attributes:
        ids: of one prompt or several, as lists or an array.
        mask: which of them are tokens and not padding, in the same form; None where nothing says.
    """

    ids: Any
    mask: Any = None


def ids_and_mask(
    tokens: Any, mask: Any = None, tokenizer: Any = None, bos: int | None = None
) -> Given:
    """Ids and mask of what was given as ``tokens``.

    Args:
        tokens: ids, as lists or arrays; a mapping with ``input_ids`` and perhaps
            ``attention_mask``, as the ``BatchEncoding`` of ``transformers``; an encoding of the
            library ``tokenizers``; several of these; with ``tokenizer``, also text or texts.
        mask: given besides.
        tokenizer: that of the model, to be called with the texts. What is odd about how it reads
            them (:func:`jaxtc.model.text.tokenized`) is warned of, UserWarning.
        bos: the model's ``bos_token_id``.

    Raises:
        InputError: a mapping without ids, two masks, or text without a tokenizer.
    """
    if is_text(tokens):
        texts = [tokens] if isinstance(tokens, str) else list(tokens)
        return Given(_tokenized(texts, mask, tokenizer, bos))
    found = _encoded(tokens)
    if found is None and isinstance(tokens, list | tuple) and len(tokens):
        several = [_encoded(one) for one in tokens]
        if any(several) and None in several:
            raise InputError("Some of these prompts are encodings, others are not; give one kind.")
        if None not in several:
            masks = [one.mask for one in several]
            if None in masks and any(one is not None for one in masks):
                raise InputError("Some of these encodings have an attention_mask, others none.")
            found = Given([_row(one.ids) for one in several], None)
            if None not in masks:
                found = found._replace(mask=[_row(one) for one in masks])
    if found is None:
        return Given(plain(tokens), plain(mask))
    if found.mask is not None and mask is not None:
        raise InputError(
            "attention_mask is given twice, besides the tokens and inside them; give one."
        )
    return found._replace(mask=plain(mask) if found.mask is None else found.mask)


def is_text(tokens: Any) -> bool:
    """Whether this is a text, or a list of texts."""
    array = isinstance(tokens, np.ndarray) and tokens.ndim == 1
    several = array or isinstance(tokens, Sequence)
    return isinstance(tokens, str) or several and any(isinstance(one, str) for one in tokens)


def _tokenized(texts: Sequence[Any], mask: Any, tokenizer: Any, bos: int | None) -> list[list[int]]:
    if tokenizer is None:
        shown = some([repr(text) for text in texts])
        raise InputError(
            f"Got text where token ids are expected ({shown}). Give tokenizer=..., which is then "
            "used, or tokenize first: jaxtc.load_tokenizer(source)(text)."
        )
    if mask is not None:
        raise InputError("Text has no padding: leave attention_mask out, or give token ids.")
    if not all(isinstance(text, str) for text in texts):
        raise InputError("Some of these prompts are text, others are not; give one kind.")
    if not callable(tokenizer):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}, expected one of transformers', such as "
            "jaxtc.load_tokenizer(source)."
        )
    rows, notes = zip(*(tokenized(tokenizer, text, bos) for text in texts), strict=True)
    for note in noted(dict(enumerate(notes))):
        warnings.warn(note, UserWarning, stacklevel=2)
    return list(rows)


def _encoded(given: Any) -> Given | None:
    """Ids and mask of a tokenizer's output; None where this is no such thing."""
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise InputError(
                f"This mapping has no input_ids, only {some([repr(key) for key in given])}; give "
                "a tokenizer's output, or the ids themselves."
            )
        return Given(plain(given["input_ids"]), plain(given.get("attention_mask")))
    ids = getattr(given, "ids", None)  # an Encoding of the tokenizers library
    if isinstance(ids, list) and hasattr(given, "attention_mask"):
        return Given(ids, list(given.attention_mask))
    return None


def _row(ids: Any) -> Any:
    """One prompt's row, which a tokenizer asked for arrays gives as a batch of one."""
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    return ids[0] if ids.ndim == 2 and len(ids) == 1 else ids


def rows_of(
    tokens: Any, kinds: str = "iu", refusal: Callable[[Any], InputError] | None = None
) -> list[np.ndarray]:
    """The rows of ids: one, a list of them of any lengths, or those of an array.

    Raises:
        InputError: a row that is none, or whose dtype is not of these ``kinds``; it is ``refusal``
            that makes the error, of the array.
    """
    several = isinstance(tokens, Sequence) and len(tokens) > 0
    try:
        nested = several and any(np.ndim(row) > 0 for row in tokens)
        rows = [np.asarray(row) for row in tokens] if nested else [np.asarray(tokens)]
    except ValueError:  # lists of different depth
        raise (refusal or not_ids)(np.asarray(None)) from None
    if not nested and rows[0].ndim == 2:
        rows = list(rows[0])
    # A tokenizer asked for arrays gives each prompt as a batch of one.
    rows = [row[0] if row.ndim == 2 and len(row) == 1 else row for row in rows]
    for row in rows:
        if row.ndim != 1 or (row.size and row.dtype.kind not in kinds):
            mixed = nested and row.ndim == 0  # a number among rows
            raise (refusal or not_ids)(np.asarray(None) if mixed else row)
    return rows


def not_ids(array: Any) -> InputError:
    """The error for an array that holds no ids."""
    what = f"an array of {array.dtype} with shape {array.shape}"
    if array.dtype == object:
        what = "rows of different depth, or what are no numbers"
    return InputError(f"Token ids are whole numbers in one row or several, got {what}.")


def spans_of(mask: Any, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(B,) where each prompt begins in its row, and (B,) how many tokens it has."""
    given = rows_of(mask, "iufb", not_a_mask)
    held = [len(row) for row in rows]
    if [len(row) for row in given] != held:
        raise not_a_mask(f"has rows of {[len(row) for row in given]}", held)
    spans = []
    for index, row in enumerate(given):
        if not np.isin(row, (0, 1)).all():
            odd = row[~np.isin(row, (0, 1))][0]
            raise not_a_mask(f"holds {odd} in row {index}", held)
        on = np.flatnonzero(row)
        if not on.size:
            raise InputError(f"Prompt {index} is empty: its attention_mask is 0 everywhere.")
        if len(on) != on[-1] - on[0] + 1:
            hole = on[0] + int(np.argmin(row[on[0] :]))
            raise InputError(
                f"The attention_mask of prompt {index} is 0 at column {hole}, between tokens; a "
                "prompt is one run of tokens, with padding on its left or right only."
            )
        spans.append((on[0], len(on)))
    starts, counts = np.array(spans, np.int32).T
    return starts, counts


def not_a_mask(what: Any, expected: Any = None) -> InputError:
    """The error for a mask of which ``what`` is wrong (or that array), of ``expected`` sizes."""
    if expected is None and what.dtype == object:
        what = "has rows of different depth, or what are no numbers"
    elif expected is None:
        what = f"is an array of {what.dtype} with shape {what.shape}"
    return InputError(
        f"The attention_mask {what}, expected 1 (or true) on tokens and 0 on padding, one for each "
        + ("token." if expected is None else f"token: {tuple(expected)}.")
    )
