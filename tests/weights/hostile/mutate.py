"""Mutations of bytes and of JSON, whatever they stand for."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

# What headers are written in, so that a damaged one often still parses as something else.
MARKS = b" \n\\'\"{}[]():,.-+0129eELFNtn\x00\xff\xef"

# Values that no field expects; the last ones are whole numbers at the edges of machines.
ODD = (
    None, True, False, "", "x", "0", "\x00", "\ud800", "../x", 0.5, -0.0, 1e308, float("nan"),
    float("inf"), [], [[]], [0], {}, {"a": 1}, -1, 0, 1, 2, 3, 2**31, 2**32 + 1, 2**53, 2**63 - 1,
    2**63, 2**64, -(2**63), 10**30,
)  # fmt: skip


def pick(rng: np.random.Generator, options: Sequence) -> Any:
    """One of them, as it is."""
    return options[int(rng.integers(len(options)))]


def mutate_bytes(raw: bytes, rng: np.random.Generator, focus: int | None = None) -> bytes:
    """One change somewhere; mostly in the first ``focus`` bytes, where the header is."""
    end = focus if focus and rng.random() < 0.7 else len(raw)
    place = int(rng.integers(max(end, 1)))
    size = min(int(2 ** rng.uniform(0, 8)), len(raw) - place)
    head, body, tail = raw[:place], raw[place : place + size], raw[place + size :]
    match int(rng.integers(11)):
        case 0:
            return raw[:place] + bytes([raw[place] ^ 1 << int(rng.integers(8))]) + raw[place + 1 :]
        case 1 | 2:
            return raw[:place] + bytes([pick(rng, MARKS)]) + raw[place + 1 :]
        case 3:
            return raw[:place]
        case 4:
            return head + tail
        case 5:
            return head + body * int(rng.integers(2, 4)) + tail
        case 6:
            return head + bytes([pick(rng, MARKS)]) + body + tail
        case 7:
            return head + rng.bytes(size) + tail
        case 8:
            return head + bytes(size) + tail
        case 9:
            return raw + pick(rng, [b"\x00", rng.bytes(9), raw[:place]])
        case _:
            return head[:-size] + body + head[len(head) - size :] + tail if size <= place else head


def whole(raw: bytes, rng: np.random.Generator) -> bytes:
    """Something else altogether."""
    return pick(rng, [
        b"", b"\x00" * len(raw), rng.bytes(len(raw)), b"PK\x05\x06" + bytes(18), b"{}", b"null",
        b"[" * 5000, b"[" * 200_000, b'{"a":' * 100_000, raw * 2, raw[::-1], b"\xff\xfe" + raw,
        (b"\x08" + bytes(7) + b"{}      "), b"\x80\x04\x95", raw.replace(b"\n", b"\r\n"),
    ])  # fmt: skip


def fields(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += fields(inner, (*path, key))
    return found


def mutate_json(value: Any, rng: np.random.Generator, names: Sequence[str] = ()) -> Any:
    """A copy with one field odd, gone, doubled under another name, nested, or swapped.

    Args:
        value: an object or a list.
        rng: decides.
        names: texts that would mean something, to be put in the place of others.
    """
    made = copy.deepcopy(value)
    path = pick(rng, fields(made))
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    match int(rng.integers(8)):
        case 0 | 1:
            holder[key] = pick(rng, ODD)
        case 2 if isinstance(old, int):
            holder[key] = old + pick(rng, [-1, 1, 8, -8, 2**40, old])
        case 3:
            del holder[key]
        case 4 if isinstance(holder, dict):
            holder[pick(rng, ["", "x", f"{key} ", "../x", "__metadata__", *names])] = old
        case 5:
            holder[key] = [old]
        case 6 if isinstance(holder, dict):
            other = pick(rng, list(holder))
            holder[key], holder[other] = holder[other], old
        case _:
            holder[key] = pick(rng, [*names] or [*map(str, ODD[:6])])
    return made


def dump(value: Any, rng: np.random.Generator) -> bytes:
    """JSON, now and then as careless or hostile writers have it."""
    text = json.dumps(value, ensure_ascii=bool(rng.random() < 0.9))
    choice = int(rng.integers(12))
    if choice == 0 and isinstance(value, dict) and value:
        key = pick(rng, list(value))  # a name twice
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(pick(rng, ODD[:20]))}}}"
    elif choice == 1:
        depth = int(10 ** rng.uniform(1, 5))
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + text[-1]
    elif choice == 2:
        text = pick(rng, [" ", "\n", "\t", "\ufeff", "\x00"]) + text
    elif choice == 3:
        text += pick(rng, [" ", "\n", "\x00", "{}", ",", "\x00" * 64])
    elif choice == 4:
        text = text.replace("1", "1" + "0" * int(10 ** rng.uniform(0, 4)), 1)
    return text.encode("utf-8", "surrogatepass")
