"""What PyTorch has at every site of the table, read through hooks named by the table itself."""

import functools
import re
from collections.abc import Sequence

import numpy as np
import torch
from transformers import Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb, repeat_kv

from jaxtc.sites import SITES, Address

# Per address, one unpadded array a prompt.
Captured = dict[Address, list[torch.Tensor]]


def hook(
    model: Gemma2ForCausalLM, where: str, keep: dict, key
) -> torch.utils.hooks.RemovableHandle:
    """Keep what passes at ``module.input``, ``module.output`` or ``module.output.1``."""
    path, end, index = re.fullmatch(r"(.+?)\.(input|output)(?:\.(\d))?", where).groups()
    module = model.get_submodule(path)
    if end == "input":
        return module.register_forward_pre_hook(lambda _, args: keep.__setitem__(key, args[0]))

    def after(_, args, out):
        keep[key] = out[int(index or 0)] if isinstance(out, tuple) else out

    return module.register_forward_hook(after)


def addresses(layers: int) -> list[Address]:
    """Every site of every layer."""
    return [
        Address(site.name, layer)
        for site in SITES
        for layer in (range(layers) if site.per_layer else (None,))
    ]


def pad(prompts: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and mask, padded with 0 on one side."""
    width = max(map(len, prompts))
    blank = [[0] * (width - len(row)) for row in prompts]
    masks = [[1] * len(row) for row in prompts]
    join = (lambda a, b: a + b) if side == "right" else (lambda a, b: b + a)
    ids = [join(list(row), gap) for row, gap in zip(prompts, blank, strict=True)]
    mask = [join(row, gap) for row, gap in zip(masks, blank, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def capture(model: Gemma2ForCausalLM, prompts: Sequence[Sequence[int]], side: str) -> Captured:
    """Every site of every layer, as PyTorch has it, without padding.

    Sites that no module of ``transformers`` shows are computed from hooked tensors, in the dtypes
    that its forward pass uses there.
    """
    config = model.config
    ids, mask = pad(prompts, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kept: dict = {}
    handles = []
    for address in addresses(config.num_hidden_layers):
        row = SITES[[site.name for site in SITES].index(address.site)]
        if row.hf:
            handles.append(hook(model, row.aliases(address.layer)["hf"], kept, address))
    for layer in range(config.num_hidden_layers):
        for name in ("q_proj", "k_proj"):
            where = f"model.layers.{layer}.self_attn.{name}.output"
            handles.append(hook(model, where, kept, (name, layer)))
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()

    kept[Address("logits")] = out.logits  # the table says it: lm_head's own are not softcapped yet
    inner = model.model
    kept[Address("final_scale")] = rate(
        inner.norm, kept[Address("resid_post", inner.layers[-1].self_attn.layer_idx)]
    )
    for layer, block in enumerate(inner.layers):
        at = functools.partial(Address, layer=layer)
        for site, norm, source in (
            ("attn_in_scale", block.input_layernorm, "resid_pre"),
            ("attn_out_scale", block.post_attention_layernorm, "attn_proj"),
            ("mlp_in_scale", block.pre_feedforward_layernorm, "resid_mid"),
            ("mlp_out_scale", block.post_feedforward_layernorm, "mlp_proj"),
        ):
            kept[at(site)] = rate(norm, kept[at(source)])
        mid = kept[at("resid_mid")]
        kept[at("mlp_in_normed")] = block.pre_feedforward_layernorm._norm(mid.float())
        q, k = rotated(model, kept.pop(("q_proj", layer)), kept.pop(("k_proj", layer)), positions)
        kept[at("q")], kept[at("k")] = q.transpose(1, 2), k.transpose(1, 2)
        visible = seen(positions, mask, block.self_attn.sliding_window)
        kept[at("attn_scores")] = scores(block.self_attn, q, k).masked_fill(
            ~visible[:, None], torch.nan
        )
        # The window as this file understands it is the one the reference has.
        hidden = kept[at("attn_pattern")].masked_select(
            ~visible[:, None] & mask[:, None, :, None].bool()
        )
        assert (hidden == 0).all()
    return {key: unpadded(key, value, mask) for key, value in kept.items()}


def rate(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """1/rms of a norm's input, in float32 as the norm has it."""
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)


def rotated(model, q, k, positions) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, heads·H) projections to rotated (B, heads, T, H)."""
    heads = lambda x: x.view(*x.shape[:2], -1, model.config.head_dim).transpose(1, 2)  # noqa: E731
    cos, sin = model.model.rotary_emb(q, positions)
    return apply_rotary_pos_emb(heads(q), heads(k), cos, sin)


def scores(attention: torch.nn.Module, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scaled and softcapped scores, (B, N, T, S), with the roundings of the eager attention."""
    k = repeat_kv(k, attention.num_key_value_groups)
    x = torch.matmul(q, k.transpose(2, 3)) * attention.scaling
    cap = attention.attn_logit_softcapping
    return x if cap is None else torch.tanh(x / cap) * cap


def seen(positions: torch.Tensor, mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """(B, T, S) booleans: the keys each query attends to."""
    back = positions[:, :, None] - positions[:, None, :]
    visible = (back >= 0) & mask[:, None, :].bool()
    return visible if window is None else visible & (back < window)


def unpadded(key: Address, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The real tokens of each row."""
    square = key.site in ("attn_scores", "attn_pattern")
    rows = [(row, real.bool()) for row, real in zip(x, mask, strict=True)]
    return [row[:, real][:, :, real] if square else row[real] for row, real in rows]


def relative(ours: Sequence, theirs: Sequence) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over the real positions of all prompts, in float64.

    Entries where the reference has NaN (masked scores) are left out.
    """
    far = size = 0.0
    for a, b in zip(ours, theirs, strict=True):
        b = b.double().numpy()
        a = np.asarray(a, np.float64).reshape(b.shape)
        kept = ~np.isnan(b)
        far += np.sum((a[kept] - b[kept]) ** 2)
        size += np.sum(b[kept] ** 2)
    return float(np.sqrt(far / size))


def relative_by_token(site: str, ours, theirs) -> np.ndarray:
    """‖ours − theirs‖ / ‖theirs‖ of each token of one prompt, (T,)."""
    axis = 1 if site in ("attn_scores", "attn_pattern") else 0
    a, b = (np.moveaxis(np.asarray(x, np.float64), axis, 0) for x in (ours, theirs))
    a = a.reshape(b.shape[0], -1)
    b = b.reshape(a.shape)
    masked = np.isnan(b)
    a, b = (np.where(masked, 0, x) for x in (a, b))
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
