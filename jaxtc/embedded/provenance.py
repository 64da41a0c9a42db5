"""Which text a trained folder is of: figures on another text would mean nothing.

The recipe notes its text in ``text.json`` beside the model. Whether that is there or not, the
model's tokenizer tells: it was made from the text.
"""

import hashlib
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from jaxtc.embedded.corpus import Corpus
from jaxtc.embedded.text import UserText
from jaxtc.embedded.tokenizer import SPECIAL_TOKENS, entity_id
from jaxtc.errors import InputError, some
from jaxtc.helpers import write_whole

NAME = "text.json"
# Of a tokenizer's pieces, the share that a text it was trained on may lack (it may have been edited
# since).
_ODD = 0.1


def described(source: Corpus | UserText) -> str:
    """A text in a few words that no other text has."""
    if isinstance(source, UserText):
        digest = hashlib.sha256(source.text.encode()).hexdigest()
        return f"text with SHA-256 {digest}, seed {source.seed}"
    return f"the generated corpus, seed {source.seed}"


def note_text(root: Path, source: Corpus | UserText) -> None:
    """Write which text the folder is of."""
    write_whole(root / NAME, json.dumps({"text": described(source)}) + "\n")


def check_text(root: Path, tokenizer: Tokenizer, source: Corpus | UserText) -> None:
    """Refuse to measure a folder on a text other than its own.

    Args:
        root: the folder.
        tokenizer: its model's.
        source: the text to measure on.

    Raises:
        InputError: it is another text, by what the folder says or by what its tokenizer knows.
    """
    why = _noted(root, source) or _unknown(tokenizer, source)
    if why:
        raise InputError(
            f"The model in {root} was trained on another text than {described(source)}: {why}. "
            "Figures on a text that is not its own would mean nothing; give the text and the seed "
            "of its training (--text FILE and --seed; source=UserText.from_file(path, seed)), or "
            "neither for a model of the generated corpus."
        )


def _noted(root: Path, source: Corpus | UserText) -> str:
    """What the folder's own note says against the text, "" for nothing."""
    try:
        noted = json.loads((root / NAME).read_text(encoding="utf-8"))["text"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # made before there were notes, or not by the recipe
    return "" if noted == described(source) else f"its {NAME} names {noted!r}"


def _unknown(tokenizer: Tokenizer, source: Corpus | UserText) -> str:
    """What the tokenizer says against the text, "" for nothing."""
    if isinstance(source, Corpus):
        names = source.world.entities
        lacks = [name for name in names if entity_id(tokenizer, name) is None]
        if lacks:
            return (
                f"its tokenizer has no token for {len(lacks)} of the corpus's {len(names)} names "
                f"({some(lacks)})"
            )
    unknown, texts = tokenizer.token_to_id("<unk>"), source.documents(2, 0, 500, held_out=True)
    encoded = [one.ids for one in tokenizer.encode_batch(texts)]
    lost, count = sum(ids.count(unknown) for ids in encoded), sum(map(len, encoded))
    if lost:
        return f"its tokenizer gives <unk> for {lost} of {count} tokens of the held-out text"
    if isinstance(source, Corpus):
        return ""
    # A byte pair encoding is made of what comes up in its text.
    special = re.compile("|".join([*map(re.escape, SPECIAL_TOKENS), r"<0x[0-9A-F]{2}>"]))
    pieces = [piece for piece in tokenizer.get_vocab() if not special.fullmatch(piece)]
    text = source.text.replace("\r\n", "\n").replace(" ", "▁")
    strange = sorted(piece for piece in pieces if piece not in text)
    if len(strange) <= _ODD * len(pieces):
        return ""
    return (
        f"{len(strange)} of the {len(pieces)} pieces of its tokenizer do not come up in it "
        f"({some(strange)})"
    )
