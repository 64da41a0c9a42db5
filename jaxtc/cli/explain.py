"""``jaxtc explain``: what features explain a prompt, as a table from 80 columns on or as JSON."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

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
from jaxtc.cli.runtime import Progress, note, plain_table, working
from jaxtc.errors import JaxtcError
from jaxtc.explore.explain import explain
from jaxtc.explore.explanation import Explanation, LayerReport, TokenReport, feature_url
from jaxtc.transcoders.cross_layer import LayerFeatures
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files.layout import GEMMA_SCOPE_2B
from jaxtc.weights.load_model import load_model, load_tokenizer
from jaxtc.weights.load_transcoder import load_transcoder
from jaxtc.weights.sources.cross_layer import cross_layer
from jaxtc.weights.sources.resolve import EMBEDDED, TRANSCODERS, resolve

FEATURE, PIECE, FAINT = "cyan", "green", "dim"
# Of the figures of a layer: what each is, and its convention.
MEANINGS = {
    "EV": ("explained variance", "1 − FVU (dataset mean), over these {} tokens"),
    "L0": ("mean L0", "active features a token (>1: above 1)"),
    "error": ("mean error", "‖y − ŷ‖ / ‖y‖ of a token"),
    "notebook": ("notebook score", "as in Gemma Scope's tutorial: from mlp_in, with <bos>"),
}
# Of a model: where its transcoders are.
OWN = {EMBEDDED: EMBEDDED, "google/gemma-2-2b": GEMMA_SCOPE_2B}
# Of the embedded model: its last, where the tokens a feature promotes say most about it. Of Gemma
# Scope: the tutorial's.
USUAL_LAYER = {EMBEDDED: 3, GEMMA_SCOPE_2B: 20}


def command(
    prompt: argument(str, "The text to explain; <bos> is added."),
    model: Model = "embedded",
    transcoder: option(
        str | None,
        "'embedded', a hub id with or without a path (google/gemma-scope-2b-pt-transcoders"
        "/layer_20/width_16k/average_l0_11), a folder or a params.npz. The model's own, if "
        "it has some.",
    ) = None,
    layer: option(
        str | None,
        "Which layer's MLP, from 0; 'all' for a row per layer. "
        "By default 3, the last, for the embedded model and 20, the Gemma Scope "
        "tutorial's, for google/gemma-2-2b.",
        metavar="N|all",
    ) = None,
    input_site: option(
        str | None,
        "Feed the transcoder another site than the one it was trained on; mlp_in is what "
        "the Gemma Scope tutorial feeds.",
        metavar="SITE",
    ) = None,
    sites: Sites = None,
    format: Format = None,
    top_features: option(int, "Strongest features shown per token.") = 3,
    max_new_tokens: option(int, "Length of the continuation.") = 2,
    dtype: Dtype = None,
    as_json: OnlyJson = False,
) -> None:
    """Show, token by token, which transcoder features explain what an MLP did with a prompt."""
    if layer is not None and layer != "all" and not re.fullmatch(r"\d+", layer, re.ASCII):
        raise JaxtcError(
            f"--layer is {layer!r}, expected the number of a layer, counted from 0, or 'all'."
        )
    said = told(sites, format)
    with working("Starting JAX") as progress:
        transcoders = find_transcoders(transcoder, model, layer, progress, said)
        asked = None
        if isinstance(transcoders, LayerFeatures):
            # What is written at a layer comes from all layers up to it.
            asked = transcoders.layer
            transcoders = _OnDemand(transcoder, range(asked + 1), said)
        progress(f"Loading {model}")
        loaded = load_model(model, dtype=dtype, progress=progress.part)
        progress("Loading the tokenizer")
        tokenizer = load_tokenizer(model)
        # The table of all layers has room for one feature of each.
        shown = min(top_features, 1) if layer == "all" and not as_json else top_features
        found = explain(
            loaded, tokenizer, prompt, transcoders, input_site=input_site, top_features=shown,
            max_new_tokens=max_new_tokens, progress=progress,
        )  # fmt: skip
        if asked is not None:
            found = dataclasses.replace(found, layers=found.layers[asked:])
    if as_json:
        write_json(STDOUT, found.to_dict())
    else:
        draw(Console(), found, by_layer=layer == "all")


def find_transcoders(
    source: str | None,
    model: str,
    layer: str | int | None,
    progress: Progress,
    said: Mapping[str, str] | None = None,
) -> Transcoder | LayerFeatures | Mapping[int, Transcoder | LayerFeatures]:
    """The transcoder of a layer (by default, the source's usual one), or those of "all".

    Of a cross-layer one, the features of a layer. Without a ``source``, the model's own. ``said``
    is what :func:`jaxtc.cli.options.told` gives.
    """
    source = source or OWN.get(model)
    if source is None:
        raise JaxtcError(
            f"Which transcoder explains {model}? Give --transcoder: a hub id, a folder, or a "
            f"params.npz that was trained on this model. (Known by themselves: {', '.join(OWN)}.)"
        )
    if layer == "all":
        found = resolve(source, TRANSCODERS)
        whole = cross_layer(found)
        layers = range(whole.layers) if whole else found.layers()
        return _OnDemand(source, layers, said or {})
    progress(f"Loading the transcoder from {source}")
    layer = USUAL_LAYER.get(source) if layer is None else int(layer)
    return load_transcoder(source, layer, **(said or {}))


class _OnDemand(Mapping):
    """A source's transcoders by layer, loaded when asked for and not kept (300 MB each)."""

    def __init__(self, source: str, layers: Sequence[int], said: Mapping[str, str]):
        self.source, self.layers, self.said = source, layers, said

    def __getitem__(self, layer: int) -> Transcoder | LayerFeatures:
        return load_transcoder(self.source, layer, **self.said)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _table(*headings: str | Text) -> Table:
    """The last column takes the width that is left, and its lines are cut at the end of it."""
    table = plain_table()
    for heading in headings[:-1]:
        side = "left" if heading == "token" else "right"
        table.add_column(heading, justify=side, no_wrap=True, max_width=20)
    table.add_column(headings[-1])
    return table


def draw(console: Console, found: Explanation, by_layer: bool = False) -> None:
    """Print it: warnings, the table, what its numbers mean, and the continuation."""
    note(console, found.warnings)
    counted = sum(not token.masked for token in found.layers[0].tokens)
    meanings = {name: (what, how.format(counted)) for name, (what, how) in MEANINGS.items()}
    if by_layer:
        legend = "; ".join(f"{name}: {', '.join(meaning)}" for name, meaning in meanings.items())
        console.print(_all_layers(found), Text(legend, FAINT), sep="\n")
    else:
        for report in found.layers:
            totals = Table.grid(padding=(0, 2))
            for name, value in _figures(report).items():
                what, how = meanings[name]
                totals.add_row(what, Text(value, "bold", justify="right"), Text(how, FAINT))
            console.print(_one_layer(report), totals, sep="\n")
    if found.continuation_ids:
        new = found.continuation or "(the model ends the text here)"
        console.print("", Text.assemble(found.prompt, (new, "bold green")), sep="\n")


def number(value: float, digits: int = 3) -> str:
    """Fixed digits; a dash where the number is not defined."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _piece(piece: str, style: str) -> Text:
    """A piece of the vocabulary: a faint ▁ where a word begins, control characters spelled out."""
    begins = piece.startswith("▁")
    rest = piece.removeprefix("▁").replace("▁", " ")
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in rest)
    return Text.assemble(("▁" if begins else "", FAINT), (plain, style))


def _features(token: TokenReport) -> Text:
    """A line for each feature; nothing where there are active ones that were not asked for."""
    lines = [] if token.l0 else [Text("none active", FAINT)]
    for feature in token.features:
        line = Text.assemble((f"{feature.feature:>5}", FEATURE), f" {feature.activation:>6.2f}")
        if feature.url:
            line.stylize(f"link {feature.url}", 0, 5)
        pieces = [_piece(text, PIECE) for text in feature.promotes]
        lines.append(Text("  ").join([line, *pieces]))
    return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


def _one_layer(report: LayerReport) -> Group:
    pages = feature_url(report.transcoder, "FEATURE")
    title = Text.assemble(
        (f"Layer {report.layer}", "bold"),
        f"  {report.input_site} → {report.width} features → {report.output_site}\n",
        (report.transcoder, FAINT),
        (f"\n{pages}" if pages else "", FEATURE),
    )
    last = "feature, activation, tokens it promotes"
    table = _table("", "token", "L0", ">1", "error", last)
    for token in report.tokens:
        piece = _piece(token.text, FAINT if token.masked else "bold")
        numbers = str(token.l0), str(token.above_one), number(token.relative_error, 2)
        style = FAINT if token.masked else ""
        table.add_row(str(token.position), piece, *numbers, _features(token), style=style)
    return Group(title, table)


def _all_layers(found: Explanation) -> Table:
    last = Text.assemble("strongest at ", _piece(found.tokens[-1], "bold"), " and what it promotes")
    table = _table("layer", *_figures(found.layers[0]), last)
    for report in found.layers:
        features = _features(report.tokens[-1])
        table.add_row(Text(str(report.layer), "bold"), *_figures(report).values(), features)
    return table


def _figures(report: LayerReport) -> dict[str, str]:
    return {
        "EV": number(report.explained_variance), "L0": number(report.l0, 1),
        "error": number(report.relative_error), "notebook": number(report.notebook_score),
    }  # fmt: skip
