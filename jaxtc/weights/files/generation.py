"""``generation_config.json``: the tokens that end a text, joined with those of ``config.json``.

``transformers`` stops at those of ``generation_config.json`` alone where there is one. Checkpoints
have been published with either file behind the other, so both are obeyed here.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jaxtc.errors import ConfigError
from jaxtc.helpers import is_whole
from jaxtc.model.config import Gemma2Config
from jaxtc.weights.files import local

GENERATION = "generation_config.json"

_MOST_BYTES = 1_000_000

# How transformers would choose tokens, where it is not as jaxtc.generate does by default.
_CHOICES = {
    "do_sample": (None, False), "num_beams": (None, 1), "repetition_penalty": (None, 1),
    "encoder_repetition_penalty": (None, 1), "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "sequence_bias": (None,),
    "stop_strings": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1), "penalty_alpha": (None, 0), "dola_layers": (None,),
}  # fmt: skip
# Only where it samples.
_SAMPLED = {
    "temperature": (None,), "top_k": (None,), "top_p": (None,), "min_p": (None,),
    "typical_p": (None, 1), "epsilon_cutoff": (None, 0), "eta_cutoff": (None, 0),
}  # fmt: skip


def read_config(folder: Path) -> Gemma2Config:
    """The config of the model in a folder, with the stop tokens of both its files.

    Raises:
        ConfigError: as :meth:`~jaxtc.Gemma2Config.from_file`, for either file.
    """
    config = Gemma2Config.from_file(folder / "config.json")
    return with_stops(config, read_generation(folder), str(folder / GENERATION))


def read_generation(folder: Path) -> bytes | None:
    """The bytes of ``generation_config.json``, None where there is none.

    Raises ConfigError for what is no plain file, or too large.
    """
    path = folder / GENERATION
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"{path} is not a plain file of at most {_MOST_BYTES:,} bytes. Remove it, or put "
                "the model's own there."
            )
        with local.open_plain(path) as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def with_stops(config: Gemma2Config, content: bytes | None, where: str) -> Gemma2Config:
    """``config``, whose ``eos_token_id`` also has those of a ``generation_config.json``.

    Raises ConfigError, which calls it ``where``, when it is not one.
    """
    said = _parse(content, where).get("eos_token_id")
    new = said if isinstance(said, list) else [] if said is None else [said]
    odd = [one for one in new if not is_whole(one) or one >= config.vocab_size]
    if odd:
        raise ConfigError(
            f"{where}: eos_token_id is {said!r}, expected the id of a token or a list of them, "
            f"0 to {config.vocab_size - 1} in this model."
        )
    known = config.eos_token_id
    known = known if isinstance(known, tuple) else () if known is None else (known,)
    both = tuple(dict.fromkeys((*known, *new)))
    if both == known:
        return config
    return dataclasses.replace(config, eos_token_id=both[0] if len(both) == 1 else both)


def generation_config(config: Gemma2Config) -> dict[str, Any]:
    """The ``generation_config.json`` by which ``transformers`` stops where this model does."""
    eos = config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }


def choices(content: bytes | None, where: str) -> dict[str, Any]:
    """What a ``generation_config.json`` asks for that :func:`jaxtc.generate` does not take from it.

    Its arguments say how tokens are chosen, so that the same call gives the same text of any
    model: greedily by default.
    """
    raw = _parse(content, where)
    asked = _CHOICES | (_SAMPLED if raw.get("do_sample") is True else {})
    return {key: raw[key] for key, usual in asked.items() if raw.get(key) not in usual}


def _parse(content: bytes | None, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        raw = json.loads(content.decode())
    # ValueError: not UTF-8, not JSON, integers too long; RecursionError: nested too deep.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read as JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} holds a JSON {type(raw).__name__}, expected an object.")
    return raw
