"""``jaxtc explain``: loads what is named, explains, and draws or prints JSON."""

import json
import re
import sys
from collections.abc import Iterator, Mapping

from rich.console import Console

from jaxtc.cli.draw import draw
from jaxtc.cli.runtime import Progress, working
from jaxtc.errors import JaxtcError
from jaxtc.explore.explain import explain
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files.layout import GEMMA_SCOPE_2B
from jaxtc.weights.load_model import load_model, load_tokenizer
from jaxtc.weights.load_transcoder import available_layers, load_transcoder
from jaxtc.weights.sources.resolve import EMBEDDED

# Of the embedded model: its last, where the tokens a feature promotes say most about it. Of Gemma
# Scope: the tutorial's.
DEFAULT_LAYER = 3
GEMMA_SCOPE_LAYER = 20


def command(
    prompt: str,
    *,
    model: str,
    transcoder: str | None,
    layer: str | None,
    input_site: str | None,
    top_features: int,
    max_new_tokens: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Explain ``prompt``; the options are those of the command line."""
    if layer is not None and layer != "all" and not re.fullmatch(r"\d+", layer, re.ASCII):
        raise JaxtcError(
            f"--layer is {layer!r}, expected the number of a layer, counted from 0, or 'all'."
        )
    with working("Starting JAX") as progress:
        transcoders = find_transcoders(transcoder or own_transcoders(model), layer, progress)
        progress(f"Loading {model}")
        loaded = load_model(model, dtype=dtype, progress=progress.part)
        progress("Loading the tokenizer")
        tokenizer = load_tokenizer(model)
        found = explain(
            loaded,
            tokenizer,
            prompt,
            transcoders,
            input_site=input_site,
            # The table of all layers has room for one feature of each.
            top_features=min(top_features, 1) if layer == "all" and not as_json else top_features,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), ensure_ascii=False, indent=2) + "\n")
        return
    draw(Console(), found, by_layer=layer == "all")


def own_transcoders(model: str) -> str:
    """Where the transcoders of a model are, for when none are named."""
    own = {EMBEDDED: EMBEDDED, "google/gemma-2-2b": GEMMA_SCOPE_2B}
    if model not in own:
        raise JaxtcError(
            f"Which transcoder explains {model}? Give --transcoder: a hub id, a folder, or a "
            f"params.npz that was trained on this model. (Known by themselves: {', '.join(own)}.)"
        )
    return own[model]


def find_transcoders(
    source: str, layer: str | None, progress: Progress
) -> Transcoder | Mapping[int, Transcoder]:
    """The transcoder of a layer (by default, the source's usual one), or those of all."""
    if layer == "all":
        return _OnDemand(source, available_layers(source))
    defaults = {EMBEDDED: DEFAULT_LAYER, GEMMA_SCOPE_2B: GEMMA_SCOPE_LAYER}
    number = defaults.get(source) if layer is None else int(layer)
    progress(f"Loading the transcoder from {source}")
    return load_transcoder(source, number)


class _OnDemand(Mapping):
    """Transcoders by layer, loaded when asked for and not kept: 26 of 300 MB are many."""

    def __init__(self, source: str, layers: list[int]):
        self.source, self.layers = source, layers

    def __getitem__(self, layer: int) -> Transcoder:
        if layer not in self.layers:
            raise KeyError(layer)
        return load_transcoder(self.source, layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
