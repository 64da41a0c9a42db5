import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxtc
from jaxtc.model.config import Gemma2Config
from jaxtc.sharding.mesh import make_mesh, mesh_of, mesh_sizes, shard, show
from jaxtc.sharding.rules import CACHE, LETTERS, RULES, ShardingError, partition, variables
from jaxtc.tap.sites import SITES
from tests.support import tiny

SIZES = {
    "2b": dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
               num_attention_heads=8, num_key_value_heads=4, head_dim=256),
    "27b": dict(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
                num_attention_heads=32, num_key_value_heads=16, head_dim=128),
}  # fmt: skip


def abstract(name: str) -> jaxtc.Gemma2:
    return jaxtc.Gemma2.abstract(Gemma2Config(vocab_size=256000, **SIZES[name]))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,model=4", {"data": 2, "model": 4}),
        (" model = 8 ", {"model": 8}),
        ("model=1,data=16", {"model": 1, "data": 16}),
    ],
)
def test_a_mesh_is_written_as_sizes(text, sizes):
    assert mesh_sizes(text) == sizes
    assert mesh_sizes(show(sizes)) == mesh_sizes(sizes) == sizes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected sizes such as"),
        ("8", "'8'"),
        ("data=2,,model=4", "''"),
        ("data=2;model=4", "data=2;model=4"),
        ("data=two", "data=two"),
        ("data=2,data=4", "twice"),
        ("batch=2", "'batch'"),
        ("modle=2", "Did you mean 'model'"),
        ("data=0", "0 devices"),
        ("data=-2", "-2 devices"),
        ("data=" + "9" * 5000, "expected sizes"),
        (None, "expected sizes"),
    ],
)
def test_what_is_no_mesh_is_refused(text, told):
    with pytest.raises(ShardingError, match=told):
        mesh_sizes(text)


@pytest.mark.parametrize("sizes", [{}, {"data": True}, {"model": 2.0}, {"pipe": 2}])
def test_sizes_that_are_no_mesh_are_refused(sizes):
    with pytest.raises(ShardingError):
        make_mesh(sizes)


def test_a_mesh_has_automatic_axes_and_the_first_devices():
    mesh = make_mesh("data=1,model=1")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert make_mesh(mesh) is mesh
    assert mesh.devices.ravel().tolist() == jax.devices()[:1]


def test_more_devices_than_there_are():
    with pytest.raises(ShardingError, match=r"takes 640 devices.*jax_num_cpu_devices', 640"):
        make_mesh("data=10,model=64")


def test_letters_and_rules_cover_every_site_and_parameter():
    assert set(LETTERS.values()) == set(RULES)
    assert {letter for site in SITES for letter in site.axes.split()} <= {*LETTERS, "1"}
    transcoder = jaxtc.Transcoder.abstract(8, 16)
    for module in (abstract("2b"), transcoder):
        for _, param in variables(module):
            assert set(param.logical_axes) <= set(RULES)


@pytest.mark.parametrize("name", SIZES)
def test_each_parameter_of_the_model_has_its_place(name):
    """Megatron's layout: what heads and neurons read is whole, what they write is split."""
    expected = {
        "embed.weight": ("model",), "attn.q": ("model",), "attn.k": ("model",),
        "attn.v": ("model",), "attn.o": (None, "model"), "mlp.gate": ("model",),
        "mlp.up": ("model",), "mlp.down": (None, "model"),
    }  # fmt: skip
    for path, param in variables(abstract(name)):
        spec = partition(param.logical_axes, param.shape, {"data": 2, "model": 4}, name=path)
        short = path.split(".", 2)[2] if path.startswith("layers") else path
        assert spec == PartitionSpec(*expected.get(short, ())), path


def test_transcoders_are_split_by_feature():
    told = {
        path: partition(param.logical_axes, param.shape, {"model": 4})
        for path, param in variables(jaxtc.Transcoder.abstract(6, 16))
    }
    split = {"W_enc": (None, "model"), "W_dec": ("model",), "b_enc": ("model",)}
    split |= {"threshold": ("model",), "b_dec": ()}
    assert told == {key: PartitionSpec(*spec) for key, spec in split.items()}


def test_few_kv_heads_are_held_whole():
    shape = (4, 128, 2, 8)
    assert partition(CACHE, shape, {"data": 2, "model": 2}) == PartitionSpec("data", None, "model")
    assert partition(CACHE, shape, {"data": 2, "model": 8}) == PartitionSpec("data")
    with pytest.raises(ShardingError, match="kv_heads = 4"):
        partition(("kv_heads",), (4,), {"model": 6})


def test_rows_that_do_not_divide_are_held_whole():
    assert partition(("batch", "tokens"), (3, 16), {"data": 2}) == PartitionSpec()


def test_what_does_not_divide_is_refused_with_what_would():
    with pytest.raises(ShardingError) as caught:
        partition(("vocab", "embed"), (256002, 8), {"model": 4}, name="embed.weight")
    told = str(caught.value)
    for part in (
        "embed.weight",
        "vocab = 256002",
        "'model'",
        "model=1 or 2 or 3 or 6",
        "RULES | {",
    ):
        assert part in told
    assert (
        partition(("vocab", "embed"), (256002, 8), {"model": 4}, dict(RULES) | {"vocab": None})
        == PartitionSpec()
    )


def test_rules_are_checked():
    with pytest.raises(ShardingError, match="Did you mean 'vocab'"):
        partition(("vocab",), (8,), {"model": 4}, {"vocabs": "model"})
    with pytest.raises(ShardingError, match="both 'heads' and 'embed'"):
        partition(("heads", "embed"), (8, 8), {"model": 4}, dict(RULES) | {"embed": "model"})


def test_a_module_in_memory_goes_onto_a_mesh_and_back():
    model, mesh = tiny.model(), make_mesh("model=1")
    moved = shard(model, mesh)
    assert mesh_of(moved) is mesh
    assert mesh_of(model) is None
    for (path, a), (_, b) in zip(variables(model), variables(moved), strict=True):
        assert (a[...] == b[...]).all() and a.logical_axes == b.logical_axes, path
