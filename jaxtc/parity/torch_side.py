"""The reference: ``Gemma2ForCausalLM`` in PyTorch, every site of it, written to files.

The only module of jaxtc that imports torch. :mod:`jaxtc.parity.job` runs it in a process of its
own, ``python -m jaxtc.parity.torch_side JOB.json``, whose memory is freed before our model is
loaded. The parity tests read the reference through the same functions.
"""

import functools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Gemma2ForCausalLM, GenerationConfig
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb, repeat_kv

from jaxtc.parity.job import Job, addresses
from jaxtc.tap.sites import BY_NAME, Address

# Of each norm of a layer: the site of its 1/rms, and the site that it reads.
NORMS = {
    "input_layernorm": ("attn_in_scale", "resid_pre"),
    "post_attention_layernorm": ("attn_out_scale", "attn_proj"),
    "pre_feedforward_layernorm": ("mlp_in_scale", "resid_mid"),
    "post_feedforward_layernorm": ("mlp_out_scale", "mlp_proj"),
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Gemma2ForCausalLM:
    """The reference model: eager attention, and greedy generation without a stop token."""
    model = Gemma2ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True,
        use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval().requires_grad_(False)


def hook(
    model: Gemma2ForCausalLM, where: str, keep: Callable[[torch.Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Call ``keep`` on the tensor at ``module.input``, ``module.output`` or ``module.output.1``."""
    path, end, index = re.fullmatch(r"(.+?)\.(input|output)(?:\.(\d))?", where).groups()
    module = model.get_submodule(path)
    if end == "input":
        return module.register_forward_pre_hook(lambda _, args: keep(args[0]))
    pick = lambda out: out[int(index or 0)] if isinstance(out, tuple) else out  # noqa: E731
    return module.register_forward_hook(lambda _, args, out: keep(pick(out)))


@torch.no_grad()
def forward(
    model: Gemma2ForCausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor,
    keep: Callable[[Address, torch.Tensor], None],
    layers: Iterable[int] | None = None,
) -> None:
    """One pass that passes every site to ``keep``, layer by layer, holding one layer at a time.

    The last layer's ``resid_post`` is passed in any case: the final sites are computed from it.
    Sites that no module of ``transformers`` has are computed from hooked tensors, in the dtypes
    of its own forward pass. Masked scores are NaN.

    ``ids`` and ``mask`` are (B, T), the latter 1 on real tokens. ``keep`` is called with an address
    and its (B, ...) tensor, of all ``layers`` by default.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    count = model.config.num_hidden_layers
    layers = range(count) if layers is None else sorted(set(layers))
    kept: dict[int | None, dict[str, torch.Tensor]] = {}

    def hold(layer: int | None, name: str, x: torch.Tensor) -> None:
        kept.setdefault(layer, {})[name] = x
        if name != "resid_post":  # the last of its layer
            return
        held = kept.pop(layer)
        if layer == count - 1:
            hold(None, "last", x)
            if layer not in layers:
                keep(Address(name, layer), x)
        if layer in layers:
            derive(model, layer, held, positions, mask)
            for name, x in held.items():
                if name in BY_NAME:
                    keep(Address(name, layer), x)

    handles = []
    for address in addresses({*layers, count - 1}):
        site = BY_NAME[address.site]
        if site.hf and site.hf not in dict(site.unlike):
            save = functools.partial(hold, address.layer, site.name)
            handles.append(hook(model, site.aliases(address.layer)["hf"], save))
    try:
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    held = kept.pop(None)
    held["final_scale"] = rate(model.model.norm, held.pop("last"))
    held["logits"] = out.logits
    for name, x in held.items():
        keep(Address(name), x)


def derive(model: Gemma2ForCausalLM, layer: int, held: dict, positions, mask) -> None:
    """Add to the hooked tensors of a layer those that no module has."""
    block = model.model.layers[layer]
    for name, (site, source) in NORMS.items():
        held[site] = rate(block.get_submodule(name), held[source])
    heads = held["attn_heads"].unflatten(-1, (-1, model.config.head_dim))
    held["head_out"] = head_out(block.self_attn, heads)
    held["mlp_in_normed"] = block.pre_feedforward_layernorm._norm(held["resid_mid"].float())
    q, k = rotated(model, held["q_unrotated"], held["k_unrotated"], positions)
    held["q"], held["k"] = q.transpose(1, 2), k.transpose(1, 2)
    visible = seen(positions, mask, block.self_attn.sliding_window)[:, None]
    held["attn_scores"] = scores(block.self_attn, q, k).masked_fill(~visible, torch.nan)
    unseen = held["attn_pattern"].masked_select(~visible & mask[:, None, :, None].bool())
    if (unseen != 0).any():
        raise RuntimeError(f"layer {layer} attends where this module takes it to be masked")


def head_out(attention: nn.Module, heads: torch.Tensor) -> torch.Tensor:
    """(B, T, N, H) heads to each one's part of the output, (B, T, N, D)."""
    weight = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim))
    return torch.einsum("btnh,dnh->btnd", heads, weight)


def rate(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """1/rms of a norm's input, in float32 as the norm has it."""
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)


def rotated(model, q, k, positions) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, heads·H) projections to rotated (B, heads, T, H)."""
    heads = lambda x: x.view(*x.shape[:2], -1, model.config.head_dim).transpose(1, 2)  # noqa: E731
    cos, sin = model.model.rotary_emb(q, positions)
    return apply_rotary_pos_emb(heads(q), heads(k), cos, sin)


def scores(attention: nn.Module, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
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


class Float64(TorchFunctionMode):
    """Where the reference asks for float32 (norms, softmax, angles), it gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(map(wide, args))
        return func(*args, **{key: wide(x) for key, x in (kwargs or {}).items()})


def widen(model: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    """The same model in float64, in place: weights and embedding scale as rounded as they were.

    Run it inside :class:`Float64`.
    """
    embed, rotary = model.model.embed_tokens, model.model.rotary_emb
    embed.embed_scale = embed.embed_scale.to(embed.weight.dtype).double()
    for weight in model.parameters():
        weight.data = weight.data.double()  # one at a time: the narrow one is freed
    half = torch.arange(0, model.config.head_dim, 2, dtype=torch.float64)
    theta = model.config.rope_parameters["rope_theta"]
    rotary.inv_freq = (theta ** -(half / model.config.head_dim)).to(rotary.inv_freq.device)
    return model


def transcoder(path: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """``z = x W_enc + b_enc``, ``a = z · (z > threshold)`` where ``z > 0``, ``a W_dec + b_dec``."""
    with np.load(path, allow_pickle=False) as held:
        p = {name: torch.from_numpy(held[name]).float().to(x.device) for name in held.files}
    z = x @ p["W_enc"] + p["b_enc"]
    a = (z > p["threshold"]) * torch.relu(z)
    return {"pre_activations": z, "activations": a, "reconstruction": a @ p["W_dec"] + p["b_dec"]}


def continuation(model: Gemma2ForCausalLM, ids: torch.Tensor, count: int) -> dict:
    """``count`` greedy tokens after (1, T) ids, and the margin of the best logit at each."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        use_cache=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits)[:, 0].float().topk(2).values
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    return {"tokens": tokens, "margins": (best[:, 0] - best[:, 1]).tolist()}


def main(path: str) -> None:
    """Run a job: a line of JSON on stdout for every step, files in the job's folder."""
    job, began = Job(**json.loads(Path(path).read_text("utf-8"))), time.monotonic()
    torch.set_grad_enabled(False)
    show("Loading the PyTorch model")
    model = load(Path(job.model), getattr(torch, job.dtype))
    device = "cuda" if torch.cuda.is_available() and not job.cpu else "cpu"
    model = widen(model) if job.truth else model
    model, report = model.to(device), []
    with Float64() if job.truth else torch.no_grad():
        for index, prompt in enumerate(job.prompts):
            show(f"PyTorch, {job.name}: prompt {index + 1} of {len(job.prompts)}")
            report.append(one(job, model, index, torch.tensor([prompt], device=device)))
    found = {
        "prompts": report,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": time.monotonic() - began,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    job.report.write_text(json.dumps(found))


def one(job: Job, model: Gemma2ForCausalLM, index: int, ids: torch.Tensor) -> dict:
    """Write a prompt's arrays, and return its continuation."""
    job.folder(index).mkdir(mode=0o700)

    def write(name: str, x: torch.Tensor) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        np.save(job.folder(index) / f"{name}.npy", x[0].cpu().numpy(), allow_pickle=False)

    def keep(address: Address, x: torch.Tensor) -> None:
        write(str(address), x)
        if job.transcoder and address == Address("mlp_in_normed", job.transcoder_layer):
            for name, made in transcoder(Path(job.transcoder), x).items():
                write(f"transcoder.{name}", made)

    forward(model, ids, torch.ones_like(ids), keep, job.layers)
    return continuation(model, ids, job.new_tokens) if job.new_tokens else {}


def show(step: str) -> None:
    """Report a step to the parent."""
    print(json.dumps({"step": step}), flush=True)


def end_with_parent() -> None:
    """Exit once the parent is gone, killed or not: its end of the pipe is closed."""
    os.read(0, 1)
    os._exit(130)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        main(sys.argv[1])
    except (KeyboardInterrupt, BrokenPipeError):  # the parent has gone, or is going
        sys.exit(130)
