"""The guards that code bases set in jax: everything public runs under each, to the same numbers."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc import Over, reducers
from jaxtc.embedded.train_model import ModelRecipe, train_model
from jaxtc.training.harvest import Harvest
from jaxtc.training.transcoders import TranscoderRecipe, train_transcoders
from jaxtc.transcoders.activations import BatchTopK, TopK
from tests.edits.test_compiled import in_order, whole
from tests.embedded.test_embedded import tiny_batches, tiny_config
from tests.support import tiny
from tests.support.batch import PROMPTS, D

SITES = [site.name for site in jaxtc.SITES]
OF = jaxtc.scores.LogitDifference(7, 8)
PAIR = [2, 5, 9, 7, 11, 4], [2, 5, 10, 7, 11, 4]
PAIRS = [PAIR[0], [2, 9, 4]], [PAIR[1], [2, 10, 4]]


GUARDS = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "NaN": lambda: jax.debug_nans(True),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "x64": lambda: jax.enable_x64(True),
}


def kept(result):
    return result.activations, result.logits


def captures():
    return kept(jaxtc.run(tiny.model(), PROMPTS, capture=SITES))


def last_logits():
    return jaxtc.run(tiny.model(), PROMPTS, logits="last").logits


@functools.cache
def every_kind():
    return in_order(whole())


def edits():
    found = jaxtc.run(tiny.model(), PROMPTS, edits=every_kind(), capture="resid_post")
    return kept(found)


def reduced():
    asked = [
        reducers.At("resid_post"), reducers.At("v", [0, -1]), reducers.Mean("mlp_act"),
        reducers.Norm("q"), reducers.TopK("logits", 3), reducers.Project("embed", np.eye(D)[:2]),
        reducers.Features(transcoder=tiny.transcoder(1), capacity=50),
    ]  # fmt: skip
    return jaxtc.run(tiny.model(), PROMPTS, capture=asked, logits=None).activations.reduced


def generated():
    options = dict(capture=["mlp_out", reducers.Norm("resid_mid")], stop=())
    edit = jaxtc.Add(np.ones(D), site="resid_mid", layer=1, position="new")
    found = jaxtc.generate(tiny.model(), PROMPTS, 3, edits=[edit], **options)
    sampled = jaxtc.generate(tiny.model(), PROMPTS, 2, temperature=0.7, top_k=5, top_p=0.9, seed=3)
    return found.tokens, found.activations, sampled.tokens


def swept():
    edit = jaxtc.Zero(site="mlp_out", layer=Over(range(3)), position=Over([0, -1]))
    noise = jaxtc.Noise(Over([1, 2]), 0.5, site="embed", position=-1)
    return [jaxtc.sweep(tiny.model(), PROMPTS, [one], of=OF).values for one in (edit, noise)]


def patched():
    return vars(
        jaxtc.activation_patching(tiny.model(), *PAIRS, of=OF, site="attn_heads", heads=True)
    )


def attributed():
    found = jaxtc.attribution_patching(tiny.model(), *PAIRS, of=OF, sites=["resid_pre", "mlp_out"])
    return {name: one.recovered for name, one in found.items()}


def slopes():
    found = jaxtc.gradients(tiny.model(), PROMPTS, OF, SITES[:-2])
    return found.score, found.gradients


def of_values():
    """`jax.grad` and `jax.vmap` of our programs, and every reducer's slope."""
    model = tiny.model()

    def loss(vector, layer):
        edit = jaxtc.Add(vector, site="mlp_out", layer=layer)
        asked = {"size": reducers.Norm("resid_post")}
        found = jaxtc.run(model, PROMPTS, edits=[edit], capture=asked, logits="last")
        return OF(found).sum() + found.activations["size"].sum()

    layers = jax.device_put(np.arange(3, dtype=np.int32))
    vector = jax.device_put(np.zeros(D, np.float32))
    return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(vector, layers)


def scored():
    found = jaxtc.run(tiny.model(), PROMPTS)
    scores = OF, jaxtc.scores.Logit(7), jaxtc.scores.LogProbability([7, 8, 9])
    return [of(found) for of in scores], found.mask


def measured():
    metrics = jaxtc.metrics
    model, ids = tiny.model(), np.array(PAIR, np.int32)
    made, read = tiny.transcoder(1), jaxtc.run(model, ids, capture=["mlp_in_normed", "mlp_out"])
    x, y = (read.activations[f"layers.1.{site}"] for site in ("mlp_in_normed", "mlp_out"))
    a, mask = made.encode(x), ~metrics.special_token_mask(ids, [0, 1, 2])
    constant = metrics.FVU().update(np.ones((2, 3)), np.ones((2, 3)))
    statistics = metrics.FeatureStatistics(50).update(a, mask)
    statistics.update(made.encode_sparse(x, 50), mask)
    return [
        metrics.FVU().update(y, made.decode(a), mask).fvu, constant.explained_variance,
        statistics.l0, statistics.density, metrics.next_token_loss(read.logits, ids),
        metrics.relative_error(y, made(x)),
        metrics.notebook_score(*(jax.device_get(part)[:1] for part in (y, made(x)))),
    ]  # fmt: skip


@functools.cache
def variants():
    options = dict(layer=1, skip=True, rngs=nnx.Rngs(0))
    kinds = "jumprelu", "relu", TopK(4), BatchTopK()
    return [jaxtc.Transcoder(D, 50, activation=kind, **options) for kind in kinds]


def transcoders():
    x, found = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32), []
    for made in variants():
        sparse = made.encode_sparse(x, 50)
        a = made.encode(x)
        found.append([made(x), a, sparse, made.decode_sparse(sparse, x), made.decode(a, x)])
        edit = [jaxtc.Splice(made), jaxtc.ScaleFeature(made, [3, 4], 2.0)]
        found.append(jaxtc.run(tiny.model(), PROMPTS, edits=edit).logits)
    return found


def explained():
    made = [tiny.transcoder(0), tiny.transcoder(1)]
    found = jaxtc.explain(tiny.model(), tiny.tokenizer(), "the capital of texas is", made)
    return [(layer.fvu, [t.relative_error for t in layer.tokens]) for layer in found.layers]


def stored(folder):
    jaxtc.save_model(tiny.model(), folder / "model")
    jaxtc.save_transcoder(tiny.transcoder(1), folder / "params.npz")
    jaxtc.convert(folder / "model", folder / "orbax")
    jaxtc.save_checkpoint({1: tiny.transcoder(1)}, folder / "checkpoint")
    both = [jaxtc.load_model(folder / name, dtype="float32") for name in ("model", "orbax")]
    made = [
        jaxtc.load_transcoder(folder / name, layer=1, sites=None)
        if False
        else jaxtc.load_transcoder(folder / name, layer=1)
        for name in ("params.npz", "checkpoint")
    ]
    back = jaxtc.load_model(folder / "model", dtype="bfloat16")
    return jax.tree.leaves((both, made, back))


def planned():
    model = tiny.model()
    found = jaxtc.estimate(model, PROMPTS, capture=["mlp_out", reducers.TopK("logits", 2)])
    return str(found), str(jaxtc.plan(model.config, "data=2,model=1", length=20))


def warmed():
    return len(jaxtc.warm_up(tiny.model(), [3, 20], batch=2, capture="embed")) * 0


def made_and_read():
    x = jaxtc.from_foreign(np.arange(6, dtype=np.float32))
    model = jaxtc.shard(tiny.model(), "data=1,model=1")
    return jaxtc.to_numpy({"x": x}), jaxtc.run(model, PROMPTS, capture="mlp_out").activations


JOBS = {
    f.__name__: f
    for f in (
        captures, last_logits, edits, reduced, generated, swept, patched, attributed, slopes,
        of_values, scored, measured, transcoders, explained, planned, warmed, made_and_read,
    )
}  # fmt: skip


@functools.cache
def unguarded(name):
    return arrays(JOBS[name]())


def arrays(found):
    return jax.tree.map(lambda x: jax.device_get(x) if isinstance(x, jax.Array) else x, found)


def same(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(
                a.astype(np.float64), b.astype(np.float64), rtol=1e-5, atol=1e-5
            )
        elif isinstance(b, str):
            assert a == b
        elif not isinstance(b, float) or not (np.isnan(a) and np.isnan(b)):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("name", JOBS)
def test_runs_to_the_same_numbers(name, guard):
    expected = unguarded(name)
    with GUARDS[guard]():
        found = JOBS[name]()
    same(arrays(found), expected)


@pytest.mark.parametrize("guard", GUARDS)
def test_files(guard, tmp_path):
    expected = arrays(stored(tmp_path / "a"))
    with GUARDS[guard]():
        found = stored(tmp_path / "b")
    same(arrays(found), expected)


def trained():
    """A few steps of training, of the model and of transcoders, as `jaxtc embedded train` does."""
    model = train_model(tiny_config(), tiny_batches(), ModelRecipe(steps=3), log=quiet)
    recipe = TranscoderRecipe(features=16, target_l0=4, steps=3, batch=32, revive_every=2)
    harvest = Harvest(model, tiny_batches(stream=1), (0, 1), tokens=128)
    return jax.tree.leaves((model, train_transcoders(harvest, recipe, log=quiet)))


def quiet(line):
    pass


@pytest.mark.parametrize("guard", [name for name in GUARDS if name != "transfers"])
def test_training(guard):
    """Its programs are jax's own, started once; what they move is not guarded."""
    with GUARDS[guard]():
        found = trained()
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in found)
