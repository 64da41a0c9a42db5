"""What a caller overwrites after a call has returned changes no result of that call.

On a CPU, JAX computes in the background and reads NumPy's memory where it lies, or copies it when
its turn comes (jax issue #37830). A long program dispatched first makes that window wide: what
follows waits, so memory that is still the caller's is overwritten before it is read, every time.
"""

import contextlib
import dataclasses
import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from jax.tree_util import Partial

import jaxtc
from jaxtc import metrics, reducers, scores
from jaxtc.experiments import scores as scores_module
from jaxtc.programs import program
from jaxtc.transcoders import encoder as encoder_module
from jaxtc.transcoders import metrics as metrics_module
from jaxtc.transcoders import transcoder as transcoder_module
from jaxtc.transcoders.encoder import SparseFeatures
from tests.support import tiny, unspared
from tests.support.batch import LENGTHS, PROMPTS, D

# Seconds of each soak: JAXTC_SOAK=300 pytest -k soak
SOAK = float(os.environ.get("JAXTC_SOAK", 2))
BF16 = ml_dtypes.bfloat16
BATCH = np.array([[*p, *[0] * (max(LENGTHS) - len(p))] for p in PROMPTS], np.int32)
DRAWN = np.random.default_rng(1).standard_normal((4000, D)).astype(np.float32)

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="only a CPU reads NumPy's memory where it lies"
)


@jax.jit
def _long(x):
    for _ in range(6):
        x = x @ x / len(x)
    return x


@contextlib.contextmanager
def busy(length=3):
    """What is dispatched inside has to wait for a while."""
    held = [_long(jnp.ones((500, 500))) for _ in range(length)]
    yield
    jax.block_until_ready(held)


def memory(values, offset=0):
    """A copy that begins ``offset`` bytes after a multiple of 64, where JAX reads in place."""
    raw = np.empty(values.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    array = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def as_torch(values):
    if values.dtype == BF16:
        return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(values.copy())


def whole(*values):
    return np.array(values, np.int32)


@jaxtc.register_edit()
class AddSum(jaxtc.Edit):
    """An edit of a user's own, with an array of any shape."""

    rows: object

    def new(self, x, context):
        return x + jnp.asarray(self.rows).sum(0)


def add(array, x):
    return x + array


@cache
def model(layers=2):
    """A small one: nearly all the time of these tests is compiling."""
    config = dataclasses.replace(tiny.config(), num_hidden_layers=layers, layer_types=None)
    return jaxtc.Gemma2(config, rngs=nnx.Rngs(0))


@cache
def on_mesh():
    return jaxtc.shard(model(1), "model=1")


def run(a):
    """Every edit that takes an array, and parameters that are NumPy's."""
    gemma, made = (jax.tree.map(lambda x: x, module) for module in (model(), tiny.transcoder(1)))
    gemma.final_norm.weight.set_raw_value(a["gain"])
    made.b_dec.set_raw_value(a["bias"])
    found = jaxtc.run(
        gemma, a["tokens"], lengths=a["lengths"], logits="last",
        capture={
            "all": "resid_post", "project": reducers.Project("resid_post", a["directions"]),
            "at": reducers.At("mlp_out", position=a["at"]),
        },
        edits=[
            jaxtc.Add(a["value"], site="resid_mid", layer=0),
            jaxtc.Add(a["bfloat16"], site="resid_mid", layer=0),
            jaxtc.Add(jaxtc.PerLayer(a["each layer"]), site="resid_mid"),
            jaxtc.SetTo(a["each token"], site="attn_out", layer=1, position=slice(0, 2)),
            jaxtc.Freeze(a["frozen"], site="mlp_out", layer=0, row=0),
            jaxtc.ProjectOut(a["out"], site="mlp_out", layer=1),
            jaxtc.Zero(site="mlp_in", position=a["position"], layer=0),
            jaxtc.Zero(site="q", position=a["rows' positions"], layer=1),
            jaxtc.Zero(site="k", position=a["mask"], layer=1),
            jaxtc.Zero(site="v", position=jaxtc.Token(a["token"]), layer=1),
            jaxtc.Zero(site="attn_out", layer=a["layer"], position=-1),
            jaxtc.Zero(site="mlp_in_normed", row=a["row"], layer=1),
            jaxtc.Zero(site="q", head=a["head"], layer=0),
            jaxtc.Scale(3.0, site="attn_out", coordinate=a["coordinate"], layer=0),
            jaxtc.Copy(site="resid_mid", position=0, from_row=a["from row"], layer=1),
            unspared.SetFeature(made, a["feature"], a["amount"]),
            AddSum(a["own"], site="embed"),
        ],
    )  # fmt: skip
    found.lengths[...] = 1  # what is handed out may be overwritten as well
    return found.logits, found.activations


def swept(a):
    return jaxtc.sweep(
        model(1), PROMPTS,
        [
            jaxtc.Add(jaxtc.Over(a["values"]), site="resid_mid", layer=jaxtc.Over(a["layers"])),
            jaxtc.Apply(Partial(add, a["function's"]), site="mlp_out"),
        ],
        of=scores.LogitDifference(a["answer"], a["other"]), chunk=4,
    )  # fmt: skip


def gradients(a):
    found = jaxtc.gradients(model(1), PROMPTS, scores.Logit(a["answer"]), "layers.0.mlp_out")
    return dataclasses.astuple(found)[:1]


def divided(a):
    edit = jaxtc.Apply(Partial(add, a["function's"]), site="resid_mid", layer=0)
    return jaxtc.run(on_mesh(), a["tokens"], lengths=LENGTHS, edits=[edit]).logits


@cache
def clean():
    return jaxtc.run(model(1), PROMPTS)


def decoded(a):
    features = SparseFeatures(a["values"], np.tile(whole(*range(50)), (4, 1)), whole(*[50] * 4))
    return tiny.transcoder(1).decode_sparse(features), tiny.transcoder(1).decode(a["activations"])


ACTIVE = np.abs(DRAWN[:25].reshape(-1, 50)[:4])
BY_TOKEN = DRAWN[5:32].reshape(*BATCH.shape, D)
ANSWERS = (whole(3, 4, 5), 6)
# A call by name: (the call, its arrays: what they hold, what they are overwritten with).
# `generate` waits for its tokens before it returns, so nothing can change it.
CALLS = {
    "run": (run, {
        "tokens": (BATCH, 7), "lengths": (whole(*LENGTHS), 1), "directions": (DRAWN[:2], 9),
        "at": (whole(0, 1), 2), "value": (DRAWN[0], 9), "bfloat16": (DRAWN[1].astype(BF16), 9),
        "each layer": (DRAWN[2:4].astype(BF16), 9), "each token": (BY_TOKEN.astype(BF16), 9),
        "frozen": (-BY_TOKEN.astype(BF16), 9),
        "out": (DRAWN[59].astype(BF16), DRAWN[60].astype(BF16)), "position": (whole(0, 1), 2),
        "rows' positions": (whole([0], [1], [2]), 1),
        "mask": (np.arange(BATCH.shape[1]) < 2, True), "token": (whole(5, 6, 13), 2),
        "layer": (whole(0, 1), 1), "row": (whole(0, 2), 1), "head": (whole(0, 2), 1),
        "coordinate": (whole(0, 2), 1), "from row": (whole(1, 2, 0), 0),
        "feature": (whole(4, 5), whole(6, 7)), "amount": (np.float32([3, 2]), 9),
        "own": (DRAWN, 9), "bias": (DRAWN[0], 9), "gain": (DRAWN[1], 9),
    }),
    "sweep": (swept, {
        "values": (DRAWN[:5], 9), "layers": (whole(0, 0, 0), 1), "function's": (DRAWN[0], 9),
        "answer": ANSWERS, "other": (whole(4, 4, 4), 6),
    }),
    "gradients": (gradients, {"answer": ANSWERS}),
    "mesh": (divided, {"function's": (DRAWN[0], 9), "tokens": (BATCH, 7)}),
    "score": (lambda a: scores.Logit(a["answer"])(clean()), {"answer": ANSWERS}),
    "encode": (lambda a: tiny.transcoder(1).encode(a["x"]), {"x": (DRAWN[:4], 9)}),
    "decode": (decoded, {"activations": (ACTIVE, 9), "values": (ACTIVE, 9)}),
    "loss": (
        lambda a: metrics.next_token_loss(a["logits"], a["tokens"]),
        {"tokens": (BATCH, 7), "logits": (BY_TOKEN, 9)},
    ),
}  # fmt: skip
# What is no field of ours is left to jax, which takes no tensors.
NUMPY_ONLY = ("function's", "own", "bias", "gain")
KINDS = {"aligned": memory, "not aligned": partial(memory, offset=8), "torch": as_torch}


def arrays_of(call, kind=memory):
    return {
        name: (memory if kind is as_torch and name in NUMPY_ONLY else kind)(values)
        for name, (values, _) in CALLS[call][1].items()
    }


def overwrite(call, arrays, names):
    for name in names:
        array, (_, value) = arrays[name], CALLS[call][1][name]
        array[...] = value if isinstance(array, np.ndarray) else 1


def host(tree):
    """Copies of all arrays of a result."""
    return [np.array(x) for x in jax.tree.leaves(tree)]


@cache
def expected(call):
    return host(jax.block_until_ready(CALLS[call][0](arrays_of(call))))


def changed(call, names, kind=memory, length=3) -> bool:
    """Whether the result is another when these are overwritten as soon as the call returned."""
    arrays, should = arrays_of(call, kind), expected(call)
    with busy(length):
        found = CALLS[call][0](arrays)
        gc.collect(0)
        overwrite(call, arrays, names)
        found = host(found)
    return not all(map(np.array_equal, found, should))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_overwritten_changes_nothing(call, kind):
    names = CALLS[call][1]
    if changed(call, names, KINDS[kind]):
        pytest.fail(f"{[name for name in names if changed(call, [name], KINDS[kind])] or names}")


# What would change if nothing were copied.
EXPOSED = {
    "run": ("bfloat16", "each layer", "out", "own", "gain"),
    "sweep": tuple(CALLS["sweep"][1]),
    "gradients": ("answer",),
    "score": ("answer",),
    "encode": ("x",),
    "decode": ("activations", "values"),
    "loss": ("tokens", "logits"),
}


def read_in_place() -> bool:
    """Whether this jax still reads memory that is overwritten after the call."""
    x = memory(np.ones(64, np.float32))
    with busy():
        y = jnp.array(x, copy=True)
        x[:] = 2
    return bool((np.asarray(y) == 2).any())


@pytest.mark.parametrize("call", EXPOSED)
def test_without_the_copies_it_would(call, monkeypatch):
    """The test above sees the fault that it is about."""
    if not read_in_place():
        pytest.skip("this jax copies NumPy's memory before it returns")
    expected(call)
    modules = program, encoder_module, transcoder_module, metrics_module, scores_module
    for module in modules:
        monkeypatch.setattr(module, "owned", lambda tree: tree)
    for name in EXPOSED[call]:  # a machine with other work needs a larger window
        seen = any(changed(call, [name], length=length) for length in (3, 10, 30))
        assert seen, f"overwriting {name!r} changed nothing, so nothing was tested"


def test_soak_of_threads():
    """Calls of many threads at once, each with its own memory, overwritten at once."""
    calls = [call for call in CALLS if call != "mesh"]
    for call in calls:
        expected(call)
    end, wrong, done = time.monotonic() + SOAK, [], []

    def work(seed: int):
        random = np.random.default_rng(seed)
        while not done or time.monotonic() < end:
            call = calls[random.integers(len(calls))]
            arrays = arrays_of(call, partial(memory, offset=8 * int(random.integers(2))))
            found = CALLS[call][0](arrays)
            gc.collect(int(random.integers(3)))
            overwrite(call, arrays, arrays)
            del arrays
            gc.collect(0)
            if not all(map(np.array_equal, host(found), expected(call))):
                wrong.append(call)
            done.append(call)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    print(f"{len(done)} calls")
    assert not wrong, wrong
