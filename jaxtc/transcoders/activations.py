"""Activation functions of transcoders, one class each.

A new activation is one class here and nothing else: the module, file formats, converted checkpoints
and feature edits read it. Axis letters: ... leading axes, M features (or a selection of them).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import JaxtcError, did_you_mean
from jaxtc.helpers import is_whole
from jaxtc.sharding.placement import Placement, top_k

__all__ = ["ACTIVATIONS", "Activation", "BatchTopK", "JumpReLU", "ReLU", "TopK", "activation_of"]


#: By name.
ACTIVATIONS: dict[str, type["Activation"]] = {}


@dataclass_transform(frozen_default=True)
@dataclasses.dataclass(frozen=True)
class Activation:
    """The declaration of an activation, never negative; hashable, so part of compile keys.

    Subclasses are frozen dataclasses too, and registered.

    Fields of a subclass are its settings: static, kept as JSON. Class attributes:
        name: what ``Transcoder(activation=name)`` calls it.
        parameters: logical axes of its arrays, attributes of the transcoder that start as zeros:
            ``("features",)``, (M,); or ``()``, one number for all features.
        files: the file formats that have it and how they spell each parameter. At most one
            activation of a format has a given set of parameters and settings, which identifies it
            in a file, unless a config beside the file names it.
        settings: how formats spell settings that they keep as arrays of one whole number.
        per_feature: whether a feature's activation depends on its own pre-activation only.
        as_threshold: {parameter: array} -> thresholds, (M,) or (), of the JumpReLU that computes
            the same, for formats that lack this activation; None where there is none.
    """

    name: ClassVar[str]
    parameters: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    files: ClassVar[Mapping[str, Mapping[str, str]]] = MappingProxyType({})
    settings: ClassVar[Mapping[str, Mapping[str, str]]] = MappingProxyType({})
    per_feature: ClassVar[bool] = True
    as_threshold: ClassVar[Callable[..., np.ndarray] | None] = None

    def __init_subclass__(cls):
        ACTIVATIONS[cls.name] = dataclasses.dataclass(frozen=True)(cls)

    def __call__(
        self, z: jax.Array, parameters: Mapping[str, jax.Array], placement: Placement | None
    ) -> jax.Array:
        """Activations (..., M), at least 0, of pre-activations ``z`` (..., M); NaN stays NaN.

        ``parameters`` are of the same features; ``placement`` is where those lie, if on a mesh.
        """
        raise NotImplementedError

    def check(self, features: int) -> None:
        """Raise JaxtcError for settings that do not fit M features."""

    def facts(self) -> dict[str, Any]:
        """Name and settings, as JSON; :func:`activation_of` takes them back."""
        return {"name": self.name, **dataclasses.asdict(self)}


class JumpReLU(Activation):
    """``z`` where ``z > threshold`` (strictly) and ``z > 0``, else 0 (arXiv 2407.14435)."""

    name = "jumprelu"
    parameters = MappingProxyType({"threshold": ("features",)})
    files = MappingProxyType({
        "gemma-scope": {"threshold": "threshold"},
        "circuit-tracer": {"threshold": "activation_function.threshold"},
        "gemma-scope-2": {"threshold": "threshold"},
        "saelens": {"threshold": "threshold"},
    })  # fmt: skip

    def __call__(self, z, parameters, placement):
        # Comparisons with NaN are false, so "off" rather than "on" keeps it.
        return jnp.where((z <= parameters["threshold"]) | (z <= 0), 0, z)


class ReLU(Activation):
    """``z`` where ``z > 0``, else 0."""

    name = "relu"
    files = MappingProxyType({"circuit-tracer": {}, "gemma-scope-2": {}, "saelens": {}})

    def __call__(self, z, parameters, placement):
        return jnp.where(z <= 0, 0, z)

    def as_threshold(self, parameters):
        return np.float32(0)


class TopK(Activation):
    """The k largest pre-activations of a token, those of them above 0; else 0 (arXiv 2406.04093).

    As SAELens and sparsify compute it; circuit-tracer alone keeps values below 0 where a token has
    fewer than k above it. Of equal pre-activations the one with the lower id comes first. NaN
    counts as largest.
    """

    k: int

    name = "topk"
    files = MappingProxyType({"circuit-tracer": {}, "saelens": {}, "sparsify": {}})
    settings = MappingProxyType({"circuit-tracer": {"k": "k"}})
    per_feature = False

    def __post_init__(self):
        if not is_whole(self.k, 1):
            raise JaxtcError(f"k is {self.k!r}, expected a whole number from 1.")
        object.__setattr__(self, "k", int(self.k))  # JSON has no integers of NumPy

    def __call__(self, z, parameters, placement):
        ids = _top_k(jax.lax.stop_gradient(z), self.k, placement, feature_axes(z.ndim))[1]
        kept = jnp.put_along_axis(jnp.zeros(z.shape, bool), ids, True, axis=-1, inplace=False)
        return jnp.where((kept & (z > 0)) | jnp.isnan(z), z, 0)

    def check(self, features):
        if self.k > features:
            raise JaxtcError(f"k is {self.k}, but the transcoder has {features} features.")


class BatchTopK(JumpReLU):
    """JumpReLU with one threshold for all features: BatchTopK at inference (arXiv 2412.06410).

    Training keeps the batch's k·B largest; the threshold is the mean, over batches, of the smallest
    one kept. Formats without it store a JumpReLU, as SAELens does.
    """

    name = "batchtopk"
    parameters = MappingProxyType({"threshold": ()})
    files = MappingProxyType({})

    def as_threshold(self, parameters):
        return parameters["threshold"]


# Sharded arrays outside a trace need a compiled program.
_top_k = jax.jit(top_k, static_argnums=(1, 2, 3))


def feature_axes(ndim: int) -> tuple[str, ...]:
    """Logical axes of (..., M)."""
    return ("batch", *["tokens"] * (ndim - 2), "features")[-ndim:]


def activation_of(given: "str | Activation | Mapping[str, Any]") -> Activation:
    """An activation from its name, from its :meth:`Activation.facts`, or itself.

    Raises:
        JaxtcError: no such activation, or settings that are not exactly its own.
    """
    if isinstance(given, Activation):
        return given
    facts = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = facts.pop("name", None)
    kind = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise JaxtcError(
            f"There is no activation {name!r}, only {', '.join(ACTIVATIONS)}."
            f"{did_you_mean(str(name), ACTIVATIONS)}"
        )
    settings = [field.name for field in dataclasses.fields(kind)]
    if sorted(map(str, facts)) != sorted(settings):
        raise JaxtcError(
            f"The activation {name!r} takes {', '.join(settings) or 'no settings'}, got "
            f"{', '.join(map(str, facts)) or 'none'}; give {kind.__name__}"
            f"({', '.join(f'{s}=...' for s in settings)}) of jaxtc.transcoders.activations."
        )
    return kind(**facts)


def parameter_names() -> list[str]:
    """Of all activations; a transcoder has each, None where its own activation lacks it."""
    return sorted({name for kind in ACTIVATIONS.values() for name in kind.parameters})


def keys_in(format: str) -> dict[str, str]:
    """How a file format spells the parameters of all its activations: parameter to key."""
    return {name: key for kind in _of(format) for name, key in kind.files[format].items()}


def optional_in(format: str) -> frozenset[str]:
    """The parameters of :func:`keys_in` that not every activation of the format has."""
    each = [frozenset(kind.parameters) for kind in _of(format)]
    return frozenset.union(*each) - frozenset.intersection(*each)


def settings_in(format: str) -> dict[str, str]:
    """How a file format spells the settings that it keeps as arrays: setting to key."""
    return {n: key for kind in _of(format) for n, key in kind.settings.get(format, {}).items()}


def activation_in(
    format: str, names: Collection[str], settings: Mapping[str, int]
) -> Activation | None:
    """The activation of this format that has exactly these parameters and settings, if any.

    Raises:
        JaxtcError: settings out of range.
    """
    for kind in _of(format):
        own = kind.settings.get(format, {})
        takes = {field.name for field in dataclasses.fields(kind)}
        if set(kind.parameters) == set(names) and set(own) == set(settings) == takes:
            return kind(**settings)
    return None


def _of(format: str) -> list[type[Activation]]:
    return [kind for kind in ACTIVATIONS.values() if format in kind.files]
