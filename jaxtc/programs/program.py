"""Compiled programs that say when they are compiled, how long it took, and what it was for.

jax reports each compile to listeners (``jax.monitoring``) in the thread that compiles, by the name
of the function. Its count of cached signatures is no measure: it grows when the same program is
given a NumPy array after a JAX one, and does not when it is compiled under ``vmap`` or ``grad``.
"""

import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.monitoring

from jaxtc.errors import some
from jaxtc.interchange import owned
from jaxtc.model.config import Gemma2Config
from jaxtc.sharding.placement import Placement
from jaxtc.sharding.rules import ShardingError

log = logging.getLogger("jaxtc")

# Recompiles for one kind of reason before the user is told what to do about it. Another experiment
# has other captures and edits: it takes a loop to have many of them.
REPEATS = 4
REPEATS_OF_CHOICE = 16
CHOICES = ("edits", "captures", "options", "transform")
# Calls that a program remembers, to say how the next one differs.
REMEMBERED = 32

ADVICE = {
    "length": "Prompts are padded to a multiple of 16 tokens (more for long ones), a program each: "
    "give prompts of similar length together, or call jaxtc.warm_up(model, lengths=...) first.",
    "batch": "Give batches of one size: fill up the last one, and drop those rows of the result.",
    "shape": "Other values of one shape run the same program: give as many positions, rows or "
    "layers each time, or a mask of booleans, and always the same kind of number.",
    "reducer": "Give reducers as many positions or directions each time.",
    "function": "Define the function once, outside the loop; what changes from call to call can be "
    "an argument: jax.tree_util.Partial(function, array) has its arrays as data.",
    "edits": "Keep one list of edits and change their values: Scale(1.0) or Add(0.0) do nothing.",
    "captures": "Capture everything you will need each time, and pick from the result.",
    "place": "Keep the model where it is, or put it on its devices once before the loop.",
    "model": "Each configuration and dtype is a program of its own: finish with one model "
    "before the next.",
    "transform": "jax.vmap compiles for each size it maps over, and jax.grad once more: put "
    "jax.jit around the whole, or map over chunks of one size.",
}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that a compiled program depends on.

    Attributes:
        key: what it is about; facts of two calls are compared by key.
        value: compared by ``==``, so never an array.
        kind: a key of :data:`ADVICE`, or "structure" for what is only told when nothing else is.
        text: how it is told; ``key value`` by default.
        was: whether the earlier value is told as well.
    """

    key: str
    value: Any
    kind: str
    text: str = ""
    was: bool = True

    def __str__(self):
        return self.text or f"{self.key} {self.value}"


def description(
    config: Gemma2Config,
    leaves: Sequence[Any],
    *,
    batch: int | None = None,
    length: int | None = None,
    padded: int | None = None,
    slots: int | None = None,
    captures: Sequence[Any] = (),
    edits: Sequence[Any] = (),
    reducers: Sequence[Any] = (),
    placement: Placement | None = None,
    **options: Any,
) -> list[Fact]:
    """What a call of the model depends on.

    Args:
        config: the model's.
        leaves: its arrays.
        batch: B.
        length: T as the user gave it.
        padded: T of the program.
        slots: tokens that the cache has room for.
        captures: addresses; compared by how they print.
        edits: as the program takes them.
        reducers: as the program takes them.
        placement: the mesh of the model.
        options: other static parts of the call; compared by ``==``, printed by name.
    """
    facts = [Fact("config", config, "model", "a model of another configuration", was=False)]
    facts.append(Fact("the weights are", str(leaves[0].dtype), "model"))
    if placement is not None:
        facts.append(Fact("the weights are on", f"a mesh of {placement}", "place"))
    elif isinstance(leaves[0], jax.Array) and not isinstance(leaves[0], jax.core.Tracer):
        devices = some(sorted(map(str, leaves[0].devices())), 2)
        facts.append(Fact("the weights are on", devices, "place"))
    if batch is not None:
        facts.append(Fact("batch", batch, "batch"))
    if padded is not None:
        text = f"the prompts are now {padded if length is None else length} tokens, padded to"
        facts.append(Fact("padded", padded, "length", f"{text} {padded}"))
    if slots is not None:
        facts.append(Fact("slots", slots, "length", f"the cache has room for {slots} tokens"))
    names = tuple(map(str, [*captures, *reducers]))
    text = f"another set of captures: {some(names, 4) or 'none'}"
    facts.append(Fact("captures", names, "captures", text, was=False))
    for name, value in options.items():
        facts.append(Fact(f"{name.replace('_', ' ')} is", value, "options"))
    kinds = [f"{type(edit).__name__} at {edit.site}" for edit in edits]
    text = f"another list of edits: {some(kinds, 4) or 'none'}"
    facts.append(Fact("edits", tuple(kinds), "edits", text, was=False))
    for index, (kind, edit) in enumerate(zip(kinds, edits, strict=True)):
        facts.extend(_parts(f"edit {index}, {kind}", edit, "shape"))
    for index, reducer in enumerate(reducers):
        facts.extend(_parts(f"reducer {index}, {reducer}", reducer, "reducer"))
    return facts


def _parts(label: str, node: Any, kind: str) -> Iterator[Fact]:
    """Facts of an edit or a reducer: the shapes of its arrays, its functions, its static half."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(node):
        name = f"{label}: {jax.tree_util.keystr(path, simple=True, separator='.')}"
        aval = jax.typeof(leaf)
        weak = "weak " if getattr(aval, "weak_type", False) else ""  # a Python number
        yield Fact(f"{name} is", f"{weak}{aval.dtype} of shape {aval.shape}", kind)
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        value = value.func if isinstance(value, jax.tree_util.Partial) else value
        if callable(value) and jax.tree_util.all_leaves([value]):
            # By id, as jax does: compiled programs keep their functions alive, this need not.
            text = f"a new function object was given to {label}: define it once outside the loop"
            yield Fact(f"{label}: {field.name}", id(value), "function", text, was=False)
    structure = jax.tree.structure(node)
    yield Fact(label, structure, "structure", f"{label}: other static fields", was=False)


def differences(now: Sequence[Fact], before: Sequence[Fact]) -> list[tuple[str, str]]:
    """(kind, words) for each thing that differs, what matters most first."""
    old = {fact.key: fact for fact in before}
    found = []
    for fact in now:
        earlier = old.pop(fact.key, None)
        if earlier is None and fact.kind == "place":
            continue  # nobody knows where the arrays of a trace are
        if earlier is None or earlier.value != fact.value:
            was = "absent" if earlier is None else earlier.value
            found.append((fact.kind, f"{fact} (was {was})" if fact.was else str(fact)))
    gone = [fact for fact in old.values() if fact.was and fact.kind != "place"]
    found += [(fact.kind, f"{fact.key} absent (was {fact.value})") for fact in gone]
    kinds = {kind for kind, _ in found}
    # What each edit or reducer has follows from which they are.
    follows = {"shape", "function"} if "edits" in kinds else set()
    follows |= {"reducer"} if "captures" in kinds else set()
    found = [one for one in found if one[0] not in follows]
    if kinds != {"structure"}:
        found = [one for one in found if one[0] != "structure"]
    return found


@dataclasses.dataclass(frozen=True)
class Compile:
    """One compile.

    Attributes:
        program: what was compiled: "run", "generate: prefill", "generate: step", ...
        seconds: of tracing, lowering and compiling; the run itself is not part of it.
        because: what is new, against the most similar call that this program has seen.
    """

    program: str
    seconds: float
    because: str

    def __str__(self):
        return f"{self.program} compiled in {self.seconds:.2f} s: {self.because}"


class Compiles(Sequence):
    """The compiles seen inside ``with jaxtc.compiles()``, in order; prints one a line."""

    def __init__(self):
        self._found: list[Compile] = []

    def __len__(self):
        return len(self._found)

    def __getitem__(self, index):
        return self._found[index]

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return sum(one.seconds for one in self._found)

    def __str__(self):
        return "\n".join(map(str, self._found)) or "nothing was compiled"

    __repr__ = __str__


_lock = threading.Lock()
_open: list[Compiles] = []


@contextlib.contextmanager
def compiles() -> Iterator[Compiles]:
    """Collect what the library compiles inside: ``with jaxtc.compiles() as found: ...``.

    Counts the programs of the library, whichever thread calls them, under ``vmap`` and ``grad``
    too (the backward pass is compiled by jax itself and not seen here). Calls inside a ``jax.jit``
    of yours become part of your program and are not counted. May be nested; each sees its own.
    """
    found = Compiles()
    with _lock:
        _open.append(found)
    try:
        yield found
    finally:
        with _lock:
            _open[:] = [one for one in _open if one is not found]


class Program:
    """``jax.jit(function)`` that notices, in its calls, that it was compiled.

    Args:
        name: as records and the log call it.
        function: pure; its first line under jit runs once a compile.
        static_argnums: as for ``jax.jit``.
        donate_argnums: as for ``jax.jit``.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        *,
        static_argnums: int | Sequence[int] = (),
        donate_argnums: int | Sequence[int] = (),
    ):
        self.name = name
        self.count = 0

        def named(*args):
            return function(*args)

        named.__name__ = named.__qualname__ = _PREFIX + function.__name__.strip("_")
        options = dict(static_argnums=static_argnums, donate_argnums=donate_argnums)
        self._jitted = jax.jit(named, **options)
        self._before: collections.deque[list[Fact]] = collections.deque(maxlen=REMEMBERED)
        self._kinds: collections.Counter[str] = collections.Counter()

    def __call__(self, *args: Any, describe: Callable[[], list[Fact]]) -> Any:
        """Run it.

        Args:
            args: of the function.
            describe: what the call depends on; asked only when it compiled.
        """
        count, seconds = _here.compiles, _here.seconds
        try:
            out = self._jitted(*map(owned, args))
        except ValueError as error:
            if "incompatible devices" not in str(error):
                raise
            raise ShardingError(
                "The arrays of this call lie on different devices: the model on one device and a "
                "transcoder or a value on a mesh, or on two meshes. Put all of them on one mesh, "
                "jaxtc.shard(model, mesh) and jaxtc.shard(transcoder, mesh); or give values as "
                f"NumPy arrays (jaxtc.to_numpy). jax says: {error}"
            ) from error
        if _here.compiles != count:
            self._record(_here.seconds - seconds, args, describe())
        return out

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As of ``jax.jit``: the program of these arguments, for its cost or its text."""
        return self._jitted.lower(*args)

    def _record(self, seconds: float, args: tuple, facts: list[Fact]) -> None:
        inside = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        text = f"the call is {'now' if inside else 'no longer'} inside jax.vmap or jax.grad"
        facts = [*facts, Fact("transform", inside, "transform", text, was=False)]
        with _lock:
            self.count += 1
            options = [differences(facts, before) for before in self._before]
            self._before.append(facts)
            nearest = min(reversed(options), key=len, default=[("first", "its first call")])
            if not nearest and inside:
                nearest = [("transform", "jax.vmap over another number, or another jax.grad")]
            elif not nearest:
                nearest = [("again", "jax forgot the program, or its settings or devices changed")]
            kinds = {kind for kind, _ in nearest}
            self._kinds.update(kinds)
            repeated = [k for k in ADVICE if k in kinds and self._kinds[k] == _patience(k)]
            because = "; ".join(words for _, words in nearest[:4])
            because += f"; and {len(nearest) - 4} more" if len(nearest) > 4 else ""
            record = Compile(self.name, seconds, because)
            for found in _open:
                found._found.append(record)
        log.info("%s", record)
        for kind in repeated:
            log.warning(
                "jaxtc compiled %r again, for the same kind of reason %d times by now. The last: "
                "%s. %s", self.name, _patience(kind), record.because, ADVICE[kind],
            )  # fmt: skip


def _patience(kind: str) -> int:
    return REPEATS_OF_CHOICE if kind in CHOICES else REPEATS


_PREFIX = "jaxtc_"


class _Here(threading.local):
    """What the listener has seen in this thread."""

    compiles = 0
    seconds = 0.0


_here = _Here()


def _listen(event: str, seconds: float, **details: Any) -> None:
    """Called by jax at the end of each stage of each compile."""
    name = details.get("fun_name", "")
    if event.startswith("/jax/core/compile/") and _PREFIX in name:
        _here.seconds += seconds
        _here.compiles += event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(_listen)
