"""``jaxtc generate``: continues a text, token by token as they come; features may steer it."""

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxtc.cli.explain import find_transcoders, own_transcoders
from jaxtc.cli.options import STDOUT, Dtype, Model, OnlyJson, argument, option, write_json
from jaxtc.cli.runtime import Progress, working
from jaxtc.edits.base import Edit
from jaxtc.edits.features import SetFeature
from jaxtc.errors import JaxtcError
from jaxtc.helpers import check_unicode
from jaxtc.programs.generate import generate
from jaxtc.weights.load_model import load_model, load_tokenizer

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
    dtype: Dtype = None,
    as_json: OnlyJson = False,
) -> None:
    """Continue a text, token by token as they come; steer it by transcoder features."""
    features = dict(map(_feature, steer or ()))
    check_unicode("The prompt", prompt)
    check_unicode("--stop", stop or "")
    if stop == "":
        raise JaxtcError("--stop is empty; every text contains that. Leave it out for no stop.")
    if len(features) < len(steer or ()):
        raise JaxtcError("--steer names a feature twice; give each of them one value.")
    if not features and (layer is not None or transcoder is not None):
        raise JaxtcError(
            "--layer and --transcoder say whose features are steered, but no feature is: add "
            "--steer FEATURE=VALUE, or leave them out."
        )
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise JaxtcError(
            "--top-k and --top-p limit what is sampled, and without --temperature nothing is "
            "sampled: the argmax is taken. --temperature 1 is the model's own distribution."
        )
    with working("Starting JAX") as progress:
        edits = _edits(features, layer, transcoder, model, progress)
        progress(f"Loading {model}")
        loaded = load_model(model, dtype=dtype, progress=progress.part)
        progress("Loading the tokenizer")
        tokenizer = load_tokenizer(model)
    ids = tokenizer(prompt).input_ids
    text = Increments(tokenizer, ids, stop)
    notes = Console(stderr=True)
    waiting = notes.status("Generating …")
    if notes.is_terminal:
        waiting.start()
    else:
        notes.print("Generating …", highlight=False)

    def write(part: str) -> None:
        if not as_json:
            print(part, end="", flush=True)

    def stream(step: int, new: list[int | None]) -> bool:
        if step == 0:
            waiting.stop()
            write(prompt)
        write(text.add(new[0]))
        return text.stopped

    try:
        found = generate(
            loaded, ids, max_new_tokens, edits=edits, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, stream=stream,
        )  # fmt: skip
    finally:
        waiting.stop()
    write(text.rest() + "\n")
    if as_json:
        value = {
            "prompt": prompt, "continuation": text.shown,
            "ids": found.prompts[0], "new_ids": found.tokens[0],
            "steered": [{"feature": f, "value": x} for f, x in features.items()],
            "layer": edits[0].layer if edits else None,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        }  # fmt: skip
        write_json(STDOUT, value)


class Increments:
    """The text of new tokens, as far as it is certain after each of them.

    A token's text depends on its neighbours: a word's leading space is there only after another
    token, and a character may span several. So the last few are decoded with and without it.

    Args:
        tokenizer: of the model.
        ids: of the prompt.
        stop: ends the text; not shown, nor is what may still become it.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int], stop: str | None = None):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(ids)
        self._start, self._read = max(len(ids) - 8, 0), len(ids)
        self._held = ""
        self.shown, self.stopped = "", False

    def add(self, token: int) -> str:
        """What to show after one more token."""
        self._ids.append(token)
        return self._show(self._decoded(), more=True)

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped else self._show(self._decoded(last=True), more=False)

    def _decoded(self, last: bool = False) -> str:
        before, after = (
            self._tokenizer.decode(
                self._ids[self._start : end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            for end in (self._read, None)
        )
        if len(after) <= len(before) or (after.endswith(UNFINISHED) and not last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _show(self, text: str, more: bool) -> str:
        text = self._held + text
        keep = 0
        if self._stop:
            if self._stop in text:
                self.stopped, text = True, text[: text.index(self._stop)]
            elif more:
                ends = range(min(len(self._stop) - 1, len(text)), 0, -1)
                keep = next((n for n in ends if text.endswith(self._stop[:n])), 0)
        show, self._held = text[: len(text) - keep], text[len(text) - keep :]
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


def _edits(features: dict, layer, source, model: str, progress: Progress) -> list[Edit]:
    """Steering on every token but <bos>, which transcoders were not trained on."""
    if not features:
        return []
    number = None if layer is None else str(layer)
    transcoder = find_transcoders(source or own_transcoders(model), number, progress)
    ids, values = list(features), list(features.values())
    return [SetFeature(transcoder, ids, values, layer=layer, position=slice(1, None))]
