"""What an edit is: a small frozen pytree that says where it applies and what happens there.

The kinds are in ``values``, ``flow`` and ``features`` beside this file; anyone may write another.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import numpy as np

from jaxtc.errors import EditError
from jaxtc.helpers import frozen_pytree
from jaxtc.interchange import plain_fields
from jaxtc.tap.context import Context, PerLayer
from jaxtc.tap.positions import is_traced, one_array, spelled
from jaxtc.tap.sites import BY_NAME, parse


class Index(NamedTuple):
    """A target of whole numbers, each an index of the first axis of the site among ``letters``.

    L is the layers, B the rows; others may come from :attr:`Edit.sizes`. Negative ones count from
    the end if ``back``; ``distinct`` ones may not be named twice.
    """

    letters: str
    back: bool = True
    distinct: bool = False


class Tokens(NamedTuple):
    """A target of tokens, in any spelling of :func:`jaxtc.tap.positions.locate`.

    The rows that the field ``rows`` names must have them. ``keys`` stand along S beside T, and are
    tokens of the prompt only.
    """

    rows: str = "row"
    keys: bool = False


# The fields by which every edit says where it applies, and what each ranges over.
TARGETS: dict[str, Index | Tokens] = {
    "layer": Index("L"),
    "position": Tokens(),
    "row": Index("B", back=False),
    "head": Index("NK"),
    "coordinate": Index("DHFV"),
    "key": Tokens(keys=True),
}


@dataclass_transform(frozen_default=True, kw_only_default=False)
def register_edit(*static: str) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass, and a pytree whose fields are data but ``static``.

    ``site`` is always static, and ``special_tokens`` where an edit has it.
    """
    return frozen_pytree("site", "special_tokens", *static)


def spares(edits: Iterable["Edit"]) -> bool:
    """Whether some edit leaves special tokens alone."""
    return any(not edit.special_tokens for edit in edits)


def own_shape(edit: "Edit", value: Any, layers: int) -> tuple[int, ...]:
    """Shape of :func:`own`.

    Raises:
        EditError: a :class:`PerLayer` of another number of layers.
    """
    if not isinstance(value, PerLayer):
        return np.shape(value)
    shape = np.shape(value.array)
    if shape[:1] != (layers,) or not BY_NAME[edit.site].per_layer:
        raise EditError(
            f"{edit}: a PerLayer value has one entry for each of the {layers} layers in front, at "
            f"sites that each layer has; got shape {shape} for {edit.site}."
        )
    return shape[1:]


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """What every edit has: where it applies. Subclasses say what happens there (:meth:`new`).

    Every field but `site` is data: any of them may be traced, swept by ``vmap``, or changed without
    compiling again. None means everywhere.

    Attributes:
        site: a site of the table, or an alias (static). ``layers.12.resid_post`` also sets `layer`.
        layer: int or ints. Negative counts from the last.
        position: which tokens: an int or ints (P,), negative counted from each prompt's own end, so
            that -1 is the last real token of every row of a padded batch; ints (B, P), a row for
            each prompt; a slice; a mask of booleans (T,) or (B, T); "prompt" or "new" (generated);
            or a :class:`jaxtc.Token`, relative to where a token stands.
        row: batch row or rows.
        head: head or heads, at sites with an axis N or K.
        coordinate: index or indices along the last axis, at sites where that is D, H, F or V.
        key: which keys, at sites with both a query and a key axis; spelled as ``position``.
    """

    site: str = dataclasses.field(default="", kw_only=True)
    layer: Any = dataclasses.field(default=None, kw_only=True)
    position: Any = dataclasses.field(default=None, kw_only=True)
    row: Any = dataclasses.field(default=None, kw_only=True)
    head: Any = dataclasses.field(default=None, kw_only=True)
    coordinate: Any = dataclasses.field(default=None, kw_only=True)
    key: Any = dataclasses.field(default=None, kw_only=True)

    # What each target ranges over; a kind with more of them adds to these.
    targets = TARGETS
    # Sites of the same layer that `new` asks its context for.
    reads = ()
    # Fields that hold a value of the site's shape, or one that broadcasts to it.
    values = ()
    # Fields that hold real numbers of another shape.
    amounts = ()
    # At `attn_scores`: whether a key that is masked for a query is seen once it has a score here.
    unmasks: ClassVar[bool] = False
    # Whether `new` applies `key` itself.
    handles_key = False
    # Worth skipping by a branch at the layers where it does not apply.
    costly = False
    # Whether `new` wants all tokens of the prompt, so that it cannot act in decode.
    needs_prompt = False
    # Whether what the model computes here is not used at all where this applies.
    replaces = False
    # Whether it applies to <bos>, <eos> and the like too.
    special_tokens = True
    # The only layers where this edit can ever apply, when that is static.
    layers: ClassVar[tuple[int, ...] | None] = None
    # Whether it keeps something of each layer for later ones, see `carry`.
    carries = False
    # Whether it applies from the layers that it names on, to the last.
    onward = False
    # Sizes of axes of its own that targets range over, by letter.
    sizes: ClassVar[dict[str, int]] = {}

    def __post_init__(self):
        if not self.site:
            raise EditError(
                f"{type(self).__name__} needs a site, for example site='resid_post'; "
                "`jaxtc sites` lists them."
            )
        plain_fields(self)
        name, layer = parse(self.site, editing=True)
        object.__setattr__(self, "site", name)
        for field, target in self.targets.items():
            form = spelled if isinstance(target, Tokens) else one_array
            object.__setattr__(self, field, form(getattr(self, field)))
        if layer is not None:
            if self.layer is not None:
                raise EditError(
                    f"{type(self).__name__} names layer {layer} in its site and layer={self.layer} "
                    "besides; give one of the two."
                )
            object.__setattr__(self, "layer", layer)

    def new(self, x: jax.Array, context: Context) -> jax.Array:
        """The value of the whole site after the edit; the tap keeps ``x`` where it does not apply.

        Args:
            x: the site's value, with the axes of the table.
            context: tokens' positions, and the upstream sites listed in :attr:`reads`. ``x`` is
                padded: a mean over tokens leaves padding out with ``context.real`` (B, T).
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it changes")

    def carry(self, context: Context) -> Any:
        """What an edit that ``carries`` keeps of this layer, whether it applies here or not.

        :meth:`new` finds it in ``context.carried``, beside that of earlier layers.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it carries")

    def check(self, sizes: dict[str, int]) -> None:
        """Raise EditError for what is wrong with this edit's own fields, before anything runs.

        ``sizes`` are of the axis letters, "L" for the layers; T and S are the true length.
        """

    def fits(self, lengths: np.ndarray) -> Any:
        """(..., B) booleans: whether targets that exist fit each other; None where they always do.

        Asked on the host only, for prompts of ``lengths`` (B,); "..." are the variants of a sweep.
        Inside a trace :meth:`new` gives NaN in its place.
        """

    def misfit(self, row: int, lengths: np.ndarray) -> str:
        """What is wrong in a row where :meth:`fits` is false, for messages."""
        return "its targets do not fit each other."

    def __str__(self):
        parts = [self.site]
        for name in TARGETS:
            value = getattr(self, name)
            if value is not None and not is_traced(value):
                numbers = isinstance(value, int | np.integer | np.ndarray | jax.Array)
                parts.append(f"{name}={np.asarray(value).tolist() if numbers else value}")
        return f"{type(self).__name__}({', '.join(parts)})"
