"""The transcoder: a wide sparse layer that imitates an MLP through interpretable features.

Variants: skip connections, other activations (:mod:`jaxtc.transcoders.activations`), and sparse
autoencoders, which imitate what they read. Axis
letters: ... leading axes (usually B T), D hidden (of what is read or of what is written), M
features, K of them asked for, C capacity of the sparse path.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtc.errors import JaxtcError
from jaxtc.helpers import explicit_transfers, is_whole, ranked
from jaxtc.interchange import owned, plain
from jaxtc.model.parameters import declare, he_uniform, zeros
from jaxtc.sharding.placement import Placement, mix_rows
from jaxtc.transcoders.activations import Activation
from jaxtc.transcoders.encoder import Encoder, SparseFeatures

_mix_rows = jax.jit(mix_rows, static_argnums=(3, 4))

# What each fact of a transcoder may be.
_FACTS = {
    **dict.fromkeys(("d_in", "features", "d_out"), lambda n: is_whole(n, 1) and n < 2**31),
    "activation": lambda given: isinstance(given, Mapping),
    **dict.fromkeys(("skip", "subtract_b_dec"), lambda given: isinstance(given, bool)),
    "layer": lambda n: n is None or is_whole(n),
    **dict.fromkeys(("input_site", "output_site", "source"), lambda s: isinstance(s, str)),
}


class Transcoder(Encoder):
    """``a = activation(x W_enc + b_enc)``, ``y = a W_dec + b_dec`` (arXiv 2408.05147, §2-3).

    With ``subtract_b_dec`` the encoder reads ``x - b_dec``, as most sparse autoencoders have been
    trained (arXiv 2406.04093, §2.1); Gemma Scope's, and transcoders, are not. With a skip
    connection, ``y = a W_dec + b_dec + x W_skipᵀ`` (arXiv 2501.18823), of ``x`` itself: calling the
    transcoder always includes it, and :meth:`decode` cannot leave it out by accident.

    A sparse autoencoder is a transcoder whose two sites are one; of attention (``attn_heads``) it
    reads the heads joined, D = N·H (:meth:`jaxtc.tap.sites.Site.join`).

    Attributes:
        W_enc: (D, M), b_enc: (M,), W_dec: (M, D), b_dec: (D,).
        activation: static; JumpReLU unless another is named, see
            :mod:`jaxtc.transcoders.activations`.
        threshold: (M,) of JumpReLU; None for an activation without one, as are the parameters of
            every other activation.
        W_skip: (D, D), [out, in], or None.
        subtract_b_dec: static; whether the decoder's bias is taken off the input. It stays a
            setting, rather than folded into ``b_enc``, so that what was read is written back to the
            last bit.
        layer: layer of the model it explains, or None when unknown.
        input_site: the site it reads; Gemma Scope's read x/rms *before* the norm's gain.
        output_site: the site it imitates.
        source: where it was loaded from, for messages and links.
    """

    def __init__(
        self,
        d_in: int,
        features: int,
        d_out: int | None = None,
        *,
        activation: str | Activation | Mapping[str, Any] = "jumprelu",
        skip: bool = False,
        subtract_b_dec: bool = False,
        layer: int | None = None,
        input_site: str = "mlp_in_normed",
        output_site: str = "mlp_out",
        source: str = "",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        d_out = d_in if d_out is None else d_out
        if subtract_b_dec and d_in != d_out:
            raise JaxtcError(
                f"subtract_b_dec takes b_dec, of D={d_out}, off what is read, of D={d_in}; only a "
                "dictionary that reads as many numbers as it writes can do that."
            )
        param = functools.partial(declare, rngs, dtype=dtype)
        self.W_enc = param((d_in, features), ("embed", "features"), he_uniform)
        self.b_enc = param((features,), ("features",), zeros)
        self.W_dec = param((features, d_out), ("features", "embed"), he_uniform)
        self.b_dec = param((d_out,), ("embed",), zeros)
        self._declare_activation(activation, features, param)
        self.W_skip = param((d_out, d_in), ("embed", "embed"), zeros) if skip else None
        self.subtract_b_dec = bool(subtract_b_dec)
        self._declare_place(layer, source, input_site, output_site)

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.W_dec.shape[1]

    @property
    def variant(self) -> str:
        """What it is in a few words: "transcoder" or "sae", "+skip", "+relu" or the like."""
        name = "sae" if self.input_site == self.output_site else "transcoder"
        name += "" if self.W_skip is None else "+skip"
        return name + ("" if self.activation.name == "jumprelu" else f"+{self.activation.name}")

    def facts(self) -> dict[str, Any]:
        """All but the arrays and their dtype, as JSON; :meth:`from_facts` takes them back."""
        found = {name: getattr(self, name, None) for name in _FACTS}
        found |= {"activation": self.activation.facts(), "skip": self.W_skip is not None}
        return found | {"layer": None if self.layer is None else int(self.layer)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], **options: Any) -> "Transcoder":
        """As :meth:`abstract`, from untrusted :meth:`facts`.

        Raises:
            JaxtcError: a fact that is missing, unknown or of another type.
        """
        if not isinstance(facts, Mapping):
            raise JaxtcError(f"The facts of a transcoder are a mapping, not {facts!r}.")
        facts = {"subtract_b_dec": False, **facts}  # as all had it before it was a fact
        wrong = [name for name, fits in _FACTS.items() if not fits(facts.get(name))]
        wrong += facts.keys() - _FACTS.keys()
        if wrong:
            given = ", ".join(f"{name}={facts.get(name)!r}" for name in wrong)
            raise JaxtcError(f"These are not the facts of a transcoder: {given}.")
        return cls.abstract(**facts, **options)

    @explicit_transfers
    def decoder_rows(self, ids: jax.Array) -> jax.Array:
        """``W_dec[ids]``: (K,) to (K, D), NaN for a feature that does not exist."""
        return self._pick(self.W_dec[...], ids, 0)

    @explicit_transfers
    def decode(self, a: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """``a W_dec + b_dec``, and the skip connection's part: (..., M) to (..., D).

        Only a skip connection looks at ``x`` (..., D), what the transcoder read.

        Raises:
            JaxtcError: this transcoder has a skip connection and ``x`` is missing.
        """
        y = jnp.matmul(owned(plain(a)), self.W_dec[...], precision="highest")
        return self._skipped(y + ranked(self.b_dec[...], y), x)

    @explicit_transfers
    def __call__(self, x: jax.Array, *, placement: Placement | None = None) -> jax.Array:
        """(..., D) to (..., D): the imitation of the MLP's output, skip connection included."""
        return self.decode(self.encode(x, placement=placement), x)

    @explicit_transfers
    def decode_sparse(self, features: SparseFeatures, x: jax.Array | None = None) -> jax.Array:
        """``decode`` from (values, ids): gathers the C decoder rows a token needs. To (..., D).

        Raises:
            JaxtcError: as :meth:`decode`.
        """
        features, here = owned(jax.tree.map(plain, features)), self._placement()
        mixed = _mix_rows(features.values, features.ids, self.W_dec[...], here, "features")
        return self._skipped(mixed + ranked(self.b_dec[...], mixed), x)

    def _encoded(self, x: jax.Array) -> jax.Array:
        x = self._input(x)
        return x - ranked(self.b_dec[...], x) if self.subtract_b_dec else x


def nameless(tree: Any) -> Any:
    """A pytree without its transcoders' layers and sources, which are part of compile keys.

    A layer of a cross-layer transcoder stays what it is: its shapes tell anyway.
    """

    def one(node: Any) -> Any:
        if isinstance(node, Encoder):
            node = jax.tree.map(lambda leaf: leaf, node)
            node.source = ""
            if isinstance(node, Transcoder):
                node.layer = None
        return node

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Encoder))
