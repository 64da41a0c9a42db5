"""2B widths, side by side with PyTorch on this CPU in float32, as ratios.

    python -m tests.benchmarks.make_checkpoint FOLDER
    python -m tests.benchmarks.bench_2b FOLDER [--repeats 5] [--long-layers 8] [--only load ...]

Both frameworks run the very same weights in the same memory (PyTorch's tensors are views of the JAX
arrays) and take turns, so that another job on the machine slows both. A ratio is PyTorch's median
time over ours; above 1 we are faster. The load is measured in a process of its own.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

LAYER = 20
console = Console()


def measure_load(folder: Path, dtype: str) -> tuple[float, float, float]:
    """(bytes of weights, peak resident bytes, seconds) of loading in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_2b", str(folder), "--load", dtype]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    weights, peak, seconds = (float(word) for word in out.split())
    return weights, peak, seconds


def load_here(folder: Path, dtype: str) -> None:
    """Body of the measured process."""
    import jaxtc

    start = time.perf_counter()
    model = jaxtc.load_model(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(weights, peak, seconds)


def torch_twin(model):
    """HF's model over the arrays of ours, without a copy."""
    import warnings

    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

    from jaxtc.weights.names import parameter_names

    def view(array: jax.Array, shape: tuple[int, ...]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "not writable": nobody writes
            return torch.from_numpy(np.asarray(array)).reshape(shape)

    raw = {k: v for k, v in model.config.to_dict().items() if k != "architectures"}
    config = Gemma2Config(**raw, attn_implementation="eager")
    with torch.device("meta"):
        twin = Gemma2ForCausalLM(config)
    arrays = by_path(model)
    state = {n.hf: view(arrays[n.ours], n.hf_shape) for n in parameter_names(model.config)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    twin.load_state_dict(state, assign=True, strict=True)
    twin.model.rotary_emb = Gemma2RotaryEmbedding(config)
    twin.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return twin.eval()


def by_path(model) -> dict[str, jax.Array]:
    """The model's arrays by our name for the parameter."""
    from jaxtc.sharding.rules import variables

    names = (name for name, _ in variables(model))
    return dict(zip(names, jax.tree.leaves(model), strict=True))


def shorten(model, layers: int):
    """The same model's first layers, over the same arrays."""
    import dataclasses

    config = dataclasses.replace(model.config, num_hidden_layers=layers, layer_types=None)
    arrays, short = by_path(model), type(model).abstract(config)
    return jax.tree.unflatten(jax.tree.structure(short), [arrays[path] for path in by_path(short)])


def alternate(ours: Callable, theirs: Callable, repeats: int) -> tuple[float, float]:
    """Median seconds of each, run in turns after one warm-up of each."""
    ours(), theirs()
    seconds = {ours: [], theirs: []}
    for _ in range(repeats):
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            seconds[call].append(time.perf_counter() - start)
    return float(np.median(seconds[ours])), float(np.median(seconds[theirs]))


def notebook_job(model, twin, folder: Path, ids: np.ndarray) -> tuple[Callable, Callable]:
    """Layer 20: capture, encode, decode, score; the notebook's own steps in each framework."""
    import torch

    import jaxtc
    from jaxtc.transcoders.metrics import notebook_score

    place = f"layer_{LAYER}/width_16k/average_l0_11"
    transcoder = jaxtc.load_transcoder(
        folder / "transcoder" / place / "params.npz", layer=LAYER, input_site="mlp_in_normed",
        output_site="mlp_out",
    )  # fmt: skip
    apply = jax.jit(lambda t, x: t(x))
    sites = [f"layers.{LAYER}.mlp_in", f"layers.{LAYER}.mlp_out"]

    def ours() -> float:
        kept = jaxtc.run(model, ids, capture=sites, logits=None).activations
        recon = apply(transcoder, kept[sites[0]])
        return notebook_score(np.asarray(kept[sites[1]]), np.asarray(recon))

    W_enc, W_dec, b_enc, b_dec, threshold = (
        torch.from_numpy(np.array(getattr(transcoder, name)[...]))
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    )
    block = twin.model.layers[LAYER]

    @torch.no_grad()
    def theirs() -> float:
        kept = {}
        hooks = [
            module.register_forward_hook(lambda m, i, out, key=key: kept.update({key: out}))
            for key, module in (
                ("in", block.pre_feedforward_layernorm),
                ("out", block.post_feedforward_layernorm),
            )
        ]
        twin(torch.from_numpy(ids))
        for hook in hooks:
            hook.remove()
        z = kept["in"] @ W_enc + b_enc
        acts = (z > threshold) * torch.nn.functional.relu(z)
        recon = acts @ W_dec + b_dec
        target = kept["out"]
        error = torch.mean((recon[0, :, 1:] - target[0, :, 1:]) ** 2)
        return float(1 - error / target[0, :, 1:].var())

    gap = abs(ours() - theirs())
    console.print(f"notebook's score, ours and PyTorch's: {ours():.6f}, {theirs():.6f}")
    assert gap < 1e-4 * max(1.0, abs(theirs())), "the two jobs do not compute the same"
    return ours, theirs


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long-layers", type=int, default=8, help="layers for 128 and 512 tokens")
    parser.add_argument("--only", nargs="*", choices=["load", "job", "forward", "capture"])
    parser.add_argument("--load", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        return load_here(given.folder, given.load)
    parts = given.only or ["load", "job", "forward", "capture"]
    table = Table(title="2B widths, this CPU, float32")
    for heading in ("what", "jaxtc", "PyTorch", "ratio", "wanted"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    if "load" in parts:
        for dtype in ("bfloat16", "float32"):
            weights, peak, seconds = measure_load(given.folder, dtype)
            table.add_row(
                f"load as {dtype}: peak memory / weights ({weights / 1e9:.2f} GB, {seconds:.0f} s)",
                f"{peak / 1e9:.2f} GB", "", f"{peak / weights:.3f}", "≤ 1.2",
            )  # fmt: skip
    if set(parts) - {"load"}:
        measure_compute(given, parts, table)
    console.print(table)


def measure_compute(given: argparse.Namespace, parts: list[str], table: Table) -> None:
    """The rows that need both models in memory."""
    import torch

    import jaxtc

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = jaxtc.load_model(given.folder, dtype="float32")
    rng = np.random.default_rng(0)

    def row(what: str, ours: float, theirs: float, wanted: str) -> None:
        table.add_row(what, f"{ours:.3f} s", f"{theirs:.3f} s", f"{theirs / ours:.2f}", wanted)
        console.print(f"{what}: {ours:.3f} s, {theirs:.3f} s, ratio {theirs / ours:.2f}")

    if "job" in parts:
        ids = rng.integers(3, model.config.vocab_size, (1, 15))
        pair = notebook_job(model, torch_twin(model), given.folder, ids)
        row("notebook's job, layer 20, 15 tokens", *alternate(*pair, given.repeats), "≥ 2")
    for length in (16, 128, 512):
        layers = model.config.num_hidden_layers if length == 16 else given.long_layers
        short = shorten(model, layers)
        twin = torch_twin(short)
        ids = rng.integers(3, model.config.vocab_size, (1, length))

        def plain(short=short, ids=ids):
            return jax.block_until_ready(jaxtc.run(short, ids).logits)

        @torch.no_grad()
        def theirs(twin=twin, ids=ids):
            return twin(torch.from_numpy(ids), use_cache=False).logits

        if "forward" in parts:
            ref = theirs().numpy()
            gap = np.linalg.norm(np.asarray(plain()) - ref) / np.linalg.norm(ref)
            console.print(f"{length} tokens: relative L2 of the logits {gap:.1e}")
            assert gap < 1e-4, "the two forwards do not compute the same"
            del ref
            row(
                f"forward with logits, {length} tokens, {layers} layers",
                *alternate(plain, theirs, given.repeats), "≥ 1.3",
            )  # fmt: skip
        if "capture" in parts and length < 512:
            sites = [f"layers.{layers // 2}.mlp_in_normed", f"layers.{layers // 2}.mlp_out"]

            def captured(short=short, ids=ids, sites=sites):
                out = jaxtc.run(short, ids, capture=sites)
                return jax.block_until_ready((out.logits, out.activations))

            with_two, without = alternate(captured, plain, 3 * given.repeats)
            table.add_row(
                f"two sites captured / plain, {length} tokens, {layers} layers",
                f"{with_two:.3f} s", f"({without:.3f} s)", f"{with_two / without:.3f}", "≤ 1.03",
            )  # fmt: skip


if __name__ == "__main__":
    main()
