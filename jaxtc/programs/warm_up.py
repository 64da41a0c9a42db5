"""``warm_up``: compile before the clock runs."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxtc.captures.request import understand
from jaxtc.errors import InputError
from jaxtc.helpers import explicit_transfers, is_whole, whole_number
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket
from jaxtc.programs.generate import generate
from jaxtc.programs.program import Compiles, compiles
from jaxtc.programs.run import run


@explicit_transfers
def warm_up(
    model: Gemma2,
    lengths: Iterable[int],
    *,
    batch: int = 1,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Compiles:
    """Compile the programs that calls with these options will need, so that none of them waits.

    Each padded length is run once on meaningless tokens, which compiles the small programs around
    the big one too. Other prompts, and edits of other values, then run at once; another batch size
    does not.

    Args:
        model: from :func:`jaxtc.load_model`.
        lengths: of prompts, in tokens; those padded to the same length share a program, but where
            a reducer of your own sees no padding (see :class:`jaxtc.reducers.Reducer`).
        batch: B.
        max_new_tokens: warms up :func:`jaxtc.generate` with it in place of :func:`jaxtc.run`.
        options: of :func:`jaxtc.run` or :func:`jaxtc.generate`: ``capture``, ``edits``, ...

    Returns:
        What was compiled; empty when everything was compiled before.

    Raises:
        InputError: no lengths, or more tokens than the model's context.
        JaxtcError: as the call itself; give edits that fit prompts of these lengths.
    """
    # The longest of each bucket: edits of the others may name positions that it has as well.
    longest, asked = {}, understand(options.get("capture", ()), model.config.num_hidden_layers)
    lengths = [lengths] if is_whole(lengths) else lengths
    for length in sorted({whole_number("A length", length, 1) for length in lengths}):
        slots = bucket(length + max_new_tokens) if max_new_tokens else 0
        longest[bucket(length), slots, length if asked.unpadded else 0] = length
    if not longest:
        raise InputError("Nothing to warm up: lengths is empty.")
    # A token of text: edits of transcoders leave special ones alone.
    special = model.config.special_ids
    text = next(i for i in range(model.config.vocab_size) if i not in special)
    with compiles() as found:
        for length in longest.values():
            tokens = np.full((batch, length), text, np.int32)
            if max_new_tokens is None:
                jax.block_until_ready(run(model, tokens, **options))
            else:
                generate(model, tokens, max_new_tokens, **{"stop": (), **options})
    return found
