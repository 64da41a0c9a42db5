"""Compiles are counted, timed, and explained in words; warming up leaves none to do."""

import dataclasses
import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc.errors import InputError
from jaxtc.programs.program import (
    REMEMBERED,
    REPEATS,
    Compiles,
    Program,
    compiles,
    description,
    differences,
)
from tests.support import tiny

D = tiny.config().hidden_size
MODEL = tiny.config(), [np.zeros(1, np.float32)]


def double(x, scale=1.0):
    return 2 * x * scale


def program(name="double", function=double, **options):
    return Program(name, function, **options)


def about(**facts):
    return lambda: description(*MODEL, **facts)


def nobody():
    raise AssertionError("asked for a description though nothing was compiled")


# Counting


def test_a_compile_is_recorded_once_and_described_only_then():
    double = program()
    with compiles() as found:
        assert double(jnp.ones(3), describe=about(batch=3)).tolist() == [2.0] * 3
        double(jnp.zeros(3), describe=nobody)
        assert len(found) == 1
        double(jnp.ones(4), describe=about(batch=4))
    assert [one.because for one in found] == ["its first call", "batch 4 (was 3)"]
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
        jax.block_until_ready(slow(jnp.ones(3), describe=about()))
    assert 0 < found.seconds <= began[0] - start


def test_a_numpy_array_after_a_jax_one_is_no_compile():
    double = program()
    with compiles() as found:
        double(jnp.ones(3), describe=about())
        double(np.ones(3, np.float32), describe=nobody)
    assert len(found) == 1


def test_a_call_inside_jit_is_part_of_that_program():
    double = program()
    with compiles() as found:
        jax.jit(lambda x: double(x, describe=nobody))(jnp.ones(3))
        assert len(found) == 0
        double(jnp.ones(3), describe=about())  # traced before, compiled only now
    assert len(found) == 1


def test_vmap_and_grad_are_counted():
    double = program()
    with compiles() as found:
        double(jnp.ones(()), describe=about())
        for size in (2, 3, 3):
            jax.vmap(lambda x: double(x, describe=about()))(jnp.ones(size))
        assert len(found) == 3
        jax.grad(lambda x: double(x, describe=about()))(1.0)
    assert len(found) == 4
    assert found[1].because == "the call is now inside jax.vmap or jax.grad"
    assert found[2].because.startswith("jax.vmap over another number")


def test_small_computations_while_tracing_are_not_counted():
    def busy(x):
        with jax.ensure_compile_time_eval():
            table = jnp.cumsum(jnp.arange(23.0) * 3)
        return x + table[5]

    busy = program("busy", busy)
    with compiles() as found:
        busy(1.0, describe=about())
    assert len(found) == 1


def test_static_and_donated_arguments():
    powers = program("power", lambda n, x: x**n, static_argnums=0, donate_argnums=1)
    with compiles() as found:
        for n in (2, 3, 2):
            x = jnp.full(3, 2.0)
            assert powers(n, x, describe=about(power=n)).tolist() == [2.0**n] * 3
            assert x.is_deleted()
    assert [one.because for one in found] == ["its first call", "power is 3 (was 2)"]


def test_an_error_while_tracing_is_the_users_and_no_compile():
    def fail(x):
        raise InputError("no")

    fail = program("fail", fail)
    with compiles() as found, pytest.raises(InputError, match="no"):
        fail(1.0, describe=nobody)
    assert len(found) == 0


def test_nested_and_closed_collections():
    double = program()
    with compiles() as outer:
        double(jnp.ones(1), describe=about())
        with compiles() as inner:
            double(jnp.ones(2), describe=about())
        double(jnp.ones(3), describe=about())
    double(jnp.ones(4), describe=about())
    assert len(outer) == 3 and len(inner) == 1 and inner[0] is outer[1]


def test_a_collection_closes_when_its_body_raises():
    double = program()
    with pytest.raises(KeyError), compiles() as found:
        raise KeyError
    double(jnp.ones(1), describe=about())
    assert len(found) == 0


def test_threads_are_seen_each_compile_once():
    double = program()

    def work(size):
        for _ in range(5):
            double(jnp.ones(size), describe=about(batch=size))

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
        double(jnp.ones(1), describe=about(batch=1))
        double(jnp.ones(2), describe=about(batch=2))
    lines = str(found).splitlines()
    assert len(lines) == 2 and repr(found) == str(found)
    assert lines[1] == f"run compiled in {found[1].seconds:.2f} s: batch 2 (was 1)"


# Why


def why(before, now):
    """``because`` of the second of two calls."""
    double = program()
    with compiles() as found:
        double(jnp.ones(1), describe=about(**before))
        double(jnp.ones(2), describe=about(**now))
    return found[1].because


def add(value, **where):
    return jaxtc.Add(value, site="resid_mid", **where)


V = np.ones(D, np.float32)
CASES = {
    "length": (
        dict(length=9, padded=16), dict(length=40, padded=48),
        "the prompts are now 40 tokens, padded to 48 (was 16)",
    ),
    "slots": (dict(slots=16), dict(slots=32), "the cache has room for 32 tokens (was 16)"),
    "captures": (
        dict(captures=["a"]), dict(captures=["a", "b"]), "another set of captures: a, b",
    ),
    "option": (dict(logits="all"), dict(logits="last"), "logits is last (was all)"),
    "value": (
        dict(edits=[add(V)]), dict(edits=[add(np.ones((3, D), np.float32))]),
        f"edit 0, Add at resid_mid: value is float32 of shape (3, {D}) "
        f"(was float32 of shape ({D},))",
    ),
    "dtype": (
        dict(edits=[add(np.float32(1))]), dict(edits=[add(1.0)]),
        "edit 0, Add at resid_mid: value is weak float32 of shape () (was float32 of shape ())",
    ),
    "target": (
        dict(edits=[add(V)]), dict(edits=[add(V, layer=np.array([1]))]),
        "edit 0, Add at resid_mid: layer is int32 of shape (1,) (was absent)",
    ),
    "no target": (
        dict(edits=[add(V, layer=np.array([1]))]), dict(edits=[add(V)]),
        "edit 0, Add at resid_mid: layer is absent (was int32 of shape (1,))",
    ),
    "second edit": (
        dict(edits=[add(V)]), dict(edits=[add(V), jaxtc.Detach(site="mlp_out")]),
        "another list of edits: Add at resid_mid, Detach at mlp_out",
    ),
    "nothing visible": (
        dict(batch=1), dict(batch=1), "jax forgot the program, or its settings or devices changed",
    ),
}  # fmt: skip


def at(*positions):
    return jaxtc.reducers.At("resid_post", position=list(positions))


def test_reducers_are_told_by_what_they_hold():
    one, two, other = [at(1)], [at(1, 2)], [jaxtc.reducers.TopK("logits", 3)]
    said = why(dict(reducers=one), dict(reducers=two))
    assert said.startswith("reducer 0, At(resid_post): position") and "shape" in said
    said = why(dict(reducers=one), dict(reducers=other))
    assert said == "another set of captures: TopK(logits)"


@pytest.mark.parametrize("case", CASES)
def test_the_reason_in_words(case):
    before, now, expected = CASES[case]
    assert why(before, now) == expected


def test_other_weights_and_another_configuration():
    other = jaxtc.Gemma2Config.from_dict({**tiny.config().to_dict(), "sliding_window": 8})
    double = program()
    with compiles() as found:
        double(jnp.ones(1), describe=about())
        half = [jnp.zeros(1, jnp.bfloat16)]
        double(jnp.ones(2), describe=lambda: description(tiny.config(), half))
        double(jnp.ones(3), describe=lambda: description(other, MODEL[1]))
    assert found[1].because == "the weights are bfloat16 (was float32)"
    assert found[2].because == "a model of another configuration"


def test_weights_that_are_traced_have_no_place():
    placed, double = [jnp.zeros(1)], program()

    def called(size, leaves):
        double(jnp.ones(size), describe=lambda: description(tiny.config(), leaves, batch=size))

    with compiles() as found:
        called(1, placed)
        jax.vmap(lambda x: called(2, [x]))(jnp.zeros((2, 1)))
        called(3, placed)
    assert [one.because for one in found[1:]] == ["batch 2 (was 1)", "batch 3 (was 2)"]


def test_another_place_of_the_weights_is_told():
    now, before = (description(*MODEL[:1], [jnp.zeros(1)]) for _ in range(2))
    now = [dataclasses.replace(f, value="cpu:7") if f.kind == "place" else f for f in now]
    ((kind, words),) = differences(now, before)
    assert kind == "place" and words.startswith("the weights are on cpu:7 (was ")


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
    double = program()
    with compiles() as found:
        for size, given in enumerate([same, same, other], 1):
            double(jnp.ones(size), describe=about(edits=[given]))
    assert found[1].because.startswith("jax forgot")
    assert found[2].because == (
        f"a new function object was given to edit 0, {kind.__name__} at mlp_out: "
        "define it once outside the loop"
    )


@jaxtc.register_edit("how")
class Styled(jaxtc.Edit):
    how: str

    def new(self, x, context):
        return x


def test_another_static_field_is_told_when_nothing_else_differs():
    one, two = Styled("a", site="mlp_out"), Styled("b", site="mlp_out")
    assert why(dict(edits=[one]), dict(edits=[two])) == (
        "edit 0, Styled at mlp_out: other static fields"
    )
    assert why(dict(edits=[one], batch=1), dict(edits=[two], batch=2)) == "batch 2 (was 1)"


def test_the_nearest_earlier_call_is_compared_with():
    double = program()
    calls = [dict(batch=1, padded=16), dict(batch=8, padded=64), dict(batch=1, padded=32)]
    with compiles() as found:
        for size, call in enumerate(calls, 1):
            double(jnp.ones(size), describe=about(**call))
    assert found[2].because == "the prompts are now 32 tokens, padded to 32 (was 16)"


def test_the_record_of_earlier_calls_is_bounded():
    double = program()
    for size in range(1, REMEMBERED + 4):
        double(jnp.ones(size), describe=about(batch=size))
    assert len(double._before) == REMEMBERED


# The log


def test_each_compile_is_logged_and_one_warning_says_what_to_do(caplog):
    caplog.set_level(logging.INFO, "jaxtc")
    double = program("run")
    for size in range(1, REPEATS + 4):
        double(jnp.ones(size), describe=about(batch=size))
        warned = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == (size > REPEATS)  # the first compile is no recompile
    infos = [r for r in caplog.records if r.levelno == logging.INFO and r.name == "jaxtc"]
    assert len(infos) == REPEATS + 3
    assert "batch 2 (was 1)" in infos[1].getMessage()
    message = warned[0].getMessage()
    assert "'run'" in message and "Give batches of one size" in message


def test_different_reasons_do_not_add_up_to_a_warning(caplog):
    double = program()
    reasons = [{}, dict(batch=1), dict(padded=16), dict(slots=16), dict(captures=["a"])]
    for size, reason in enumerate(reasons, 1):
        double(jnp.ones(size), describe=about(**reason))
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
