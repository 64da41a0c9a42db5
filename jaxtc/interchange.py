"""Arrays to and from PyTorch and NumPy, without a copy where the device allows.

jaxtc itself takes arrays of other libraries wherever it takes an array (:func:`plain` is that
door). torch is imported by :func:`to_torch` only.
"""

import dataclasses
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError, first_line
from jaxtc.helpers import explicit_transfers
from jaxtc.sharding.processes import whole

# What :func:`plain` mostly sees, and passes.
_COMMON = frozenset({int, float, bool, str, type(None), np.ndarray, np.int32, np.int64})


@explicit_transfers
def to_torch(tree: Any) -> Any:
    """The same structure with torch tensors in place of JAX and NumPy arrays.

    Shares memory through DLPack: on the CPU always, on a GPU where torch has CUDA; elsewhere, and
    for an array spread over devices, the tensor is a copy on the host. Dtypes stay, bfloat16 too.
    What shares memory with a JAX array must not be written to: JAX arrays are constant.
    Gradients do not cross.

    Args:
        tree: an array of any shape, or a pytree of them, such as ``result.activations`` (whose
            addresses and aliases work as before) or a whole
            :class:`jaxtc.programs.call.RunResult`. Other leaves stay as they are.

    Raises:
        InputError: torch is not installed; a traced array, a random key, or a dtype that torch
            lacks.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "to_torch needs PyTorch, which is not installed here: pip install 'jaxtc[parity]'. "
            "jaxtc.to_numpy gives NumPy arrays without it."
        ) from error

    def convert(x):
        if isinstance(x, np.ndarray):
            return _numpy_to_torch(x, torch)
        if not isinstance(x, jax.Array):
            return x
        _check_known(x, "torch")
        platforms = [device.platform for device in x.devices()]
        shared = ["cpu"], *([["gpu"], ["cuda"], ["rocm"]] if torch.cuda.is_available() else [])
        if platforms in shared:
            return torch.from_dlpack(x)
        return _numpy_to_torch(np.array(whole(x)), torch)

    return jax.tree.map(convert, tree)


@explicit_transfers
def to_numpy(tree: Any) -> Any:
    """The same structure with NumPy arrays in place of JAX arrays and torch tensors.

    Shares memory where the array lies on the host (views of JAX arrays are read-only). Dtypes stay;
    bfloat16 becomes ``ml_dtypes.bfloat16``, as in JAX. Other leaves stay as they are. Arrays spread
    over devices are gathered; if they span processes, all of those must call this.

    Args:
        tree: an array of any shape, or a pytree of them.

    Raises:
        InputError: a traced array, a random key, or a tensor that has no plain memory.
    """

    def convert(x):
        if isinstance(x, jax.Array):
            _check_known(x, "NumPy")
            return whole(x)
        return _on_host(x) if _foreign(x) else x

    return jax.tree.map(convert, tree)


@explicit_transfers
def from_foreign(tree: Any) -> Any:
    """The same structure with JAX arrays in place of torch tensors, NumPy and other DLPack arrays.

    Shares memory where the layout allows (compact, transposed ones too, and on the CPU aligned to
    64 bytes): then the other library must not write to it any more, not even after the call that
    uses it returned, as JAX computes in the background. Tensors that require gradients are
    detached. 64-bit numbers become 32-bit ones unless ``jax_enable_x64`` is set. What lies on
    another kind of device than JAX's is copied there.

    Not needed to hand arrays to jaxtc, which takes them as they are (and copies them).

    Args:
        tree: an array of any shape, or a pytree of them. Other leaves stay as they are.

    Raises:
        InputError: whole numbers that need 64 bits, or a tensor that has no plain memory.
    """

    def convert(x):
        return _to_jax(x) if isinstance(x, np.ndarray) or _foreign(x) else x

    return jax.tree.map(convert, tree)


def plain(given: Any) -> Any:
    """``given``, or as NumPy on the host where it is another library's array.

    Everything in jaxtc that takes an array begins with this. Lists and tuples are searched; NumPy
    and JAX arrays, traced ones and all else pass. Nothing is copied here: :func:`owned` does that
    where arrays are handed to JAX.

    Raises:
        InputError: a tensor that has no plain memory.
    """
    kind = type(given)
    if kind in _COMMON:
        return given
    if kind is list or kind is tuple:
        return given if _COMMON.issuperset(map(type, given)) else kind(map(plain, given))
    return _on_host(given) if _foreign(given) else given


def owned(tree: Any) -> Any:
    """``tree`` with each NumPy array copied, so that no caller can write to what JAX reads.

    On a CPU, JAX reads NumPy memory in place, or copies it in the background (jax issue #37830):
    what is overwritten after a call returned changes results still being computed. That includes
    ``jnp.asarray`` and ``jnp.array(x, copy=True)``, whose copy is a computation too.
    """
    if isinstance(tree, np.ndarray):
        return tree.copy()
    # A model's hundreds of arrays, without flattening them.
    if type(tree) is list and all(issubclass(kind, jax.Array) for kind in set(map(type, tree))):
        return tree
    leaves, structure = jax.tree.flatten(tree)
    if not any(issubclass(kind, np.ndarray) for kind in set(map(type, leaves))):
        return tree
    copies = [x.copy() if isinstance(x, np.ndarray) else x for x in leaves]
    return jax.tree.unflatten(structure, copies)


def plain_fields(instance: Any) -> None:
    """:func:`plain` for every field of a frozen dataclass; fit to be its ``__post_init__``."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        taken = plain(value)
        if taken is not value:
            object.__setattr__(instance, field.name, taken)


def stack(arrays: list) -> Any:
    """Arrays of one library, stacked in front by that library."""
    return _library(arrays[0]).stack(arrays)


def below(length: int, lengths: Any) -> Any:
    """(B, T) booleans, true before each of the (B,) lengths, in the library they come from."""
    options = {"device": lengths.device} if _is_tensor(lengths) else {}
    return _library(lengths).arange(length, **options)[None] < lengths[:, None]


def _is_tensor(x: Any) -> bool:
    # Of a torch that the user has imported.
    return isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ()))


def _library(x: Any) -> ModuleType:
    if _is_tensor(x):
        return sys.modules["torch"]
    return np if isinstance(x, np.ndarray) else jnp


def _foreign(x: Any) -> bool:
    """Whether this is an array that is neither JAX's nor NumPy's."""
    return hasattr(type(x), "__dlpack__") and not isinstance(x, jax.Array | np.ndarray | np.generic)


def _check_known(x: jax.Array, library: str) -> None:
    if isinstance(x, jax.core.Tracer):
        raise InputError(
            f"Inside jit, vmap or grad an array has no values that {library} could see: convert "
            "what the transformed function returns."
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise InputError(
            f"{library} has no random keys: give jax.random.key_data(key), an array of numbers."
        )


def _numpy_to_torch(x: np.ndarray, torch: ModuleType) -> Any:
    # torch takes neither what is read-only nor strides that go backwards.
    if not x.flags.writeable or any(stride < 0 for stride in x.strides):
        x = x.copy()
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(x)
    except TypeError as error:
        raise InputError(f"torch has no dtype for {x.dtype}{list(x.shape)}.") from error


def _on_host(x: Any) -> np.ndarray:
    """Another library's array as NumPy, sharing memory where that is on the host."""
    if _is_tensor(x):
        torch = _library(x)
        try:
            if x.dtype == torch.bfloat16:
                bits = x.detach().resolve_neg().view(torch.int16)
                return bits.numpy(force=True).view(jnp.bfloat16)
            return x.numpy(force=True)
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"NumPy cannot read this tensor of {x.dtype} and shape {tuple(x.shape)} "
                f"({first_line(error)}). Give one of real data in plain memory, tensor.to_dense(), "
                "of a dtype that NumPy has or of torch.bfloat16."
            ) from error
    try:
        return np.from_dlpack(x)
    except (TypeError, ValueError, RuntimeError, BufferError):
        # Another device, or a dtype of which NumPy knows nothing.
        return np.asarray(jnp.from_dlpack(x))


def _to_jax(x: Any) -> jax.Array:
    """An array of NumPy or another library as JAX's, sharing memory where possible."""
    host = x if isinstance(x, np.ndarray) else None
    if _is_tensor(x):
        x = x.detach().resolve_conj().resolve_neg()  # bits that DLPack does not carry
        host = _on_host(x) if x.device.type == "cpu" else None
    if host is not None and host.dtype.kind in "iu" and host.dtype.itemsize > 4:
        kept = np.iinfo(jax.dtypes.canonicalize_dtype(host.dtype))
        if host.size and not (kept.min <= host.min() and host.max() <= kept.max):
            raise InputError(
                f"Whole numbers from {host.min()} to {host.max()} do not fit JAX's {kept.dtype}; "
                "set jax.config.update('jax_enable_x64', True) first to keep all 64 bits."
            )
    try:
        made = jnp.from_dlpack(x)
    except (TypeError, ValueError, RuntimeError, BufferError):
        return jnp.asarray(np.ascontiguousarray(_on_host(x) if host is None else host))
    if next(iter(made.devices())).platform == jax.devices()[0].platform:
        return made
    return jnp.asarray(np.asarray(made))
