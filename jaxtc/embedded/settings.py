"""The settings of the recipe; the defaults made the files that ship."""

from __future__ import annotations

from dataclasses import dataclass


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
class TranscoderRecipe:
    """How transcoders are trained.

    Attributes:
        features: M.
        target_l0: L0*, the mean number of active features a token to aim at.
        steps: optimiser steps, all layers in each.
        batch: tokens a step.
        learning_rate: at its peak, reached after 2% of the steps; it falls to 0 over the last 60%.
        l0_weight: λ, reached linearly over the first 20% of the steps.
        bandwidth: width ε of the rectangle kernel.
        start_density: share of tokens on which a feature is active at the start.
        rarest: a feature active on a smaller share of tokens counts as dead.
        revive_every: steps between settings anew of dead features; none after 60% of the steps.
        seed: of the initial weights.
    """

    features: int = 1024
    target_l0: float = 16.0
    steps: int = 3000
    batch: int = 1024
    learning_rate: float = 3e-3
    l0_weight: float = 1.0
    bandwidth: float = 0.1
    start_density: float = 0.05
    rarest: float = 5e-5
    revive_every: int = 200
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
