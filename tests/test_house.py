"""The structure of the house, read from its imports: arrows point one way, and names tell."""

import ast
import functools
import importlib
import types
from pathlib import Path

import jax
import pytest

import jaxtc

ROOT = Path(jaxtc.__file__).parent

# The rooms, from the ground up: each may import those above it here, but for the ones it names.
ROOMS = {
    "errors": "",
    "helpers": "",
    "sharding": "",
    "interchange": "",
    "tap": "",
    "model": "",
    "transcoders": "",
    "captures": "",
    "edits": "",
    "weights": "captures edits",
    "memory": "",
    "programs": "weights",
    "experiments": "weights",
    "explore": "memory experiments",
    "training": "captures edits weights memory programs experiments explore",
    "embedded": "memory experiments explore",
    "parity": "experiments explore training embedded",
    "cli": "",
}
# Public names of rooms' modules: each is imported from where its name leads.
PUBLIC = {"metrics": "transcoders", "plots": "experiments", "reducers": "captures",
          "scores": "experiments"}  # fmt: skip


def module_name(path: Path) -> str:
    """``jaxtc.tap.sites`` of its file."""
    return ".".join(("jaxtc", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@functools.cache
def imported(name: str) -> frozenset[str]:
    """Modules of jaxtc that a module imports anywhere in its file, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return frozenset(found & set(MODULES) - {name})


def room(name: str) -> str:
    """``tap`` of ``jaxtc.tap.sites``; "" of ``jaxtc`` itself."""
    return (name.split(".") + [""])[1]


def test_every_room_is_in_the_table():
    assert {room(name) for name in MODULES} == {"", *ROOMS, *PUBLIC}


@pytest.mark.parametrize("name", MODULES)
def test_arrows_between_rooms(name):
    here = room(name)
    if here in PUBLIC:
        assert {room(other) for other in imported(name)} == {PUBLIC[here]}
    elif here:
        above = list(ROOMS)[: list(ROOMS).index(here)]
        allowed = {here, *above} - set(ROOMS[here].split())
        wrong = {other for other in imported(name) if room(other) not in allowed}
        assert not wrong, f"{name} may not import {sorted(wrong)}"


def test_no_circle():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(imported(name)):
            visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_hidden(name):
    """``import jaxtc.x.y`` gives that module, not a function of its name."""
    module = importlib.import_module(name)
    found = functools.reduce(getattr, name.split(".")[1:], jaxtc)
    assert isinstance(found, types.ModuleType) and found is module


def test_structures_of_two_classes_are_never_equal():
    """In jax 0.10.2 those of registered dataclasses are, and jit ran Zero's program for Detach."""
    edits = [kind(site="embed") for kind in (jaxtc.Zero, jaxtc.Detach)]
    scores = [kind(3) for kind in (jaxtc.scores.Logit, jaxtc.scores.LogProbability)]
    for one, other in (edits, scores):
        assert jax.tree.structure(one) != jax.tree.structure(other)
    users = [path for path in MODULES.values() if "register_dataclass" in path.read_text()]
    assert users == [MODULES["jaxtc.helpers"]]
