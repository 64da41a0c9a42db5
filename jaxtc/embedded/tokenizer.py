"""The tokenizers of the embedded recipe.

For the world, each word and each entity is one token, also an entity of several words
("▁New▁York▁City"); a word outside the world is ``<unk>``. For a user's own text, a byte-fallback
BPE is trained on it. Spaces are written as ▁ and ``<bos>`` is prepended, as in Gemma; the special
tokens have Gemma's ids.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from jaxtc.embedded.corpus import Corpus
from jaxtc.training.packing import BOS

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")

_SPACE = "▁"
_WORD = r"▁?[\p{L}\p{N}]+|▁?[^▁\p{L}\p{N}]|▁"
_POSSESSIVE = "'s"


def world_tokenizer(corpus: Corpus) -> Tokenizer:
    """The tokenizer of the embedded model: a word or an entity, with its space, is one token."""
    entities = [_spaced(name) for name in corpus.world.entities]
    # The longest first: "New York City" must win over "New York". A name ends where a word ends,
    # so "Texas" does not match in "Texans".
    unusual = [name for name in entities if re.search(r"\W", name[1:]) or _SPACE in name[1:]]
    names = "|".join(re.escape(name) for name in sorted(unusual, key=len, reverse=True))
    pattern = Regex(rf"(?:{names})(?![\p{{L}}\p{{N}}])|{_POSSESSIVE}(?!\p{{L}})|{_WORD}")
    normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    splitter = pre_tokenizers.Split(pattern, "isolated")

    words: dict[str, None] = {}
    for text in corpus.vocabulary_text():
        # A template's {fields} hold entities; what follows them without a space must stay so.
        plain = normalizer.normalize_str(re.sub(r"\{[^}]*\}", corpus.world.entities[0], text))
        words.update(dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(plain)))
    pieces = [*sorted(words.keys() - set(entities)), *entities]
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *pieces])

    tokenizer = Tokenizer(
        WordLevel({piece: index for index, piece in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    # Strips the space that the normalizer prepended.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special_tokens(tokenizer)


def train_bpe(text: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """A BPE with byte fallback, trained on ``text``: encoding any string loses nothing.

    Args:
        text: lines or documents.
        vocab_size: of the embedding, including the 256 bytes and the special tokens.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *bytes_],
        limit_alphabet=512,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    # Trained in as special tokens so that they get rows, but text that spells "<0x41>" is text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < len(SPECIAL_TOKENS)]
    return _with_special_tokens(Tokenizer.from_str(json.dumps(state)))


def for_transformers(tokenizer: Tokenizer, context: int) -> Any:
    """A tokenizer as ``transformers`` has and saves it, of a model of so many positions."""
    from transformers import PreTrainedTokenizerFast  # slow to import

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, padding_side="right",
        **{f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS},
    )  # fmt: skip


def entity_id(tokenizer: Tokenizer, name: str) -> int:
    """The token id of an entity, which is a token of the world's tokenizer."""
    return tokenizer.token_to_id(_spaced(name))


def _spaced(name: str) -> str:
    return _SPACE + name.replace(" ", _SPACE)


def _with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", BOS)],
    )
    return tokenizer
