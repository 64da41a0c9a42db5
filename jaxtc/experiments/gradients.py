"""Gradients of a score with respect to activations: at every layer and position in one pass back.

Axis letters: B batch, T tokens, L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtc.captures.activations import Activations
from jaxtc.captures.request import check_logits, understand
from jaxtc.edits.base import Edit
from jaxtc.edits.values import Add
from jaxtc.errors import InputError
from jaxtc.experiments.scores import as_pytree
from jaxtc.helpers import explicit_transfers, pytree
from jaxtc.memory.needs import check_fits, estimate
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import Prompts, prepare
from jaxtc.programs.call import Call, Key, RunResult, forward
from jaxtc.programs.leaves import parameters, placed
from jaxtc.programs.program import Program


@pytree
@dataclasses.dataclass(frozen=True)
class Gradients:
    """What :func:`gradients` returns.

    Attributes:
        score: what ``of`` gave, () or (B,).
        activations: at the sites asked for.
        gradients: the score's (summed over the batch: each row's own) at the same addresses.
    """

    score: jax.Array
    activations: Activations
    gradients: Activations


@explicit_transfers
def gradients(
    model: Gemma2,
    tokens: Any,
    of: Callable[[RunResult], jax.Array],
    sites: str | Sequence[str],
    *,
    edits: Sequence[Edit] = (),
    lengths: Any = None,
    attention_mask: Any = None,
    tokenizer: Any = None,
    logits: Literal["all", "last"] = "last",
) -> Gradients:
    """Activations of sites and a score's gradients there, in one forward and one backward pass.

    The same as ``jax.grad`` with respect to the value of an ``Add`` of zeros at each place, which
    also works for everything else: an edit's values are leaves.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokens, lengths, attention_mask, tokenizer: as for :func:`jaxtc.run`.
        of: a score, see :mod:`jaxtc.scores`: a function from the result of a run (with these sites'
            activations) to a number, or one for each row, (B,). A plain function is part of the
            compile key (define it once).
        sites: such as ``"resid_post"`` (every layer) or ``["layers.3.mlp_out", "embed"]``.
        edits: as for :func:`jaxtc.run`; gradients are of a site's value after its edits.
        logits: that ``of`` sees, the last token's by default.

    Raises:
        InputError, SiteError, EditError: as for :func:`jaxtc.run`; or no site was named, or ``of``
            is not such a score.
        CapacityError: the activations would not fit in memory.
    """
    config = model.config
    prompts = prepare(tokens, config, lengths, attention_mask=attention_mask, tokenizer=tokenizer)
    asked = understand(sites, config.num_hidden_layers)
    if not asked.addresses or asked.reducers:
        raise InputError("Name the sites whose gradients are wanted, such as 'resid_post'.")
    check_logits(logits, needed=True)
    leaves = parameters(model)
    place = placed(model, leaves)
    call = Call.of(config, prompts, asked, edits, logits, place)
    size = estimate(model, prompts.tokens.shape, capture=sites, logits=logits)
    check_fits(3 * size.kept, "These activations, their gradients and the pass back")
    of = as_pytree(of) if place is None else place.put_whole(as_pytree(of))
    *given, _ = call.on_mesh(leaves)  # there are no reducers
    key = _Key(**vars(given.pop(0)), length=prompts.length)
    return Gradients(*_program(key, *given, prompts.starts, of))


@dataclasses.dataclass(frozen=True)
class _Key(Key):
    length: int


def _backward(key: _Key, leaves, tokens, lengths, edits, starts, of):
    """(score, activations, gradients)."""
    prompts = Prompts(tokens, lengths, key.length, starts)
    asked = understand(key.captures, key.config.num_hidden_layers)
    call = Call(key, prompts, asked, edits, ())

    def score(probes):
        pushes = [Add(value, site=a.site, layer=a.layer) for a, value in probes.items()]
        pushed = dataclasses.replace(call, edits=(*edits, *pushes))
        result = call.result(forward(*pushed.arguments(leaves)))
        found = _checked(of(result), len(tokens))
        return found.sum(), (found, result.activations)

    shapes = jax.eval_shape(lambda: forward(*call.arguments(leaves))[1])
    probes = {address: jnp.zeros(x.shape, x.dtype) for address, x in shapes.items()}
    slopes, (found, kept) = jax.grad(score, has_aux=True)(probes)
    return found, kept, call.result((None, slopes, [])).activations


def _checked(score: Any, batch: int) -> jax.Array:
    """What ``of`` gave, when it is a score."""
    fits = jax.tree_util.all_leaves([score]) and jnp.shape(score) in ((), (batch,))
    if fits and jnp.issubdtype(jnp.result_type(score), jnp.floating):
        return jnp.asarray(score)
    given = jax.tree.map(jax.typeof, score)
    raise InputError(
        f"`of` gave {given}, expected one real number, or one for each of the {batch} rows."
    )


_program = Program("gradients", _backward, static_argnums=0)
