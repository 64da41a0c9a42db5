"""Compiled programs that report when they are compiled, how long it took, and why.

jax reports each compile to listeners (``jax.monitoring``) in the thread that compiles, by the name
of the function. Its count of cached signatures will not do: it grows when the same program is
given a NumPy array after a JAX one, and does not when it is compiled under ``vmap`` or ``grad``.
"""

import collections
import contextlib
import dataclasses
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.monitoring

from jaxtc.interchange import owned
from jaxtc.programs.reasons import Advice, advised, differences, facts
from jaxtc.sharding.rules import ShardingError

log = logging.getLogger("jaxtc")

# Calls that a program remembers, to say how the next one differs.
REMEMBERED = 32
_PREFIX = "jaxtc_"


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


class Compiles(list[Compile]):
    """The compiles seen inside ``with jaxtc.compiles()``, in order; prints one a line."""

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return sum(one.seconds for one in self)

    def __str__(self):
        return "\n".join(map(str, self)) or "nothing was compiled"

    __repr__ = __str__


_lock = threading.Lock()
_open: list[Compiles] = []


@contextlib.contextmanager
def compiles() -> Iterator[Compiles]:
    """Collect what the library compiles inside: ``with jaxtc.compiles() as found: ...``.

    Counts the library's programs in every thread, under ``vmap`` and ``grad`` too (jax compiles the
    backward pass itself, which is not seen here). Calls inside a ``jax.jit`` of yours become part
    of your program and are not counted. May be nested; each sees its own.
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
    """``jax.jit(function)`` that records each compile of its own, and why.

    Args:
        name: as records and the log call it.
        function: pure. Reasons are given by the names of its parameters; see
            :func:`jaxtc.programs.reasons.facts`.
        options: of ``jax.jit``: ``static_argnums``, ``donate_argnums``.
    """

    def __init__(self, name: str, function: Callable, **options: Any):
        self.name, self.count = name, 0
        self._parameters = list(inspect.signature(function).parameters)

        def named(*args):
            return function(*args)

        named.__name__ = named.__qualname__ = _PREFIX + function.__name__.strip("_")
        self._jitted = jax.jit(named, **options)
        self._before: collections.deque[dict] = collections.deque(maxlen=REMEMBERED)
        self._repeats: collections.Counter[Advice] = collections.Counter()

    def __call__(self, *args: Any) -> Any:
        """Run it; raises ShardingError for arrays on different devices."""
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
            self._record(_here.seconds - seconds, args)
        return out

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As of ``jax.jit``: the program of these arguments, for its cost or its text."""
        return self._jitted.lower(*args)

    def _record(self, seconds: float, args: tuple) -> None:
        now = facts(dict(zip(self._parameters, args, strict=False)))
        with _lock:
            self.count += 1
            found = [differences(now, before) for before in reversed(self._before)]
            self._before.append(now)
            reasons = min(found, key=len, default=["its first call"])
            because = "; ".join(reasons[:4])
            because += f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
            record = Compile(self.name, seconds, because)
            advice = set(filter(None, map(advised, reasons)))
            self._repeats.update(advice)
            repeated = [one for one in advice if self._repeats[one] == one.patience]
            for one in _open:
                one.append(record)
        log.info("%s", record)
        for one in repeated:
            log.warning(
                "jaxtc compiled %r again, for the same kind of reason %d times by now. The last: "
                "%s. %s", self.name, one.patience, because, one.text,
            )  # fmt: skip


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
