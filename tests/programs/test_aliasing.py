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
from jax.tree_util import Partial

import jaxtc
from jaxtc import metrics, reducers, scores
from jaxtc.experiments import scores as scores_module
from jaxtc.programs import program
from jaxtc.transcoders import metrics as metrics_module
from jaxtc.transcoders import transcoder as transcoder_module
from jaxtc.transcoders.transcoder import SparseFeatures
from tests.support import tiny
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
def busy():
    """What is dispatched inside has to wait for a while."""
    held = [_long(jnp.ones((500, 500))) for _ in range(3)]
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


def run(a):
    found = jaxtc.run(
        tiny.model(), a["tokens"], lengths=a["lengths"], logits="last",
        capture={
            "all": "resid_post",
            "project": reducers.Project("resid_post", a["directions"]),
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
            jaxtc.Zero(site="q", head=a["head"], layer=2),
            jaxtc.Scale(3.0, site="attn_out", coordinate=a["coordinate"], layer=2),
            jaxtc.Copy(site="resid_mid", position=0, from_row=a["from row"], layer=2),
            jaxtc.SetFeature(tiny.transcoder(1), a["feature"], a["amount"]),
            AddSum(a["own"], site="embed"),
        ],
    )  # fmt: skip
    found.lengths[...] = 1  # what is handed out may be overwritten as well
    return found.logits, found.activations


RUN = {
    "tokens": (BATCH, 7),
    "lengths": (whole(*LENGTHS), 1),
    "directions": (DRAWN[:2], 9),
    "at": (whole(0, 1), 2),
    "value": (DRAWN[0], 9),
    "bfloat16": (DRAWN[1].astype(BF16), 9),
    "each layer": (DRAWN[2:5].astype(BF16), 9),
    "each token": (DRAWN[5:32].reshape(*BATCH.shape, D).astype(BF16), 9),
    "frozen": (DRAWN[32:59].reshape(*BATCH.shape, D).astype(BF16), 9),
    "out": (DRAWN[59].astype(BF16), DRAWN[60].astype(BF16)),
    "position": (whole(0, 1), 2),
    "rows' positions": (whole([0], [1], [2]), 1),
    "mask": (np.arange(BATCH.shape[1]) < 2, True),
    "token": (whole(5, 6, 13), 2),
    "layer": (whole(0, 2), 1),
    "row": (whole(0, 2), 1),
    "head": (whole(0, 2), 1),
    "coordinate": (whole(0, 2), 1),
    "from row": (whole(1, 2, 0), 0),
    "feature": (whole(4, 5), whole(6, 7)),
    "amount": (np.float32([3, 2]), 9),
    "own": (DRAWN, 9),
}


def swept(a):
    return jaxtc.sweep(
        tiny.model(), PROMPTS,
        [
            jaxtc.Add(jaxtc.Over(a["values"]), site="resid_mid", layer=jaxtc.Over(a["layers"])),
            jaxtc.Apply(Partial(add, a["function's"]), site="mlp_out"),
        ],
        of=scores.LogitDifference(a["answer"], a["other"]), chunk=4,
    )  # fmt: skip


def gradients(a):
    return dataclasses.astuple(
        jaxtc.gradients(tiny.model(), PROMPTS, scores.Logit(a["answer"]), "layers.1.mlp_out")
    )[:1]


def generated(a):
    edits = [
        jaxtc.Apply(Partial(add, a["function's"]), site="resid_mid", layer=1),
        jaxtc.Add(a["value"], site="mlp_out", position="new"),
    ]
    return jaxtc.generate(
        tiny.model(), a["tokens"], 3, lengths=a["lengths"], edits=edits, capture="mlp_out", stop=[]
    ).activations


def transcoded(a):
    """Parameters that are NumPy's."""
    model, made = (
        jax.tree.map(lambda x: x, module) for module in (tiny.model(), tiny.transcoder(1))
    )
    model.final_norm.weight.set_raw_value(a["gain"])
    made.b_dec.set_raw_value(a["bias"])
    return jaxtc.run(model, PROMPTS, edits=[jaxtc.Splice(made)]).logits


def score(a):
    return scores.Logit(a["answer"])(jaxtc.run(tiny.model(), PROMPTS))


def decoded(a):
    features = SparseFeatures(a["values"], np.tile(whole(*range(50)), (4, 1)), whole(*[50] * 4))
    return tiny.transcoder(1).decode_sparse(features), tiny.transcoder(1).decode(a["activations"])


def loss(a):
    return metrics.next_token_loss(a["logits"], a["tokens"])


@cache
def on_mesh():
    return jaxtc.shard(tiny.model(), "model=1")


def divided(a):
    edit = jaxtc.Apply(Partial(add, a["function's"]), site="resid_mid", layer=1)
    return jaxtc.run(on_mesh(), a["tokens"], edits=[edit]).logits


SWEPT = {
    "values": (DRAWN[:5], 9),
    "layers": (whole(0, 1, 2), 1),
    "function's": (DRAWN[0], 9),
    "answer": (whole(3, 4, 5), 6),
    "other": (whole(4, 4, 4), 6),
}
GENERATED = {
    "function's": (DRAWN[0], 9),
    "value": (DRAWN[1].astype(BF16), 9),
    "tokens": (BATCH, 7),
    "lengths": (whole(*LENGTHS), 1),
}
ACTIVE = np.abs(DRAWN[:25].reshape(-1, 50)[:4])
# A call by name: (the call, its arrays: what they hold, what they are overwritten with).
CALLS = {
    "run": (run, RUN),
    "sweep": (swept, SWEPT),
    "gradients": (gradients, {"answer": (whole(3, 4, 5), 6)}),
    "generate": (generated, GENERATED),
    "parameters": (transcoded, {"bias": (DRAWN[0], 9), "gain": (DRAWN[1], 9)}),
    "score": (score, {"answer": (whole(3, 4, 5), 6)}),
    "encode": (lambda a: tiny.transcoder(1).encode(a["x"]), {"x": (DRAWN[:4], 9)}),
    "decode": (decoded, {"activations": (ACTIVE, 9), "values": (ACTIVE, 9)}),
    "loss": (loss, {"tokens": (BATCH, 7), "logits": (DRAWN[: BATCH.size].reshape(3, -1, D), 9)}),
    "model": (lambda a: tiny.model()(a["tokens"])[0], {"tokens": (BATCH, 7)}),
    "mesh": (divided, {"function's": (DRAWN[0], 9), "tokens": (BATCH, 7)}),
}


def arrays_of(call, kind=memory):
    return {name: kind(values) for name, (values, _) in CALLS[call][1].items()}


def host(tree):
    """Copies of all arrays of a result."""
    return [np.array(x) for x in jax.tree.leaves(tree)]


@cache
def expected(call):
    return host(jax.block_until_ready(CALLS[call][0](arrays_of(call))))


def overwritten(call, arrays, name) -> bool:
    """Whether the result is another when an array is overwritten as soon as the call returned."""
    function, held = CALLS[call]
    with busy():
        found = function(arrays)
        gc.collect(0)
        arrays[name][...] = held[name][1] if isinstance(arrays[name], np.ndarray) else 1
        found = host(found)
    return not all(map(np.array_equal, found, expected(call)))


def changed(call, kind=memory, only=None) -> set[str]:
    """The arrays that change a call's result when they are overwritten."""
    found = set()
    for name in only or CALLS[call][1]:
        values, arrays = CALLS[call][1][name][0], arrays_of(call)
        # What is no field of ours is left to jax, which takes no tensors.
        if kind is not as_torch or name not in ("function's", "own", "bias", "gain"):
            arrays[name] = kind(values)
        if overwritten(call, arrays, name):
            found.add(name)
    return found


KINDS = {"aligned": memory, "not aligned": partial(memory, offset=8), "torch": as_torch}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_overwritten_changes_nothing(call, kind):
    assert not changed(call, KINDS[kind])


# What would change if nothing were copied. `generate` waits for its tokens, and a pass of the bare
# model takes longer to dispatch than the queue is busy, so neither shows it.
EXPOSED = {
    "run": {"bfloat16", "each layer", "out", "own"},
    "sweep": set(SWEPT),
    "gradients": {"answer"},
    "parameters": {"bias", "gain"},
    "score": {"answer"},
    "encode": {"x"},
    "decode": {"activations", "values"},
    "loss": {"tokens", "logits"},
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
    for module in (program, transcoder_module, metrics_module, scores_module):
        monkeypatch.setattr(module, "owned", lambda tree: tree)
    missing = EXPOSED[call]
    for _ in range(4):  # a machine with other work may leave the window too small
        missing = missing - changed(call, only=missing)
        if not missing:
            return
    raise AssertionError(f"overwriting {missing} changed nothing, so nothing was tested")


def test_soak_of_threads():
    """Calls of many threads at once, each with its own memory, overwritten at once."""
    calls = [call for call in CALLS if call not in ("model", "mesh")]
    for call in calls:
        expected(call)
    end, wrong, done = time.monotonic() + SOAK, [], []

    def work(seed: int):
        random = np.random.default_rng(seed)
        while time.monotonic() < end:
            call = calls[random.integers(len(calls))]
            arrays = arrays_of(call, partial(memory, offset=8 * int(random.integers(2))))
            found = CALLS[call][0](arrays)
            gc.collect(int(random.integers(3)))
            for name, array in arrays.items():
                array[...] = CALLS[call][1][name][1]
            del arrays, array
            gc.collect(0)
            if not all(map(np.array_equal, host(found), expected(call))):
                wrong.append(call)
            done.append(call)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    print(f"{len(done)} calls")
    assert not wrong and len(done) >= 8
