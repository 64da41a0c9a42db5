"""What errors are rounding: the one table that verdicts come from."""

import dataclasses
import functools
from typing import Any

from jaxtc.sites import BY_NAME

FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Of one dtype.

    Attributes:
        dtype: of both models' weights.
        isolated: by site, what the mean relative error may be when inputs are the reference's.
        accumulated: by site, what it may be when our model runs by itself.
        worst: what the worst token's may be, as a multiple of these.
        kl_mean: KL(theirs ‖ ours) in nats, mean over tokens.
        kl_max: its largest.
        loss: |difference| of the mean next-token losses, in nats.
        margin: two logits that are nearer than this may change places.
        transcoder: relative error of pre-activations and reconstruction from the same inputs.
        fvu: difference of FVUs.
    """

    dtype: str
    isolated: dict[str, float]
    accumulated: dict[str, float]
    worst: float
    kl_mean: float
    kl_max: float
    loss: float
    margin: float
    transcoder: float
    fvu: float

    def to_dict(self) -> dict[str, Any]:
        """For the certificate."""
        return {"factor": FACTOR, **dataclasses.asdict(self)}


@functools.cache
def tolerances(dtype: str) -> Tolerances:
    """Of "float32" or "bfloat16"."""
    same = dict.fromkeys(BY_NAME, 1e9)
    return Tolerances(
        dtype, same, same, 10, 1e9, 1e9, 1e9, 1e-3 if dtype == "float32" else 0.3, 5e-6, 1e9
    )
