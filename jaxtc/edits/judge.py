"""One judge of targets: does what an edit names exist, and is it reached?

:func:`settle` counts a target from the front, and :func:`judge` states the rules once: with NumPy
on the host, where :func:`refusal` is the error for a broken one, and with jax.numpy inside a trace,
where :func:`all_there` makes the result NaN. A sweep judges all values of its axes at once.
:func:`check_conflicts` compares edits with each other.

Axis letters: B batch, P positions, "..." the variants of a sweep.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxtc.edits.base import Edit, Index, Tokens
from jaxtc.edits.features import FeatureEdit
from jaxtc.errors import EditError
from jaxtc.model.config import Gemma2Config
from jaxtc.model.prompts import Prompts, among_ids
from jaxtc.tap.positions import Places, Span, as_int32, is_traced, locate, missing, present
from jaxtc.tap.sites import BY_NAME, ORDER, Address, Site, check_layer
from jaxtc.tap.tap import among

# What an axis's indices belong to, for messages.
OWNERS = {"B": "the batch", "M": "this transcoder"}


class Pass(NamedTuple):
    """The forward pass that edits are judged for.

    Attributes:
        config: of the model.
        reach: the last (layer, place in the layer) that is needed.
        lengths: (B,) tokens of each prompt, NumPy where they are known.
        extra: tokens that will follow the prompts (generation).
        prompts: themselves.
    """

    config: Gemma2Config
    reach: tuple[int, int]
    lengths: Any
    extra: int = 0
    prompts: Prompts | None = None

    def sizes(self, edit: Edit) -> dict[str, int]:
        """Sizes of the axes that an edit's targets range over, by letter."""
        layers = self.config.num_hidden_layers
        return {**self.config.sizes, "B": len(self.lengths), "L": layers, **edit.sizes}

    def size(self, edit: Edit, target: Index) -> int:
        """Of the axis that a target ranges over."""
        return self.sizes(edit)[_axis(edit, target, BY_NAME[edit.site])]


def settle(edit: Edit, name: str, given: Any, here: Pass) -> Any:
    """One target's value, counted from the front: int32, or a form of positions.

    Raises:
        EditError: the site has no such axis, or this is not an index or a position.
    """
    target, site = edit.targets[name], BY_NAME[edit.site]
    if _axis(edit, target, site) is None:
        fitting = ", ".join(other for other, row in BY_NAME.items() if _axis(edit, target, row))
        raise EditError(
            f"{edit}: {site.name} [{site.axes}] has no axis for {name}=...; these sites have one: "
            f"{fitting}."
        )
    if isinstance(target, Tokens):
        new = here.extra > 0 and name == "position"
        return locate(given, here.prompts, new=new, what=edit)
    array = given if isinstance(given, jax.core.Tracer) else np.asarray(given)
    if array.dtype.kind not in "iu" or array.ndim > 1 or not array.size:
        raise EditError(
            f"{edit}: {name} must be whole numbers, one or a row of them, got {given!r}."
        )
    array = as_int32(array)
    if target.back:
        xp = jnp if is_traced(array) else np
        array = xp.where(array < 0, array + here.size(edit, target), array)
    return array


def _axis(edit: Edit, target: Index | Tokens, site: Site) -> str | None:
    """The letter of the axis of a site that a target ranges over; None when it has none."""
    letters = [*site.letters, *("L" if site.per_layer else ""), *edit.sizes]
    if isinstance(target, Tokens):
        return "S" if not target.keys or "T" in letters and "S" in letters else None
    return next((letter for letter in letters if letter in target.letters), None)


def judge(edit: Edit, here: Pass, *, inside: bool = False) -> dict[str, Any]:
    """(...,) booleans by rule: whether what the edit names is there.

    Args:
        edit: with its targets settled; all may have leading axes "...", which broadcast.
        here: the pass.
        inside: in the trace of the pass every rule is computed; outside, those of traced values
            are left out.
    """
    found, xp, batch = {}, jnp if inside else np, len(here.lengths)

    def known(*inputs: Any) -> bool:
        return inside or not is_traced(inputs)

    for name, target in edit.targets.items():
        value = getattr(edit, name)
        if value is None:
            continue
        if isinstance(target, Tokens):
            if known(value, edit.row, getattr(edit, target.rows), here.lengths):
                ends = here.lengths + (here.extra if name == "position" else 0)
                found[name] = present(value, ends, _rows(edit, target, batch, xp))
        elif known(value):
            at = xp.atleast_1d(xp.asarray(value))
            found[name] = ((at >= 0) & (at < here.size(edit, target))).all(-1)
            if target.distinct:
                ordered = xp.sort(at, -1)
                found[name] &= (ordered[..., 1:] != ordered[..., :-1]).all(-1)
    if not edit.special_tokens and known(
        edit.position, edit.row, here.prompts.tokens, here.lengths
    ):
        found["special"] = _some_text(edit, here, xp)
    if known(edit.layer):
        layers = xp.atleast_1d(xp.asarray(_layers(edit, here)))
        if edit.layer is not None and edit.layers is not None:
            found["layers"] = (layers[..., None] == xp.asarray(edit.layers)).any(-1).all(-1)
        found["reach"] = (layers <= here.reach[0] - (ORDER[edit.site] > here.reach[1])).all(-1)
    if not inside and not is_traced((here.lengths, [getattr(edit, name) for name in edit.targets])):
        fine = edit.fits(here.lengths)
        if fine is not None:
            found["fits"] = (fine | ~_rows(edit, Tokens(), batch, np)).all(-1)
    return found


def _some_text(edit: Edit, here: Pass, xp: Any) -> Any:
    """(...,) booleans: a token is named that is not special, or none that is, one by one."""
    named, special = _named(edit, here, xp)
    if isinstance(edit.position, Places):
        return ~(named & special).any((-2, -1))
    later = edit.position is None or isinstance(edit.position, Span)
    more = here.extra > 0 and later and getattr(edit.position, "part", "") != "prompt"
    return (named & ~special).any((-2, -1)) | more


def _named(edit: Edit, here: Pass, xp: Any) -> tuple[Any, Any]:
    """(..., B, W) booleans: the prompts' tokens that an edit names; (B, W): the special ones."""
    tokens = xp.asarray(here.prompts.tokens)
    batch, width = tokens.shape
    positions = xp.broadcast_to(xp.arange(width), (batch, width))
    real = (positions < here.lengths[:, None]) & _rows(edit, Tokens(), batch, xp)[..., None]
    named = real if edit.position is None else real & edit.position.selects(positions)
    return named, among_ids(tokens, here.config.special_ids)


def _rows(edit: Edit, target: Tokens, batch: int, xp: Any) -> Any:
    """(..., B) booleans: the rows that must have the tokens of a target."""
    rows = xp.ones(batch, bool) if edit.row is None else among(edit.row, batch, xp)
    if target.rows == "row" or getattr(edit, target.rows) is None:
        return rows
    # Those that some edited row names.
    froms = xp.atleast_1d(xp.asarray(getattr(edit, target.rows)))
    froms = xp.broadcast_to(froms, (*froms.shape[:-1], batch))
    return ((xp.arange(batch)[:, None] == froms[..., None, :]) & rows[..., None, :]).any(-1)


def _layers(edit: Edit, here: Pass) -> Any:
    """The layers that an edit names; where it names none, the first at which it applies."""
    if edit.layer is not None:
        return edit.layer
    if BY_NAME[edit.site].per_layer:
        return 0 if edit.layers is None else edit.layers
    return Address(edit.site).place(here.config.num_hidden_layers)[0]


def refusal(rule: str, edit: Edit, given: Edit, here: Pass) -> EditError:
    """The error for a rule of :func:`judge` that ``edit``, as ``given`` by the user, breaks.

    Raises:
        SiteError: a layer that does not exist.
    """
    target, lengths = edit.targets.get(rule), here.lengths
    if isinstance(target, Tokens):
        found, rows = getattr(edit, rule), _rows(edit, target, len(lengths), np)
        extra = here.extra if rule == "position" else 0
        return missing(found, getattr(given, rule), lengths, extra, rows, given)
    if target:
        at, named = (np.atleast_1d(getattr(one, rule)) for one in (edit, given))
        size = here.size(edit, target)
        outside = named[(at < 0) | (at >= size)]
        if not outside.size:
            return EditError(f"{given}: a {rule} is named twice in {named.tolist()}.")
        if rule == "layer":
            check_layer(int(outside[0]), size, str(given))
        owner = OWNERS.get(target.letters, "this model")
        return EditError(
            f"{given}: {rule} {outside[0]} does not exist; {owner} has "
            f"{rule.removeprefix('from_')}s 0 to {size - 1}."
        )
    if rule == "special":
        named, special = _named(edit, here, np)
        row, at = np.argwhere(named & special)[0]
        what = "every token that it names is special, such as"
        if isinstance(edit.position, Places):
            what = "it names a special token,"
        return EditError(
            f"{given}: {what} id {here.prompts.tokens[row, at]} at position {at} of prompt {row}. "
            "Transcoders were not trained on <bos>, <eos> and padding, so these are left alone: "
            "name other tokens, or give special_tokens=True."
        )
    if rule == "fits":
        wrong = ~edit.fits(lengths) & _rows(edit, Tokens(), len(lengths), np)
        return EditError(f"{given}: {edit.misfit(int(np.argmax(wrong)), lengths)}")
    layers = np.atleast_1d(_layers(edit, here))
    if rule == "layers":
        wrong = np.setdiff1d(layers, edit.layers)[0]
        return EditError(f"{given} has nothing for layer {wrong}, only {edit.layers}.")
    of = f" of layer {layers.max()}" if BY_NAME[edit.site].per_layer else ""
    return EditError(
        f"{given} would never fire: nothing that was asked for depends on {edit.site!r}{of}. Ask "
        "for logits, or for a capture that comes after it."
    )


def all_there(
    edits: Sequence[Edit],
    config: Gemma2Config,
    reach: tuple,
    lengths: Any,
    tokens: Any,
    checks: bool = False,
) -> jax.Array:
    """() boolean: whether every target of every edit exists, inside a trace.

    ``lengths`` (B,) and ``tokens`` (B, W) are of the prompts, padded on the right. With ``checks``
    each rule is also a check of ``jax.experimental.checkify``.
    """
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(lengths), np.shape(tokens)[1])
    fine, here = jnp.ones((), bool), Pass(config, reach, prompts.lengths, prompts=prompts)
    for edit in edits:
        for rule, one in judge(edit, here, inside=True).items():
            fine &= one
            if checks:
                given = getattr(edit, rule, None) if rule in edit.targets else edit.layer
                what = f"{edit} would not fire ({rule})".replace("{", "{{").replace("}", "}}")
                checkify.check(one, what + ": {}", jax.tree.map(jnp.asarray, given))
    return fine


def check_conflicts(edits: Sequence[Edit], layers: int, width: int) -> None:
    """Refuse edits of what is replaced, and two edits of one feature at one token.

    What is traced cannot be compared, and passes. ``width`` is W, the padded length.

    Raises:
        EditError: naming both edits.
    """
    for (i, a), (j, b) in itertools.permutations(enumerate(edits), 2):
        # What leads from the site that is read to the one that is replaced is not computed.
        inside = ORDER["mlp_in"] < ORDER[b.site] < ORDER[a.site]
        before = b.site == a.site and j < i
        known = a.replaces and (inside or before) and not is_traced((a.layer, b.layer))
        if known and _layers_of(b, layers) <= _layers_of(a, layers):
            raise EditError(
                f"{b} would have no effect: {a} replaces what it changes. Leave one of them out"
                + (", or put it after the other." if before else ".")
            )
        if i < j and isinstance(a, FeatureEdit) and isinstance(b, FeatureEdit) and a.site == b.site:
            _check_features(a, b, width)


def _check_features(a: FeatureEdit, b: FeatureEdit, width: int) -> None:
    """Each adds its difference from the transcoder's own activation, so two would add up wrong."""
    targets = [(target, getattr(a, name), getattr(b, name)) for name, target in a.targets.items()]
    if not _encoders(a) & _encoders(b) or is_traced(targets):
        return
    for target, mine, others in targets:
        if mine is None or others is None:
            continue
        if isinstance(target, Tokens):
            # As far as the prompts go; what follows them is named by spans and numbers alike.
            batch = len(jax.tree.leaves(mine)[0])
            at = np.broadcast_to(np.arange(2 * width), (batch, 2 * width))
            shared = (mine.selects(at) & others.selects(at)).any()
        else:
            shared = np.intersect1d(mine, others).size
        if not shared:
            return
    raise EditError(
        f"{a} and {b} both change feature {np.intersect1d(a.feature, b.feature)[0]} at the same "
        "tokens, and each adds its difference from what the transcoder itself finds there. Make it "
        "one edit, or give them different positions."
    )


def _encoders(edit: FeatureEdit) -> set[int]:
    """Which arrays encode its features; of a cross-layer transcoder, those of each layer."""
    given = edit.transcoder
    return {id(one.W_enc[...]) for one in getattr(given, "layers", [given])}


def _layers_of(edit: Edit, layers: int) -> set[int]:
    every = range(layers) if edit.layers is None else edit.layers
    if edit.onward and edit.layer is not None:
        return set(range(int(np.min(edit.layer)), layers))
    return set(np.atleast_1d(every if edit.layer is None else edit.layer).tolist())
