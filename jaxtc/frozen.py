"""Frozen dataclasses that are pytrees: what edits and reducers are made of."""

import dataclasses
from collections.abc import Callable

import jax


def frozen_pytree(*static: str) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass, and a pytree whose fields are leaves but ``static``."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in names if name not in static]
        return jax.tree_util.register_dataclass(cls, data, [n for n in names if n in static])

    return register
