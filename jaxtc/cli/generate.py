"""``jaxtc generate``: continues a text, token by token as they come; features may steer it."""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxtc.cli.explain import find_transcoders
from jaxtc.cli.options import (
    STDOUT,
    Dtype,
    Format,
    Model,
    OnlyJson,
    Sites,
    argument,
    option,
    told,
    write_json,
)
from jaxtc.cli.runtime import note, working
from jaxtc.edits.features import SetFeature
from jaxtc.errors import JaxtcError
from jaxtc.explore.explain import continuation
from jaxtc.helpers import check_unicode
from jaxtc.model.text import tokenized
from jaxtc.programs.generate import generate
from jaxtc.weights.files.generation import GENERATION
from jaxtc.weights.load_model import load_model, load_tokenizer
from jaxtc.weights.opening import choices_of
from jaxtc.weights.sources.resolve import CONFIG, resolve

# Of sampling, named as in generation_config.json.
OPTIONS = ("temperature", "top_k", "top_p")

# What the byte-level pieces of an unfinished character decode to.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def command(
    prompt: argument(str, "The text to continue; <bos> is added."),
    model: Model = "embedded",
    max_new_tokens: option(int, "Length of the continuation.") = 40,
    temperature: option(
        float, "0 takes the argmax; 1 samples from the model's distribution."
    ) = 0.0,
    top_k: option(int | None, "Sample among the K most likely tokens only.") = None,
    top_p: option(
        float | None, "Sample among the fewest tokens whose probabilities sum to this only."
    ) = None,
    seed: option(int, "The same seed gives the same text.") = 0,
    stop: option(str | None, "End before this text, if it comes up.") = None,
    steer: option(
        list[str] | None,
        "Set a transcoder's feature to this activation on every token but <bos>. "
        "Several: give it again.",
        metavar="FEATURE=VALUE",
    ) = None,
    layer: option(
        int | None,
        "Whose MLP's features --steer names, from 0; by default as for `jaxtc explain`.",
        metavar="N",
        min=0,
    ) = None,
    transcoder: option(str | None, "Where --steer's features are, as for `jaxtc explain`.") = None,
    sites: Sites = None,
    format: Format = None,
    dtype: Dtype = None,
    as_json: OnlyJson = False,
) -> None:
    """Continue a text, token by token as they come; steer it by transcoder features."""
    features = dict(map(_feature, steer or ()))
    check_unicode("The prompt", prompt)
    if stop == "":
        raise JaxtcError("--stop is empty; every text contains that. Leave it out for no stop.")
    if len(features) < len(steer or ()):
        raise JaxtcError("--steer names a feature twice; give each of them one value.")
    said = told(sites, format)
    if not features and (said or layer is not None or transcoder is not None):
        raise JaxtcError(
            "--layer, --transcoder, --sites and --format say whose features are steered, but no "
            "feature is: add --steer FEATURE=VALUE, or leave them out."
        )
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise JaxtcError(
            "--top-k and --top-p limit what is sampled, and without --temperature nothing is "
            "sampled: the argmax is taken. --temperature 1 is the model's own distribution."
        )

    def write(part: str) -> None:
        if not as_json:
            print(part, end="", flush=True)

    def stream(step: int, new: list[int | None]) -> bool:
        if step == 0:
            loading.close()
            if not as_json:
                note(Console(stderr=True), notes)
            write(prompt)
        write(text.add(new[0]))
        return text.stopped

    with contextlib.ExitStack() as loading:
        progress = loading.enter_context(working("Starting JAX"))
        edits = []
        if features:
            steered = find_transcoders(transcoder, model, layer, progress, said)
            values = list(features.values())
            edits = [SetFeature(steered, list(features), values, layer=layer)]
        progress(f"Loading {model}")
        loaded = load_model(model, dtype=dtype, progress=progress.part)
        progress("Loading the tokenizer")
        tokenizer = load_tokenizer(model)
        ids, notes = tokenized(tokenizer, prompt, loaded.config.bos_token_id)
        notes += _not_taken(model, temperature)
        text = Increments(tokenizer, ids, stop)
        progress("Generating")
        found = generate(
            loaded, ids, max_new_tokens, edits=edits, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, stream=stream,
        )  # fmt: skip
    write(text.rest() + "\n")
    if as_json:
        value = {
            "prompt": prompt, "continuation": text.shown,
            "ids": found.prompts[0], "new_ids": found.tokens[0],
            "steered": [{"feature": f, "value": x} for f, x in features.items()],
            "layer": edits[0].layer if edits else None,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
            "warnings": notes,
        }  # fmt: skip
        write_json(STDOUT, value)


def _not_taken(model: str, temperature: float) -> list[str]:
    """A sentence on what ``generation_config.json`` asks for and this command does not do."""
    asked = choices_of(resolve(model, CONFIG))
    if temperature:
        asked = {k: v for k, v in asked.items() if k not in ("do_sample", *OPTIONS)}
    if not asked:
        return []
    said = ", ".join(f"{key} = {value!r}" for key, value in asked.items())
    return [
        f"{GENERATION} asks for {said}, which is not taken from it. --temperature, --top-k and "
        "--top-p sample; without them the argmax is taken."
    ]


class Increments:
    """The text of new tokens, as far as it is certain after each of them.

    A token's text depends on its neighbours: a word's leading space is there only after another
    token, and a character may span several. So all are decoded each time. ``ids`` are the prompt's;
    ``stop`` ends the text and is not shown, nor is what may still become it.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int], stop: str | None = None):
        self._tokenizer, self._ids, self._stop = tokenizer, ids, stop or ""
        self._new: list[int] = []
        self.shown, self.stopped = "", False

    def add(self, token: int) -> str:
        """What to show after one more token."""
        self._new.append(token)
        return self._show(more=True)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._show(more=False)

    def _show(self, more: bool) -> str:
        text = continuation(self._tokenizer, self._ids, self._new)
        if self._stop and self._stop in text:
            self.stopped, text = True, text[: text.index(self._stop)]
        elif more:
            text = text.rstrip(UNFINISHED)
            begun = (n for n in range(len(self._stop) - 1, 0, -1) if text.endswith(self._stop[:n]))
            text = text[: len(text) - next(begun, 0)]
        show = text[len(self.shown) :]
        self.shown += show
        return show


def _feature(text: str) -> tuple[int, float]:
    """``"123=4.5"`` to (123, 4.5)."""
    match = re.fullmatch(r"(\d+)=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text, re.ASCII)
    if not match:
        raise JaxtcError(
            f"--steer is {text!r}, expected FEATURE=VALUE with a feature's id and an activation, "
            "such as --steer 123=8. `jaxtc explain` shows the features of a prompt."
        )
    return int(match[1]), float(match[2])
