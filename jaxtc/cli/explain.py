"""``jaxtc explain``: what features explain a prompt, as a table from 80 columns on or as JSON."""

import math
import re
from collections.abc import Iterator, Mapping

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from jaxtc.cli.options import STDOUT, Dtype, Model, OnlyJson, argument, option, write_json
from jaxtc.cli.runtime import Progress, plain_table, working
from jaxtc.errors import JaxtcError
from jaxtc.explore.explain import explain
from jaxtc.explore.explanation import ActiveFeature, Explanation, LayerReport, TokenReport
from jaxtc.explore.neuronpedia import feature_url
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files.layout import GEMMA_SCOPE_2B
from jaxtc.weights.load_model import load_model, load_tokenizer
from jaxtc.weights.load_transcoder import load_transcoder
from jaxtc.weights.sources.resolve import EMBEDDED, TRANSCODERS, resolve

FEATURE, PIECE, FAINT = "cyan", "green", "dim"
EDGES = 2  # columns that a table takes beside its cells and the two between them
# Of the embedded model: its last, where the tokens a feature promotes say most about it. Of Gemma
# Scope: the tutorial's.
DEFAULT_LAYER = 3
GEMMA_SCOPE_LAYER = 20


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
    with working("Starting JAX") as progress:
        transcoders = find_transcoders(transcoder or own_transcoders(model), layer, progress)
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
    if as_json:
        write_json(STDOUT, found.to_dict())
    else:
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
        return _OnDemand(source, resolve(source, TRANSCODERS).layers())
    defaults = {EMBEDDED: DEFAULT_LAYER, GEMMA_SCOPE_2B: GEMMA_SCOPE_LAYER}
    number = defaults.get(source) if layer is None else int(layer)
    progress(f"Loading the transcoder from {source}")
    return load_transcoder(source, number)


class _OnDemand(Mapping):
    """Transcoders by layer, loaded when asked for and not kept: 26 take 300 MB each."""

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


def _table(headings: Mapping[str, int], last: Text | str, columns: int) -> tuple[Table, int]:
    """A table of columns of these widths, then one that takes the rest, and the room in that."""
    table = plain_table()
    for heading, width in headings.items():
        side = "left" if heading == "token" else "right"
        table.add_column(heading, justify=side, min_width=width)
    room = max(columns - sum(headings.values()) - 2 * len(headings) - EDGES, 20)
    table.add_column(last if isinstance(last, str) else _cut(last, room), no_wrap=True)
    return table, room


def draw(console: Console, found: Explanation, by_layer: bool = False) -> None:
    """Print it: warnings, the table, what its numbers mean, and the continuation."""
    for warning in found.warnings:
        console.print(Text.assemble(("Note: ", "bold yellow"), warning))
    if by_layer:
        console.print(_all_layers(found, console.width))
    else:
        for report in found.layers:
            console.print(_one_layer(report, console.width))
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


def _feature(feature: ActiveFeature, room: int) -> Text:
    """A feature on one line of ``room`` columns: as many of the tokens it promotes as fit."""
    line = Text.assemble((f"{feature.feature:>5}", FEATURE), f" {feature.activation:>6.2f} ")
    if feature.url:
        line.stylize(f"link {feature.url}", 0, 5)
    for index, text in enumerate(feature.promotes):
        piece = _piece(text, PIECE)
        last = index == len(feature.promotes) - 1
        if index and line.cell_len + piece.cell_len + (1 if last else 3) > room:
            line.append(" …", FAINT)
            break
        line = Text.assemble(line, " ", piece, "" if last else " ")
    line.truncate(room, overflow="ellipsis")
    return line


def _no_feature(token: TokenReport) -> Text:
    """What stands for features: nothing where there are active ones that were not asked for."""
    return Text("" if token.l0 else "none active", FAINT)


def _cut(text: Text, room: int) -> Text:
    text.truncate(room, overflow="ellipsis")
    return text


def _one_layer(report: LayerReport, columns: int) -> Group:
    title = Text.assemble(
        (f"Layer {report.layer}", "bold"),
        f"  {report.input_site} → {report.width} features → {report.output_site}\n",
        (report.transcoder, FAINT),
    )
    pieces = [
        _cut(_piece(token.text, FAINT if token.masked else "bold"), 20) for token in report.tokens
    ]
    longest = max(piece.cell_len for piece in pieces)
    widths = {"": len(str(len(pieces))), "token": max(longest, 5), "L0": 3, ">1": 3, "error": 5}
    table, room = _table(widths, "feature, activation, tokens it promotes", columns)
    for token, piece in zip(report.tokens, pieces, strict=True):
        lines = [_feature(feature, room) for feature in token.features] or [_no_feature(token)]
        numbers = str(token.l0), str(token.above_one), number(token.relative_error, 2)
        style = FAINT if token.masked else ""
        table.add_row(str(token.position), piece, *numbers, Text("\n").join(lines), style=style)
    return Group(title, table, *_totals(report))


def _totals(report: LayerReport) -> Iterator[Table | Text]:
    counted = sum(not token.masked for token in report.tokens)
    figures = Table.grid(padding=(0, 2))
    figures.add_column(no_wrap=True)
    figures.add_column(justify="right", style="bold", no_wrap=True)
    figures.add_column(style=FAINT)
    about = f"1 − FVU (dataset mean), over these {counted} tokens"
    figures.add_row("explained variance", number(report.explained_variance), about)
    figures.add_row("mean L0", number(report.l0, 1), "active features a token (>1: above 1)")
    figures.add_row("mean error", number(report.relative_error), "‖y − ŷ‖ / ‖y‖ of a token")
    if math.isfinite(report.notebook_score):
        about = "as in Gemma Scope's tutorial: from mlp_in, with <bos>"
        figures.add_row("notebook score", number(report.notebook_score), about)
    yield figures
    if url := feature_url(report.transcoder, "FEATURE"):
        yield Text.assemble("Neuronpedia has a page for each feature:\n", (url, FEATURE))


def _all_layers(found: Explanation, columns: int) -> Group:
    last = Text.assemble("strongest at ", _piece(found.tokens[-1], "bold"), " and what it promotes")
    widths = {"layer": 5, "EV": 6, "L0": 5, "error": 5, "notebook": 8}
    table, room = _table(widths, last, columns)
    for report in found.layers:
        token = report.tokens[-1]
        table.add_row(
            Text(str(report.layer), "bold"),
            number(report.explained_variance),
            number(report.l0, 1),
            number(report.relative_error),
            number(report.notebook_score),
            _feature(token.features[0], room) if token.features else _no_feature(token),
        )
    counted = sum(not token.masked for token in found.layers[0].tokens)
    meaning = Text(
        f"EV: explained variance, 1 − FVU (dataset mean), over these {counted} tokens. "
        "L0: active features a token. error: mean ‖y − ŷ‖ / ‖y‖. All three without special tokens. "
        "notebook: the Gemma Scope tutorial's score (reads mlp_in, keeps <bos>, one scalar "
        "variance).",
        FAINT,
    )
    return Group(table, meaning)
