"""Cross-layer transcoders: one encoder a layer, whose features write at that and all later layers.

Axis letters: L layers of the model, ... leading axes (usually B T), D hidden (of what is read or of
what is written), M features of a layer, K of them asked for, W layers that features write at.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtc.errors import JaxtcError
from jaxtc.helpers import explicit_transfers, ranked
from jaxtc.interchange import owned, plain
from jaxtc.model.parameters import declare, he_uniform, zeros
from jaxtc.transcoders.activations import Activation
from jaxtc.transcoders.encoder import Encoder


class LayerFeatures(Encoder):
    """The features of one layer of a cross-layer transcoder, and all that they write.

    They are a part of the reconstruction at their own layer and at every later one; none of those
    is made of them alone, so this cannot take an MLP's place. Feature edits, and the reducer
    ``Features``, take it as it is.

    Attributes:
        W_enc, b_enc, activation, threshold: as of :class:`jaxtc.transcoders.encoder.Encoder`.
        W_dec: (M, W, D), W = L − layer: ``W_dec[:, n]`` are the rows that write at ``layer + n``.
        b_dec: (D,) and W_skip: (D, D), [out, in], or None. They belong to the reconstruction *at*
            this layer, whichever layers' features it is made of.
        layer: which, counted from 0 (static).
        input_site, output_site: what is read at this layer; where it is written at each.
        source: where it was loaded from, for messages.
    """

    def __init__(
        self,
        layer: int,
        layers: int,
        d_in: int,
        features: int,
        d_out: int | None = None,
        *,
        activation: str | Activation | Mapping[str, Any] = "jumprelu",
        skip: bool = False,
        input_site: str = "resid_mid",
        output_site: str = "mlp_out",
        source: str = "",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        d_out = d_in if d_out is None else d_out
        param = functools.partial(declare, rngs, dtype=dtype)
        self.W_enc = param((d_in, features), ("embed", "features"), he_uniform)
        self.b_enc = param((features,), ("features",), zeros)
        shape, axes = (features, layers - layer, d_out), ("features", "layers", "embed")
        self.W_dec = param(shape, axes, he_uniform)
        self.b_dec = param((d_out,), ("embed",), zeros)
        self._declare_activation(activation, features, param)
        self.W_skip = param((d_out, d_in), ("embed", "embed"), zeros) if skip else None
        self._declare_place(layer, source, input_site, output_site)

    @property
    def d_out(self) -> int:
        """Width of what they write."""
        return self.W_dec.shape[2]

    @property
    def writes(self) -> range:
        """The layers at which they write."""
        return range(self.layer, self.layer + self.W_dec.shape[1])

    @explicit_transfers
    def decoder_rows(self, ids: jax.Array, layer: int | None = None) -> jax.Array:
        """``W_dec[ids]``: (K,) to (K, W, D), or to (K, D) at one of :attr:`writes`.

        NaN for a feature that does not exist.

        Raises:
            JaxtcError: these features do not write at ``layer``.
        """
        if layer is None:
            return self._pick(self.W_dec[...], ids, 0)
        return self._pick(self._rows(layer), ids, 0)

    @explicit_transfers
    def write(self, a: jax.Array, layer: int) -> jax.Array:
        """``a W_dec[:, layer − self.layer]``, their part at a layer: (..., M) to (..., D).

        Raises:
            JaxtcError: these features do not write at ``layer``.
        """
        return jnp.matmul(owned(plain(a)), self._rows(layer), precision="highest")

    @explicit_transfers
    def write_all(self, a: jax.Array) -> jax.Array:
        """Their part at each layer of :attr:`writes`: (..., M) to (W, ..., D)."""
        a = owned(plain(a))
        written = jnp.einsum("...m,mwd->...wd", a, self.W_dec[...], precision="highest")
        return jnp.moveaxis(written, -2, 0)

    def _rows(self, layer: int) -> jax.Array:
        """(M, D)."""
        if layer not in self.writes:
            raise JaxtcError(
                f"Features of layer {self.layer} write at layers {self.layer} to "
                f"{self.writes[-1]}, not at layer {layer}."
            )
        return self.W_dec[:, layer - self.layer]

    @explicit_transfers
    def finish(self, y: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """The reconstruction at this layer, of the sum ``y`` (..., D) that all features write here.

        Adds ``b_dec`` and, with a skip connection, ``x W_skipᵀ`` of ``x`` (..., D), what is read at
        this layer.

        Raises:
            JaxtcError: there is a skip connection and ``x`` is missing.
        """
        return self._skipped(y + ranked(self.b_dec[...], y), x)


class CrossLayerTranscoder(nnx.Module):
    """``a_l = activation(x_l W_enc_l + b_enc_l)``; ``y_m = Σ_{l ≤ m} a_l W_dec_l[m] + b_dec_m``.

    x_l is what layer l reads and y_m the imitation of layer m's MLP (Ameisen et al. 2025,
    "Circuit Tracing: Revealing Computational Graphs in Language Models", §2); with skip connections
    y_m has ``x_m W_skip_mᵀ`` besides. A feature bridges layers, so paths between features are
    shorter than through one transcoder for each layer; such dictionaries may also turn several
    steps of a model into one of their own.

    Attributes:
        layers: the :class:`LayerFeatures` of each layer of the model, in order.
    """

    def __init__(
        self,
        layers: int,
        d_in: int,
        features: int,
        d_out: int | None = None,
        **options: Any,
    ):
        """Of a model of so many layers; ``options`` are those of :class:`LayerFeatures`."""
        self.layers = nnx.List(
            [LayerFeatures(n, layers, d_in, features, d_out, **options) for n in range(layers)]
        )

    # No layer of its own: what takes one transcoder asks.
    layer = None

    @property
    def d_in(self) -> int:
        """Width of what it reads at each layer."""
        return self.layers[0].d_in

    @property
    def d_out(self) -> int:
        """Width of what it writes at each layer."""
        return self.layers[0].d_out

    @property
    def features(self) -> int:
        """M, how many features each layer has."""
        return self.layers[0].features

    @property
    def input_site(self) -> str:
        """The site that it reads at each layer."""
        return self.layers[0].input_site

    @property
    def output_site(self) -> str:
        """The site that it imitates at each layer."""
        return self.layers[0].output_site

    @property
    def source(self) -> str:
        """Where it was loaded from, for messages."""
        return self.layers[0].source

    @explicit_transfers
    def encode(self, x: Sequence[jax.Array] | jax.Array) -> jax.Array:
        """Activations of each layer's features: (L, ..., D), what each reads, to (L, ..., M).

        Raises:
            JaxtcError: another number of layers, or the last axis is not D.
        """
        self._check_layers(x, "reads")
        return jnp.stack([one.encode(part) for one, part in zip(self.layers, x, strict=True)])

    @explicit_transfers
    def decode_at(
        self, layer: int, a: Sequence[jax.Array] | jax.Array, x: jax.Array | None = None
    ) -> jax.Array:
        """The reconstruction at one layer, (..., D).

        Args:
            layer: m, counted from 0.
            a: (m + 1 or more, ..., M), activations of the layers from 0 on; later ones do not
                write here.
            x: (..., D), what is read at that layer; only skip connections look at it.

        Raises:
            JaxtcError: no such layer, activations of fewer layers, or ``x`` is missing.
        """
        if not 0 <= layer < len(self.layers) or len(a) <= layer:
            raise JaxtcError(
                f"The reconstruction at layer {layer} is made of the features of layers 0 to "
                f"{layer}; got activations of {len(a)} layers, of {len(self.layers)} in all."
            )
        parts = [self.layers[n].write(a[n], layer) for n in range(layer + 1)]
        return self.layers[layer].finish(sum(parts[1:], parts[0]), x)

    @explicit_transfers
    def decode(
        self, a: Sequence[jax.Array] | jax.Array, x: Sequence[jax.Array] | jax.Array | None = None
    ) -> jax.Array:
        """:meth:`decode_at` every layer: (L, ..., M), and (L, ..., D) read, to (L, ..., D)."""
        self._check_layers(a, "has features of")
        read = [None] * len(self.layers) if x is None else x
        return jnp.stack([self.decode_at(n, a, read[n]) for n in range(len(self.layers))])

    @explicit_transfers
    def __call__(self, x: Sequence[jax.Array] | jax.Array) -> jax.Array:
        """(L, ..., D), what each layer reads, to (L, ..., D), the imitation of each MLP's output.

        ``x`` is that of one run; in ``Splice`` every layer reads what the spliced run has there.
        """
        return self.decode(self.encode(x), x)

    def _check_layers(self, given: Any, what: str) -> None:
        if len(given) != len(self.layers):
            raise JaxtcError(
                f"This cross-layer transcoder {what} {len(self.layers)} layers, got arrays of "
                f"{len(given)}: the first axis is the layers, in order."
            )

    @classmethod
    def abstract(cls, *args: Any, **kwargs: Any) -> Self:
        """The same with shapes in place of arrays; nothing is allocated."""
        return nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0), **kwargs))


# What edits take beside :class:`jaxtc.Transcoder`.
CROSS_LAYER = (CrossLayerTranscoder, LayerFeatures)


def at_layer(given: CrossLayerTranscoder | LayerFeatures, layer: int) -> LayerFeatures | None:
    """The features of a layer, None where there are none."""
    if isinstance(given, CrossLayerTranscoder):
        return given.layers[layer]
    return given if given.layer == layer else None
