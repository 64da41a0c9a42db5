"""Random configs that a mistake cannot hide in, and how far the two models are apart on them.

Cases are drawn by NumPy from (seed, index), not by hypothesis: every case costs a compile, so that
shrinking one failure would cost more than the whole suite, and case 317 must be the same case
whether 60 or 500 are run.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Gemma2Config as TorchConfig
from transformers import Gemma2ForCausalLM

import jaxtc
from jaxtc.model.config import FULL, SLIDING, Gemma2Config
from jaxtc.parity.compare import masked
from jaxtc.sharding.rules import variables
from jaxtc.tap.sites import Address
from jaxtc.weights.names import parameter_names
from tests.parity import oracles, reference

# Our parameters by our names, in our shapes.
Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what is run through it; ``repr`` is all that is needed to make it again.

    Attributes:
        config: of both models.
        seed: of the weights.
        lengths: of the prompts, whose ids are drawn from the seed too.
        side: where the reference's prompts are padded.
    """

    config: Gemma2Config
    seed: int
    lengths: tuple[int, ...]
    side: str

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of the vocabulary but for the special ones, which doors take for padding at ends."""
        random = np.random.default_rng(self.seed)
        size = self.config.vocab_size
        drawn = [random.integers(size, size=n) for n in self.lengths]
        return [np.where(ids < 3, size - 1, ids).tolist() for ids in drawn]


def draw(seed: int, index: int) -> Case:
    """Case ``index`` of a seed."""
    random = np.random.default_rng([seed, index])

    def whole(least: int, most: int) -> int:
        return int(random.integers(least, most + 1))

    def maybe(least: float, most: float) -> float | None:
        return None if random.random() < 0.3 else round(random.uniform(least, most), 3)

    def decades(least: float, most: float) -> float:
        return float(f"{10 ** random.uniform(least, most):.4g}")

    layers, kv_heads, window = whole(1, 4), whole(1, 4), whole(1, 20)
    heads = kv_heads * whole(1, 4)
    head_dim = 2 * whole(1, 12)
    vocab = whole(30, 300)
    config = Gemma2Config(
        vocab_size=vocab + (vocab % 128 == 0),
        # The reference wants a multiple, for no reason in the architecture.
        hidden_size=heads * whole(-(-12 // heads), 80 // heads),
        intermediate_size=whole(24, 160),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim + whole(1, 40),
        sliding_window=window,
        layer_types=tuple((SLIDING, FULL)[whole(0, 1)] for _ in range(layers)),
        attn_logit_softcapping=maybe(4, 60),
        final_logit_softcapping=maybe(3, 40),
        rope_theta=decades(1, 6),
        rms_norm_eps=decades(-7, -2),
        max_position_embeddings=64,
    )
    # From one token to past the window; at least one prompt gets past it more often than not.
    lengths = [whole(1, min(30, 2 * window + 6)) for _ in range(whole(1, 3))]
    if random.random() < 0.6:
        lengths[whole(0, len(lengths) - 1)] = min(30, window + whole(1, 12))
    side = ("left", "right")[whole(0, 1)]
    return Case(config, whole(0, 2**31 - 1), tuple(lengths), side)


def torch_model(case: Case) -> Gemma2ForCausalLM:
    """The reference, perturbed as :mod:`tests.parity.oracles` does.

    Queries and keys are scaled against ``query_pre_attn_scalar``: scores keep the spread at which
    softcaps bite, and do not get so large that a softmax turns their rounding into large errors.
    """
    config = case.config
    model = Gemma2ForCausalLM(TorchConfig(**config.to_dict(), attn_implementation="eager"))
    generator = torch.Generator().manual_seed(case.seed)
    spread = (config.query_pre_attn_scalar / config.head_dim) ** 0.25
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * oracles.scale(key, weight)
            noise *= spread if "q_proj" in key or "k_proj" in key else 1
            weight.copy_(noise + (oracles.offset(key) if weight.ndim == 1 else 0))
    return model.eval().requires_grad_(False)


def weights(model: Gemma2ForCausalLM, config: Gemma2Config) -> Weights:
    """The reference's parameters as those of a model of this config, without a file between.

    The config may split the axes of a matrix otherwise than the reference does.
    """
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    names = parameter_names(config)
    return {name.ours: state[name.hf].numpy().reshape(name.shape) for name in names}


def our_model(config: Gemma2Config, values: Weights) -> jaxtc.Gemma2:
    """Our model around these parameters, in float32."""
    model = jaxtc.Gemma2.abstract(config)
    shapes = {name: param.shape for name, param in variables(model)}
    assert shapes == {name: value.shape for name, value in values.items()}
    leaves = [jnp.asarray(values[name]) for name in shapes]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def errors(
    case: Case, ours: dict[Address, list[np.ndarray]], theirs: reference.Captured
) -> dict[Address, float]:
    """Relative L2 at every address, over the real tokens of all prompts.

    The norm is ‖ours − theirs‖ / ‖theirs‖, in float64, with one exception. A score is the inner
    product of a query and a key and rounds in proportion to their lengths, however small it comes
    out; where a case has but one or a few, all of them may come out near 0. So the scores' error is
    divided by the size that scores of such queries and keys have, :func:`expected_scores`, where
    that is larger. Other sites have enough terms for their norm not to vanish.

    Infinite where the shapes differ, where the masks differ, where something is not a number.
    """
    assert set(ours) == set(theirs)
    found = {}
    for address, rows in theirs.items():
        a, b = ([np.asarray(x, np.float64) for x in side] for side in (ours[address], rows))
        if [x.size for x in a] != [x.size for x in b]:
            found[address] = np.inf
            continue
        far = size = 0.0
        same = True
        for x, y in zip(a, b, strict=True):
            x = x.reshape(y.shape)
            if address.site == "attn_scores":
                hidden = masked(y)
                same &= bool((masked(x) == hidden).all())
                x, y = (np.where(hidden | masked(z), 0, z) for z in (x, y))
            far += np.sum((x - y) ** 2)
            size += np.sum(y**2)
        if address.site == "attn_scores":
            size = max(size, expected_scores(case.config, theirs, address.layer))
        error = float(np.sqrt(far / size))
        found[address] = error if same and not np.isnan(error) else np.inf
    return found


def expected_scores(config: Gemma2Config, theirs: reference.Captured, layer: int) -> float:
    """Sum of squares of the visible scores, were queries and keys of these lengths random.

    Two random vectors have an inner product of root mean square ‖q‖‖k‖/√H.
    """
    groups, total = config.num_attention_heads // config.num_key_value_heads, 0.0
    scores, queries, keys = (theirs[Address(site, layer)] for site in ("attn_scores", "q", "k"))
    for row, q, k in zip(scores, queries, keys, strict=True):
        q, k = (np.linalg.norm(x.double().numpy(), axis=-1).T for x in (q, k))
        size = q[:, :, None] * k.repeat(groups, axis=0)[:, None, :]
        size /= (config.query_pre_attn_scalar * config.head_dim) ** 0.5
        size = np.minimum(size, config.attn_logit_softcapping or np.inf)
        total += float(np.sum(size[~masked(row.numpy())] ** 2))
    return total


def changed(config: Gemma2Config, **changes: Any) -> Gemma2Config:
    """The same config with other constants."""
    return dataclasses.replace(config, **changes)
