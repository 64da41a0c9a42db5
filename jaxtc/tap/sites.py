"""The table of sites: every place of the forward pass that can be read or edited, by name.

The model, captures, edits, validation, error messages, ``jaxtc sites`` and the parity tests all
read this one table. Axis letters: B batch, T query position, S key position, D hidden, N query
heads, K key/value heads, H head dim, F MLP width, V vocabulary.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from jaxtc.errors import SiteError, did_you_mean
from jaxtc.tap.not_sites import NOT_SITES


@dataclasses.dataclass(frozen=True)
class Site:
    """One row of the table.

    Attributes:
        name: our name.
        axes: the axis letters of its array, separated by spaces.
        meaning: one line.
        per_layer: whether each layer has one, or the model has one.
        float32: whether its array is float32 whatever the weights' dtype is.
        hf: module of ``transformers`` (below the layer, when ``per_layer``) and which of its ends
            holds this value: ``.input``, ``.output`` or ``.output.1``; empty when none does.
        tl: TransformerLens hook (below ``blocks.l``, when ``per_layer``); empty when none.
        differs: why the hook, though it stands for this place, holds another number.
        also: other names for it there, separated by spaces: ends of other modules of
            ``transformers``, hooks of TransformerLens' bridge.
        read: names of the same number as *one* of its readers sees it (a norm, one projection). In
            their library an edit there reaches that reader only, so they are taken for captures,
            and refused for edits.
        last: names of the last layer's.
    """

    name: str
    axes: str
    meaning: str
    per_layer: bool = True
    float32: bool = False
    hf: str = ""
    tl: str = ""
    differs: str = ""
    also: str = ""
    read: str = ""
    last: str = ""

    @property
    def letters(self) -> tuple[str, ...]:
        """The axis letters one by one."""
        return tuple(self.axes.split())

    @property
    def kind(self) -> str:
        """ "pairs" (a number for each query and key), "scale" (1/rms of a norm) or "vector"."""
        return {"S": "pairs", "1": "scale"}.get(self.letters[-1], "vector")

    @property
    def sequence_axis(self) -> int:
        """The axis over tokens, which an edit's ``position`` selects from."""
        return self.letters.index("T" if "T" in self.letters else "S")

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axis letters of one token's value; empty where values belong to pairs of tokens."""
        _, first, *rest = self.letters
        return tuple(rest) if first in "TS" else ()

    def width(self, sizes: Mapping[str, int]) -> int | None:
        """How many numbers a token has here, None where values belong to pairs of tokens."""
        letters = self.token_axes
        return math.prod(sizes.get(letter, 1) for letter in letters) if letters else None

    def shape(self, sizes: Mapping[str, int | str]) -> tuple[int | str, ...]:
        """The shape of its array; letters that ``sizes`` lacks stay letters.

        ``sizes`` are :attr:`jaxtc.Gemma2Config.sizes`, with B, T and S.
        """
        return tuple(1 if letter == "1" else sizes.get(letter, letter) for letter in self.letters)

    def join(self, x: Any) -> Any:
        """A token's numbers in one axis: (..., N, H) to (..., N·H), the heads one after the other.

        What a sparse autoencoder of attention reads. Sites with one axis a token stay as they are.
        """
        if len(self.token_axes) < 2:
            return x
        return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

    @property
    def unlike(self) -> dict[str, str]:
        """Foreign names that hold another number, and why; shown, but refused as aliases."""
        inverse = "TransformerLens keeps the rms itself there, jaxtc keeps 1/rms"
        why = inverse if self.kind == "scale" else self.differs
        return {self.tl: why} if why else {}

    def aliases(self, layer: int | str = "l") -> dict[str, str]:
        """The full names of this site in other libraries, ``{library: name}``, refused ones too."""
        names = {}
        if self.hf:
            module = ".".join(filter(None, [f"layers.{layer}" if self.per_layer else "", self.hf]))
            # lm_head is the one module that does not live under `model.`.
            names["hf"] = module if module.startswith("lm_head") else "model." + module
        if self.tl:
            names["tl"] = f"blocks.{layer}.{self.tl}" if self.per_layer else self.tl
        return names


# In the order in which the forward pass computes them.
SITES: tuple[Site, ...] = (
    Site("embed", "B T D", "token embedding times sqrt(D)", per_layer=False,
         hf="embed_tokens.output", tl="hook_embed", also="embed.hook_out"),
    Site("resid_pre", "B T D", "residual stream entering the block",
         hf="input", tl="hook_resid_pre",
         also="hook_in", read="input_layernorm.input ln1.hook_in"),
    Site("attn_in_scale", "B T 1", "1/rms of the input norm", float32=True, tl="ln1.hook_scale"),
    Site("attn_in", "B T D", "input norm's output, with gain: what attention reads",
         hf="input_layernorm.output",
         also="self_attn.input ln1.hook_out attn.hook_in",
         read="self_attn.q_proj.input self_attn.k_proj.input self_attn.v_proj.input "
         "attn.q.hook_in attn.k.hook_in attn.v.hook_in"),
    Site("q_unrotated", "B T N H", "queries, before rotary embedding",
         hf="self_attn.q_proj.output", tl="attn.hook_q", also="attn.q.hook_out"),
    Site("q", "B T N H", "queries, after rotary embedding", tl="attn.hook_rot_q"),
    Site("k_unrotated", "B S K H", "keys, before rotary embedding",
         hf="self_attn.k_proj.output", tl="attn.hook_k", also="attn.k.hook_out"),
    Site("k", "B S K H", "keys, after rotary embedding", tl="attn.hook_rot_k"),
    Site("v", "B S K H", "values",
         hf="self_attn.v_proj.output", tl="attn.hook_v", also="attn.v.hook_out"),
    Site("attn_scores", "B N T S", "scaled, softcapped and masked scores", float32=True,
         tl="attn.hook_attn_scores"),
    Site("attn_pattern", "B N T S", "softmax of the scores",
         hf="self_attn.output.1", tl="attn.hook_pattern"),
    Site("attn_heads", "B T N H", "each head's mix of values",
         hf="self_attn.o_proj.input", tl="attn.hook_z", also="attn.o.hook_in"),
    Site("head_out", "B T N D", "each head's part of attn_proj; computed only when asked for",
         tl="attn.hook_result"),
    Site("attn_proj", "B T D", "output projection, before the post norm", hf="self_attn.output",
         also="self_attn.output.0 self_attn.o_proj.output post_attention_layernorm.input "
         "attn.hook_out attn.o.hook_out ln1_post.hook_in"),
    Site("attn_out_scale", "B T 1", "1/rms of the post-attention norm", float32=True,
         tl="ln1_post.hook_scale"),
    Site("attn_out", "B T D", "what attention adds to the residual stream",
         hf="post_attention_layernorm.output", tl="hook_attn_out",
         also="ln1_post.hook_out"),
    Site("resid_mid", "B T D", "residual stream between attention and MLP",
         hf="pre_feedforward_layernorm.input", tl="hook_resid_mid",
         read="pre_feedforward_layernorm.input ln2.hook_in hook_mlp_in"),
    Site("mlp_in_scale", "B T 1", "1/rms of the pre-MLP norm", float32=True, tl="ln2.hook_scale"),
    Site("mlp_in_normed", "B T D", "x/rms before the gain: input of Gemma Scope transcoders",
         float32=True, tl="ln2.hook_normalized"),
    Site("mlp_in", "B T D", "x/rms with the gain: what the MLP reads",
         hf="pre_feedforward_layernorm.output",
         also="mlp.input ln2.hook_out mlp.hook_in",
         read="mlp.gate_proj.input mlp.up_proj.input mlp.gate.hook_in mlp.in.hook_in"),
    Site("mlp_gate", "B T F", "gate's pre-activation, before the gelu",
         hf="mlp.gate_proj.output", tl="mlp.hook_pre",
         also="mlp.act_fn.input mlp.gate.hook_out"),
    Site("mlp_up", "B T F", "what the gate is multiplied with",
         hf="mlp.up_proj.output", tl="mlp.hook_pre_linear", also="mlp.in.hook_out"),
    Site("mlp_act", "B T F", "gelu(gate)·up",
         hf="mlp.down_proj.input", tl="mlp.hook_post", also="mlp.out.hook_in"),
    Site("mlp_proj", "B T D", "down projection, before the post norm", hf="mlp.output",
         also="mlp.down_proj.output post_feedforward_layernorm.input "
         "mlp.hook_out mlp.out.hook_out ln2_post.hook_in"),
    Site("mlp_out_scale", "B T 1", "1/rms of the post-MLP norm", float32=True,
         tl="ln2_post.hook_scale"),
    Site("mlp_out", "B T D", "what the MLP adds to the residual stream: transcoder target",
         hf="post_feedforward_layernorm.output", tl="hook_mlp_out",
         also="ln2_post.hook_out"),
    Site("resid_post", "B T D", "residual stream leaving the block",
         hf="output", tl="hook_resid_post",
         also="output.0 hook_out", last="norm.input ln_final.hook_in"),
    Site("final_scale", "B T 1", "1/rms of the final norm", per_layer=False, float32=True,
         tl="ln_final.hook_scale"),
    Site("final_norm", "B T D", "final norm's output, with gain", per_layer=False,
         hf="norm.output", tl="ln_final.hook_normalized",
         differs="TransformerLens has it before the gain, jaxtc after it",
         also="output.last_hidden_state lm_head.input ln_final.hook_out unembed.hook_in"),
    Site("logits_uncapped", "B T V", "logits before the softcap", per_layer=False, float32=True,
         hf="lm_head.output", also="unembed.hook_out hook_unembed"),
    Site("logits", "B T V", "softcapped logits", per_layer=False, float32=True,
         also="output.logits"),
)  # fmt: skip

BY_NAME: dict[str, Site] = {site.name: site for site in SITES}
ORDER: dict[str, int] = {site.name: index for index, site in enumerate(SITES)}
LOGITS: tuple[str, ...] = tuple(site.name for site in SITES if "V" in site.letters)
NORM_SCALES: tuple[str, ...] = tuple(site.name for site in SITES if site.kind == "scale")


@dataclasses.dataclass(frozen=True, order=True)
class Address:
    """A site at a layer; ``str()`` gives its name, such as ``layers.20.mlp_out`` or ``embed``."""

    site: str
    layer: int | None = None

    def __str__(self):
        return self.site if self.layer is None else f"layers.{self.layer}.{self.site}"

    def place(self, layers: int) -> tuple[int, int]:
        """When a pass computes it: (layer, place in the layer); -1 is before the first layer."""
        once = -1 if self.site == "embed" else layers
        return once if self.layer is None else self.layer, ORDER[self.site]


class _Meaning(NamedTuple):
    """What a name means: a site (and layer, where the name says it), or why it is refused."""

    site: str = ""
    layer: int | None = None
    refused: str = ""
    read_only: bool = False


def _names() -> dict[tuple[bool, str], _Meaning]:
    """Every name by whether it is below a layer; ``.output`` may be left out."""
    found = {
        (below, name): _Meaning(refused=why)
        for below, names in NOT_SITES.items()
        for name, why in names.items()
    }
    for site in SITES:
        given = {name: _Meaning(site.name) for name in (site.hf, site.tl, *site.also.split())}
        given |= {name: _Meaning(site.name, read_only=True) for name in site.read.split()}
        given |= {name: _Meaning(site.name, refused=why) for name, why in site.unlike.items()}
        found |= {(site.per_layer, name): meaning for name, meaning in given.items() if name}
        found |= {(False, name): _Meaning(site.name, -1) for name in site.last.split()}
    short = {(below, name.removesuffix(".output")): one for (below, name), one in found.items()}
    own = {(site.per_layer, site.name): _Meaning(site.name) for site in SITES}
    return short | found | own


_NAMES = _names()
_LAYERED = re.compile(r"(?:layers|blocks)\.(?P<layer>-?\d+|\*)(?:\.(?P<rest>.+))?")


@lru_cache(maxsize=4096)
def parse(address: str | Address, *, editing: bool = False) -> tuple[str, int | None]:
    """Split an address into its site's name and its layer.

    Accepts our names (``layers.20.mlp_out``; ``mlp_out`` or ``layers.*.mlp_out`` for every layer),
    those of ``transformers`` (``model.layers.20.mlp``, its output unless ``.input`` is added), as
    nnsight spells them too (``model.model.layers[20].mlp.input``), and those of TransformerLens
    (``blocks.20.hook_mlp_out``) and its bridge (``blocks.20.ln2_post.hook_out``).

    Args:
        address: what to split.
        editing: to change what is there: names of what a single reader sees are refused.

    Returns:
        (site name, layer); the layer is None for a site that the model has once, and for
        "every layer". A negative layer counts from the last one.

    Raises:
        SiteError: no such site, or a foreign name that holds another number.
    """
    if isinstance(address, Address):
        address = str(address)
    if not isinstance(address, str):
        raise SiteError(f"A site is named by a string, got {type(address).__name__}.")
    dotted = re.sub(r"\[(-?\d+)\]", r".\1", address)  # layers[20]
    dotted = re.sub(r"\.inputs?(\.0){2}$", ".input", dotted)  # nnsight: (arguments, keywords)
    dotted = re.sub(r"^(base_model\.)?(model\.)*", "", dotted)
    match = _LAYERED.fullmatch(dotted)
    if match:
        rest = match["rest"] or "output"
        layer = None if match["layer"] == "*" else int(match["layer"])
    else:
        rest, layer = dotted, None
    meaning = _Meaning()
    for below in (True,) if match else (False, True):
        named = [_NAMES.get((below, name)) for name in (rest, re.sub(r"(\.\d+)+$", "", rest))]
        refused = [one for one in named[1:] if one and one.refused]  # a part of it: output.0
        meaning = next(filter(None, [named[0], *refused]), meaning)
        if meaning.site or meaning.refused:
            break
    if meaning.refused:
        raise SiteError(
            f"{address!r} is not an alias here: {meaning.refused}. `jaxtc sites` lists what can be "
            "captured."
        )
    if meaning.read_only and editing:
        raise SiteError(
            f"{address!r} is what one reader of {meaning.site} gets: in its library an edit there "
            "reaches that one only, and here an edit reaches all of them. If that is meant, say "
            f"{meaning.site!r}; if not, edit what that reader gives: attn_in or mlp_in of a norm, "
            "q_unrotated or mlp_gate of a projection."
        )
    if meaning.site:
        return meaning.site, layer if meaning.layer is None else meaning.layer
    if rest in BY_NAME:
        raise SiteError(
            f"{address!r}: the model has {rest!r} once, not per layer; ask for {rest!r}."
        )
    names = [name for (_, name), one in _NAMES.items() if not one.refused]
    raise SiteError(
        f"There is no site called {rest!r} (in {address!r}).{did_you_mean(rest, names)} "
        "`jaxtc sites` lists them all."
    )


def check_layer(layer: int, layers: int, what: str) -> int:
    """``layer`` as an index from 0, negative ones counted from the end.

    Raises:
        SiteError: the model has no such layer.
    """
    if not -layers <= layer < layers:
        raise SiteError(
            f"{what} asks for layer {layer}, but this model has {layers} layers: 0 to {layers - 1}."
        )
    return layer % layers


def resolve(address: "str | Address", layers: int) -> tuple[Address, ...]:
    """The addresses that one request names, in a model of ``layers`` layers.

    Raises:
        SiteError: no such site or no such layer.
    """
    site, layer = parse(address)
    if not BY_NAME[site].per_layer:
        return (Address(site),)
    if layer is None:
        return tuple(Address(site, index) for index in range(layers))
    return (Address(site, check_layer(layer, layers, str(address))),)
