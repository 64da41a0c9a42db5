"""Training the small Gemma-2: AdamW on packed documents, some embeddings left as drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.training.loop import Log, fit
from jaxtc.training.packing import Batch, Batches, next_token_loss


@dataclass(frozen=True)
class ModelRecipe:
    """How the model is trained."""

    steps: int = 5000
    learning_rate: float = 3e-3  # peak; 2% of the steps warm-up, linear decay to 0 from 40% on
    weight_decay: float = 0.1  # AdamW's, of matrices, not of norms and embeddings
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the initial weights


def small_config(vocab_size: int, **sizes) -> Gemma2Config:
    """The embedded model's shape; ``sizes`` (named as in Gemma2Config) replace its defaults."""
    defaults = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        # Shorter than a sentence: information from further back needs the global layers.
        "sliding_window": 4,
    }
    return Gemma2Config(vocab_size=vocab_size, **{**defaults, **sizes})


def optimizer(recipe: ModelRecipe, frozen_tokens: Sequence[int]) -> optax.GradientTransformation:
    """AdamW with the recipe's schedule; the embeddings of ``frozen_tokens`` never change."""
    warm, flat = round(0.02 * recipe.steps), round(0.4 * recipe.steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, warm),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, recipe.steps - flat),
        ],
        [warm, flat],
    )
    frozen = np.asarray(frozen_tokens, np.int32)

    def is_embedding(path) -> bool:
        return "'embed'" in jax.tree_util.keystr(path)

    def is_matrix(params: nnx.State) -> nnx.State:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf.ndim > 1 and not is_embedding(path), params
        )

    def freeze(updates: nnx.State, _) -> nnx.State:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf.at[frozen].set(0.0) if is_embedding(path) else leaf, updates
        )

    return optax.chain(
        optax.stateless(freeze),  # before the clip: frozen entries must not shrink the rest
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=recipe.weight_decay, mask=is_matrix),
    )


def train_model(
    config: Gemma2Config,
    batches: Batches,
    recipe: ModelRecipe,
    *,
    frozen_tokens: Sequence[int] = (),
    folder: Path | None = None,
    stop_at: int | None = None,
    log: Log = print,
) -> Gemma2:
    """Train a Gemma-2 from random weights, float32.

    Args:
        frozen_tokens: ids whose embeddings stay at their random initial values, so that what the
            model learns about these tokens has to be learnt by its layers.
        folder, stop_at, log: as in :func:`jaxtc.training.loop.fit`.
    """
    graph, params = nnx.split(Gemma2(config, rngs=nnx.Rngs(recipe.seed)))
    transform = optimizer(recipe, frozen_tokens)

    def loss(params: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, params)
        logits, _ = model(batch.tokens, positions=batch.positions, segments=batch.segments)
        return next_token_loss(logits, batch)

    def step(carry, batch: Batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = transform.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), {"loss": value}

    params, _ = fit(
        step,
        (params, transform.init(params)),
        batches.__getitem__,
        recipe.steps, name="model", folder=folder, stop_at=stop_at, log=log,
    )  # fmt: skip
    return nnx.merge(graph, params)
