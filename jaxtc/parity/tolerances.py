"""Which errors are rounding: the one table that verdicts come from.

``MEASURED`` holds the worst mean relative errors of correct models, as
``python -m tests.parity.calibrate`` finds them on a CPU: the embedded model, random ones with the
proportions of 2B, 9B and 27B, and one with the widths of 2B, with prompts of up to 277 tokens.
Isolated errors are of models of up to 26 layers; accumulated ones and predictions of up to 4, and
taken to grow in proportion to the layers, as one of 26 did. A tolerance is ``FACTOR`` times that. A
site that is not in it gets the largest of its kind.
"""

import dataclasses
import functools

from jaxtc.tap.sites import BY_NAME, SITES

FACTOR = 4.0
# Tolerance of the worst token's error, as a multiple of the mean's.
WORST = 10.0
DEPTH = 4
# A sum that differs in its last float32 bits may round to the next number of the dtype, which
# moves a token by at most this much; rare, so the mean of few tokens must allow for one.
STEP = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
# Nothing is rounded between these and what is given.
STEPLESS = ("embed", "attn_in_scale", "mlp_in_scale", "mlp_in_normed", "final_scale")

# By site: isolated and accumulated in float32, isolated and accumulated in bfloat16. 1e-8 stands
# for no error at all.
MEASURED: dict[str, tuple[float, float, float, float]] = {
    "embed": (1.0e-08, 1.0e-08, 1.0e-08, 1.0e-08),
    "resid_pre": (1.0e-08, 1.9e-06, 1.0e-08, 4.3e-02),
    "attn_in_scale": (5.0e-08, 1.8e-07, 5.0e-08, 4.3e-03),
    "attn_in": (5.7e-08, 1.9e-06, 3.3e-06, 4.3e-02),
    "q_unrotated": (4.5e-07, 2.1e-06, 2.9e-05, 4.3e-02),
    "q": (4.4e-07, 1.9e-06, 2.9e-05, 4.3e-02),
    "k_unrotated": (4.5e-07, 2.1e-06, 2.6e-05, 4.4e-02),
    "k": (4.4e-07, 1.9e-06, 2.6e-05, 4.4e-02),
    "v": (4.4e-07, 1.9e-06, 1.7e-05, 4.3e-02),
    "attn_scores": (7.3e-07, 2.6e-06, 3.5e-03, 6.1e-02),
    "attn_pattern": (1.6e-06, 5.0e-06, 1.6e-02, 1.2e-01),
    "attn_heads": (1.7e-06, 4.4e-06, 1.4e-02, 1.1e-01),
    "head_out": (1.7e-06, 5.4e-06, 1.4e-02, 1.1e-01),
    "attn_proj": (1.8e-06, 4.4e-06, 1.4e-02, 1.1e-01),
    "attn_out_scale": (3.9e-07, 8.9e-07, 3.1e-03, 2.5e-02),
    "attn_out": (1.7e-06, 4.3e-06, 1.4e-02, 1.1e-01),
    "resid_mid": (1.0e-08, 2.4e-06, 1.0e-08, 5.8e-02),
    "mlp_in_scale": (5.4e-08, 2.7e-07, 5.6e-08, 6.1e-03),
    "mlp_in_normed": (5.5e-08, 2.4e-06, 5.9e-08, 5.7e-02),
    "mlp_in": (5.9e-08, 2.5e-06, 4.6e-06, 5.8e-02),
    "mlp_gate": (4.5e-07, 2.9e-06, 3.3e-05, 5.7e-02),
    "mlp_up": (4.5e-07, 2.9e-06, 3.3e-05, 5.7e-02),
    "mlp_act": (6.5e-07, 3.6e-06, 3.3e-05, 8.4e-02),
    "mlp_proj": (8.1e-07, 3.6e-06, 1.9e-04, 8.5e-02),
    "mlp_out_scale": (1.4e-07, 1.0e-06, 4.8e-06, 1.8e-02),
    "mlp_out": (8.0e-07, 3.6e-06, 2.3e-04, 8.2e-02),
    "resid_post": (5.1e-07, 2.7e-06, 1.9e-04, 6.2e-02),
    "final_scale": (4.8e-08, 3.2e-07, 4.3e-08, 6.8e-03),
    "final_norm": (5.4e-08, 2.7e-06, 3.7e-06, 6.1e-02),
    "logits_uncapped": (3.4e-07, 3.0e-06, 3.1e-03, 6.2e-02),
    "logits": (4.8e-07, 3.0e-06, 3.1e-03, 6.2e-02),
}


# The others by dtype. A KL grows with the square of an error; ``margin`` is half the largest error
# of a logit, so that the tolerance is twice that.
PREDICTIONS = {
    "float32": {"kl_mean": 8e-11, "kl_max": 9e-10, "loss": 7e-6, "margin": 8.5e-5, "fvu": 2e-7},
    "bfloat16": {"kl_mean": 3.2e-2, "kl_max": 0.57, "loss": 5.2e-2, "margin": 1.75, "fvu": 7e-4},
}
# Of a transcoder, which is float32 in either case, of D = 2304.
TRANSCODER = 3.3e-7
# Our error against float64, as a multiple of the reference's. In float32 the order in which a
# library adds decides: 1.6 at one site of the embedded model.
TRUTH = {"float32": 10.0, "bfloat16": 2.0}


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Of one dtype, and a number of layers. Errors are relative, in the mean over many tokens."""

    dtype: str  # of both models' weights
    factor: float
    isolated: dict[str, float]  # by site
    accumulated: dict[str, float]
    worst: float  # of the worst token, as a multiple of these
    step: float  # added to the isolated one of each token
    kl_mean: float  # KL(theirs ‖ ours) in nats, mean over tokens
    kl_max: float
    loss: float  # difference of the mean next-token losses, in nats
    margin: float  # two logits nearer than this may change places
    transcoder: float  # of pre-activations and reconstruction from the same inputs
    fvu: float  # difference of FVUs
    truth: float  # our error against float64, as a multiple of the reference's

    def limits(self, kind: str, site: str, tokens: int) -> tuple[float, float]:
        """(mean over ``tokens``, worst of them); ``kind`` is "isolated" or "accumulated"."""
        mean = getattr(self, kind)[site]
        step = 0.0 if kind == "accumulated" or site in STEPLESS else self.step
        return mean + step / tokens, self.worst * mean + step


@functools.cache
def tolerances(dtype: str, layers: int = DEPTH) -> Tolerances:
    """Of "float32" or "bfloat16", for a model of this many layers."""
    column = 0 if dtype == "float32" else 2
    deeper = max(1.0, layers / DEPTH)
    rows = {}
    for site in SITES:
        alike = [row for name, row in MEASURED.items() if BY_NAME[name].kind == site.kind]
        rows[site.name] = MEASURED.get(site.name) or [*map(max, zip(*alike, strict=True))]
    predictions = {
        name: (FACTOR * deeper) ** (2 if name.startswith("kl") else 1) * value
        for name, value in PREDICTIONS[dtype].items()
    }
    return Tolerances(
        dtype=dtype, factor=FACTOR, worst=WORST, step=STEP[dtype], **predictions,
        isolated={site: FACTOR * row[column] for site, row in rows.items()},
        accumulated={site: FACTOR * row[column + 1] * deeper for site, row in rows.items()},
        transcoder=FACTOR * TRANSCODER, truth=TRUTH[dtype],
    )  # fmt: skip
