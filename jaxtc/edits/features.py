"""Edits through a transcoder: put it in place of the MLP, or turn its features up and down.

Axis letters: B batch, T tokens, D hidden, M features, K features edited.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.edits import cross_layer
from jaxtc.edits.base import TARGETS, Edit, Index, own_shape, register_edit
from jaxtc.errors import EditError, some
from jaxtc.helpers import is_whole, plain_number
from jaxtc.tap.context import Context, own
from jaxtc.tap.positions import is_traced
from jaxtc.tap.sites import BY_NAME, parse
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder
from jaxtc.transcoders.encoder import Encoder
from jaxtc.transcoders.transcoder import Transcoder


@dataclasses.dataclass(frozen=True, eq=False)
class TranscoderEdit(Edit):
    """What edits with a transcoder share: they read its input site and write its output site.

    Attributes:
        transcoder: a :class:`jaxtc.Transcoder`; its arrays are leaves of this edit. Or a
            cross-layer one, see each edit.
        layer: defaults to the layer the transcoder was trained on.
        site: defaults to the transcoder's output site (static).
        reads: defaults to the transcoder's input site, as a tuple of one (static).
        special_tokens: whether it applies to ``<bos>``, ``<eos>`` and padding too, which
            transcoders were not trained on; ``result.left_out`` tells which tokens those are
            (static).
    """

    transcoder: Any
    reads: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    special_tokens: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.special_tokens, bool):
            raise EditError(
                f"{type(self).__name__}: special_tokens is {self.special_tokens!r}, expected True "
                "or False."
            )
        if isinstance(self.transcoder, Mapping):
            by_layer = {plain_number(layer): one for layer, one in self.transcoder.items()}
            wrong = [layer for layer in by_layer if not is_whole(layer, -math.inf)]
            if wrong:
                raise EditError(
                    f"{type(self).__name__} was given a mapping with the key {wrong[0]!r}; keys "
                    "are layers, whole numbers from 0: {20: transcoder}."
                )
            object.__setattr__(self, "transcoder", {int(k): one for k, one in by_layer.items()})
        given = self._transcoders(required=not self.site)
        if given:
            first = next(iter(given.values()))
            object.__setattr__(self, "site", self.site or first.output_site)
            reads = (self.reads,) if isinstance(self.reads, str) else self.reads
            reads = tuple(parse(name)[0] for name in reads or (first.input_site,))
            object.__setattr__(self, "reads", reads)
        super().__post_init__()
        single = given.get(None)
        if single is not None and self.layer is None and BY_NAME[self.site].per_layer:
            if isinstance(single, CrossLayerTranscoder):
                return
            if single.layer is None:
                raise EditError(
                    f"{type(self).__name__} needs a layer: this transcoder was loaded from a path "
                    "that names none; give layer=..."
                )
            object.__setattr__(self, "layer", single.layer)

    def _transcoders(self, required: bool = True) -> dict[int | None, Transcoder]:
        """By layer; a single one, for any layer, under None; none inside a flattened pytree."""
        given = self.transcoder
        held = given if isinstance(given, dict) else {None: given}
        if cross_layer.is_cross_layer(given):
            return held
        if held and all(isinstance(one, Transcoder) for one in held.values()):
            return held
        if required:
            cross_layer.check_apart(held.values())
            what = type(given).__name__
            if isinstance(given, dict):
                kinds = {type(one).__name__ for one in given.values()} - {"Transcoder"}
                what = f"a mapping to {some(sorted(kinds))}" if given else "an empty mapping"
            raise EditError(
                f"{type(self).__name__} was given {what}, expected a jaxtc.Transcoder (or, for "
                "Splice, a mapping of layers to them)."
            )
        return {}

    @property
    def layers(self) -> tuple[int, ...] | None:
        return tuple(self.transcoder) if isinstance(self.transcoder, dict) else None

    @property
    def carries(self) -> bool:
        return cross_layer.is_cross_layer(self.transcoder)

    def check(self, sizes):
        if self.carries:
            cross_layer.check_model(self, sizes["L"])
        for layer, transcoder in self._transcoders().items():
            if layer is not None and not (is_whole(layer) and layer < sizes["L"]):
                raise EditError(
                    f"{self} names a transcoder for layer {layer!r}; this model has layers 0 to "
                    f"{sizes['L'] - 1}."
                )
            sites = {transcoder.input_site, transcoder.output_site}
            if layer is not None and not sites <= {self.site, *self.reads}:
                raise EditError(f"{self}: layer {layer}'s transcoder has other sites, {sites}.")
            widths = [BY_NAME[name].width(sizes) for name in (self.reads[0], self.site)]
            if [transcoder.d_in, transcoder.d_out] != widths:
                read, written = (width or "no vector for each token" for width in widths)
                raise EditError(
                    f"{self}: the transcoder reads D={transcoder.d_in} and writes "
                    f"D={transcoder.d_out}, but this model has {read} at {self.reads[0]} and "
                    f"{written} at {self.site}. It belongs to another model or another site."
                )

    def _here(self, context: Context) -> Transcoder:
        return self.transcoder if self.layers is None else self.transcoder[context.layer]

    def _read(self, context: Context) -> jax.Array:
        """(B, T, D) what the transcoder reads; of a site with heads, all of them in one axis."""
        return BY_NAME[self.reads[0]].join(jnp.asarray(context.read(self.reads[0])))


@register_edit("reads", "error")
class Splice(TranscoderEdit):
    """Put a transcoder in place of the MLP: what is lost when only its features speak?

    A sparse autoencoder, which reads the site that it writes, takes the place of that site's value.
    A transcoder's skip connection is part of its output.

    Where a transcoder replaces every token the MLP itself is not computed: with
    ``special_tokens=True``, and in batches and generation steps without a special token.
    ``Splice({layer: transcoder})`` replaces several layers at once, each by its own; with
    ``layer=`` only those named, as data: a sweep over layers is one compiled program. Feature edits
    that follow in the list act on the spliced transcoder's features.

    A :class:`jaxtc.CrossLayerTranscoder` takes the place of every MLP: at each layer the sum of
    what the features of that and all earlier layers write, each layer read in this same, spliced
    pass. With ``layer=`` the MLPs of those layers only.

    Attributes:
        transcoder: one, a mapping of layers to them (the layers of a mapping are static), or a
            cross-layer one.
        layer: defaults to the transcoder's own; to all layers of a mapping or a cross-layer one.
        error: add back what the transcoder misses, detached: the value stays the MLP's, but
            gradients flow through the features only (Marks et al. 2024, arXiv 2403.19647, §3).
    """

    error: bool = dataclasses.field(default=False, kw_only=True)
    costly = True

    def __post_init__(self):
        super().__post_init__()
        cross_layer.check_splice(self)

    @property
    def replaces(self) -> bool:
        if self.error or self.site in self.reads:
            return False
        return all(getattr(self, name) is None for name in TARGETS.keys() - {"layer"})

    def carry(self, context: Context) -> jax.Array:
        features = self.transcoder.layers[context.layer]
        return features.encode(self._read(context), placement=context.placement)

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        read = self._read(context)
        if self.carries:
            made = cross_layer.reconstruction(self, read, context)
        else:
            made = self._here(context)(read, placement=context.placement)
        made = made.reshape(x.shape).astype(x.dtype)
        if self.error:
            # Zero is added, so that the value is the MLP's to the last bit.
            return jax.lax.stop_gradient(x) + (made - jax.lax.stop_gradient(made))
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureEdit(TranscoderEdit):
    """Changes some features' activations: adds (a′ − a) · W_dec[feature] to the output site.

    A skip connection does not depend on the features, so it is not part of what is added.

    Alone it moves the MLP's own output; after ``Splice(transcoder)`` in the list of edits the sum
    is exactly the decoding of the changed features.

    Of a :class:`jaxtc.CrossLayerTranscoder` the features of ``layer`` change (data, as ever), and
    with them all that they write: at that layer and at every later one, at the same tokens.

    Attributes:
        feature: a feature's id or several, (K,).
    """

    feature: Any
    targets = TARGETS | {"feature": Index("M", back=False, distinct=True)}

    @property
    def onward(self) -> bool:
        return self.carries

    @property
    def sizes(self) -> dict[str, int]:
        held = self._transcoders()
        if held.keys() - {None}:
            raise EditError(f"{self} takes one transcoder; give an edit for each layer.")
        return {"M": held[None].features}

    def check(self, sizes):
        super().check(sizes)
        if self.carries:
            cross_layer.check_features(self)
        for name in self.amounts:
            value = getattr(self, name)
            shape = () if value is None else own_shape(self, value, sizes["L"])
            if shape not in ((), (1,), np.shape(self.feature)):
                raise EditError(
                    f"{self}: {name} of shape {shape} is neither one number nor one for each "
                    f"feature, {np.shape(self.feature)}."
                )

    def changed(self, a: jax.Array, *amounts: jax.Array | None) -> jax.Array:
        """(B, T, K) activations to new ones; the edit's :attr:`amounts` are spread likewise."""
        raise NotImplementedError

    def _change(self, made: Encoder, context: Context) -> jax.Array:
        """(B, T, K) by how much the features' activations change; NaN for one that is not there."""

        def spread(amount):
            amount = jnp.asarray(own(amount, context.layer)).astype(a.dtype)
            return jnp.broadcast_to(amount, a.shape)

        a = made.encode_features(self._read(context), self._ids, placement=context.placement)
        given = (getattr(self, name) for name in self.amounts)
        amounts = (None if amount is None else spread(amount) for amount in given)
        return self.changed(a, *amounts) - a

    @property
    def _ids(self) -> jax.Array:
        """(K,)."""
        return jnp.atleast_1d(jnp.asarray(self.feature))

    def carry(self, context: Context) -> jax.Array | None:
        return cross_layer.change_here(self, self._change, context)

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        if self.carries:
            delta = cross_layer.written(self, self._ids, x, context)
        else:
            made = self._here(context)
            rows = made.decoder_rows(self._ids)
            delta = jnp.matmul(self._change(made, context), rows, precision="highest")
        return (x.astype(jnp.float32) + delta.reshape(x.shape)).astype(x.dtype)


@register_edit("reads")
class SetFeature(FeatureEdit):
    """Set features to an activation: steer with something that has a name.

    Attributes:
        value: the activation, or one for each feature (K,).
    """

    value: Any
    amounts = ("value",)

    def changed(self, a, value):
        return value


@register_edit("reads")
class ScaleFeature(FeatureEdit):
    """Multiply features' activations: 0 ablates them, and nothing happens where they are inactive.

    Attributes:
        factor: a number, or one for each feature (K,).
    """

    factor: Any
    amounts = ("factor",)

    def changed(self, a, factor):
        return a * factor


@register_edit("reads")
class ClampFeature(FeatureEdit):
    """Keep features' activations within bounds.

    Attributes:
        low: lower bound, or one for each feature (K,); none by default.
        high: upper bound, likewise.
    """

    low: Any = None
    high: Any = None
    amounts = ("low", "high")

    def check(self, sizes):
        super().check(sizes)
        if self.low is None and self.high is None:
            raise EditError(f"{self} has no bound: give low, high or both.")
        if self.low is None or self.high is None or is_traced((self.low, self.high)):
            return
        low, high = (np.asarray(getattr(v, "array", v)) for v in (self.low, self.high))
        if (low > high).any():
            raise EditError(f"{self}: low {self.low} is above high {self.high}.")

    def changed(self, a, low, high):
        low, high = -jnp.inf if low is None else low, jnp.inf if high is None else high
        # Bounds that were traced may be the wrong way round.
        return jnp.where(low > high, jnp.nan, jnp.clip(a, low, high))
