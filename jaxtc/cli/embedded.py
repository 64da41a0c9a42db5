"""``jaxtc embedded``: make the embedded model again, or one from your own text, and measure it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer
from rich.console import Console

from jaxtc.cli.options import STDOUT, OnlyJson, argument, option, write_json
from jaxtc.embedded import DATA
from jaxtc.embedded import recipe as recipes
from jaxtc.embedded.corpus import default_corpus
from jaxtc.embedded.report import measure
from jaxtc.embedded.text import UserText
from jaxtc.embedded.train_model import ModelRecipe
from jaxtc.training.transcoders import TranscoderRecipe

app = typer.Typer(rich_markup_mode="markdown")  # so that lines of a paragraph are joined

DEFAULT = recipes.Recipe()
Text = option(
    Path | None,
    "Your own text (UTF-8) in place of the generated corpus: documents separated by "
    "empty lines, or one a line. One document in 20 is held out to test on.",
    metavar="FILE",
)
Seed = option(int, "Of the text, the weights and the order.", min=0)


@app.command()
def train(
    out: option(Path, "Where model/ and transcoders/ are written.", metavar="DIR") = Path(
        "jaxtc-embedded"
    ),
    text: Text = None,
    seed: Seed = 0,
    layers: option(int, "Layers of the model.", min=1) = 4,
    hidden: option(int, "Hidden size D.", min=8) = 128,
    mlp: option(int, "MLP width F.", min=1) = 512,
    heads: option(int, "Query heads N; half as many key/value heads.", min=1) = 4,
    window: option(int, "Positions that a sliding layer sees.", min=1) = 4,
    vocab: option(int, "Tokens of a tokenizer trained on --text.", min=300) = DEFAULT.vocab_size,
    length: option(int, "Tokens in a packed row of training text.", min=16) = DEFAULT.length,
    rows: option(int, "Rows in a batch.", min=1) = DEFAULT.rows,
    steps: option(int, "Training steps of the model.", min=1) = DEFAULT.model.steps,
    features: option(int, "Features M of a transcoder.", min=1) = DEFAULT.transcoders.features,
    l0: option(float, "Active features a token to aim at.", min=1) = DEFAULT.transcoders.target_l0,
    transcoder_steps: option(
        int, "Training steps of the transcoders.", min=1
    ) = DEFAULT.transcoders.steps,
) -> None:
    """Train a small Gemma-2, then JumpReLU transcoders on all its layers, from scratch.

    Without options this makes the files that ship with jaxtc, on its generated corpus of facts
    about places; it takes about 10 minutes on two free cores.

    With --text the same recipe runs on a text of yours: a byte-fallback BPE tokenizer is trained on
    it, then the model, then the transcoders. For example: jaxtc embedded train --text notes.txt
    --out my-model --vocab 2000 --steps 3000

    The result can be used wherever a model is named: jaxtc explain PROMPT --model my-model/model
    --transcoder my-model/transcoders

    Stop it at any time (Ctrl-C): the same command goes on from the last checkpoint.
    """
    sizes = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": max(heads // 2, 1),
        "head_dim": hidden // heads, "query_pre_attn_scalar": hidden // heads,
        "sliding_window": window,
    }  # fmt: skip
    recipe = recipes.Recipe(
        model=ModelRecipe(steps=steps, seed=seed),
        transcoders=TranscoderRecipe(
            features=features, target_l0=l0, steps=transcoder_steps, seed=seed
        ),
        rows=rows, length=length, vocab_size=vocab, sizes=tuple(sizes.items()),
    )  # fmt: skip
    source = UserText.from_file(text, seed) if text else default_corpus(seed)
    console = Console(highlight=False)
    console.print(recipes.train(out, recipe, source, log=console.print))


@app.command()
def report(
    folder: argument(
        Path | None, "A folder that `jaxtc embedded train` made; the shipped one if none."
    ) = None,
    text: Text = None,
    seed: Seed = 0,
    as_json: OnlyJson = False,
) -> None:
    """Measure a trained folder: accuracy on facts, loss, and each transcoder, clean and spliced.

    Give --text and --seed as they were in training: a folder of another text is refused, as its
    figures would mean nothing.
    """
    source = UserText.from_file(text, seed) if text else default_corpus(seed)
    with Console(stderr=True).status("Measuring"):
        found = measure(folder or DATA, source)
    if as_json:
        write_json(STDOUT, dataclasses.asdict(found))
    else:
        Console().print(found)
