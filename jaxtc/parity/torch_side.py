"""The reference: ``Gemma2ForCausalLM`` in PyTorch, every site of it, written to files.

The only module of jaxtc that imports torch. :mod:`jaxtc.parity.job` runs it as a process of its
own, ``python -m jaxtc.parity.torch_side JOB.json``, whose memory is free again before our model is
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

from jaxtc.parity.job import Job
from jaxtc.tap.sites import BY_NAME, SITES, Address

# Of each norm of a layer: the site of its 1/rms, and the site that it reads.
NORMS = {
    "input_layernorm": ("attn_in_scale", "resid_pre"),
    "post_attention_layernorm": ("attn_out_scale", "attn_proj"),
    "pre_feedforward_layernorm": ("mlp_in_scale", "resid_mid"),
    "post_feedforward_layernorm": ("mlp_out_scale", "mlp_proj"),
}

# Called with an address and its (B, ...) tensor, as soon as its layer is computed.
Keep = Callable[[Address, torch.Tensor], None]


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
    """Give ``keep`` what passes at ``module.input``, ``module.output`` or ``module.output.1``."""
    path, end, index = re.fullmatch(r"(.+?)\.(input|output)(?:\.(\d))?", where).groups()
    module = model.get_submodule(path)
    if end == "input":
        return module.register_forward_pre_hook(lambda _, args: keep(args[0]))
    pick = lambda out: out[int(index or 0)] if isinstance(out, tuple) else out  # noqa: E731
    return module.register_forward_hook(lambda _, args, out: keep(pick(out)))


def addresses(layers: Iterable[int]) -> list[Address]:
    """Every site of these layers, and those that the model has once."""
    layers = list(layers)
    return [
        Address(site.name, layer)
        for site in SITES
        for layer in (layers if site.per_layer else (None,))
    ]


@torch.no_grad()
def forward(
    model: Gemma2ForCausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor,
    keep: Keep,
    layers: Iterable[int] | None = None,
) -> None:
    """One pass that shows every site, and forgets each layer when it has been shown.

    The last layer's ``resid_post`` is shown in any case: the final sites are computed from it.

    Sites that no module of ``transformers`` shows are computed from hooked tensors, in the dtypes
    that its forward pass uses there. Masked scores are NaN.

    Args:
        model: from :func:`load`.
        ids: (B, T).
        mask: (B, T), 1 on real tokens.
        keep: see :data:`Keep`.
        layers: whose sites; all by default.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    count = model.config.num_hidden_layers
    layers = range(count) if layers is None else sorted(set(layers))
    kept: dict[int | None, dict[str, torch.Tensor]] = {}

    def hold(layer: int | None, name: str, x: torch.Tensor) -> None:
        kept.setdefault(layer, {})[name] = x

    def finish(layer: int) -> None:
        held = kept.pop(layer)
        if layer == count - 1:
            hold(None, "last", held["resid_post"])
            if layer not in layers:
                keep(Address("resid_post", layer), held["resid_post"])
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
    for layer in {*layers, count - 1}:
        # After the hook of resid_post, which is this module's output too.
        end = f"model.layers.{layer}.output"
        handles.append(hook(model, end, lambda _, layer=layer: finish(layer)))
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
    """Add to the hooked tensors of a layer those that no module shows."""
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


class JumpReLU(nn.Module):
    """``a = z · (z > threshold)``, ``z > 0`` besides; ``y = a W_dec + b_dec``."""

    def __init__(self, d_in: int, features: int, d_out: int):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_in, features))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(torch.zeros(features, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.threshold = nn.Parameter(torch.zeros(features))

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., M)."""
        return x @ self.W_enc + self.b_enc

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., M)."""
        z = self.pre_activations(x)
        return (z > self.threshold) * torch.relu(z)

    def decode(self, a: torch.Tensor) -> torch.Tensor:
        """(..., M) to (..., D)."""
        return a @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        return self.decode(self.encode(x))

    @classmethod
    def load(cls, path: Path) -> "JumpReLU":
        """From a published ``params.npz``."""
        with np.load(path, allow_pickle=False) as held:
            arrays = {key: torch.from_numpy(held[key]).float() for key in held.files}
        module = cls(*arrays["W_enc"].shape, arrays["W_dec"].shape[1])
        module.load_state_dict(arrays)
        return module.requires_grad_(False)


def continuation(model: Gemma2ForCausalLM, ids: torch.Tensor, count: int) -> dict:
    """``count`` greedy tokens after (1, T) ids, and how sure the model was of each."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        use_cache=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits)[:, 0].float().topk(2).values
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    return {"tokens": tokens, "margins": (best[:, 0] - best[:, 1]).tolist()}


def main(path: str) -> None:
    """Do one job: a line of JSON on stdout for every step, files in the job's folder."""
    job, began = Job.read(Path(path)), time.monotonic()
    torch.set_grad_enabled(False)
    tell("Loading the PyTorch model")
    model = load(Path(job.model), getattr(torch, job.dtype))
    device = "cuda" if torch.cuda.is_available() and not job.cpu else "cpu"
    model = widen(model) if job.truth else model
    model, report = model.to(device), []
    with Float64() if job.truth else torch.no_grad():
        for index, prompt in enumerate(job.prompts):
            tell(f"PyTorch, {job.name}: prompt {index + 1} of {len(job.prompts)}")
            report.append(one(job, model, index, torch.tensor([prompt], device=device)))
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    job.report.write_text(
        json.dumps(
            {
                "prompts": report,
                "device": name,
                "seconds": time.monotonic() - began,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


def one(job: Job, model: Gemma2ForCausalLM, index: int, ids: torch.Tensor) -> dict:
    """Write a prompt's arrays; its continuation is what comes back."""
    job.folder(index).mkdir(mode=0o700)

    def write(name: str, x: torch.Tensor) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        np.save(job.file(index, name), x[0].cpu().numpy(), allow_pickle=False)

    def keep(address: Address, x: torch.Tensor) -> None:
        write(str(address), x)
        if job.transcoder and str(address) == f"layers.{job.transcoder_layer}.mlp_in_normed":
            transcoder = JumpReLU.load(Path(job.transcoder)).to(x.device)
            write("transcoder.pre_activations", transcoder.pre_activations(x))
            activations = transcoder.encode(x)
            write("transcoder.activations", activations)
            write("transcoder.reconstruction", transcoder.decode(activations))

    forward(model, ids, torch.ones_like(ids), keep, job.layers)
    return continuation(model, ids, job.new_tokens) if job.new_tokens else {}


def tell(step: str) -> None:
    """A step for the parent to show."""
    print(json.dumps({"step": step}), flush=True)


def end_with_parent() -> None:
    """Exit once the parent is gone, however it went: its end of the pipe is closed."""
    os.read(0, 1)
    os._exit(130)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        main(sys.argv[1])
    except (KeyboardInterrupt, BrokenPipeError):  # the parent has gone, or is going
        sys.exit(130)
