"""Activation patching at every layer and position: one sweep, against hooks on PyTorch's model.

    python -m tests.benchmarks.bench_sweep [--widths embedded 2b] [--repeats 5] [--chunks 8 16]

Of 16 tokens, the clean prompt's residual stream is put into the corrupted one's at one layer and
position at a time, and the last token's logits are kept. PyTorch has a hook for each place, no
gradients, no cache, logits of the last token only, and the better of one and all threads. Both run
the same weights in turns, so that another job on the machine slows both; the figures are medians. A
ratio is PyTorch's time over ours. Compiling is not part of them: it is told besides.
"""

import argparse
import cProfile
import os
import pstats
import time

import jax
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxtc
from jaxtc import Over, PerLayer, SetTo
from tests.benchmarks.bench_2b import torch_twin

TOKENS = 16
WANTED = {"embedded": 8, "2b": 3}
console = Console()


def model_of(widths: str) -> jaxtc.Gemma2:
    """The embedded model, or four random layers of 2B widths."""
    if widths == "embedded":
        return jaxtc.load_model()
    config = jaxtc.Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=4096, max_position_embeddings=8192,
    )  # fmt: skip
    return jaxtc.Gemma2(config, rngs=nnx.Rngs(0))


def hooked_sweep(twin, tokens: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(L, T, V) logits of the last token with hooks; kept: (L, 1, T, D)."""
    ids, values = torch.from_numpy(tokens[None]), torch.from_numpy(np.array(kept))
    found = np.empty((len(kept), len(tokens), twin.config.vocab_size), np.float32)
    with torch.no_grad():
        for layer, block in enumerate(twin.model.layers):
            for position in range(len(tokens)):

                def patch(module, args, layer=layer, position=position):
                    args[0][:, position] = values[layer, :, position]

                hook = block.register_forward_pre_hook(patch)
                try:
                    out = twin(ids, use_cache=False, logits_to_keep=1)
                finally:
                    hook.remove()
                found[layer, position] = out.logits[0, -1].numpy()
    return found


def seconds(call) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turns(calls: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    found = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return {name: float(np.median(times)) for name, times in found.items()}


def measure(widths: str, given: argparse.Namespace, table: Table) -> None:
    """One model's rows."""
    model = model_of(widths)
    layers, vocab = model.config.num_hidden_layers, model.config.vocab_size
    twin = torch_twin(model)
    rng = np.random.default_rng(0)
    clean, corrupted = (np.concatenate([[2], rng.integers(3, vocab, TOKENS - 1)]) for _ in range(2))
    kept = jaxtc.run(model, clean, capture="resid_pre", logits=None).activations["resid_pre"]
    patch = SetTo(
        PerLayer(kept), site="resid_pre", layer=Over(range(layers)), position=Over(range(TOKENS))
    )

    def ours(chunk=None):
        return jaxtc.sweep(model, corrupted, [patch], chunk=chunk).values

    def theirs(threads):
        def call():
            torch.set_num_threads(threads)
            return hooked_sweep(twin, corrupted, kept)

        return call

    calls = {"jaxtc": ours}
    calls |= {f"jaxtc, chunks of {n}": lambda n=n: ours(n) for n in given.chunks}
    with jaxtc.compiles() as found:
        mine = np.asarray(ours())[:, :, 0]
        for chunk in given.chunks:
            ours(chunk)
    console.print(f"{widths}, compiled once for {found[0].seconds + found[1].seconds:.1f} s")
    all_threads = sorted({1, len(os.sched_getaffinity(0))})
    reference = theirs(1)()
    gap = np.linalg.norm(mine - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    assert gap.max() < 1e-4, f"the two sweeps differ by {gap.max():.1e}"
    console.print(f"{widths}: relative L2 of the logits, worst of all places {gap.max():.1e}")
    calls |= {f"PyTorch, {n} threads": theirs(n) for n in all_threads}
    with jaxtc.compiles() as found:
        medians = in_turns(calls, given.repeats)
    assert not found, f"compiled while measuring: {found}"
    best = min(value for name, value in medians.items() if name.startswith("PyTorch"))
    for name, value in medians.items():
        wanted = f"≥ {WANTED[widths]}" if name == "jaxtc" else ""
        per = f"{1e3 * value / layers / TOKENS:.2f} ms"
        table.add_row(widths, name, f"{value:.3f} s", per, f"{best / value:.2f}", wanted)
    if given.profile:
        with cProfile.Profile() as profile:
            jax.block_until_ready(ours())
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="*", choices=list(WANTED), default=["embedded"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="variants at once, too")
    parser.add_argument("--profile", action="store_true", help="where the host's time goes")
    given = parser.parse_args()
    console.print(f"load of the machine: {os.getloadavg()}")
    table = Table(title=f"patching, layer × position, {TOKENS} tokens, {jax.devices()[0]}, float32")
    for heading in ("widths", "what", "time", "a place", "PyTorch / this", "wanted"):
        table.add_column(heading, justify="left" if heading in ("widths", "what") else "right")
    for widths in given.widths:
        measure(widths, given, table)
    console.print(table)


if __name__ == "__main__":
    main()
