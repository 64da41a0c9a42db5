"""What a reducer is: a small frozen pytree that says what to keep of a site in place of all of it.

The kinds are in :mod:`jaxtc.reducers`; anyone may write another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp

from jaxtc.errors import InputError, SiteError
from jaxtc.helpers import frozen_pytree
from jaxtc.interchange import plain_fields
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts
from jaxtc.tap.columns import returned
from jaxtc.tap.context import Context
from jaxtc.tap.positions import resolve as located
from jaxtc.tap.positions import spelled
from jaxtc.tap.sites import BY_NAME, ORDER, Address, Site, parse, resolve


@dataclass_transform(frozen_default=True, kw_only_default=False)
def register_reducer(*static: str) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass, and a pytree whose fields are leaves but ``static``.

    ``address`` is always static; every other field is data, so another value runs the same program.
    """
    return frozen_pytree("address", *static)


@dataclasses.dataclass(frozen=True, eq=False)
class Reducer:
    """What every reducer has: the address it reads. Subclasses say what is kept (:meth:`reduce`).

    A field ``position`` of theirs is spelled as in :class:`jaxtc.Edit`, and located in each prompt.

    Attributes:
        address: such as ``layers.12.resid_post``, or an alias; without a layer, every layer
            (static).

    Raises:
        SiteError: no such site.
    """

    address: str

    # Whether each token is reduced by itself, so that generation can use it step by step. Every
    # array kept then has the site's axes up to the one that runs over tokens.
    per_token = False
    # Whether what is kept has the site's last axis, with padding where that runs over keys.
    keeps_keys = False
    # Whether masked scores, huge negative numbers, would drown the result.
    sums = False
    # Sites of the same layer that `reduce` asks its context for.
    reads = ()

    def __post_init__(self):
        plain_fields(self)
        if hasattr(self, "position"):
            object.__setattr__(self, "position", spelled(self.position))
        object.__setattr__(self, "address", str(Address(*parse(self.address))))
        if self.sums and self.site.name == "attn_scores":
            raise SiteError(
                f"{self}: attn_scores holds {jnp.finfo(jnp.float32).min:.3g} wherever a token may "
                "not attend, and sums over that mean nothing; read attn_pattern, or capture the "
                "scores themselves."
            )

    @property
    def site(self) -> Site:
        """The row of the table that it reads."""
        return BY_NAME[parse(self.address)[0]]

    @property
    def every_layer(self) -> bool:
        """Whether it reads every layer, so that what it keeps has a leading axis L."""
        return self.site.per_layer and parse(self.address)[1] is None

    def reduce(self, x: jax.Array, context: Context) -> Any:
        """What is kept of one layer's value: an array or a pytree of them.

        Args:
            x: the site's value after the edits, with the axes of the table.
            context: the layer, the tokens' positions, and which of them are real.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

    def checked(self, config: Gemma2Config, prompts: Prompts) -> "Reducer":
        """This reducer as compiled programs take it, checked against a model and prompts.

        Raises:
            SiteError: no such layer.
            EditError: a ``position`` that some prompt lacks.
            InputError: a class that is not registered, or fields that do not fit the site.
        """
        if jax.tree_util.all_leaves([self]):
            raise InputError(
                f"{type(self).__name__} is not registered, so jax does not see its fields: put "
                "@jaxtc.reducers.register_reducer() above the class."
            )
        for read in self.reads:
            later = ORDER[read] >= ORDER[self.site.name]
            if later or BY_NAME[read].per_layer != self.site.per_layer:
                raise InputError(f"{self} reads {read!r}, which is not computed before its site.")
        found = {}
        if not self.every_layer:
            (address,) = resolve(self.address, config.num_hidden_layers)
            found["address"] = str(address)
        if getattr(self, "position", None) is not None:
            found["position"] = located(self.position, prompts, what=str(self))
        return dataclasses.replace(self, **found)

    def cut(self, kept: Any, length: int) -> Any:
        """What was kept (layers stacked, if several) without the padding past T = ``length``."""
        if not self.per_token:
            keys = self.keeps_keys and self.site.kind == "pairs"
            return kept[..., :length] if keys else kept
        axis = self.site.sequence_axis + self.every_layer
        return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, length, axis=axis), kept)

    def moved(self, kept: Any, starts: Any) -> Any:
        """What :meth:`cut` gave, with tokens and keys where they stood as they were given.

        ``starts`` are of :class:`jaxtc.model.prompts.Prompts`.
        """
        rows, keys = int(self.every_layer), self.keeps_keys and self.site.kind == "pairs"
        axes = [self.site.sequence_axis + rows] if self.per_token else []
        for axis in [*axes, *[-1] * keys]:
            kept = jax.tree.map(lambda x, axis=axis: returned(x, starts, axis, rows), kept)
        return kept

    def last_axis(self, config: Gemma2Config, prompts: Prompts) -> int:
        """The length of the site's last axis."""
        return self.site.shape({**config.sizes, "S": prompts.length})[-1]

    def __str__(self):
        return f"{type(self).__name__}({self.address})"
