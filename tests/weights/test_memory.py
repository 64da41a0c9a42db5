"""Loading needs little memory beyond the weights themselves."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxtc

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
import jaxtc

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(field + ":"))

folder, dtype = sys.argv[1:]
jaxtc.Gemma2.abstract(jaxtc.Gemma2Config.from_file(folder + "/config.json"))
jnp.zeros(3).block_until_ready()
before = memory("VmRSS")
model = jaxtc.load_model(folder, dtype=dtype)
after, peak = memory("VmRSS"), memory("VmHWM")
print(json.dumps({
    "weights": sum(x.nbytes for x in jax.tree.leaves(model)),
    "kept": after - before, "peak": peak - before,
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of about 150 MB in bfloat16, in three shards."""
    config = jaxtc.Gemma2Config(
        vocab_size=20000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=256,
    )  # fmt: skip
    abstract = jaxtc.Gemma2.abstract(config)
    model = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), abstract)
    return jaxtc.save_model(model, tmp_path_factory.mktemp("big") / "m", max_shard_size=60_000_000)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_at_most_a_fifth_above_the_weights(checkpoint, dtype):
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), dtype]
    env_free = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(env_free.stdout)
    print(dtype, {key: f"{value / 1e6:.0f} MB" for key, value in measured.items()})
    assert measured["weights"] > 100e6
    assert measured["peak"] <= 1.2 * measured["weights"]
    # The arrays are really in memory: a mapped file would make the peak meaningless.
    assert measured["kept"] >= 0.95 * measured["weights"]
