"""Multi-process runs (``jax.distributed``): failing together, gathering arrays."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxtc.errors import JaxtcError, SourceError


class OtherProcessError(JaxtcError):
    """What this process did was fine, but another one failed."""


@contextlib.contextmanager
def agreed(mesh: Mesh | None, what: str) -> Iterator[None]:
    """All processes complete this block, or all of them raise.

    A process that raised alone would leave the others waiting for it, in their next computation.

    Args:
        mesh: None, or one within this process, makes this a no-op.
        what: is done here, for messages: "load the model".

    Raises:
        OtherProcessError: the block failed in other processes, and not in this one.
    """
    if mesh is None or len({device.process_index for device in mesh.devices.flat}) == 1:
        yield
        return
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    failures = multihost_utils.process_allgather(np.int32(failed is not None))
    if failed is not None:
        raise failed
    if failures.any():
        where = ", ".join(map(str, np.flatnonzero(failures)))
        raise OtherProcessError(
            f"Process {where} of {jax.process_count()} could not {what}; its own error says why. "
            "Nothing is wrong with the part of this process."
        )


def check_here(tree: Any, what: str) -> None:
    """Raise SourceError for arrays of which this process has only a part."""
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree)):
        raise SourceError(
            f"This {what} is spread over {jax.process_count()} processes, and a file of this "
            "format is written by one. All processes can call jaxtc.save_checkpoint, which writes "
            "a folder that jaxtc loads anywhere, and `jaxtc convert` turns into this format."
        )


def whole(x: jax.Array | np.ndarray) -> np.ndarray:
    """``x`` on the host; if it lies on several processes, all of them must call this."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
