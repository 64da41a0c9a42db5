"""Edits done with forward hooks on transformers' Gemma2ForCausalLM, in plain PyTorch.

Most sites are the input or the output of a module, as the table of sites says, and need nothing
here. The others (``SPECIAL``) take more than one hook, each of which still runs the model's own
modules on tensors they were given:

- ``q``, ``k``: the projection's output is rotated, changed and rotated back;
- the sites of a norm: its output is computed again from its input;
- ``attn_scores``, ``attn_pattern``, ``attn_proj``: what ``self_attn`` returns is computed again,
  from the hooked outputs of its projections;
- ``head_out``: ``o_proj``'s output is the sum over its heads;
- ``resid_mid``: the second norm's input is changed, and the layer's output is the changed stream
  plus what the MLP adds to it;
- ``logits``: the output of the whole model, after the softcap.

Axis letters are those of the table: B batch, T query, S key, D hidden, N query heads, K key heads.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb, repeat_kv

from jaxtc.parity import torch_side
from jaxtc.tap.sites import BY_NAME, SITES, Site
from tests.parity import reference

# Of each norm: the site of 1/rms, of the rescaled input before the gain, and of the output.
NORMS = {
    "input_layernorm": ("attn_in_scale", None, "attn_in"),
    "post_attention_layernorm": ("attn_out_scale", None, "attn_out"),
    "pre_feedforward_layernorm": ("mlp_in_scale", "mlp_in_normed", "mlp_in"),
    "post_feedforward_layernorm": ("mlp_out_scale", None, "mlp_out"),
    "norm": ("final_scale", None, "final_norm"),
}
SPECIAL = {name for sites in NORMS.values() for name in sites} | {
    "q", "k", "attn_scores", "attn_pattern", "attn_proj", "head_out", "resid_mid", "logits"
}  # fmt: skip
LEAST = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True)
class Where:
    """Which entries of a site an edit changes, spelled as Python would index a list of them.

    Attributes:
        layer: int or ints.
        position, key: int, ints, slice, booleans; or a list that has one of these for each prompt.
        row, head, coordinate: int or ints.
    """

    layer: Any = None
    position: Any = None
    row: Any = None
    head: Any = None
    coordinate: Any = None
    key: Any = None

    def layers(self, count: int) -> list[int]:
        """Its layers in a model of ``count``."""
        return sorted(chosen(self.layer, count))

    def mask(self, site: str, shape: Sequence[int], prompts: Sequence[Sequence[int]]):
        """Booleans of the site's shape, true on what is changed; never on padding."""
        letters = BY_NAME[site].letters
        square = BY_NAME[site].kind == "pairs"
        mask = torch.zeros(*shape, dtype=torch.bool)
        for row in chosen(self.row, len(prompts)):
            prompt = prompts[row]
            index: list[list[int]] = [[row]]
            for letter, size in zip(letters[1:], shape[1:], strict=True):
                if letter in "TS":
                    named = self.key if square and letter == "S" else self.position
                    named = named[row] if isinstance(named, list) else named
                    index.append(sorted(chosen(named, len(prompt))))
                else:
                    named = self.head if letter in "NK" else self.coordinate
                    index.append(sorted(chosen(named, size)))
            mask[np.ix_(*index)] = True
        return mask


def chosen(named: Any, size: int) -> set[int]:
    """The indices that something names in a list of ``size``."""
    everything = range(size)
    if named is None:
        return set(everything)
    if isinstance(named, slice):
        return set(everything[named])
    if np.asarray(named).dtype == bool:
        return {index for index, on in zip(everything, named, strict=False) if on}
    return {everything[index] for index in np.atleast_1d(named).tolist()}


@dataclasses.dataclass(frozen=True)
class Now:
    """What a change may know of the pass.

    Attributes:
        layer: of the site.
        lengths: (B,) tokens of each prompt.
        axis: of the site, that runs over the tokens.
        read: upstream sites of this layer, padded on the right.
    """

    layer: int | None
    lengths: list[int]
    axis: int
    read: dict[str, torch.Tensor]

    @property
    def real(self) -> torch.Tensor:
        """(B, T) booleans."""
        lengths = torch.tensor(self.lengths)
        return torch.arange(int(lengths.max()))[None] < lengths[:, None]


# The new value of a whole site, padded on the right; only what `Where` names of it is used.
Change = Callable[[torch.Tensor, Now], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Hooked:
    """One edit: a change at a site, or knocked-out attention edges where ``change`` is None."""

    site: str
    change: Change | None
    where: Where = Where()


class Hooks:
    """The hooks of some edits on a model, for one batch of prompts."""

    def __init__(self, model: Gemma2ForCausalLM, prompts, edits: Sequence[Hooked], side: str):
        self.model, self.prompts, self.edits, self.side = model, prompts, tuple(edits), side
        self.lengths = list(map(len, prompts))
        self.layers = model.config.num_hidden_layers
        self.handles: list = []
        self.kept: dict[tuple[str, int], Any] = {}
        self.masks: dict[tuple, torch.Tensor] = {}

    def at(self, site: str, layer: int | None = None, knocked: bool = False) -> list[Hooked]:
        """The edits of a site in a layer, in order."""
        return [
            edit
            for edit in self.edits
            if edit.site == site
            and (edit.change is None) == knocked
            and (layer is None or layer in edit.where.layers(self.layers))
        ]

    def shifted(self, site: str, x: torch.Tensor, sign: int) -> torch.Tensor:
        """Between a batch padded on the left and on the right (sign -1), and back (1)."""
        if self.side == "right":
            return x
        axes = [i - 1 for i, letter in enumerate(BY_NAME[site].letters) if letter in "TS"]
        width = max(self.lengths)
        rows = zip(x.expand(len(self.lengths), *x.shape[1:]), self.lengths, strict=True)
        return torch.stack([row.roll([sign * (width - n)] * len(axes), axes) for row, n in rows])

    def mask(self, edit: Hooked, shape: Sequence[int]) -> torch.Tensor:
        """Where an edit applies, worked out once."""
        key = (id(edit), tuple(shape))
        if key not in self.masks:
            self.masks[key] = edit.where.mask(edit.site, shape, self.prompts)
        return self.masks[key]

    def change(self, site: str, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """``x`` after the edits of its site."""
        edits = self.at(site, layer)
        if not edits:
            return x
        x = self.shifted(site, x, -1)
        read = {name: held for (name, where), held in self.kept.items() if where == layer}
        for edit in edits:
            axis = BY_NAME[site].sequence_axis
            new = edit.change(x, Now(layer, self.lengths, axis, read))
            x = torch.where(self.mask(edit, x.shape), new, x)
        return self.shifted(site, x, 1)

    def on_output(self, module: torch.nn.Module, function: Callable) -> None:
        """``function(x)`` in place of a module's output."""
        self.handles.append(module.register_forward_hook(lambda _, args, out: function(out)))

    def on_input(self, module: torch.nn.Module, function: Callable) -> None:
        """``function(x)`` in place of a module's first input."""
        self.handles.append(
            module.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:]))
        )

    def register(self) -> None:
        """Put all hooks in place. Of two on the same end of a module, the first runs first."""
        model = self.model.model
        for layer, block in enumerate(model.layers):
            for name in list(NORMS)[:-1]:
                self.norm(block.get_submodule(name), NORMS[name], layer)
            if self.at("resid_mid", layer):
                self.resid_mid(layer, block)
            knocked = self.at("attn_pattern", layer, knocked=True)
            if knocked:
                self.knocked(layer, block.self_attn, knocked)
            for site in SITES:
                if site.per_layer and self.at(site.name, layer) and site.name not in SPECIAL:
                    self.end_of_module(site, layer)
            self.attention(layer, block.self_attn)
        self.norm(model.norm, NORMS["norm"], None)
        for site in SITES:
            if not site.per_layer and site.name not in SPECIAL:
                self.end_of_module(site, None)
        self.on_output(self.model, self.on_logits)

    def on_logits(self, out):
        out.logits = self.change("logits", out.logits)
        return out

    def end_of_module(self, site: Site, layer: int | None) -> None:
        """A site that is a module's input or output."""
        path, end = site.aliases(layer)["hf"].rsplit(".", 1)

        def function(x):
            heads = (-1, self.model.config.head_dim) if len(site.token_axes) > 1 else (-1,)
            return self.change(site.name, x.view(*x.shape[:2], *heads), layer).reshape(x.shape)

        on = self.on_input if end == "input" else self.on_output
        on(self.model.get_submodule(path), function)

    def norm(self, norm: torch.nn.Module, sites: tuple, layer: int | None) -> None:
        """The three sites of a norm; ``mlp_in_normed`` is kept for what reads it."""
        scale, normed, output = sites

        def compute(_, args, out):
            if self.at(scale, layer) or normed and (self.at(normed, layer) or self.at("mlp_out")):
                x = args[0].float()
                x = x * self.change(scale, torch_side.rate(norm, x), layer)
                if normed:
                    x = self.change(normed, x, layer)
                    self.kept[normed, layer] = self.shifted(normed, x, -1)
                if self.at(scale, layer) or normed and self.at(normed, layer):
                    out = (x * (1.0 + norm.weight.float())).type_as(args[0])
            return self.change(output, out, layer)

        self.handles.append(norm.register_forward_hook(compute))

    def resid_mid(self, layer: int, block: torch.nn.Module) -> None:
        """Needs the hooks of ``mlp_out`` to be there and those of ``resid_post`` not to be."""
        held: dict[str, torch.Tensor] = {}

        def before(x):
            held["mid"] = self.change("resid_mid", x, layer)
            return held["mid"]

        self.on_input(block.pre_feedforward_layernorm, before)
        self.on_output(block.post_feedforward_layernorm, lambda x: held.setdefault("out", x))
        self.on_output(block, lambda _: held.pop("mid") + held.pop("out"))

    def attention(self, layer: int, attention: torch.nn.Module) -> None:
        """The special sites of attention."""
        again = self.at("attn_scores", layer) or self.at("attn_pattern", layer)

        def before(_, args, kwargs):
            self.kept["turn", layer] = kwargs["position_embeddings"]

        self.handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))

        def split(x):
            return x.view(*x.shape[:2], -1, attention.head_dim)

        def turned(site):
            def change(flat):
                cos, sin = self.kept["turn", layer]
                x = split(flat).transpose(1, 2)
                x = apply_rotary_pos_emb(x, x, cos, sin)[0].transpose(1, 2)
                moved = (self.change(site, x, layer) - x).transpose(1, 2)
                moved = apply_rotary_pos_emb(moved, moved, cos, -sin)[0].transpose(1, 2)
                return flat + moved.reshape(flat.shape)  # exact where nothing changed

            return change

        def keep(name):
            return lambda x: self.kept.__setitem__((name, layer), x)

        for site, module in (("q", attention.q_proj), ("k", attention.k_proj)):
            if self.at(site, layer):
                self.on_output(module, turned(site))
        if self.at("head_out", layer):

            def summed(_, args, out):
                each = torch_side.head_out(attention, split(args[0]))
                return self.change("head_out", each, layer).sum(2)

            self.handles.append(attention.o_proj.register_forward_hook(summed))
        if again:
            for name in ("q_proj", "k_proj", "v_proj"):
                self.on_output(attention.get_submodule(name), keep(name))

        def after(module, args, kwargs, out):
            out, pattern = out
            if again:
                q, k, v = (
                    split(self.kept[name, layer]).transpose(1, 2)
                    for name in ("q_proj", "k_proj", "v_proj")
                )
                q, k = apply_rotary_pos_emb(q, k, *self.kept["turn", layer])
                scores = torch_side.scores(module, q, k) + kwargs["attention_mask"]
                pattern = self.change("attn_scores", scores, layer).softmax(-1)
                pattern = self.change("attn_pattern", pattern, layer)
                mixed = pattern @ repeat_kv(v, module.num_key_value_groups)
                out = module.o_proj(mixed.transpose(1, 2).flatten(2))
            return self.change("attn_proj", out, layer), pattern

        self.handles.append(attention.register_forward_hook(after, with_kwargs=True))

    def knocked(self, layer: int, attention: torch.nn.Module, knocked: Sequence[Hooked]) -> None:
        """Attention without some edges: another mask, and nothing where no edge is left."""
        held: dict[str, torch.Tensor] = {}

        def before(_, args, kwargs):
            mask, held["left"] = self.knock_out(knocked, kwargs["attention_mask"])
            return args, {**kwargs, "attention_mask": mask}

        def cleared(x):
            heads = x.view(*x.shape[:2], -1, attention.head_dim)
            return (heads * held["left"][..., None]).reshape(x.shape)

        self.handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        self.on_input(attention.o_proj, cleared)

    def knock_out(self, knocked: Sequence[Hooked], mask: torch.Tensor):
        """((B, N, T, S) mask without the edges, (B, T, N) whether a query sees any key still).

        A softmax over nothing but masked scores is even, where an attention without edges is
        nothing.
        """
        heads, width = self.model.config.num_attention_heads, max(self.lengths)
        shape = (len(self.lengths), heads, width, width)
        mask = mask.expand(shape).clone()
        had = (mask == 0).any(-1)
        for edit in knocked:
            mask[self.shifted("attn_pattern", self.mask(edit, shape), 1)] = LEAST
        left = (mask == 0).any(-1) | ~had  # padding never saw anything and never matters
        return mask, left.transpose(1, 2)


@contextlib.contextmanager
def edited(
    model: Gemma2ForCausalLM, prompts, edits: Sequence[Hooked], side: str = "right"
) -> Iterator[Hooks]:
    """The model with ``edits`` hooked in, for a batch of ``prompts`` padded on ``side``."""
    hooks = Hooks(model, prompts, edits, side)
    hooks.register()
    try:
        yield hooks
    finally:
        for handle in hooks.handles:
            handle.remove()


def run(
    model: Gemma2ForCausalLM, prompts, edits: Sequence[Hooked] = (), side: str = "right"
) -> torch.Tensor:
    """(B, T, V) logits with the edits; padded on the right, whatever ``side`` the model saw."""
    ids, mask = reference.pad(prompts, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with edited(model, prompts, edits, side) as hooks:
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return hooks.shifted("logits", out.logits, -1)
