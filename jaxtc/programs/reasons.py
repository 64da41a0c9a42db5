"""Why a program was compiled again: its arguments' shapes and static halves, against earlier ones.

A fact of a call is a name and a value that is compared by ``==`` and holds no array.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxtc.errors import some


class Advice(NamedTuple):
    """What to do when differences whose words begin with ``pattern`` came up ``patience`` times."""

    pattern: str
    patience: int
    text: str


# The first that fits. Another experiment has other captures and edits: it takes a loop to have 16.
ADVICE = (
    Advice(".*another function object", 4, "Define the function once, outside the loop; what "
           "changes from call to call can be an argument: jax.tree_util.Partial(function, array) "
           "has its arrays as data."),
    Advice(r"(another )?(of\b|\w+\[)", 4, "Other values of one shape run the same program: give "
           "as many positions, rows, layers or directions each time, or a mask of booleans, and "
           "always the same kind of number."),
    Advice("(padded )?length|slots", 4, "Prompts are padded to a multiple of 16 tokens (more for "
           "long ones), a program each: give prompts of similar length together, or call "
           "jaxtc.warm_up(model, lengths=...) first."),
    Advice("batch", 4, "Give batches of one size: fill up the last one, and drop those rows of the "
           "result."),
    Advice("(another )?edits", 16, "Keep one list of edits and change their values: Scale(1.0) or "
           "Add(0.0) do nothing."),
    Advice("(another )?(captures|reducers|asked|addresses)", 16, "Capture everything you will need "
           "each time, and pick from the result."),
    Advice("(another )?(weights|config)", 4, "Each configuration, dtype and place is a program of "
           "its own: finish with one model before the next, and put it on its devices once."),
    Advice("called|jax.vmap", 16, "jax.vmap compiles for each size it maps over, and jax.grad once "
           "more: put jax.jit around the whole, or map over chunks of one size."),
)  # fmt: skip
# Arguments whose shapes follow from the others': reported when nothing else has changed.
_FOLLOWING = frozenset(
    {"lengths", "starts", "ends", "places", "cache", "record", "begin", "resume"}
)


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function by its id, as jax compares it; compiled programs keep theirs alive."""

    number: int
    name: str

    def __str__(self):
        return self.name


def facts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a program depends on, by name, from its arguments by name.

    ``leaves`` are a model's, of which dtype and devices count; ``tokens`` are (B, W) or (B,); a
    dataclass that is no pytree is the static half of a call.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))
    found = {"called": "inside jax.vmap or jax.grad" if traced else "directly"}
    for name, value in arguments.items():
        if name == "leaves":
            found["weights"] = str(value[0].dtype)
            if isinstance(value[0], jax.Array) and not isinstance(value[0], jax.core.Tracer):
                found.setdefault("weights on", some(sorted(map(str, value[0].devices())), 2))
        elif name == "tokens":
            found |= zip(("batch", "padded length"), value.shape, strict=False)
        elif dataclasses.is_dataclass(value) and jax.tree_util.all_leaves([value]):
            for field in dataclasses.fields(value):
                found[field.name.replace("_", " ")] = getattr(value, field.name)
            if found.get("placement"):
                found["weights on"] = f"a mesh of {found.pop('placement')}"
        else:
            found |= _walk(name, value)
    return found


def _walk(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Facts of a pytree: the shapes of its arrays and, node by node, what is static."""
    children, structure = jax.tree_util.tree_flatten_with_path(node, lambda x: x is not node)
    if children and not children[0][0]:
        aval = jax.typeof(node)
        weak = "weak " if getattr(aval, "weak_type", False) else ""  # a Python number
        yield name, f"{weak}{aval.dtype}{list(aval.shape)}"
        return
    names = [getattr(path[0], "name", None) for path, _ in children]
    if isinstance(node, list | tuple):
        yield name, tuple(map(_kind, node))
    elif isinstance(node, jax.tree_util.Partial):
        yield name, _static(node.func)
    elif dataclasses.is_dataclass(node) and None not in names:
        yield name, type(node).__name__
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            with contextlib.suppress(TypeError):  # what has no hash is part of no key
                if field.name not in names and hash(value) is not None:
                    yield f"{name}.{field.name}", _static(value)
    else:
        yield name, None if node is None else structure
    for path, child in children:
        yield from _walk(name + jax.tree_util.keystr(path), child)


def _static(value: Any) -> Any:
    if callable(value) and jax.tree_util.all_leaves([value]):
        return _Function(id(value), getattr(value, "__name__", type(value).__name__))
    return value


def _kind(node: Any) -> str:
    """An element of a list in a few words, such as ``Add at resid_mid``."""
    place = getattr(node, "site", None) or getattr(node, "address", None)
    return type(node).__name__ + (f" at {getattr(place, 'name', place)}" if place else "")


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What is new against an earlier call, in words: at least one reason."""
    # A name that only one of them has is part of something that differs, or is unknown (the devices
    # of traced weights).
    names = [name for name in now if name in before and now[name] != before[name]]
    names = [n for n in names if not any(n.startswith((f"{m}.", f"{m}[")) for m in names)]
    own = [name for name in names if re.match(r"\w+", name)[0] not in _FOLLOWING]
    found = [_words(name, now[name], before[name]) for name in own or names]
    if not found and now["called"] != "directly":
        return ["jax.vmap over another size, or another jax.grad"]
    return found or ["jax forgot the program, or its settings or devices changed"]


def advised(reason: str) -> Advice | None:
    """What can be done about a difference."""
    return next((one for one in ADVICE if re.match(one.pattern, reason)), None)


def _words(name: str, now: Any, before: Any) -> str:
    if isinstance(now, _Function):
        return f"{name}: another function object, {now}: define it once outside the loop"
    words = f"{name}{' ' if type(now) is int else ': '}{_shown(now)} (was {_shown(before)})"
    return words if len(words) < 300 else f"another {name}"


def _shown(value: Any) -> str:
    return some(list(map(str, value)), 4) or "none" if isinstance(value, tuple) else str(value)
