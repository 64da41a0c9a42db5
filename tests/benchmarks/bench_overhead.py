"""What a call of ``jaxtc.run`` costs besides the compiled program, on a model of 26 layers.

    python -m tests.benchmarks.bench_overhead [--repeats 300]

The model is small, so that the program takes little and the rest can be seen. The same program,
compiled ahead of time, is called with the same arrays in turns with ``run``; the overhead is the
difference of the medians. Both wait for their results.
"""

import argparse
import importlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxtc
from jaxtc.programs.leaves import parameters

# `jaxtc.run` is the function; this is its module.
module = importlib.import_module("jaxtc.programs.run")


def model() -> jaxtc.Gemma2:
    """26 layers, narrow."""
    config = jaxtc.Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=26,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
        sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    return jaxtc.Gemma2(config, rngs=nnx.Rngs(0))


def bare(call: Callable) -> Callable:
    """The program that ``call`` runs, compiled, over the arguments that it gave to it."""
    kept, program = [], module._run

    def recorded(*args, **options):
        kept.append(args)
        return program(*args, **options)

    module._run = recorded
    try:
        call()
    finally:
        module._run = program
    assert len(kept) == 1, f"one program was expected to run, not {len(kept)}"
    compiled = program.lower(*kept[0]).compile()
    arrays = kept[0][1:]  # the plan is static
    return lambda: compiled(*arrays)


def alternate(calls: list[Callable], repeats: int) -> list[float]:
    """Median seconds of each, in turns."""
    seconds = [[] for _ in calls]
    for _ in range(repeats):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[index].append(time.perf_counter() - start)
    return [float(np.median(x)) for x in seconds]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    repeats = parser.parse_args().repeats
    ours = model()
    tokens = np.arange(2, 14)
    edit = jaxtc.Add(jnp.ones(16), site="resid_mid", layer=12, position=-1)
    capture = ["layers.12.mlp_in_normed", "layers.12.mlp_out"]
    cases = {
        "plain": {},
        "one edit": dict(edits=[edit]),
        "two captures": dict(capture=capture),
        "26 captures": dict(capture="resid_post"),
        "one edit, two captures": dict(edits=[edit], capture=capture),
        "one edit, two captures, no logits": dict(edits=[edit], capture=capture, logits=None),
    }
    table = Table(title=f"26 layers, {len(tokens)} tokens, {jax.devices()[0].device_kind}")
    for heading in ("call", "run", "program", "overhead", "wanted"):
        table.add_column(heading, justify="left" if heading == "call" else "right")
    for name, options in cases.items():

        def whole(options=options):
            return jaxtc.run(ours, tokens, **options)

        whole()
        program = bare(whole)
        with jaxtc.compiles() as found:
            run, alone = alternate([whole, program], repeats)
        assert not found, f"compiled while measuring: {found}"
        row = (f"{1e3 * x:.2f} ms" for x in (run, alone, run - alone))
        table.add_row(name, *row, "≤ 1 ms")
    Console().print(table)

    flat, walked = alternate([lambda: parameters(ours), lambda: jax.tree.flatten(ours)], repeats)
    # Waiting for results that are there already costs the same in both.
    leaves = parameters(ours)
    (waiting,) = alternate([lambda: leaves], repeats)
    Console().print(
        f"the model's arrays: {1e3 * (flat - waiting):.3f} ms, "
        f"by jax.tree.flatten {1e3 * (walked - waiting):.3f} ms"
    )


if __name__ == "__main__":
    main()
