"""``run``: one compiled forward pass with captures and edits."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtc.captures.request import Captures, check_logits, understand
from jaxtc.edits.base import Edit
from jaxtc.edits.judge import all_there
from jaxtc.helpers import explicit_transfers
from jaxtc.memory.needs import check_run
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import prepare
from jaxtc.programs.call import Call, RunResult, forward
from jaxtc.programs.leaves import parameters, placed
from jaxtc.programs.program import Program
from jaxtc.sharding.mesh import MeshLike

_run = Program("run", forward, static_argnums=0)


@explicit_transfers
def run(
    model: Gemma2,
    tokens: Any,
    *,
    lengths: Any = None,
    attention_mask: Any = None,
    tokenizer: Any = None,
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
        tokens: one prompt's ids, a list of prompts of any lengths, or an array (T,) or (B, T); or
            a tokenizer's whole output, ``tokenizer(texts, padding=True)``, in which case its
            ``attention_mask`` counts. Results stand where the tokens stand, so that prompts padded
            on the left come back on the right of their rows; positions of edits and of reducers
            are counted in each prompt, and 0 is its first token.
        lengths: (B,) real tokens of each row, when ``tokens`` is an array padded on the right.
        attention_mask: as ``tokens``, 1 on real tokens and 0 on padding, on either side.
        tokenizer: the model's, when ``tokens`` is text, or several texts.
        capture: addresses such as ``"layers.20.mlp_in_normed"`` (``"mlp_out"`` means every layer)
            and reducers of :mod:`jaxtc.reducers`, which keep less; one, several, or a mapping from
            names of your own.
        edits: see :mod:`jaxtc.edits.values`; applied in this order.
        logits: of every token, of each prompt's last token only, or none.
        mesh: only needed inside a ``jax.jit`` of yours, where the mesh of a model is not known;
            elsewhere it must be the model's. Rows are divided over its axis ``data`` if there are
            enough. Results are arrays on the mesh, see :func:`jaxtc.to_numpy`.
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
    prompts = prepare(tokens, config, lengths, attention_mask=attention_mask, tokenizer=tokenizer)
    call = Call.of(config, prompts, asked, edits, logits, where)
    size = len(prompts.tokens), prompts.length
    check_run(config, leaves, size, asked.addresses, call.reducers, logits, call.edits)
    if checks and call.key.unsure:
        of = call.prompts
        all_there(call.edits, config, call.key.reach, of.lengths, of.tokens, checks=True)
    return call.result(_run(*call.on_mesh(leaves)))
