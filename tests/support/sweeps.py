"""Edits with axes, and those of single variants made by hand."""

import dataclasses

import jax

from jaxtc import Over


def over(*values, name=""):
    return Over(values, name)


def at(tree, place):
    """The edit of one variant, made by hand."""
    pick = lambda x: x.values[place[x.name]] if isinstance(x, Over) else x  # noqa: E731
    return jax.tree.map(pick, tree, is_leaf=lambda x: isinstance(x, Over))


def named(edit):
    """With the default names put in."""
    fields = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)}
    fields = {k: Over(v.values, v.name or k) for k, v in fields.items() if isinstance(v, Over)}
    return dataclasses.replace(edit, **fields)
