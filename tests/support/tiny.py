"""A small random model, transcoders of it, and a tokenizer of a few words, made in memory."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.decoders import Fuse, Replace, Sequence, Strip
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import jaxtc

WORDS = ("the", "capital", "of", "texas", "is", "austin", "paris", "france", "a", "city")
WORDS += ("[bold]", "in", "and", "or", "a-word-of-so-many-letters-that-no-table-has-room-for-it")


@functools.cache
def config() -> jaxtc.Gemma2Config:
    return jaxtc.Gemma2Config(
        vocab_size=4 + len(WORDS), hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        sliding_window=4, max_position_embeddings=40,
    )  # fmt: skip


def handed_out(make):
    """Made once, of real arrays even inside a trace; each caller gets modules of its own."""

    @functools.cache
    def made(*args, **kwargs):
        with jax.ensure_compile_time_eval():
            return make(*args, **kwargs)

    return functools.wraps(make)(lambda *args, **kwargs: fresh(made(*args, **kwargs)))


def fresh(module):
    """Other modules and parameters with the same arrays, which nothing can write to."""
    return jax.tree.map(lambda leaf: leaf, module)


@handed_out
def model() -> jaxtc.Gemma2:
    made = jaxtc.Gemma2(config(), rngs=nnx.Rngs(0))
    # Gains away from 0, so that the site before the gain differs from the one after it.
    key = jax.random.key(7)
    gains = [made.final_norm, *(block.mlp_in_norm for block in made.layers)]
    for index, norm in enumerate(gains):
        draw = jax.random.normal(jax.random.fold_in(key, index), norm.weight.shape)
        norm.weight[...] = 0.5 * draw
    return made


@handed_out
def transcoder(layer: int | None, features: int = 50, width: int = 24) -> jaxtc.Transcoder:
    made = jaxtc.Transcoder(
        width, features, layer=layer, source=f"tiny/layer_{layer}", rngs=nnx.Rngs(layer or 0)
    )
    made.threshold[...] = jnp.full((features,), 0.5)
    return made


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *("▁" + word for word in WORDS)]
    made = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = Sequence([Replace("▁", " "), Fuse(), Strip(" ", 1, 0)])
    made.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)
