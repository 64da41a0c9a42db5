"""``run``: one compiled forward pass with captures and edits."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtc.captures.activations import Activations
from jaxtc.captures.base import Reducer
from jaxtc.captures.request import Asked, Captures, check_logits, understand
from jaxtc.edits.base import Edit
from jaxtc.edits.check import check_edits
from jaxtc.edits.judge import all_there
from jaxtc.errors import InputError
from jaxtc.interchange import below
from jaxtc.memory.needs import check_run
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import Prompts, last_tokens, prepare
from jaxtc.programs.leaves import parameters, placed, rebuild
from jaxtc.programs.program import Fact, Program, description
from jaxtc.sharding.mesh import MeshLike
from jaxtc.sharding.placement import Placement
from jaxtc.tap.sites import BY_NAME, ORDER, Address
from jaxtc.tap.tap import Tap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunResult:
    """What :func:`run` returns.

    Attributes:
        logits: (B, T, V) float32 for "all", (B, V) for "last", None otherwise.
        activations: what was captured, by address; aliases work as keys.
        lengths: (B,) int32; in rows shorter than T, what lies past the length is padding.
        length: T.
    """

    logits: jax.Array | None
    activations: Activations
    lengths: jax.Array
    length: int = dataclasses.field(metadata={"static": True})

    @property
    def mask(self) -> jax.Array:
        """(B, T) booleans, true on real tokens."""
        return below(self.length, self.lengths)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call: with the shapes, the key under which a program is compiled."""

    config: Gemma2Config
    captures: tuple[Address, ...]
    logits: str | None
    reach: tuple[int, int]
    unsure: bool
    placement: Placement | None


def run(
    model: Gemma2,
    tokens: Any,
    *,
    lengths: Any = None,
    capture: Captures = (),
    edits: Sequence[Edit] = (),
    logits: Literal["all", "last"] | None = "all",
    mesh: MeshLike | None = None,
    checks: bool = False,
) -> RunResult:
    """Run prompts through the model once, keeping what is captured and applying edits.

    Compiled once per combination of captured sites, kinds of edits and padded length; other token
    ids, other lengths of the same bucket, and other values, layers, positions, rows or features of
    an edit run the same program (:func:`jaxtc.compiles` counts). Layers past the last one asked for
    are not run when ``logits`` is None.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokens: one prompt's ids, a list of prompts of any lengths, or an array (T,) or (B, T)
            padded on the right.
        lengths: (B,) real tokens of each row, when ``tokens`` is an array with padding.
        capture: addresses such as ``"layers.20.mlp_in_normed"`` (``"mlp_out"`` means every layer)
            and reducers of :mod:`jaxtc.reducers`, which keep less; one, several, or a mapping from
            names of your own.
        edits: see :mod:`jaxtc.edits.values`; applied in this order.
        logits: of every token, of each prompt's last token only, or none.
        mesh: only needed inside a ``jax.jit`` of yours, where a model does not tell on which mesh
            it lies; elsewhere it must be the model's. Rows are divided over its axis ``data`` if
            there are enough. Results are arrays on the mesh, see :func:`jaxtc.to_numpy`.
        checks: for debugging: where targets of edits are traced, name the ones that do not exist
            through ``jax.experimental.checkify``. Under ``vmap`` alone that raises; inside ``jit``
            wrap the function, ``error, out = checkify.checkify(f)(...)``, then ``error.throw()``.

    Raises:
        InputError: tokens the model cannot run, or nothing asked for.
        SiteError: an address that names nothing here.
        EditError: an edit that does not fit or could never fire. Where its target is only known
            inside a trace (``vmap`` over layers, say) the result is NaN instead.
        CapacityError: what was asked for would not fit in memory.
        ShardingError: a mesh that is not the model's, or a transcoder that is not on it.
    """
    config = model.config
    check_logits(logits)
    asked = understand(capture, config.num_hidden_layers)
    leaves = parameters(model)
    where = placed(model, leaves, mesh)
    call = Call.of(config, prepare(tokens, config, lengths), asked, edits, logits, where)
    check_run(config, leaves, call.size, asked.addresses, call.reducers, logits, call.edits)
    if checks and call.plan.unsure:
        all_there(call.edits, config, call.plan.reach, call.prompts.lengths, checks=True)
    return call.result(_run(*call.on_mesh(leaves), describe=lambda: call.facts(leaves)))


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of :func:`run`, checked: what its program takes, and what to make of its results."""

    plan: Plan
    prompts: Prompts
    asked: Asked
    edits: tuple[Edit, ...]
    reducers: tuple[Reducer, ...]

    @classmethod
    def of(
        cls,
        config: Gemma2Config,
        prompts: Prompts,
        asked: Asked,
        edits: Sequence[Edit],
        logits: str | None,
        placement: Placement | None = None,
    ) -> "Call":
        """Check edits and captures against the model and the prompts; raises as :func:`run`."""
        if logits is None and not asked:
            raise InputError(
                "Nothing was asked for: give capture=[...], or logits='all' or 'last'."
            )
        layers = config.num_hidden_layers
        reach = (layers, len(ORDER)) if logits else asked.reach(layers)
        checked, unsure = check_edits(edits, config, reach, prompts)
        plan = Plan(config, asked.addresses, logits, reach, unsure, placement)
        return cls(plan, prompts, asked, checked, asked.checked(config, prompts))

    @property
    def size(self) -> tuple[int, int, int]:
        """(B, T, T padded)."""
        batch, width = self.prompts.tokens.shape
        return batch, self.prompts.length, width

    def arguments(self, leaves: Sequence[jax.Array]) -> tuple:
        """Of :func:`forward`."""
        prompts = self.prompts
        return self.plan, leaves, prompts.tokens, prompts.lengths, self.edits, self.reducers

    def on_mesh(self, leaves: Sequence[jax.Array]) -> tuple:
        """:meth:`arguments`, each where the program expects it."""
        plan, _, tokens, lengths, edits, reducers = given = self.arguments(leaves)
        place = plan.placement
        if place is None:
            return given
        rows = place.put_rows(tokens), place.put_rows(lengths)
        return plan, leaves, *rows, *place.put_whole((edits, reducers))

    def facts(self, leaves: Sequence[jax.Array]) -> list[Fact]:
        """What its program depends on."""
        plan, (batch, length, width) = self.plan, self.size
        return description(
            plan.config, leaves, batch=batch, length=length, padded=width,
            captures=plan.captures, edits=self.edits, reducers=self.reducers, logits=plan.logits,
            last_layer=plan.reach[0], traced_targets=plan.unsure, placement=plan.placement,
        )  # fmt: skip

    def result(self, kept: tuple) -> RunResult:
        """Of what :func:`forward` gave, without the padding up to the bucket."""
        out, arrays, reduced = kept
        length = self.prompts.length
        if length < self.prompts.tokens.shape[1]:
            names = tuple(address.site for address in arrays)
            logits = [out] if self.plan.logits == "all" else []
            cut = _trim(names, length, list(arrays.values()), logits)
            arrays = dict(zip(arrays, cut, strict=False))
            out = cut[-1] if logits else out
            reduced = [r.cut(one, length) for r, one in zip(self.reducers, reduced, strict=True)]
        named = dict(zip(self.asked.names, reduced, strict=True))
        layers = self.plan.config.num_hidden_layers
        activations = Activations(arrays, layers, named, self.asked.aliases)
        return RunResult(out, activations, self.prompts.lengths, length)


def forward(plan: Plan, leaves, tokens, lengths, edits, reducers, resume=None):
    """Logits, captured arrays and what reducers kept, all still padded; ``_run`` without jit.

    Args:
        plan: the static half.
        leaves: of the model, as :func:`jaxtc.programs.leaves.parameters` gives them.
        tokens: (B, W) ids.
        lengths: (B,).
        edits: as ``check_edits`` gives them.
        reducers: as ``Asked.checked`` gives them.
        resume: see :class:`jaxtc.model.gemma2.Gemma2`.
    """
    model, layers = rebuild(plan.config, leaves), plan.config.num_hidden_layers
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    tap = Tap(plan.captures, edits, positions, lengths, reducers=reducers, placement=plan.placement)
    at = lengths - 1 if plan.logits == "last" and not tap.touches("logits") else None
    depth = plan.reach[0] + 1 if plan.reach[0] < layers else None
    out, _ = model(tokens, positions=positions, tap=tap, depth=depth, logits_at=at, resume=resume)
    if plan.logits is None:
        out = None
    elif plan.logits == "last":
        out = out[:, 0] if at is not None else last_tokens(out, lengths)
    kept = out, tap.activations, tap.stacked()
    if plan.unsure:
        fine = all_there(edits, plan.config, plan.reach, lengths)
        kept = jax.tree.map(lambda x: jnp.where(fine, x, nothing(x)), kept)
    return kept


_run = Program("run", forward, static_argnums=0)


def nothing(x: jax.Array) -> jax.Array:
    """NaN in the dtype of ``x``; -1 where that holds whole numbers."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(jnp.nan if floating else -1).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trim(sites: tuple[str, ...], length: int, arrays, logits) -> list[jax.Array]:
    """Arrays of these sites, then logits, without the padding up to the bucket.

    One program for all: a slice by itself takes jax as long as a short model's whole pass.
    """

    def cut(site, x):
        letters = BY_NAME[site].axes.split()
        return x[tuple(slice(length) if letter in "TS" else slice(None) for letter in letters)]

    return [*map(cut, sites, arrays), *(cut("logits", x) for x in logits)]
