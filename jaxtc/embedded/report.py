"""What the embedded model knows and how well its transcoders explain it, measured on its files.

Measured on held-out text and on every kind of fact, with the MLPs as they are (clean), with one
layer's MLP replaced by its transcoder (spliced), and with all of them: a small change of the loss
can hide lost facts. <bos> and <eos> keep their MLPs, since transcoders are not trained on special
tokens; losses count <eos> as an answer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Group
from rich.table import Table
from tokenizers import Tokenizer

from jaxtc.edits.base import Edit, register_edit
from jaxtc.edits.features import Splice
from jaxtc.edits.values import Zero
from jaxtc.embedded import DATA, model_folder, transcoder_folder
from jaxtc.embedded.corpus import Corpus, Item, default_corpus
from jaxtc.embedded.provenance import check_text
from jaxtc.embedded.text import UserText
from jaxtc.errors import InputError
from jaxtc.helpers import explicit_transfers
from jaxtc.model.gemma2 import Gemma2
from jaxtc.programs.run import run
from jaxtc.tap.sites import Address
from jaxtc.training.packing import BOS, PAD, pieces
from jaxtc.transcoders.metrics import (
    FVU,
    FeatureStatistics,
    Loss,
    delta_loss,
    loss_recovered,
)
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.load_model import load_model
from jaxtc.weights.load_transcoder import load_transcoders

KINDS = {
    "one_hop": "one-hop",
    "two_hop": "two-hop, stated in training",
    "h1": "two-hop, pair held out (h1)",
    "h2": "two-hop, city held out (h2)",
}
_ROWS, _LENGTH = 128, 64


@register_edit()
class _Ablate(Zero):
    """Zeros at the tokens that a splice replaces, as :func:`loss_recovered` asks."""

    special_tokens = False


@dataclasses.dataclass(frozen=True)
class KindReport:
    """Next-token accuracy on one kind of fact: clean, and with all layers spliced."""

    items: int
    clean: float
    spliced: float


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One transcoder on held-out text; losses in nats."""

    fvu: float  # dataset-mean convention
    l0: float  # mean number of active features per token
    dead: float  # share of features that were never active
    loss: float  # next-token loss with this transcoder spliced
    delta_loss: float  # by how much that exceeds the clean loss
    loss_recovered: float  # (ablated − spliced) / (ablated − clean), this layer's MLP zeroed


@dataclasses.dataclass(frozen=True)
class Report:
    """All figures of one folder."""

    tokens: int  # of the held-out text
    loss: float
    loss_spliced: float
    loss_ablated: float
    kinds: dict[str, KindReport]
    layers: dict[int, LayerReport]

    def __rich__(self) -> Group:
        facts = Table("kind", "items", "clean", "all spliced", title="Next-token accuracy on facts")
        for kind, k in self.kinds.items():
            facts.add_row(KINDS[kind], str(k.items), f"{k.clean:.2%}", f"{k.spliced:.2%}")
        layers = Table(
            "layer", "FVU", "L0", "dead", "Δ loss, nats", "loss recovered",
            title="Transcoders on held-out text (FVU: dataset mean)",
        )  # fmt: skip
        for layer, t in self.layers.items():
            layers.add_row(
                str(layer), f"{t.fvu:.4f}", f"{t.l0:.1f}", f"{t.dead:.1%}", f"{t.delta_loss:+.4f}",
                f"{t.loss_recovered:.2%}",
            )  # fmt: skip
        columns = ("held-out text", "clean", "all spliced", "all zeroed")
        loss = Table(*columns, title="Loss, nats/token")
        losses = (self.loss, self.loss_spliced, self.loss_ablated)
        loss.add_row(f"{self.tokens} tokens", *(f"{value:.4f}" for value in losses))
        return Group(*([facts] if self.kinds else []), layers, loss)


@explicit_transfers
def measure(
    root: Path = DATA,
    source: Corpus | UserText | None = None,
    *,
    items: int = 4000,
    documents: int = 2048,
    stream: int = 2,
) -> Report:
    """Measure the model and transcoders in a folder that the recipe made.

    Args:
        root: the folder; the shipped one by default.
        source: the text it was trained on; the generated corpus when None.
        items: most facts of a kind, the same ones every time.
        documents: of held-out text.
        stream: which of the source's streams that text comes from.

    Raises:
        SourceError: the folder holds no model or no transcoders.
        InputError: the model is of another text, as far as its folder or its tokenizer can tell.
    """
    source = default_corpus() if source is None else source
    model = load_model(model_folder(root), dtype=jnp.float32)
    tokenizer = Tokenizer.from_file(str(model_folder(root) / "tokenizer.json"))
    check_text(root, tokenizer, source)
    transcoders = load_transcoders(transcoder_folder(root))
    splice = Splice(transcoders)
    zero = _Ablate(site="mlp_out")
    texts = source.documents(stream, 0, documents, held_out=True)
    ids = list(pieces((encoded.ids for encoded in tokenizer.encode_batch(texts)), _LENGTH))

    clean = text_loss(model, ids)
    layers = {}
    for n, (fvu, l0, dead) in reconstruction(model, ids, transcoders).items():
        spliced, ablated = (
            text_loss(model, ids, [dataclasses.replace(edit, layer=n)]) for edit in (splice, zero)
        )
        layers[n] = LayerReport(
            fvu, l0, dead, spliced, delta_loss(clean, spliced),
            loss_recovered(clean, spliced, ablated),
        )  # fmt: skip
    kinds = {}
    for kind in KINDS if isinstance(source, Corpus) else ():
        every = source.items(kind)
        chosen = np.random.default_rng(0).permutation(len(every))[:items]
        asked = [every[i] for i in sorted(chosen)]
        accuracies = (accuracy(model, tokenizer, asked, edits) for edits in ((), [splice]))
        kinds[kind] = KindReport(len(asked), *accuracies)
    return Report(
        tokens=sum(len(row) - 1 for row in ids), loss=clean,
        loss_spliced=text_loss(model, ids, [splice]), loss_ablated=text_loss(model, ids, [zero]),
        kinds=kinds, layers=layers,
    )  # fmt: skip


def accuracy(
    model: Gemma2, tokenizer: Tokenizer, items: Sequence[Item], edits: Sequence[Edit] = ()
) -> float:
    """Share of items whose most probable next token is the answer.

    Raises:
        InputError: the tokenizer does not know a prompt or an answer, or has several tokens for an
            answer: the model is of another text.
    """
    prompts = [encoded.ids for encoded in tokenizer.encode_batch([i.prompt for i in items])]
    encoded = tokenizer.encode_batch([i.answer for i in items], add_special_tokens=False)
    unknown = tokenizer.token_to_id("<unk>")
    for item, prompt, answer in zip(items, prompts, encoded, strict=True):
        if unknown in [*prompt, *answer.ids] or len(answer.ids) != 1:
            raise InputError(
                f"The model's tokenizer splits {item.prompt!r} and its answer {item.answer!r} into "
                f"{tokenizer.decode(prompt, skip_special_tokens=False)!r} and {answer.tokens}, "
                "where an answer is one token and no word unknown: it is of another text, on "
                "which this accuracy would mean nothing."
            )
    answers = np.array([answer.ids[0] for answer in encoded])
    guesses = [
        run(model, tokens, lengths=lengths, edits=edits, logits="last").logits.argmax(axis=-1)
        for tokens, lengths in _batches(prompts)
    ]
    return float((np.concatenate(guesses)[: len(items)] == answers).mean())


def text_loss(model: Gemma2, ids: Sequence[Sequence[int]], edits: Sequence[Edit] = ()) -> float:
    """Mean cross-entropy in nats of each document's tokens after the first."""
    loss = Loss(special_tokens=True)
    for tokens, lengths in _batches(ids):
        loss.update(run(model, tokens, lengths=lengths, edits=edits))
    return loss.mean


def reconstruction(
    model: Gemma2, ids: Sequence[Sequence[int]], transcoders: dict[int, Transcoder]
) -> dict[int, tuple[float, float, float]]:
    """(FVU, L0, share of dead features) by layer, special tokens left out."""
    errors = {n: FVU() for n in transcoders}
    active = {n: FeatureStatistics(t.features) for n, t in transcoders.items()}
    sites = {
        n: (Address(t.input_site, n), Address(t.output_site, n)) for n, t in transcoders.items()
    }
    wanted = [address for pair in sites.values() for address in pair]
    for tokens, lengths in _batches(ids):
        held = run(model, tokens, lengths=lengths, capture=wanted, logits=None)
        for n, transcoder in transcoders.items():
            x, y = (held.activations[address] for address in sites[n])
            features = transcoder.encode(x)
            errors[n].update(y, transcoder.decode(features, x), held)
            active[n].update(features, held)
    return {n: (errors[n].fvu, active[n].l0, float(active[n].dead.mean())) for n in transcoders}


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens (rows, T), lengths (rows,)), in one shape for one program, filled with <pad>."""
    ids = [*ids, *[[BOS]] * (-len(ids) % _ROWS)]
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.full((len(ids), lengths.max()), PAD, np.int32)
    tokens[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(ids)
    for start in range(0, len(ids), _ROWS):
        yield tokens[start : start + _ROWS], lengths[start : start + _ROWS]
