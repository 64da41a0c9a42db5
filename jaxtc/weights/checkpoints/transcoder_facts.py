"""What a sidecar says of a transcoder beside its arrays, and the transcoder that it says it is."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.checkpoints.sidecar import Array


def describe(transcoder: Transcoder) -> dict[str, Any]:
    """The facts, as JSON."""
    names = ("input_site", "output_site", "source", "variant")
    return {name: getattr(transcoder, name) for name in names}


def declare(
    facts: Mapping[str, Any],
    arrays: Mapping[str, Array],
    layer: int,
    dtype: np.dtype | None,
    sites: Mapping[str, str | None],
) -> Transcoder | None:
    """A transcoder without its values.

    Args:
        facts: from :func:`describe`.
        arrays: its arrays, by the names of its parameters.
        layer: whose.
        dtype: of its parameters; by default the widest of those that are stored.
        sites: ``input_site`` and ``output_site``, where others are meant than the facts say.

    Returns:
        The transcoder; None when the arrays are not a transcoder's.
    """
    weights = [arrays.get(key) for key in ("W_enc", "W_dec")]
    if any(one is None or len(one.shape) != 2 for one in weights):
        return None
    (d_in, features), (_, d_out) = (one.shape for one in weights)
    if dtype is None:
        dtype = functools.reduce(jnp.promote_types, [one.dtype for one in arrays.values()])
    return Transcoder.abstract(
        d_in,
        features,
        d_out,
        dtype=dtype,
        relu="threshold" not in arrays,
        skip="W_skip" in arrays,
        layer=layer,
        input_site=sites.get("input_site") or facts["input_site"],
        output_site=sites.get("output_site") or facts["output_site"],
        source=facts["source"],
    )
