"""The models that parity is checked on: random ones that a mistake cannot hide in, and the shipped.

A freshly initialised Gemma-2 has zero norm weights and nearly flat attention, so most mistakes
leave its output as it is. These have random gains, queries and keys large enough for the softcap to
bite, a window shorter than the prompts, and the proportions of the released sizes: 2B (D a
square), 9B (D not a square), 27B (scores scaled by neither head_dim nor D).
"""

import dataclasses
from pathlib import Path

import torch
from transformers import AutoTokenizer, Gemma2ForCausalLM
from transformers import Gemma2Config as TorchConfig

from jaxtc.embedded.corpus import default_corpus
from jaxtc.weights.sources.resolve import EMBEDDED_DATA

COMMON = {"num_hidden_layers": 4, "sliding_window": 7, "max_position_embeddings": 512}
SHAPES = {
    "2b": {
        "hidden_size": 144,
        "intermediate_size": 576,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "vocab_size": 211,
    },
    "9b": {
        "hidden_size": 56,
        "intermediate_size": 224,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "vocab_size": 257,
    },
    "27b": {
        "hidden_size": 72,
        "intermediate_size": 576,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 9,
        "vocab_size": 199,
    },
}
BOS = 2
RANDOM = tuple(SHAPES)
EMBEDDED = "embedded"
ALL = (*RANDOM, EMBEDDED)

# Beginnings of sentences of the embedded model's world, of different lengths.
SENTENCES = (
    "The capital of the state containing Dallas is",
    "The capital of Texas is",
    "The state containing Oakland is",
)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A checkpoint folder that both frameworks load, and the prompts to run through it.

    Attributes:
        name: of the shape, or "embedded".
        folder: what ``Gemma2ForCausalLM.from_pretrained`` reads.
        source: what ``jaxtc.load_model`` reads.
        prompts: ids of prompts of different, odd and even lengths, each longer than the window.
        long: a batch of one long prompt: beyond 256 tokens, where bfloat16 can no longer count,
            when the model's context allows.
    """

    name: str
    folder: Path
    source: str
    prompts: list[list[int]]
    long: list[list[int]]


def embedded() -> Oracle:
    """The model that ships in the package, on sentences of its own world."""
    folder = EMBEDDED_DATA / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in SENTENCES]
    texts = default_corpus().documents(stream=99, batch=0, count=32, held_out=True)
    long = [token for text in texts for token in tokenizer(text).input_ids]
    assert len(long) > 256
    return Oracle(EMBEDDED, folder, EMBEDDED, prompts, [long])


def random_prompts(vocab: int, lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Prompts of random ids behind a BOS."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, vocab, (n - 1,), generator=generator).tolist()  # noqa: E731
    return [[BOS, *draw(n)] for n in lengths]


def perturbed(name: str, seed: int = 0, **changes) -> Gemma2ForCausalLM:
    """A random model of one of :data:`SHAPES` whose every constant matters.

    ``changes`` are of the config: another model with the same weights.
    """
    settings = {**COMMON, **SHAPES[name], **changes}
    model = Gemma2ForCausalLM(TorchConfig(**settings, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            weight.copy_(noise * scale(key, weight) + (offset(key) if weight.ndim == 1 else 0))
    return model.eval()


def scale(key: str, weight: torch.Tensor) -> float:
    """Standard deviation of a random parameter."""
    if weight.ndim == 1:
        return 0.5
    if "embed_tokens" in key:
        return 0.1
    unit = weight.shape[1] ** -0.5
    return 1.8 * unit if "q_proj" in key or "k_proj" in key else 1.5 * unit


def offset(key: str) -> float:
    """Mean of a random gain ``w``.

    Blocks must outweigh the embedding, or greedy text falls into repeating one token.
    """
    return 6.0 if "post_" in key or key == "model.norm.weight" else 0.0
