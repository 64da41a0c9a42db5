"""On 8 simulated devices; test_mesh.py runs this file in a process that has them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxtc
from jaxtc.captures.reducers import Features, Reducer, TopK, register_reducer
from jaxtc.captures.request import understand
from jaxtc.model.prompts import prepare
from jaxtc.programs.call import Call
from jaxtc.programs.generate import _PREFILL, _STEP
from jaxtc.programs.leaves import parameters, placed
from jaxtc.programs.run import _run
from jaxtc.sharding.mesh import make_mesh, shard
from jaxtc.sharding.placement import Placement, mix_rows, placement_of, top_k
from jaxtc.sharding.rules import RULES, ShardingError, partition, variables
from jaxtc.transcoders.activations import TopK as Top
from jaxtc.weights.checkpoints import tree as checkpoint_tree
from jaxtc.weights.checkpoints.sidecar import read_sidecar
from tests.scale import lab
from tests.support import cross_layer, unspared
from tests.weights.adapters.cases import DATA
from tests.weights.adapters.test_merged import doubled, write_base

MESHES = ("data=2,model=4", "model=8", "data=8")


def test_there_are_8_devices():
    assert jax.device_count() == 8


@pytest.fixture(scope="module")
def one():
    """What a single device computes, by name of the function of the lab."""
    held = {}

    def compute(name, *args, **options):
        key = name, str(sorted(options))
        if key not in held:
            held[key] = lab.numbers(getattr(lab, name)(*args, **options))
        return held[key]

    return compute


@pytest.fixture(scope="module")
def on():
    """(model, transcoder) on a mesh."""
    held = {}

    def place(mesh):
        if mesh not in held:
            held[mesh] = shard(lab.model(), mesh), shard(lab.transcoder(), mesh)
        return held[mesh]

    return place


@pytest.mark.parametrize("mesh", MESHES)
def test_run_with_captures_and_edits(mesh, one, on):
    expected = one("run_with_everything", lab.model(), lab.transcoder())
    found = lab.run_with_everything(*on(mesh))
    print(mesh, lab.check_same(found, expected))


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_generate(mesh, one, on):
    expected = one("generation", lab.model(), lab.transcoder())
    print(mesh, lab.check_same(lab.generation(*on(mesh)), expected))


def test_sampling_draws_the_same_tokens(on):
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3, "stop": ()}
    alone = jaxtc.generate(lab.model(), lab.ROWS[:2], 3, **options)
    assert jaxtc.generate(on("model=8")[0], lab.ROWS[:2], 3, **options).tokens == alone.tokens


@pytest.mark.parametrize("mesh", ["data=2,model=4", "data=8"])
def test_sweep(mesh, one, on):
    expected = one("sweep", lab.model(), lab.transcoder())
    print(mesh, lab.check_same(lab.sweep(*on(mesh)), expected))


@register_reducer()
class Summary(Reducer):
    """Of each prompt by itself, without padding; places itself on the mesh as edits do."""

    position: Any = -1
    reads = ("mlp_in_normed",)

    def reduce(self, x, context):
        if context.placement is not None:
            x = context.placement.constrain(x, ("batch", "tokens", "embed"))
        last = self.position.selects(context.positions)[..., None]
        return {"mean": x.mean(1), "last": (last * context.read("mlp_in_normed")).sum(1)}


@pytest.mark.parametrize("mesh", ["data=2,model=4", "data=8"])
def test_a_reducer_of_ones_own(mesh, on):
    def told(model):
        asks = dict(lengths=lab.LENGTHS, capture={"own": Summary("mlp_out")}, logits=None)
        over = jaxtc.Scale(jaxtc.Over([0.5, 2.0, 3.0]), site="embed")
        swept = jaxtc.sweep(model, lab.ROWS, [over], of=lambda r: r.activations["own"], **asks)
        found = jaxtc.run(model, lab.ROWS, **asks).activations["own"]
        return {f"run {k}": v for k, v in found.items()} | swept.values

    found, expected = told(on(mesh)[0]), lab.numbers(told(lab.model()))
    print(mesh, lab.check_same(found, expected))


def test_gradients(on):
    score = jaxtc.scores.Logit(7)
    alone = jaxtc.gradients(lab.model(), lab.ROWS, score, ["resid_post", "mlp_act"])
    many = jaxtc.gradients(on(MESHES[0])[0], lab.ROWS, score, ["resid_post", "mlp_act"])
    lab.check_same(_told(many), lab.numbers(_told(alone)))


def _told(found):
    kept = {f"a {name}": found.activations[name] for name in found.activations}
    return kept | {f"g {name}": found.gradients[name] for name in found.gradients}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_transcoder_by_itself(mesh, on):
    x = np.random.default_rng(2).normal(size=(4, 6, 24)).astype(np.float32)
    expected = lab.numbers(lab.dictionary(lab.transcoder(), x))
    assert expected["sparse"].count.max() > 32
    print(mesh, lab.check_same(lab.dictionary(on(mesh)[1], x), expected))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("activation", [Top(33), "batchtopk"], ids=str)  # 33 halves a pair of ties
def test_other_activations(mesh, activation):
    alone = lab.transcoder(activation=activation)
    model, many = shard(lab.model(), mesh), shard(alone, mesh)
    x = np.random.default_rng(2).normal(size=(4, 6, 24)).astype(np.float32)
    expected, found = lab.dictionary(alone, x), lab.dictionary(many, x)
    lab.check_same(found, lab.numbers(expected))
    assert np.array_equal(found["encode"] > 0, expected["encode"] > 0)
    edits = [unspared.Splice, lambda t: unspared.SetFeature(t, [3, 400], 2.0)]
    runs = [
        jaxtc.run(
            model, lab.ROWS, edits=[edit(t) for edit in edits],
            capture=["mlp_out", Features(transcoder=t, capacity=lab.FEATURES // 2)],
        )
        for model, t in ((lab.model(), alone), (model, many))
    ]  # fmt: skip
    told = [{"logits": r.logits} | {k: r.activations[k] for k in r.activations} for r in runs]
    lab.check_same(told[1], lab.numbers(told[0]))


@pytest.mark.parametrize("mesh", MESHES)
def test_top_k_breaks_ties_as_one_device_does(mesh):
    # Whole numbers from 0 to 3: nearly all of them are tied; NaN and signed zeros among them.
    x = np.random.default_rng(3).integers(0, 4, (8, 5, 64)).astype(np.float32)
    x[0, 0, 50], x[1, 1, ::3] = np.nan, -0.0
    place = Placement.of(make_mesh(mesh))
    axes = ("batch", "tokens", "features")
    given = jax.device_put(x, place.sharding(axes, x.shape))
    for k in (1, 5, 64):
        found = jax.jit(lambda x, k=k: top_k(x, k, place, axes))(given)
        wanted = jax.lax.top_k(x, k)
        assert np.array_equal(found[0], wanted[0], equal_nan=True)
        assert np.array_equal(found[1], wanted[1])


def test_top_k_has_the_gradient_of_one_device():
    x = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    weights = np.arange(5, dtype=np.float32)

    def score(x, place):
        return (top_k(x, 5, place, ("batch", "features"))[0] * weights).sum()

    wanted = jax.grad(score)(x, None)
    found = jax.jit(jax.grad(score), static_argnums=1)(x, Placement.of(make_mesh("data=2,model=4")))
    assert np.array_equal(found, wanted)


class _Told:
    """A jitted function that leaves its compiled text behind."""

    def __init__(self, jitted, texts):
        self.jitted, self.texts = jitted, texts

    def __call__(self, *args):
        if self.jitted.__name__ not in self.texts:
            self.texts[self.jitted.__name__] = self.jitted.lower(*args).compile().as_text()
        return self.jitted(*args)


def test_no_weight_is_ever_gathered(on, monkeypatch):
    """No collective has an operand or result as long as the features or the vocabulary."""
    model, transcoder = on("data=2,model=4")
    features = Features(transcoder=transcoder, capacity=16)
    asked = understand([TopK("logits", 5), features], 2)
    leaves, prompts = parameters(model), prepare(lab.ROWS, lab.CONFIG, lab.LENGTHS)
    place = placed(model, leaves)
    call = Call.of(lab.CONFIG, prompts, asked, lab.edits(transcoder), "last", place)
    texts = {"run": _run.lower(*call.on_mesh(leaves)).compile().as_text()}
    x = place.put_rows(np.ones((8, 4, 24), np.float32))
    sparse = jax.jit(lambda t, x: t.decode_sparse(t.encode_sparse(x, 16, placement=place)))
    texts["sparse"] = sparse.lower(transcoder, x).compile().as_text()
    assert placement_of(transcoder) == place
    with monkeypatch.context() as patched:
        for program in (_PREFILL, _STEP):
            patched.setattr(program, "_jitted", _Told(program._jitted, texts))
        jaxtc.generate(model, lab.ROWS, 3, edits=[unspared.Splice(transcoder)], stop=())
    assert len(texts) == 4
    top = shard(lab.transcoder(activation=Top(33)), "data=2,model=4")
    call = Call.of(lab.CONFIG, prompts, asked, lab.edits(top), "last", place)
    texts["top of a run"] = _run.lower(*call.on_mesh(leaves)).compile().as_text()
    texts["top"] = sparse.lower(top, x).compile().as_text()
    for name, text in texts.items():
        assert _gathered(text), name  # the few best of each part, at least
        assert not {lab.FEATURES, lab.CONFIG.vocab_size} & _gathered(text), name
    whole = jax.jit(lambda w: jax.lax.with_sharding_constraint(w, place.whole))
    text = whole.lower(transcoder.W_dec[...]).compile().as_text()
    assert lab.FEATURES in _gathered(text)  # so it would be seen


def _gathered(text: str) -> set[int]:
    """All sizes of all axes of what a program's devices send each other whole."""
    moved = re.findall(r"= \(?([^=]*?)\)? (?:all-gather|all-to-all|collective-permute)", text)
    shapes = [shape for line in moved for shape in re.findall(r"\[([\d,]*)\]", line)]
    return {int(size) for shape in shapes for size in shape.split(",") if size}


def test_another_value_layer_or_prompt_does_not_compile(on):
    model, transcoder = on(MESHES[0])
    vector = np.ones(24, np.float32)

    def calls(value, layer, rows, feature):
        edits = [
            jaxtc.Add(value, site="resid_mid", layer=layer),
            unspared.SetFeature(transcoder, feature=feature, value=2.0, layer=layer),
        ]
        jaxtc.run(model, rows, edits=edits, logits="last")
        jaxtc.generate(model, rows, 3, edits=edits, stop=())

    calls(vector, 0, lab.ROWS, 3)
    kept = jaxtc.run(model, lab.ROWS, capture="resid_mid").activations["layers.1.resid_mid"]
    with jaxtc.compiles() as found:
        calls(vector * 2, 1, lab.ROWS[:, :7], 400)
        calls(kept[0, 0], 1, lab.ROWS[::-1], 4)  # a value that lies on the mesh
        calls(jnp.ones(24), -1, lab.ROWS, 5)  # and one that lies on a single device
    assert not found, found


def test_a_compile_says_which_mesh(on):
    jaxtc.run(on("model=8")[0], lab.ROWS[:5], logits="last")
    with jaxtc.compiles() as found:
        jaxtc.run(on("data=8")[0], lab.ROWS[:5], logits="last")
    assert "on: a mesh of data=8" in found[0].because and "model=8" in found[0].because


def test_under_the_users_own_jit_the_mesh_is_given(on):
    model, _ = on(MESHES[0])
    mesh = make_mesh(MESHES[0])
    wanted = jaxtc.run(lab.model(), lab.ROWS, logits="last").logits

    @jax.jit
    def mine(model, rows):
        return jaxtc.run(model, rows, logits="last", mesh=mesh).logits

    assert lab.check_same({"": mine(model, jnp.asarray(lab.ROWS))}, {"": np.asarray(wanted)}) < 1e-6


def test_a_vmap_over_layers(on):
    def logits(model, layer):
        zero = jaxtc.Zero(site="mlp_out", layer=layer)
        return jaxtc.run(model, lab.ROWS, edits=[zero], logits="last").logits

    layers = jnp.arange(2)
    wanted = jax.vmap(lambda layer: logits(lab.model(), layer))(layers)
    found = jax.vmap(lambda layer: logits(on(MESHES[0])[0], layer))(layers)
    lab.check_same({"": found}, {"": np.asarray(wanted)})


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_holds_its_share(mesh, tmp_path):
    jaxtc.save_model(lab.model(), tmp_path / "model")
    jaxtc.save_transcoder(lab.transcoder(), tmp_path / "layer_1")
    many = jaxtc.load_model(tmp_path / "model", mesh=mesh)
    features = jaxtc.load_transcoder(tmp_path / "layer_1", mesh=mesh)
    sizes = make_mesh(mesh).shape
    for module, alone in ((many, lab.model()), (features, lab.transcoder())):
        for (name, found), (_, wanted) in zip(variables(module), variables(alone), strict=True):
            spec = partition(wanted.logical_axes, wanted.shape, sizes)
            parts = np.prod([sizes[axis] for axis in spec if axis], dtype=int)
            shards = found[...].addressable_shards
            assert found[...].sharding.spec == spec, name
            assert len(shards) == 8
            assert {s.data.nbytes for s in shards} == {wanted[...].nbytes // parts}, name
            assert np.array_equal(found[...], wanted[...]), name


def test_rules_of_ones_own_go_with_the_model(tmp_path):
    jaxtc.save_model(lab.model(), tmp_path / "model")
    rules = RULES | {"vocab": None, "heads": None, "kv_heads": None, "embed": "data"}
    model = jaxtc.load_model(tmp_path / "model", mesh="data=2,model=4", rules=rules)
    assert model.layers[0].mlp.down.sharding.spec == P("data", "model")
    place = placed(model, parameters(model))
    assert dict(place.rules) | {"batch": "data"} == dict(rules)
    wanted = np.asarray(jaxtc.run(lab.model(), lab.ROWS).logits)
    with pytest.raises(ShardingError, match="both 'batch' and 'embed'"):
        jaxtc.run(model, lab.ROWS)
    rules = RULES | {"vocab": None, "heads": None, "kv_heads": None}
    model = shard(lab.model(), "data=2,model=4", rules)
    result = jaxtc.run(model, lab.ROWS, capture="layers.0.q")
    assert result.activations["layers.0.q"].sharding.spec == P("data")
    lab.check_same({"": result.logits}, {"": wanted})


def test_activations_and_caches_lie_as_the_rules_say(on):
    model, _ = on(MESHES[0])
    kept = jaxtc.run(model, lab.ROWS, capture=["layers.0.q", "layers.0.mlp_act", "layers.0.k"])
    specs = {name: kept.activations[name].sharding.spec for name in kept.activations}
    assert specs["layers.0.q"] == P("data", None, "model")
    assert specs["layers.0.mlp_act"] == P("data", None, "model")
    assert kept.logits.sharding.spec == P("data", None, "model")
    assert specs["layers.0.k"] == P("data", None, "model")


def test_what_lies_elsewhere_is_refused_by_name(on):
    model, transcoder = on(MESHES[0])
    with pytest.raises(ShardingError, match=r"jaxtc.shard\(transcoder, mesh\)"):
        jaxtc.run(model, lab.ROWS, edits=[unspared.Splice(lab.transcoder())])
    with pytest.raises(ShardingError, match="another mesh, data=2,model=4"):
        jaxtc.run(model, lab.ROWS, mesh="model=8")
    with pytest.raises(ShardingError, match="lies on a single device"):
        jaxtc.generate(lab.model(), lab.ROWS, 2, mesh="model=8")
    alone = jax.device_put(lab.model(), jax.devices()[0])
    with pytest.raises(ShardingError, match="different devices"):
        jaxtc.run(alone, lab.ROWS, edits=[unspared.Splice(transcoder)])
    with pytest.raises(ShardingError, match=r"embed.weight has vocab = 251, which does not"):
        odd = jaxtc.Gemma2Config(**{**_sizes(), "vocab_size": 251})
        shard(jaxtc.Gemma2.abstract(odd), "model=8")


def _sizes():
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim",
    )  # fmt: skip
    return {name: getattr(lab.CONFIG, name) for name in names}


@pytest.mark.parametrize("small", [1000, 1 << 20], ids=["many chunks", "a chunk a shard"])
def test_saved_contents_are_the_same_whatever_the_mesh(on, small, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_tree, "CHUNK_BYTES", small)
    one = jaxtc.save_checkpoint(lab.model(), tmp_path / "one")
    for mesh in ("model=8", "data=2,model=4"):
        many = jaxtc.save_checkpoint(on(mesh)[0], tmp_path / mesh)
        assert read_sidecar(many).encode() == read_sidecar(one).encode()
        again = jaxtc.load_model(many, mesh="data=4,model=2", dtype="float32", verify=True)
        for (name, a), (_, b) in zip(variables(again), variables(lab.model()), strict=True):
            assert np.array_equal(a[...], b[...]), name
    saved = jaxtc.save_checkpoint({1: on("model=8")[1]}, tmp_path / "transcoders")
    again = jaxtc.load_transcoder(saved, mesh="model=4")
    assert again.W_enc.sharding.spec == P(None, "model")
    pairs = zip(jax.tree.leaves(again), jax.tree.leaves(lab.transcoder()), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_orbax_restores_a_saved_checkpoint_onto_a_mesh(on, tmp_path):
    saved = jaxtc.save_checkpoint(on("model=8")[0], tmp_path / "saved")
    mesh = make_mesh("data=2,model=4")
    wanted = dict(variables(lab.model()))

    def place(path, x):
        param = wanted[jax.tree_util.keystr(path, simple=True, separator=".")]
        spec = partition(param.logical_axes, x.shape, mesh.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.tree_util.tree_map_with_path(place, ocp.metadata(saved).metadata)
    found = ocp.load(saved, shapes)
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert np.array_equal(x, wanted.pop(name)[...]), name
    assert not wanted
    assert found["embed"]["weight"].sharding.spec == P("model")


def test_mixing_rows_by_parts():
    rng = np.random.default_rng(8)
    values, rows = rng.normal(size=(4, 3, 6)), rng.normal(size=(64, 5))
    ids, place = rng.integers(0, 64, (4, 3, 6)), Placement.of(make_mesh("model=8"))
    given = values.astype(np.float32), ids, rows.astype(np.float32)
    found = jax.jit(lambda *a: mix_rows(*a, place, "features"))(*given)
    wanted = (values[..., None] * rows[ids]).sum(-2)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-6


def test_the_programs_of_generate_hand_each_other_the_cache(on):
    """A cache laid out anew at each step would compile a step twice, and copy it."""
    before = _PREFILL.count, _STEP.count
    jaxtc.generate(on("model=8")[0], lab.ROWS[:7], 4, stop=())
    assert (_PREFILL.count, _STEP.count) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("name", ["plain", "dora", "dora-embedding", "resized", "tokens"])
@pytest.mark.parametrize("sizes", ["model=2", "data=2,model=4"])
def test_an_adapter_is_merged_shard_by_shard(name, sizes, tmp_path):
    base = write_base(tmp_path / "base", name)
    free = RULES | {"vocab": None} if name == "resized" else RULES
    given = {"base": base, "dtype": "float32"}
    with doubled(name):
        alone = jaxtc.load_model(DATA / name, **given)
    with doubled(name):
        spread = jaxtc.load_model(DATA / name, **given, mesh=sizes, rules=free)
    for (path, a), (_, b) in zip(variables(alone), variables(spread), strict=True):
        assert np.allclose(a[...], b[...], rtol=1e-6, atol=1e-7), path
        if path.endswith(("attn.o", "mlp.down", "mlp.up")):
            assert not b[...].sharding.is_fully_replicated, path


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_a_cross_layer_transcoder(mesh, on, tmp_path):
    arrays = cross_layer.arrays(len(lab.LAYERS), 24, lab.FEATURES, skip=True)
    folder = cross_layer.write(tmp_path / "clt", arrays, "mlp_in")
    alone, many = jaxtc.load_transcoders(folder), jaxtc.load_transcoders(folder, mesh=mesh)
    part = jaxtc.load_transcoder(folder, 1, mesh=mesh)
    sizes = make_mesh(mesh).shape
    for module, wanted in ((many, alone), (part, alone.layers[1])):
        for (name, found), (_, one) in zip(variables(module), variables(wanted), strict=True):
            spec = partition(one.logical_axes, one.shape, sizes)
            shards = {shard.data.nbytes for shard in found[...].addressable_shards}
            divided = np.prod([sizes[axis] for axis in spec if axis], dtype=int)
            assert shards == {one[...].nbytes // divided}, name
            assert np.array_equal(found[...], one[...]), name
        assert placement_of(module) is not None
    x = np.random.default_rng(2).normal(size=(len(lab.LAYERS), 4, 6, 24)).astype(np.float32)
    lab.check_same({"y": many(x)}, {"y": np.asarray(alone(x))})

    def run(model, whole):
        edits = [unspared.Splice(whole), unspared.SetFeature(whole, [3, 400], 2.0, layer=0)]
        capture = ["mlp_out", Features(transcoder=whole.layers[1], capacity=lab.FEATURES)]
        made = jaxtc.run(model, lab.ROWS, lengths=lab.LENGTHS, capture=capture, edits=edits)
        return {"logits": made.logits} | {n: made.activations[n] for n in lab.capture_of(made)}

    lab.check_same(run(on(mesh)[0], many), lab.numbers(run(lab.model(), alone)))
    saved = jaxtc.save_transcoder(many, tmp_path / "saved")
    for a, b in zip(*map(jax.tree.leaves, (jaxtc.load_transcoders(saved), alone)), strict=True):
        assert np.array_equal(a, b)
