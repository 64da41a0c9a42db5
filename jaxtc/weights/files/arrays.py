"""Host arrays and dtypes of weights: allocated, cast, checked, handed to jax."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import WeightsError

# What XLA's CPU client needs to use a host array in place.
_ALIGNMENT = 64

# How much of an array is in memory besides it while it is read, cast or checked.
CHUNK_BYTES = 8 << 20

#: What is said, after its name, of an array with other values than numbers.
NOT_FINITE = "holds NaN or infinity"

_BF16 = np.dtype(jnp.bfloat16)


def check_dtype(dtype: jnp.dtype | str) -> np.dtype:
    """``dtype`` as numpy's. Raises WeightsError unless it is a float dtype that jax has enabled."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise WeightsError(
            "dtype float64 needs jax's 64-bit mode: set JAX_ENABLE_X64=1 before starting."
        )
    if found not in (_BF16, np.float16, np.float32, np.float64):
        raise WeightsError(
            f"Weights cannot be loaded as {dtype!r}; choose 'float32', 'bfloat16', 'float16' or "
            "'float64'."
        )
    return found


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that jax can take over on the CPU without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def cast(source: np.ndarray, out: np.ndarray) -> None:
    """Copy ``source`` into ``out`` of the same shape, whatever their dtypes."""
    if source.dtype == _BF16 and out.dtype == np.float32:
        # A bfloat16 is the upper half of a float32; shifting is many times faster than a cast.
        np.left_shift(source.view(np.uint16), np.uint32(16), out=out.view(np.uint32))
        return
    with np.errstate(over="ignore", invalid="ignore"):  # both are reported by name later
        np.copyto(out, source, casting="unsafe")


def converted(stored: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, str]:
    """(``stored`` in ``dtype``, in memory of its own; what is wrong with its values, after the name
    of what holds them, or an empty string)."""
    made = empty(stored.shape, dtype)
    cast(stored, made)
    return made, problem_of(made, stored)


def problem_of(made: np.ndarray, stored: np.ndarray) -> str:
    """What is wrong with values that were cast from ``stored``, or an empty string."""
    if all_finite(made):
        return ""
    return f"holds values too large for {made.dtype.name}" if all_finite(stored) else NOT_FINITE


def all_finite(x: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity in it."""
    if x.nbytes > CHUNK_BYTES and len(x) > 1:  # the test takes memory of its own
        step = max(1, CHUNK_BYTES * len(x) // x.nbytes)
        return all(all_finite(x[start : start + step]) for start in range(0, len(x), step))
    if x.dtype == _BF16:
        return not ((x.view(np.uint16) & np.uint16(0x7F80)) == 0x7F80).any()
    return bool(np.isfinite(x).all())


def to_jax(array: np.ndarray) -> jax.Array:
    """``array`` on the default device; on the CPU in place, so it must not be written again."""
    # Waiting keeps one host copy at a time where the device has memory of its own.
    return jax.device_put(array).block_until_ready()
