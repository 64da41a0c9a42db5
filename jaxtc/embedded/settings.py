"""The settings of the recipe; the defaults made the files that ship."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtc.training.transcoders import TranscoderRecipe


@dataclass(frozen=True)
class ModelRecipe:
    """How the model is trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: at its peak, after a warm-up over 2% of the steps; it stays there until
            40% of the steps and then falls linearly to 0.
        weight_decay: of AdamW, on matrices; not on norms and embeddings.
        clip: largest norm of the gradient.
        seed: of the initial weights.
    """

    steps: int = 5000
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything, besides the text, that decides what comes out.

    Attributes:
        model: training of the model.
        transcoders: training of the transcoders.
        rows: packed rows in a batch of the model.
        length: tokens in a row.
        vocab_size: of the tokenizer trained on a user's text; the world's has one word a token.
        sizes: fields of Gemma2Config that differ from the embedded model's.
    """

    model: ModelRecipe = ModelRecipe()
    transcoders: TranscoderRecipe = TranscoderRecipe()
    rows: int = 16
    length: int = 64
    vocab_size: int = 4096
    sizes: tuple[tuple[str, int], ...] = ()
