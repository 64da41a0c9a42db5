"""The recipe: a tokenizer, a model and its transcoders from nothing, resumable.

While a run is unfinished its folder holds ``work/`` (checkpoints, the tokenizer, unfinished parts).
Each part is moved into place when complete: ``model/``, ``transcoders/``, ``report.json``; then
``work/`` is deleted. A killed run, started again with the same settings, resumes.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
from tokenizers import Tokenizer

from jaxtc.embedded import model_folder, transcoder_folder
from jaxtc.embedded.corpus import Corpus, default_corpus
from jaxtc.embedded.report import Report, measure
from jaxtc.embedded.settings import Recipe
from jaxtc.embedded.text import UserText
from jaxtc.embedded.tokenizer import (
    entity_id,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    world_tokenizer,
    write_json,
)
from jaxtc.embedded.train_model import small_config, train_model
from jaxtc.errors import SourceError
from jaxtc.model.gemma2 import Gemma2
from jaxtc.training.harvest import Harvest
from jaxtc.training.loop import Log
from jaxtc.training.packing import Batches
from jaxtc.training.transcoders import train_transcoders
from jaxtc.weights.load_model import load_model
from jaxtc.weights.save_model import save_model
from jaxtc.weights.save_transcoder import save_transcoder

MODEL_STREAM, TRANSCODER_STREAM = range(2)
MODEL_STEPS, TRANSCODER_STEPS = "model-steps", "transcoder-steps"
_BUCKET = 131_072


def train(
    out: Path, recipe: Recipe, source: Corpus | UserText | None = None, *, log: Log = print
) -> Report:
    """Make ``out/model``, ``out/transcoders`` and ``out/report.json``.

    Args:
        out: created when missing; a run that was killed there resumes.
        recipe: settings.
        source: the text; the generated corpus when None.
        log: called with lines of progress.

    Returns:
        Measurements of the files that were written.

    Raises:
        SourceError: ``out`` holds a finished run, or one begun with other settings.
    """
    source = default_corpus() if source is None else source
    work = _open_work(out, recipe, source)
    model, tokenizer = _model(out, work, recipe, source, log)
    _transcoders(out, work, recipe, source, model, tokenizer, log)
    log("measuring")
    report = measure(out, source)
    write_json(out / "report.json", dataclasses.asdict(report))
    shutil.rmtree(work)
    return report


def _model(out, work, recipe, source, log) -> tuple[Gemma2, Tokenizer]:
    """The finished model, trained unless it exists."""
    tokenizer = _tokenizer(work, recipe, source)
    folder = model_folder(out)
    if not folder.exists():
        frozen = ()
        if isinstance(source, Corpus):
            # Answers must be learnt as outputs. Every other city keeps a random embedding, which
            # cannot store where the city lies: the MLPs have to look it up.
            world = source.world
            cities = [c for c in world.place_of if c not in world.answer_cities]
            frozen = [entity_id(tokenizer, city) for city in cities]
        model = train_model(
            small_config(tokenizer.get_vocab_size(), **dict(recipe.sizes)),
            Batches(source, tokenizer, recipe.rows, recipe.length, MODEL_STREAM),
            recipe.model,
            frozen_tokens=frozen,
            folder=work / MODEL_STEPS,
            log=log,
        )
        made = save_model(model, work / "model")
        save_tokenizer(tokenizer, made, model.config.max_position_embeddings)
        ids = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id")}
        write_json(made / "generation_config.json", {"_from_model_config": True, **ids})
        made.rename(folder)
    # Read back, so that the transcoders explain exactly the weights that were written.
    return load_model(folder, dtype=jnp.float32), tokenizer


def _transcoders(out, work, recipe, source, model, tokenizer, log) -> None:
    """Train the transcoders, unless they exist."""
    if transcoder_folder(out).exists():
        return
    layers = tuple(range(model.config.num_hidden_layers))
    rows = max(4096 // recipe.length, 1)
    batches = Batches(source, tokenizer, rows, recipe.length, TRANSCODER_STREAM)
    bucket = min(_BUCKET, recipe.transcoders.steps * recipe.transcoders.batch)
    transcoders = train_transcoders(
        Harvest(model, batches, layers, bucket),
        layers,
        recipe.transcoders,
        folder=work / TRANSCODER_STEPS,
        log=log,
    )
    held_out = Batches(source, tokenizer, rows, recipe.length, TRANSCODER_STREAM, held_out=True)
    x, _ = Harvest(model, held_out, layers, tokens=16_384).bucket(0)
    made = _empty(work / "transcoders")
    for layer, transcoder in enumerate(transcoders):
        l0 = float((transcoder.encode(x[layer]) > 0).sum(axis=1).mean())
        M = transcoder.features
        width = M if M % 1024 else f"{M // 1024}k"
        save_transcoder(transcoder, made / f"layer_{layer}/width_{width}/average_l0_{l0:.0f}")
    made.rename(transcoder_folder(out))


def _tokenizer(work: Path, recipe: Recipe, source: Corpus | UserText) -> Tokenizer:
    """The tokenizer, made once; a resumed run reads it back."""
    folder = work / "tokenizer"
    if not folder.exists():
        corpus = isinstance(source, Corpus)
        made = world_tokenizer(source) if corpus else train_bpe(source.train, recipe.vocab_size)
        partial = _empty(work / "tokenizer-partial")
        save_tokenizer(made, partial, recipe.length)
        partial.rename(folder)
    return load_tokenizer(folder)


def _open_work(out: Path, recipe: Recipe, source: Corpus | UserText) -> Path:
    """``out/work``, if it is new or was begun with the same settings and text."""
    work, settings = out / "work", _settings(recipe, source)
    if not work.exists():
        if model_folder(out).exists() or transcoder_folder(out).exists():
            raise SourceError(
                f"{out} already holds a trained model. Give another folder, or delete its model "
                "and transcoders folders to train again."
            )
        work.mkdir(parents=True)
    begun = work / "settings.json"
    before = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else settings
    differ = [key for key in settings if before.get(key) != settings[key]]
    # Nothing depends on the transcoders' settings before their training begins.
    if differ == ["transcoders"] and not (work / TRANSCODER_STEPS).exists():
        differ = []
    if differ:
        raise SourceError(
            f"{out} holds an unfinished run with other settings ({', '.join(differ)}). Use those "
            f"settings to resume it, delete {work} to start over, or give another folder."
        )
    write_json(begun, settings)
    return work


def _settings(recipe: Recipe, source: Corpus | UserText) -> dict:
    text = f"the generated corpus, seed {source.seed}"
    if isinstance(source, UserText):
        digest = hashlib.sha256(source.text.encode()).hexdigest()
        text = f"text with SHA-256 {digest}, seed {source.seed}"
    return json.loads(json.dumps({"text": text, **dataclasses.asdict(recipe)}))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
