"""Compiles are counted, timed, and explained in words; warming up leaves none to do."""

import dataclasses
import gc
import importlib
import logging
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc.errors import InputError
from jaxtc.programs.program import REMEMBERED, Compiles, Program, compiles
from jaxtc.programs.reasons import advised, differences, facts
from tests.support import tiny, unspared

D = tiny.config().hidden_size
LEAVES = [np.zeros(1, np.float32)]
REPEATS = advised("batch 2 (was 1)").patience


def double(x, scale=1.0):
    return 2 * x * scale


def program(name="double", function=double, **options):
    return Program(name, function, **options)


@dataclasses.dataclass(frozen=True)
class Key:
    config: object = "config"
    captures: tuple = ()
    logits: str = "all"
    slots: int = 16


class Model:
    """A program that depends on what those of the library do."""

    def __init__(self, name="run"):
        def model(key, leaves, tokens, edits, reducers):
            return tokens + 1

        self.program = Program(name, model, static_argnums=0)

    def __call__(self, batch=1, width=16, leaves=LEAVES, edits=(), reducers=(), **key):
        tokens = np.zeros((batch, width), np.int32)
        return self.program(Key(**key), leaves, tokens, edits, reducers)


# Counting


def test_a_compile_is_recorded_once_and_looked_into_only_then(monkeypatch):
    double, looked = program(), []
    module = importlib.import_module("jaxtc.programs.program")
    monkeypatch.setattr(module, "facts", lambda given: looked.append(1) or facts(given))
    with compiles() as found:
        assert double(jnp.ones(3)).tolist() == [2.0] * 3
        double(jnp.zeros(3))
        assert len(found) == len(looked) == 1
        double(jnp.ones(4))
    assert [one.because for one in found] == ["its first call", "x: float32[4] (was float32[3])"]
    assert [one.program for one in found] == ["double", "double"]
    assert all(0 < one.seconds < 60 for one in found)
    assert found.seconds == pytest.approx(found[0].seconds + found[1].seconds)
    assert double.count == 2


def test_seconds_leave_out_the_run_itself():
    began = []

    def wait(x):
        began.append(time.perf_counter())
        time.sleep(0.5)
        return x

    slow = program("slow", lambda x: jax.pure_callback(wait, x, x))
    start = time.perf_counter()
    with compiles() as found:
        jax.block_until_ready(slow(jnp.ones(3)))
    assert 0 < found.seconds <= began[0] - start


def test_a_numpy_array_after_a_jax_one_is_no_compile():
    double = program()
    with compiles() as found:
        double(jnp.ones(3))
        double(np.ones(3, np.float32))
    assert len(found) == 1


def test_a_call_inside_jit_is_part_of_that_program():
    double = program()
    with compiles() as found:
        jax.jit(lambda x: double(x))(jnp.ones(3))
        assert len(found) == 0
        double(jnp.ones(3))  # traced before, compiled only now
    assert len(found) == 1


def test_vmap_and_grad_are_counted():
    double = program()
    with compiles() as found:
        double(jnp.ones(()))
        for size in (2, 3, 3):
            jax.vmap(lambda x: double(x))(jnp.ones(size))
        assert len(found) == 3
        jax.grad(lambda x: double(x))(1.0)
    assert len(found) == 4
    assert found[1].because == "called: inside jax.vmap or jax.grad (was directly)"
    assert found[2].because.startswith("jax.vmap over another size")


def test_small_computations_while_tracing_are_not_counted():
    def busy(x):
        with jax.ensure_compile_time_eval():
            table = jnp.cumsum(jnp.arange(23.0) * 3)
        return x + table[5]

    busy = program("busy", busy)
    with compiles() as found:
        busy(1.0)
    assert len(found) == 1


def test_static_and_donated_arguments():
    @dataclasses.dataclass(frozen=True)
    class Power:
        power: int

    powers = program("power", lambda n, x: x**n.power, static_argnums=0, donate_argnums=1)
    with compiles() as found:
        for n in (2, 3, 2):
            x = jnp.full(3, 2.0)
            assert powers(Power(n), x).tolist() == [2.0**n] * 3
            assert x.is_deleted()
    assert [one.because for one in found] == ["its first call", "power 3 (was 2)"]


def test_an_error_while_tracing_is_the_users_and_no_compile():
    def fail(x):
        raise InputError("no")

    fail = program("fail", fail)
    with compiles() as found, pytest.raises(InputError, match="no"):
        fail(1.0)
    assert len(found) == 0


def test_nested_and_closed_collections():
    double = program()
    with compiles() as outer:
        double(jnp.ones(1))
        with compiles() as inner:
            double(jnp.ones(2))
        double(jnp.ones(3))
    double(jnp.ones(4))
    assert len(outer) == 3 and len(inner) == 1 and inner[0] is outer[1]


def test_a_collection_closes_when_its_body_raises():
    double = program()
    with pytest.raises(KeyError), compiles() as found:
        raise KeyError
    double(jnp.ones(1))
    assert len(found) == 0


def test_threads_are_seen_each_compile_once():
    double = program()

    def work(size):
        for _ in range(5):
            double(jnp.ones(size))

    with compiles() as found:
        threads = [threading.Thread(target=work, args=(size,)) for size in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == double.count == 6


def test_printing():
    found = Compiles()
    assert str(found) == "nothing was compiled"
    double = program("run")
    with compiles() as found:
        double(jnp.ones(1))
        double(jnp.ones(2))
    lines = str(found).splitlines()
    assert len(lines) == 2 and repr(found) == str(found)
    assert lines[1] == f"run compiled in {found[1].seconds:.2f} s: x: float32[2] (was float32[1])"


# Why


def why(before, now):
    """``because`` of the second of two calls."""
    model = Model()
    with compiles() as found:
        model(**before)
        model(**now)
    return found[1].because


def add(value, **where):
    return jaxtc.Add(value, site="resid_mid", **where)


V = np.ones(D, np.float32)
CASES = {
    "batch": (dict(batch=3), dict(batch=4), "batch 4 (was 3)"),
    "length": (dict(width=16), dict(width=48), "padded length 48 (was 16)"),
    "slots": (dict(slots=16), dict(slots=32), "slots 32 (was 16)"),
    "captures": (dict(captures=("a",)), dict(captures=("a", "b")), "captures: a, b (was a)"),
    "option": (dict(logits="all"), dict(logits="last"), "logits: last (was all)"),
    "value": (
        dict(edits=[add(V)]), dict(edits=[add(np.ones((3, D), np.float32))]),
        f"edits[0].value: float32[3, {D}] (was float32[{D}])",
    ),
    "dtype": (
        dict(edits=[add(np.float32(1))]), dict(edits=[add(1.0)]),
        "edits[0].value: weak float32[] (was float32[])",
    ),
    "target": (
        dict(edits=[add(V)]), dict(edits=[add(V, layer=np.array([1]))]),
        "edits[0].layer: int32[1] (was None)",
    ),
    "no target": (
        dict(edits=[add(V, layer=np.array([1]))]), dict(edits=[add(V)]),
        "edits[0].layer: None (was int32[1])",
    ),
    "second edit": (
        dict(edits=[add(V)]), dict(edits=[add(V), jaxtc.Detach(site="mlp_out")]),
        "edits: Add at resid_mid, Detach at mlp_out (was Add at resid_mid)",
    ),
}  # fmt: skip


def at(*positions):
    return jaxtc.reducers.At("resid_post", position=list(positions))


def test_reducers_are_described_by_what_they_hold():
    one, two, other = [at(1)], [at(1, 2)], [jaxtc.reducers.TopK("logits", 3)]
    said = why(dict(reducers=one), dict(reducers=two))
    assert said.startswith("reducers[0].position") and "[2] (was " in said
    said = why(dict(reducers=one), dict(reducers=other))
    assert said == "reducers: TopK at logits (was At at resid_post)"


@pytest.mark.parametrize("case", CASES)
def test_the_reason_in_words(case):
    before, now, expected = CASES[case]
    assert why(before, now) == expected


def test_nothing_visible():
    double = program()
    with compiles() as found:
        double(1.0)
        double._jitted.clear_cache()
        double(1.0)
    assert found[1].because == "jax forgot the program, or its settings or devices changed"


def test_other_weights_and_another_configuration():
    other = jaxtc.Gemma2Config.from_dict({**tiny.config().to_dict(), "sliding_window": 8})
    model = Model()
    with compiles() as found:
        model(config=tiny.config())
        model(config=tiny.config(), leaves=[jnp.zeros(1, jnp.bfloat16)])
        model(config=other)
    assert found[1].because == "weights: bfloat16 (was float32)"
    assert found[2].because == "another config"


def test_weights_that_are_traced_have_no_place():
    placed, model = [jnp.zeros(1)], Model()
    with compiles() as found:
        model(batch=1, leaves=placed)
        jax.vmap(lambda x: model(batch=2, leaves=[x]) * x)(jnp.zeros((2, 1)))
        model(batch=3, leaves=placed)
    assert "batch 2 (was 1)" in found[1].because and "batch 3 (was" in found[2].because
    assert not any("weights" in one.because for one in found)


def test_another_place_of_the_weights_is_a_reason():
    before = facts({"leaves": [jnp.zeros(1)]})
    [reason] = differences(before | {"weights on": "cpu:7"}, before)
    assert reason.startswith("weights on: cpu:7 (was ") and "put it on" in advised(reason).text


@jaxtc.register_edit()
class Calls(jaxtc.Edit):
    function: object

    def new(self, x, context):
        return self.function(x)


@jaxtc.register_edit("function")
class CallsStatic(Calls):
    pass


@pytest.mark.parametrize("kind", [Calls, CallsStatic])
def test_a_new_function_object_is_named(kind):
    def edit():
        plain = lambda x: x  # noqa: E731
        given = plain if kind is CallsStatic else jax.tree_util.Partial(plain)
        return kind(given, site="mlp_out")

    same, other = edit(), edit()
    model = Model()
    with compiles() as found:
        for given in (same, same, other):
            model(edits=[given])
    assert len(found) == 2
    assert found[1].because == (
        "edits[0].function: another function object, <lambda>: define it once outside the loop"
    )


def test_a_function_in_place_of_a_score():
    score = jaxtc.scores.Logit(3)

    def plain(result):
        return result

    of = program("sweep", lambda of: 1.0)
    with compiles() as found:
        two = jaxtc.scores.Logit(np.int32([3, 4]))
        for given in (score, two, jax.tree_util.Partial(plain), score):
            of(given)
    assert [one.because for one in found[1:]] == [
        "of.token: int32[2] (was weak int32[])",
        "of: another function object, plain: define it once outside the loop",
    ]  # fmt: skip


@jaxtc.register_edit("how")
class Styled(jaxtc.Edit):
    how: str

    def new(self, x, context):
        return x


def test_another_static_field():
    one, two = Styled("a", site="mlp_out"), Styled("b", site="mlp_out")
    assert why(dict(edits=[one]), dict(edits=[two])) == "edits[0].how: b (was a)"
    both = why(dict(edits=[one], batch=1), dict(edits=[two], batch=2))
    assert both == "batch 2 (was 1); edits[0].how: b (was a)"


def test_shapes_that_follow_are_not_repeated():
    def step(tokens, cache):
        return tokens

    step = program("step", step)
    with compiles() as found:
        for batch, slots in ((1, 4), (2, 4), (2, 8)):
            step(np.ones(batch), {"k": np.ones((batch, slots))})
    assert [one.because for one in found[1:]] == [
        "batch 2 (was 1)", "cache['k']: float32[2, 8] (was float32[2, 4])",
    ]  # fmt: skip


def test_the_nearest_earlier_call_is_compared_with():
    model = Model()
    calls = [dict(batch=1, width=16), dict(batch=8, width=64), dict(batch=1, width=32)]
    with compiles() as found:
        for call in calls:
            model(**call)
    assert found[2].because == "padded length 32 (was 16)"


def test_the_record_of_earlier_calls_is_bounded_and_holds_no_array():
    double = program()
    for size in range(1, REMEMBERED + 4):
        double(np.ones(size))
    assert len(double._before) == REMEMBERED
    model, made = Model(), jax.tree.map(jnp.copy, tiny.transcoder(1))
    array = weakref.ref(made.W_enc[...])
    model(edits=[unspared.Splice(made)], leaves=[made.W_enc[...]])
    del made
    gc.collect()
    assert array() is None


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Opaque:
    """A pytree whose children have no names."""

    array: object
    how: str

    def tree_flatten(self):
        return (self.array,), self.how

    @classmethod
    def tree_unflatten(cls, how, children):
        return cls(*children, how)


def test_a_pytree_of_another_make():
    said = why(dict(edits=[Opaque(V, "a")]), dict(edits=[Opaque(V[:2], "a")]))
    assert said.startswith("edits[0]") and f"float32[2] (was float32[{D}])" in said
    assert why(dict(edits=[Opaque(V, "a")]), dict(edits=[Opaque(V, "b")])).startswith("edits[0]:")


# The log


def test_each_compile_is_logged_and_one_warning_says_what_to_do(caplog):
    caplog.set_level(logging.INFO, "jaxtc")
    model = Model()
    for size in range(1, REPEATS + 4):
        model(batch=size)
        warned = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == (size > REPEATS)  # the first compile is no recompile
    infos = [r for r in caplog.records if r.levelno == logging.INFO and r.name == "jaxtc"]
    assert len(infos) == REPEATS + 3
    assert "batch 2 (was 1)" in infos[1].getMessage()
    message = warned[0].getMessage()
    assert "'run'" in message and "Give batches of one size" in message


def test_different_reasons_do_not_add_up_to_a_warning(caplog):
    model = Model()
    for reason in [{}, dict(batch=2), dict(width=32), dict(slots=32), dict(captures=("a",))]:
        model(**reason)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


# Through the library


def test_run_says_what_it_compiles():
    model = tiny.model()
    jaxtc.run(model, [2, 5, 7])
    with jaxtc.compiles() as found:
        jaxtc.run(model, [2, 5, 7, 8])
        assert len(found) == 0
        jaxtc.run(model, [[2] * 4] * 7)
    assert len(found) == 1 and "batch 7" in found[0].because


def test_warm_up_leaves_nothing_to_compile():
    model = tiny.model()
    options = dict(capture="attn_heads", edits=[add(V, layer=1)])
    found = jaxtc.warm_up(model, lengths=(3, 5, 20), batch=5, **options)
    assert len(found) == 2  # 3 and 5 are padded to one length
    with jaxtc.compiles() as later:
        for length in (2, 5, 16, 30):
            other = dict(capture="attn_heads", edits=[add(2 * V, layer=0)])
            jaxtc.run(model, [[3] * length] * 5, **other)
    assert str(later) == "nothing was compiled"
    assert len(jaxtc.warm_up(model, lengths=[7], batch=5, **options)) == 0


def test_warm_up_of_generate():
    model = tiny.model()
    found = jaxtc.warm_up(model, lengths=[4], batch=6, max_new_tokens=3)
    assert len(found) == 2
    with jaxtc.compiles() as later:
        jaxtc.generate(model, [[2, 5, 7, 9]] * 6, 3, stop=())
    assert len(later) == 0


@pytest.mark.parametrize(
    "lengths, message", [([], "empty"), ([0], "at least 1"), ([99], "context")]
)
def test_warm_up_refuses_lengths_that_no_prompt_has(lengths, message):
    with pytest.raises(InputError, match=message):
        jaxtc.warm_up(tiny.model(), lengths=lengths)
