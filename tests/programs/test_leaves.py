"""The flat list of a model's arrays: always what jax.tree.leaves says, or an error."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc.errors import SiteError
from jaxtc.model.gemma2 import MLP, Norm
from jaxtc.programs import leaves as dispatch
from jaxtc.programs.leaves import parameters, rebuild
from tests.support import tiny


def fresh(seed=0):
    """A model of its own, read once: what follows goes the quick way where it can."""
    model = jaxtc.Gemma2(tiny.config(), rngs=nnx.Rngs(seed))
    same(parameters(model), model)
    assert model in dispatch._READERS
    return model


def same(found, model):
    expected = jax.tree.flatten(model)[0]
    assert isinstance(found, list) and len(found) == len(expected) > 0
    assert all(a is b for a, b in zip(found, expected, strict=True))


def quick(model):
    return dispatch._READERS[model](model)


def test_the_leaves_in_their_order_without_flattening(monkeypatch):
    model = fresh()
    expected = jax.tree.leaves(model)
    monkeypatch.setattr(jax.tree, "flatten", None)  # whoever calls it fails
    found = parameters(model)
    assert all(a is b for a, b in zip(found, expected, strict=True))
    assert len({id(x) for x in found}) == len(found)


def test_more_than_ten_layers_are_in_the_order_of_numbers():
    config = jaxtc.Gemma2Config(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=12, head_dim=2,
        num_attention_heads=1, num_key_value_heads=1, query_pre_attn_scalar=2, sliding_window=4,
        max_position_embeddings=8,
    )  # fmt: skip
    model = jaxtc.Gemma2(config, rngs=nnx.Rngs(0))
    parameters(model)
    same(quick(model), model)


def set_in_place(model):
    model.layers[0].mlp.gate[...] = jnp.ones_like(model.layers[0].mlp.gate[...])


def set_other_shape(model):
    model.layers[0].mlp.gate.set_value(jnp.ones((2, 3)))


def nnx_update(model):
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model)))


def another_parameter(model):
    model.layers[1].attn.q = nnx.Param(
        jnp.zeros(model.layers[1].attn.q.shape), logical_axes=("heads", "head_dim", "embed")
    )


def equal_parameter_of_one_number(model):
    """``==`` of these two is true, and yet they are two."""
    model.final_norm.weight = nnx.Param(jnp.zeros((1,)), logical_axes=("embed",))
    same(parameters(model), model)
    model.final_norm.weight = nnx.Param(jnp.zeros((1,)), logical_axes=("embed",))


def another_module(model):
    model.layers[2].mlp = MLP(tiny.config(), jnp.float32, nnx.Rngs(5))


def another_item_of_the_list(model):
    model.layers[1] = jaxtc.Gemma2(tiny.config(), rngs=nnx.Rngs(6)).layers[0]


def swapped_layers(model):
    model.layers[0], model.layers[2] = model.layers[2], model.layers[0]


def swapped_parameters(model):
    mlp = model.layers[0].mlp
    mlp.gate, mlp.up = mlp.up, mlp.gate


def shared_parameter(model):
    model.layers[0].mlp.up = model.layers[0].mlp.gate


def removed_and_put_back(model):
    gate = model.layers[0].mlp.gate
    del model.layers[0].mlp.gate
    model.layers[0].mlp.gate = gate


def numpy_inside(model):
    model.final_norm.weight.set_raw_value(np.ones(24, np.float32))


def equal_configuration(model):
    model.layers[0].attn.config = jaxtc.Gemma2Config.from_dict(tiny.config().to_dict())


ALLOWED = [
    set_in_place, set_other_shape, nnx_update, another_parameter, equal_parameter_of_one_number,
    another_module, another_item_of_the_list, swapped_layers, swapped_parameters,
    shared_parameter, removed_and_put_back, numpy_inside, equal_configuration,
]  # fmt: skip


@pytest.mark.parametrize("change", ALLOWED, ids=lambda f: f.__name__)
def test_what_was_replaced_is_never_stale(change):
    model = fresh()
    before = parameters(model)
    change(model)
    found = parameters(model)
    same(found, model)
    unchanged = (removed_and_put_back, equal_configuration)
    assert any(a is not b for a, b in zip(found, before, strict=True)) != (change in unchanged)
    same(parameters(model), model)  # and once more, from what is remembered now


def added_array(model):
    model.extra = nnx.Param(jnp.zeros(3))


def added_number(model):
    model.layers[0].mlp.extra = 3


def removed_parameter(model):
    del model.layers[0].mlp.gate


def renamed_parameter(model):
    norm = model.final_norm
    weight = norm.weight
    del norm.weight
    norm.gain = weight


def another_constant(model):
    model.final_norm.eps = 1e-3


def longer_list(model):
    model.layers.append(jaxtc.Gemma2(tiny.config(), rngs=nnx.Rngs(6)).layers[0])


def shorter_list(model):
    del model.layers[2]


def another_kind_of_parameter(model):
    model.final_norm.weight = nnx.BatchStat(jnp.zeros(24), logical_axes=("embed",))


def wrapped_module(model):
    class Loud(Norm):
        pass

    model.final_norm = Loud(tiny.config(), jnp.float32, nnx.Rngs(0))


def changed_class(model):
    class Loud(Norm):
        pass

    object.__setattr__(model.final_norm, "__class__", Loud)


def several_arrays_in_one(model):
    model.final_norm.weight.set_raw_value({"a": jnp.zeros(2), "b": jnp.zeros(2)})


def no_array(model):
    model.final_norm.weight.set_raw_value(None)


def hook_in_metadata(model):
    model.final_norm.weight.set_metadata(on_get_value=lambda variable, value: value * 2)


REFUSED = [
    added_array, added_number, removed_parameter, renamed_parameter, another_constant, longer_list,
    shorter_list, another_kind_of_parameter, wrapped_module, changed_class, several_arrays_in_one,
    no_array, hook_in_metadata,
]  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_another_structure_is_refused_every_time(change):
    model = fresh()
    change(model)
    for _ in range(2):
        with pytest.raises(SiteError, match="changed after it was built"):
            parameters(model)


def test_a_refused_change_taken_back_is_fine_again():
    model = fresh()
    eps = model.final_norm.eps
    model.final_norm.eps = 0.5
    with pytest.raises(SiteError):
        parameters(model)
    model.final_norm.eps = eps
    same(parameters(model), model)


def test_shapes_in_place_of_arrays():
    model = jaxtc.Gemma2.abstract(tiny.config())
    same(parameters(model), model)
    same(parameters(model), model)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in quick(model))


def test_a_model_that_is_an_argument_of_jit_or_grad():
    model = fresh()
    seen = []

    def total(model, scale):
        same(parameters(model), model)
        leaves = parameters(model)
        same(leaves, model)
        seen.append(leaves)
        return scale * sum((x**2).sum() for x in leaves)

    expected = sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(model))
    np.testing.assert_allclose(jax.jit(total)(model, 1.0), expected, rtol=1e-5)
    slopes = jax.grad(total)(model, 2.0)
    for slope, leaf in zip(jax.tree.leaves(slopes), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(slope, 4 * leaf, rtol=1e-5)
    assert all(isinstance(x, jax.core.Tracer) for leaves in seen for x in leaves)
    same(parameters(model), model)  # no tracer stayed behind


def test_stacked_models_under_vmap():
    models = [fresh(seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    same(parameters(stacked), stacked)
    found = jax.vmap(lambda model: sum(x.sum() for x in parameters(model)))(stacked)
    expected = [sum(float(x.sum()) for x in jax.tree.leaves(model)) for model in models]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_model_is_freed_with_its_arrays():
    model = fresh()
    array = weakref.ref(model.layers[0].mlp.gate.get_raw_value())
    replaced = weakref.ref(model.embed.weight.get_raw_value())
    another_of_embed = jnp.zeros(model.embed.weight.shape)
    model.embed.weight = nnx.Param(another_of_embed, logical_axes=("vocab", "embed"))
    gc.collect()
    assert replaced() is None, "the remembered layout keeps a replaced parameter"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and array() is None


def test_rebuild_gives_the_model_back():
    model = fresh()
    again = rebuild(model.config, parameters(model))
    assert jax.tree.structure(again) == jax.tree.structure(model)
    same(parameters(again), model)


def test_many_threads_read_and_replace_their_own_models():
    shared, wrong = fresh(), []

    def work(seed):
        own = jaxtc.Gemma2(tiny.config(), rngs=nnx.Rngs(seed))
        for step in range(30):
            own.layers[step % 3].mlp.down[...] = jnp.full(own.layers[0].mlp.down.shape, step)
            for model in (own, shared):
                found, expected = parameters(model), jax.tree.leaves(model)
                if any(a is not b for a, b in zip(found, expected, strict=True)):
                    wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
