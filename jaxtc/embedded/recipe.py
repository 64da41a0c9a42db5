"""The recipe: a tokenizer, a model and its transcoders from nothing, resumable.

While a run is unfinished its folder holds ``work/`` (checkpoints, the tokenizer, unfinished parts).
Each part is moved into place when complete: ``model/``, ``transcoders/``, ``report.json``; then
``work/`` is deleted. A killed run, started again with the same settings, resumes.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
from tokenizers import Tokenizer

from jaxtc.embedded import model_folder, transcoder_folder
from jaxtc.embedded.corpus import Corpus
from jaxtc.embedded.report import Report, measure
from jaxtc.embedded.text import UserText
from jaxtc.embedded.tokenizer import entity_id, for_transformers, train_bpe, world_tokenizer
from jaxtc.embedded.train_model import ModelRecipe, small_config, train_model
from jaxtc.errors import SourceError
from jaxtc.helpers import explicit_transfers, write_whole
from jaxtc.training.harvest import Harvest
from jaxtc.training.loop import Log
from jaxtc.training.packing import Batches
from jaxtc.training.transcoders import TranscoderRecipe, train_transcoders
from jaxtc.weights.load_model import load_model
from jaxtc.weights.save_model import save_model
from jaxtc.weights.save_transcoder import save_transcoder

MODEL_STREAM, TRANSCODER_STREAM = range(2)
_BUCKET = 131_072


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything, besides the text, that determines the outcome; the defaults made what ships."""

    model: ModelRecipe = ModelRecipe()
    transcoders: TranscoderRecipe = TranscoderRecipe()
    rows: int = 16  # packed rows in a batch of the model
    length: int = 64  # tokens in a row
    vocab_size: int = 4096  # of a tokenizer trained on a user's text
    sizes: tuple[tuple[str, int], ...] = ()  # fields of Gemma2Config other than the embedded one's


@explicit_transfers
def train(out: Path, recipe: Recipe, source: Corpus | UserText, *, log: Log = print) -> Report:
    """Make ``out/model``, ``out/transcoders`` and ``out/report.json``, and return what that says.

    The folder is created when missing; a run that was killed there resumes. ``log`` is called with
    lines of progress.

    Raises:
        SourceError: ``out`` holds a finished run, or one begun with other settings.
    """
    work = _open_work(out, recipe, source)
    tokenizer = _tokenizer(work / "tokenizer.json", recipe, source)
    if not model_folder(out).exists():
        _train_model(out, recipe, source, tokenizer, log)
    if not transcoder_folder(out).exists():
        _train_transcoders(out, recipe, source, tokenizer, log)
    log("measuring")
    report = measure(out, source)
    write_whole(out / "report.json", json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    shutil.rmtree(work)
    return report


def _tokenizer(file: Path, recipe: Recipe, source: Corpus | UserText) -> Tokenizer:
    """Made once: a BPE trained on the same text again can split it differently."""
    if not file.exists():
        corpus = isinstance(source, Corpus)
        made = world_tokenizer(source) if corpus else train_bpe(source.train, recipe.vocab_size)
        write_whole(file, made.to_str())
    return Tokenizer.from_file(str(file))


def _train_model(
    out: Path, recipe: Recipe, source: Corpus | UserText, tokenizer: Tokenizer, log: Log
) -> None:
    frozen = []
    if isinstance(source, Corpus):
        # Answers must be learnt as outputs. Every other city keeps a random embedding, which
        # cannot store where the city lies: the MLPs have to look it up.
        cities = (c for c in source.world.place_of if c not in source.world.answer_cities)
        frozen = [entity_id(tokenizer, city) for city in cities]
    model = train_model(
        small_config(tokenizer.get_vocab_size(), **dict(recipe.sizes)),
        Batches(source.documents, tokenizer, recipe.rows, recipe.length, MODEL_STREAM),
        recipe.model,
        frozen_tokens=frozen,
        folder=out / "work/model-steps",
        log=log,
    )
    context = model.config.max_position_embeddings
    save_model(model, model_folder(out), for_transformers(tokenizer, context))


def _train_transcoders(
    out: Path, recipe: Recipe, source: Corpus | UserText, tokenizer: Tokenizer, log: Log
) -> None:
    # Read back, so that the transcoders explain exactly the weights that were written.
    model = load_model(model_folder(out), dtype=jnp.float32)
    layers = tuple(range(model.config.num_hidden_layers))
    rows = max(4096 // recipe.length, 1)
    batches = functools.partial(
        Batches, source.documents, tokenizer, rows, recipe.length, TRANSCODER_STREAM
    )
    bucket = min(_BUCKET, recipe.transcoders.steps * recipe.transcoders.batch)
    transcoders = train_transcoders(
        Harvest(model, batches(), layers, bucket),
        recipe.transcoders,
        folder=out / "work/transcoder-steps",
        log=log,
    )
    x, _ = Harvest(model, batches(held_out=True), layers, tokens=16_384).bucket(0)
    made = out / "work/transcoders"
    shutil.rmtree(made, ignore_errors=True)
    for layer, transcoder in enumerate(transcoders):
        l0 = float((transcoder.encode(x[layer]) > 0).sum(axis=1).mean())
        M = transcoder.features
        width = M if M % 1024 else f"{M // 1024}k"
        save_transcoder(transcoder, made / f"layer_{layer}/width_{width}/average_l0_{l0:.0f}")
    made.rename(transcoder_folder(out))


def _open_work(out: Path, recipe: Recipe, source: Corpus | UserText) -> Path:
    """``out/work``, if it is new or was begun with the same settings and text."""
    work = out / "work"
    text = f"the generated corpus, seed {source.seed}"
    if isinstance(source, UserText):
        digest = hashlib.sha256(source.text.encode()).hexdigest()
        text = f"text with SHA-256 {digest}, seed {source.seed}"
    settings = json.loads(json.dumps({"text": text, **dataclasses.asdict(recipe)}))
    begun = work / "settings.json"
    if not work.exists() and (model_folder(out).exists() or transcoder_folder(out).exists()):
        raise SourceError(
            f"{out} already holds a trained model. Give another folder, or delete its model and "
            "transcoders folders to train again."
        )
    work.mkdir(parents=True, exist_ok=True)
    before = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else settings
    differ = [key for key in settings if before.get(key) != settings[key]]
    if differ:
        raise SourceError(
            f"{out} holds an unfinished run with other settings ({', '.join(differ)}). Use those "
            f"settings to resume it, delete {work} to start over, or give another folder."
        )
    write_whole(begun, json.dumps(settings, indent=2))
    return work
