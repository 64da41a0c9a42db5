"""Training JumpReLU transcoders on a model's MLPs (Gemma Scope, arXiv 2408.05147, scaled down).

The loss of a token is ‖y − ŷ‖² + λ (2/L0*) (L0 − L0*)²: squared error, and the penalty of the
Gemma 3 release, which sets L0 itself. Gradients reach the thresholds through a rectangle kernel
(straight-through estimator). Inputs and targets are divided by a constant each, so that a
coordinate has unit mean square, and the constants are folded into the weights at the end.

Differences from the paper, because a run here is a thousandth as long: a wider kernel, a higher
learning rate that decays, thresholds that start where L0 is near its target, and resampling of
features that hardly ever fire on the tokens explained worst (after Bricken et al. 2023, "Towards
Monosemanticity"). Axis letters: n tokens, D hidden, M features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxtc.training.harvest import Harvest
from jaxtc.training.loop import Log, fit
from jaxtc.transcoders.transcoder import Transcoder

# A new feature gets a density from which it is dead again after 300 silent steps.
_DENSITY_RATE, _REVIVED_DENSITY = 0.01, 20


@dataclass(frozen=True)
class TranscoderRecipe:
    """How transcoders are trained."""

    features: int = 1024  # M
    target_l0: float = 16.0  # L0*, the target for the mean number of active features per token
    steps: int = 3000  # all layers in each
    batch: int = 1024  # tokens per step
    learning_rate: float = 3e-3  # peak; 2% of the steps warm-up, linear decay to 0 over 60%
    l0_weight: float = 1.0  # λ, reached linearly over the first 20% of the steps
    bandwidth: float = 0.1  # width ε of the rectangle kernel
    start_density: float = 0.05  # initial share of tokens on which a feature is active
    rarest: float = 5e-5  # a feature active on a smaller share of tokens counts as dead
    revive_every: int = 200  # steps between resamplings of dead features; none after 60%
    seed: int = 0  # of the initial weights


class Weights(NamedTuple):
    """One transcoder in training: W_enc (D, M), b_enc (M,), W_dec (M, D), b_dec (D,), threshold."""

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    threshold: jax.Array


@jax.custom_vjp
def jumprelu(z: jax.Array, threshold: jax.Array, bandwidth: float) -> tuple[jax.Array, jax.Array]:
    """(activations, gate): ``z`` where it exceeds the threshold, and 1.0 there; both (n, M).

    The gradient with respect to ``z`` is the exact one; with respect to the threshold it is the
    straight-through estimate of Rajamanoharan et al. 2024 (arXiv 2407.14435, §4).
    """
    gate = ((z > threshold[None]) & (z > 0)).astype(z.dtype)
    return z * gate, gate


def _jumprelu_fwd(z, threshold, bandwidth):
    activations, gate = jumprelu(z, threshold, bandwidth)
    return (activations, gate), (z, threshold, bandwidth, gate)


def _jumprelu_bwd(kept, cotangents):
    z, threshold, bandwidth, gate = kept
    to_activations, to_gate = cotangents
    near = (jnp.abs(z - threshold[None]) < bandwidth / 2).astype(z.dtype) / bandwidth
    to_threshold = -jnp.sum(near * (threshold[None] * to_activations + to_gate), axis=0)
    return to_activations * gate, to_threshold, None


jumprelu.defvjp(_jumprelu_fwd, _jumprelu_bwd)


def initial_weights(
    key: jax.Array, x: jax.Array, y: jax.Array, recipe: TranscoderRecipe
) -> Weights:
    """Random weights; thresholds and ``b_dec`` fitted to normalised activations, (n, D) each."""
    inward, outward = jax.random.split(key)
    he_uniform = jax.nn.initializers.he_uniform()
    # Small: unit decoder rows firing at random would drown the target and be silenced at once.
    W_enc = 0.1 * he_uniform(inward, (x.shape[1], recipe.features), jnp.float32)
    W_dec = he_uniform(outward, (recipe.features, y.shape[1]), jnp.float32)
    threshold = jnp.quantile(x @ W_enc, 1 - recipe.start_density, axis=0)
    return Weights(
        W_enc, jnp.zeros(recipe.features), _unit_rows(W_dec), jnp.asarray(y.mean(axis=0)),
        threshold=jnp.maximum(threshold, recipe.bandwidth),
    )  # fmt: skip


def loss(weights: Weights, x: jax.Array, y: jax.Array, ramp: jax.Array, recipe: TranscoderRecipe):
    """The loss of a batch of normalised activations, (n, D) each, and metrics.

    Returns:
        (loss, (metrics, density (M,) in this batch, residual (n, D))).
    """
    z = x @ weights.W_enc + weights.b_enc[None]
    activations, gate = jumprelu(z, weights.threshold, recipe.bandwidth)
    left = y - (activations @ weights.W_dec + weights.b_dec[None])
    error = jnp.sum(left**2, axis=1).mean()
    l0 = gate.sum(axis=1).mean()
    excess = (2 / recipe.target_l0) * (l0 - recipe.target_l0) ** 2
    fvu = error / jnp.sum((y - y.mean(axis=0, keepdims=True)) ** 2, axis=1).mean()
    total = error + ramp * recipe.l0_weight * excess
    return total, ({"fvu": fvu, "l0": l0}, gate.mean(axis=0), left)


def revive(key: jax.Array, weights: Weights, dead: jax.Array, x: jax.Array, left: jax.Array):
    """Resample dead features, (M,) booleans, each on a token drawn by its squared error.

    The new feature fires on tokens whose input lies in the direction of that token's (from the
    batch's mean), and writes the residual there. Of the batch, ``x`` (n, D) are the inputs and
    ``left`` (n, D) target minus reconstruction.
    """
    squared = jnp.sum(left**2, axis=1)
    drawn = jax.random.categorical(key, jnp.log(squared + 1e-12), shape=dead.shape)
    size = jnp.sqrt(squared[drawn])
    inward = x[drawn] - x.mean(axis=0, keepdims=True)
    # On the drawn token the pre-activation is the size of the error.
    W_enc = (inward * (size / jnp.sum(inward**2, axis=1))[:, None]).T
    return Weights(
        W_enc=jnp.where(dead[None], W_enc, weights.W_enc),
        b_enc=jnp.where(dead, -x.mean(axis=0) @ W_enc, weights.b_enc),
        W_dec=jnp.where(dead[:, None], _unit_rows(left[drawn]), weights.W_dec),
        b_dec=weights.b_dec,
        threshold=jnp.where(dead, 0.7 * size, weights.threshold),
    )


def train_transcoders(
    harvest: Harvest,
    recipe: TranscoderRecipe,
    *,
    folder: Path | None = None,
    stop_at: int | None = None,
    log: Log = print,
) -> list[Transcoder]:
    """Train one transcoder per layer of the harvest, all on the same tokens.

    The transcoders are of raw activations, with decoder rows of norm 1; ``folder``, ``stop_at`` and
    ``log`` are as in :func:`jaxtc.training.loop.fit`.
    """
    layers = harvest.layers
    x, y = (part[:, : recipe.batch * 4] for part in harvest.bucket(0))
    scales = [(_rms(x[i]), _rms(y[i])) for i in range(len(layers))]
    keys = jax.random.split(jax.random.key(recipe.seed), len(layers))
    transform = _optimizer(recipe)

    def start(i: int):
        weights = initial_weights(keys[i], x[i] / scales[i][0], y[i] / scales[i][1], recipe)
        density = jnp.full(recipe.features, _REVIVED_DENSITY * recipe.rarest)
        return weights, transform.init(weights), density

    def advance(i: int, number, batch, weights: Weights, state, density):
        x, y = (part[i] / scale for part, scale in zip(batch, scales[i], strict=True))
        ramp = jnp.minimum(1.0, number / (0.2 * recipe.steps))
        reviving = (number % recipe.revive_every == 0) & (number > 0)
        reviving &= number <= 0.6 * recipe.steps
        gradient, (seen, now, left) = jax.grad(loss, has_aux=True)(weights, x, y, ramp, recipe)
        updates, state = transform.update(_tangent(gradient, weights), state)
        weights = optax.apply_updates(weights, updates)
        weights = weights._replace(
            W_dec=_unit_rows(weights.W_dec), threshold=jnp.maximum(weights.threshold, 0)
        )
        density += _DENSITY_RATE * (now - density)
        dead = density < recipe.rarest
        key = jax.random.fold_in(keys[i], number)
        weights = jax.lax.cond(
            reviving, lambda: revive(key, weights, dead, x, left), lambda: weights
        )
        density = jnp.where(dead & reviving, _REVIVED_DENSITY * recipe.rarest, density)
        seen |= {"dead": dead.mean()}
        return (weights, state, density), {f"{k}[{layers[i]}]": value for k, value in seen.items()}

    def step(carry, batch):
        number, states = carry
        after, figures = [], {}
        for i, state in enumerate(states):
            new, seen = advance(i, number, batch, *state)
            after.append(new)
            figures |= seen
        return (number + 1, after), figures

    _, states = fit(
        step,
        (jnp.zeros((), jnp.int32), [start(i) for i in range(len(layers))]),
        lambda number: harvest.batch(number, recipe.batch),
        recipe.steps, name="transcoders", folder=folder, chunk=16, stop_at=stop_at, log=log,
    )  # fmt: skip
    return [_fold(states[i][0], *scales[i], layer) for i, layer in enumerate(layers)]


def _optimizer(recipe: TranscoderRecipe) -> optax.GradientTransformation:
    warm, decay = round(0.02 * recipe.steps), round(0.6 * recipe.steps)
    schedule = optax.join_schedules(
        [
            optax.cosine_decay_schedule(0.1 * recipe.learning_rate, max(warm, 1), alpha=10.0),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, decay),
        ],
        [warm, recipe.steps - decay],
    )
    return optax.adam(schedule, b1=0.0, b2=0.999, eps=1e-8)


def _tangent(gradient: Weights, weights: Weights) -> Weights:
    """The gradient without what would only change the norm of decoder rows."""
    along = jnp.sum(gradient.W_dec * weights.W_dec, axis=1, keepdims=True)
    return gradient._replace(W_dec=gradient.W_dec - along * weights.W_dec)


def _fold(weights: Weights, c_in: float, c_out: float, layer: int) -> Transcoder:
    """Weights for raw activations: JumpReLU commutes with the positive factor ``c_out``."""
    D, M = weights.W_enc.shape
    transcoder = Transcoder(D, M, weights.W_dec.shape[1], layer=layer, rngs=nnx.Rngs(0))
    factors = {"W_enc": c_out / c_in, "W_dec": 1.0}
    for name, value in weights._asdict().items():
        getattr(transcoder, name)[...] = value * factors.get(name, c_out)
    return transcoder


def _unit_rows(W: jax.Array) -> jax.Array:
    return W / jnp.linalg.norm(W, axis=1, keepdims=True)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
