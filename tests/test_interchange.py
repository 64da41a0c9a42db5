"""Arrays of torch and NumPy: the same memory where that can be, the same values everywhere."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxtc
from jaxtc import metrics, scores
from jaxtc.captures.reducers import At, Project
from jaxtc.errors import EditError, InputError
from jaxtc.interchange import plain
from jaxtc.tap.positions import Token
from tests.support import batch, tiny, unspared

DTYPES = ["float32", "bfloat16", "float16", "int32", "bool"]
D = tiny.config().hidden_size
RANDOM = np.random.default_rng(0)
VECTOR = RANDOM.standard_normal(D).astype(np.float32)


def ours(dtype, shape=(64, 16)):
    return jnp.asarray(RANDOM.integers(0, 2, shape)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_memory_both_ways(dtype):
    x = ours(dtype)
    tensor = jaxtc.to_torch(x)
    assert tensor.dtype == getattr(torch, dtype) and tensor.shape == x.shape
    assert tensor.data_ptr() == x.unsafe_buffer_pointer()
    back = jaxtc.from_foreign(tensor)
    assert back.dtype == x.dtype and back.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
    np.testing.assert_array_equal(tensor.float().numpy(), np.asarray(x, np.float32))
    seen = jaxtc.to_numpy(x)
    assert type(seen) is np.ndarray and seen.dtype == x.dtype
    assert seen.ctypes.data == x.unsafe_buffer_pointer()
    again = jaxtc.to_numpy(tensor)
    assert again.dtype == x.dtype and again.ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout",
    {
        "transposed": lambda t: t.T,
        "every other": lambda t: t[:, ::2],
        "offset": lambda t: t.flatten()[1:],
        "expanded": lambda t: t[:1].expand(5, -1),
        "requires gradient": lambda t: t.clone().requires_grad_() * 2,
        "parameter": torch.nn.Parameter,
        "scalar": lambda t: t[0, 0],
        "empty": lambda t: t[:0],
    }.items(),
    ids=lambda item: item[0],
)
def test_tensors_of_any_layout(layout, dtype):
    tensor = layout[1](torch.randn(8, 16).to(getattr(torch, dtype)))
    expected = tensor.detach().float().numpy()
    for made in (jaxtc.from_foreign(tensor), jaxtc.to_numpy(tensor), plain(tensor)):
        assert made.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(made, np.float32), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0, dtype=np.float32).reshape(3, 4)[::-1],
        np.broadcast_to(np.float32(3), (2, 3)),
        np.arange(6, dtype=np.float32).astype(jnp.bfloat16),
        np.arange(6, dtype=np.float32).astype(jnp.bfloat16)[::-2],
    ],
    ids=["backwards", "read-only", "bfloat16", "bfloat16 backwards"],
)
def test_numpy_of_any_layout(array):
    tensor, made = jaxtc.to_torch(array), jaxtc.from_foreign(array)
    assert str(tensor.dtype) == f"torch.{array.dtype}" and made.dtype == array.dtype
    np.testing.assert_array_equal(tensor.float().numpy(), array.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(made), array)


def test_numpy_shares_memory_where_it_may():
    array = np.zeros((32, 32), np.float32)
    assert jaxtc.to_torch(array).data_ptr() == array.ctypes.data
    made = jaxtc.from_foreign(array)
    assert (made.unsafe_buffer_pointer() == array.ctypes.data) == (array.ctypes.data % 64 == 0)


class OtherLibrary:
    """An array that is known by DLPack only."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_array_with_dlpack(dtype):
    x = ours(dtype)
    other = OtherLibrary(x)
    assert jaxtc.from_foreign(other).unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
    for made in (jaxtc.to_numpy(other), plain([other])[0]):
        assert made.dtype == x.dtype and made.ctypes.data == x.unsafe_buffer_pointer()


def test_64_bits():
    assert jaxtc.from_foreign(torch.tensor([1, 2**31 - 1])).tolist() == [1, 2**31 - 1]
    for wide in (torch.tensor([2**31]), np.array([-(2**31) - 1])):
        with pytest.raises(InputError, match="do not fit JAX's int32"):
            jaxtc.from_foreign(wide)
    # On the host nothing is lost.
    assert jaxtc.to_numpy(torch.tensor([2**40])).tolist() == [2**40]
    assert metrics.FVU().update(torch.zeros(2, 3).double(), torch.ones(2, 3).double()).tokens == 2


def test_an_array_spread_over_devices_is_copied():
    mesh = Mesh(np.array(jax.devices()[:1]), "x")
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("x")))
    np.testing.assert_array_equal(jaxtc.to_torch(x).numpy(), np.arange(8.0))


def test_a_whole_result_in_other_libraries():
    reducers = [At("resid_post"), jaxtc.reducers.TopK("logits", 3)]
    result = batch.run(capture=["mlp_out", "embed", *reducers])
    for convert, kind in ((jaxtc.to_torch, torch.Tensor), (jaxtc.to_numpy, np.ndarray)):
        there = convert(result)
        assert type(there) is type(result) and there.length == result.length
        assert list(there.activations) == list(result.activations)
        for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(result), strict=True):
            assert type(a) is kind
            np.testing.assert_array_equal(a, b)
        stacked = there.activations["blocks.*.hook_mlp_out"]
        assert type(stacked) is kind
        np.testing.assert_array_equal(stacked, result.activations["mlp_out"])
        assert type(there.mask) is kind
        np.testing.assert_array_equal(there.mask, result.mask)
        back = jaxtc.from_foreign(there)
        assert isinstance(back.logits, jax.Array)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(result), strict=True):
            np.testing.assert_array_equal(a, b)


def test_leaves_that_are_no_arrays_stay():
    tree = {"a": 1, "b": ("text", None, 2.5)}
    for convert in (jaxtc.to_torch, jaxtc.to_numpy, jaxtc.from_foreign):
        assert convert(tree) == tree


def test_what_the_door_leaves_alone():
    for given in ([1, 2], (1.5, "x"), [[1], [2, 3]], jnp.ones(2), np.ones(2), range(3), None):
        same = plain(given)
        assert type(same) is type(given)
        assert same is given or same == given
    jax.jit(lambda x: (plain(x), plain([x])[0]))(jnp.ones(2))


def refused(convert, given, match):
    with pytest.raises(InputError, match=match):
        convert(given)


def test_errors_teach():
    refused(jaxtc.to_torch, jax.random.key(0), "key_data")
    refused(jaxtc.to_numpy, jax.random.key(0), "key_data")
    refused(jax.jit(jaxtc.to_torch), jnp.ones(2), "what the transformed function returns")
    refused(jax.jit(jaxtc.to_numpy), jnp.ones(2), "what the transformed function returns")
    for convert in (jaxtc.from_foreign, jaxtc.to_numpy, plain):
        refused(convert, torch.ones(2).to_sparse(), "to_dense")
        refused(convert, torch.ones(2, device="meta"), "meta")
        refused(convert, torch.ones(2).to(torch.float8_e4m3fn), "bfloat16")
    refused(jaxtc.to_torch, np.array(["text"]), "no dtype")


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'jaxtc\[parity\]'.*to_numpy"):
        jaxtc.to_torch(jnp.ones(2))
    assert jaxtc.to_numpy(jnp.ones(2)).tolist() == [1, 1]
    assert jaxtc.from_foreign(np.ones(2, np.float32)).tolist() == [1, 1]


def test_torch_is_not_imported_for_nothing():
    script = (
        "import sys, numpy as np, jax.numpy as jnp, jaxtc\n"
        "jaxtc.to_numpy(jnp.ones(2)); jaxtc.from_foreign(np.ones(2, np.float32))\n"
        "jaxtc.Add([1.0, 2.0], site='embed', position=[0, 1])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == 0


# The doors: what is given as torch does what it does as NumPy, to the last bit.


def same(make, *, of=batch.logits):
    """``of(make(array))`` with arrays of NumPy, and of torch in the ways that tensors come."""
    expected = of(make(np.asarray))
    for other in (torch.tensor, lambda x: grad(torch.tensor(x)), by_dlpack):
        np.testing.assert_array_equal(np.asarray(of(make(other))), np.asarray(expected))
    return expected


def by_dlpack(array):
    return OtherLibrary(np.array(array))


def grad(tensor):
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


EDITS = {
    "value": lambda a: jaxtc.Add(a(VECTOR), site="layers.1.resid_post"),
    "scalar": lambda a: jaxtc.Scale(a(np.float32(2.5)), site="mlp_out"),
    "per layer": lambda a: jaxtc.SetTo(
        jaxtc.PerLayer(a(np.stack([VECTOR, 2 * VECTOR, 3 * VECTOR]))), site="mlp_out", position=-1
    ),
    "list of tensors": lambda a: jaxtc.Add([a(x) for x in VECTOR], site="embed"),
    "direction": lambda a: jaxtc.ProjectOut(a(VECTOR), site="resid_mid"),
    "targets": lambda a: jaxtc.Zero(
        site="attn_heads", layer=a(np.array([0, 2])), head=a(np.array(1)), row=a(np.array([0, 1])),
        position=a(np.array([-1, 0])),
    ),
    "list of positions": lambda a: jaxtc.Zero(
        site="mlp_out", position=[a(np.array(0)), a(np.array(-1))]
    ),
    "slice": lambda a: jaxtc.Zero(site="mlp_out", position=slice(a(np.array(1)), None)),
    "token": lambda a: jaxtc.Zero(site="mlp_out", row=0, position=Token(a(np.array(5)))),
    "mask": lambda a: jaxtc.Add(
        a(VECTOR), site="mlp_out", row=0, position=a(np.arange(9) % 2 == 0)
    ),
    "feature": lambda a: unspared.SetFeature(
        tiny.transcoder(1), feature=a(np.array([3, 7])), value=a(np.float32([2, 4]))
    ),
    "seed": lambda a: jaxtc.Noise(a(np.array(3)), a(np.float32(0.5)), site="embed"),
    "rows": lambda a: jaxtc.Copy(from_row=a(np.array([1, 1, 1])), site="embed", position=[0]),
}  # fmt: skip


@pytest.mark.parametrize("make", EDITS.values(), ids=EDITS)
def test_edits_take_tensors(make):
    assert not np.array_equal(same(make), batch.logits())


def test_edits_take_bfloat16_tensors():
    wide = torch.tensor(VECTOR).to(torch.bfloat16)
    expected = batch.logits(jaxtc.Add(wide.float().numpy(), site="embed"))
    np.testing.assert_array_equal(batch.logits(jaxtc.Add(wide, site="embed")), expected)


def test_errors_of_edits_are_those_of_arrays():
    with pytest.raises(EditError, match=r"a value of shape \(7,\).*embed"):
        batch.logits(jaxtc.Add(torch.zeros(7), site="embed"))
    with pytest.raises(EditError, match="position 12 lies outside"):
        batch.logits(jaxtc.Zero(site="embed", position=torch.tensor([12])))


def test_sweeps_take_tensors():
    def sweep(a):
        edits = [jaxtc.Scale(jaxtc.Over(a(np.float32([0, 1, 2]))), site="mlp_out",
                             layer=jaxtc.Over(a(np.array([0, 2]))))]  # fmt: skip
        return jaxtc.sweep(tiny.model(), batch.PROMPTS, edits).values

    same(lambda a: a, of=sweep)


def test_prompts_take_tensors():
    padded = np.zeros((3, 9), np.int64)
    for row, prompt in zip(padded, batch.PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array(batch.LENGTHS)
    expected = batch.logits()
    for a in (np.asarray, torch.tensor, by_dlpack):
        found = batch.run(prompts=a(padded), lengths=a(lengths)).logits
        np.testing.assert_array_equal(found, expected)
        rows = [a(np.array(prompt)) for prompt in batch.PROMPTS]
        np.testing.assert_array_equal(batch.run(prompts=rows).logits, expected)
    with pytest.raises(InputError, match="Token id 4294967296"):
        batch.run(prompts=torch.tensor([2, 2**32]))


def test_the_module_itself_takes_tensors():
    model = tiny.model()
    ids, places = torch.tensor([[2, 5, 7]]), torch.tensor([[0, 1, 2]])
    ours, _ = model(jnp.asarray(ids.numpy()))
    theirs, _ = model(ids, positions=places, logits_at=torch.tensor([1]))
    np.testing.assert_allclose(np.asarray(theirs[:, 0]), np.asarray(ours[:, 1]), rtol=1e-5)


def test_stop_tokens_may_be_tensors():
    model = tiny.model()
    tokens = jaxtc.generate(model, [[2, 5]], 6, stop=()).tokens[0]
    for stop in (torch.tensor([tokens[2]]), torch.tensor(tokens[2]), jnp.array([tokens[2]])):
        found = jaxtc.generate(model, [[2, 5]], 6, stop=stop).tokens[0]
        assert found == tokens[: tokens.index(tokens[2]) + 1]
    for stop in (torch.tensor([1.5]), torch.tensor([[1]]), torch.tensor([-1])):
        with pytest.raises(InputError, match="expected token ids"):
            jaxtc.generate(model, [[2, 5]], 6, stop=stop)


def test_pictures_take_tensors():
    pytest.importorskip("matplotlib").use("Agg")
    from jaxtc import plots

    values = torch.arange(12.0).reshape(3, 4)
    expected = plots.heat_map(values.numpy()).images[0].get_array()
    for tensor in (values.bfloat16(), values.clone().requires_grad_()):
        drawn = plots.heat_map(tensor).images[0].get_array()
        np.testing.assert_array_equal(drawn, expected)


def test_transcoders_take_tensors():
    made, x = tiny.transcoder(0), RANDOM.standard_normal((2, 5, D)).astype(np.float32)
    same(lambda a: a(x), of=made)
    same(lambda a: a(x), of=made.encode)
    features = same(lambda a: a(x), of=lambda x: made.encode_sparse(x, 50).values)
    assert (features > 0).any()
    same(lambda a: a(np.asarray(made.encode(x))), of=made.decode)
    sparse = made.encode_sparse(x, 50)
    np.testing.assert_array_equal(
        made.decode_sparse(jaxtc.to_torch(sparse)), made.decode_sparse(sparse)
    )


def test_metrics_take_tensors():
    y, guess = RANDOM.standard_normal((2, 2, 5, D)).astype(np.float32)
    mask = RANDOM.integers(0, 2, (2, 5)) > 0
    same(lambda a: (a(y), a(guess), a(mask)), of=lambda x: metrics.FVU().update(*x).fvu)
    same(lambda a: (a(y[0]), a(guess[0])), of=lambda x: metrics.notebook_score(*x))
    same(lambda a: (a(y), a(guess)), of=lambda x: metrics.relative_error(*x))
    same(lambda a: a(y), of=lambda x: metrics.FeatureStatistics(D).update(x).counts)
    same(lambda a: (a(y[..., 0]), a(mask)), of=lambda x: metrics.Mean().update(*x).mean)
    same(lambda a: a(np.array([[1, 2], [3, 1]])), of=lambda x: metrics.special_token_mask(x, [1]))
    ids = RANDOM.integers(0, D, (2, 5))
    same(lambda a: (a(y), a(ids)), of=lambda x: metrics.next_token_loss(*x))
    half = torch.tensor(y).to(torch.bfloat16)
    assert metrics.FVU().update(half, guess).fvu == metrics.FVU().update(half.float(), guess).fvu


def test_reducers_and_scores_take_tensors():
    directions = RANDOM.standard_normal((2, D)).astype(np.float32)

    def project(a):
        kept = batch.run(capture={"x": Project("layers.1.resid_post", a(directions))})
        return kept.activations["x"]

    same(lambda a: a, of=project)
    tokens, others = np.array([4, 5, 6]), np.array([7, 8, 9])
    result = batch.run(logits="last")
    same(lambda a: scores.LogitDifference(a(tokens), a(others)), of=lambda score: score(result))

    def sweep(a):
        edits = [jaxtc.Scale(jaxtc.Over([0.0, 2.0]), site="mlp_out")]
        of = scores.LogProbability(a(tokens))
        return jaxtc.sweep(tiny.model(), batch.PROMPTS, edits, of=of).values

    same(lambda a: a, of=sweep)


def test_a_tensor_written_to_afterwards_changes_nothing():
    value = torch.ones(D)
    result = batch.logits(jaxtc.Add(value, site="embed"))
    value.fill_(1e6)
    np.testing.assert_array_equal(result, batch.logits(jaxtc.Add(np.ones(D), site="embed")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sign_or_conjugation_that_torch_has_not_applied_yet_counts(dtype):
    x = torch._neg_view(torch.arange(3, dtype=getattr(torch, dtype)))
    for convert in (jaxtc.from_foreign, jaxtc.to_numpy):
        np.testing.assert_array_equal(np.asarray(convert(x), np.float32), [0, -1, -2])
    z = torch.complex(torch.ones(2), torch.ones(2)).conj()
    np.testing.assert_array_equal(jaxtc.from_foreign(z.imag[0]), -1)
