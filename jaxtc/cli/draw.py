"""How an explanation looks in a terminal, from 80 columns on."""

import math

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table, box
from rich.text import Text

from jaxtc.explanation import ActiveFeature, Explanation, LayerReport, TokenReport
from jaxtc.neuronpedia import feature_url

FEATURE, PIECE, FAINT = "cyan", "green", "dim"


def draw(console: Console, found: Explanation, by_layer: bool = False) -> None:
    """Print it: warnings, the table, what its numbers mean, and the continuation."""
    for warning in found.warnings:
        console.print(Text.assemble(("Note: ", "bold yellow"), warning))
    if by_layer:
        console.print(_all_layers(found))
    else:
        for report in found.layers:
            console.print(_one_layer(report))
    console.print(_continuation(found))


def number(value: float, digits: int = 3) -> str:
    """Fixed digits; a dash where the number is not defined."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _pieces(text: str, style: str) -> Text:
    """Pieces of the vocabulary on one line: control characters spelled out, ▁ (a space) faint."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    shown = Text(plain, style)
    shown.highlight_regex("▁", FAINT)
    return shown


def _feature(feature: ActiveFeature) -> Text:
    name = Text(f"{feature.feature:>5}", FEATURE)
    if feature.url:
        name.stylize(f"link {feature.url}")
    return Text.assemble(
        name, f" {feature.activation:>6.2f}  ", _pieces(" ".join(feature.promotes), PIECE)
    )


def _features(token: TokenReport) -> Group | Text:
    if not token.features:
        return Text("none active", FAINT)
    return Group(*(_one_line(_feature(feature)) for feature in token.features))


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _one_layer(report: LayerReport) -> Group:
    title = Text.assemble(
        (f"Layer {report.layer}", "bold"),
        f"  {report.input_site} → {report.width} features → {report.output_site}\n",
        (report.transcoder, FAINT),
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right", style=FAINT)
    table.add_column("token", max_width=20)
    table.add_column("L0", justify="right")
    table.add_column(">1", justify="right")
    table.add_column("error", justify="right")
    table.add_column("feature, activation, tokens it promotes", no_wrap=True)
    for token in report.tokens:
        table.add_row(
            str(token.position),
            _pieces(token.text, FAINT if token.masked else "bold"),
            str(token.l0),
            str(token.above_one),
            number(token.relative_error, 2),
            _features(token),
            style=FAINT if token.masked else "",
        )
    return Group(title, table, _totals(report))


def _totals(report: LayerReport) -> Group:
    counted = [token for token in report.tokens if not token.masked]
    figures = Table.grid(padding=(0, 2))
    figures.add_column(no_wrap=True)
    figures.add_column(justify="right", style="bold", no_wrap=True)
    figures.add_column(style=FAINT)
    figures.add_row(
        "explained variance",
        number(report.explained_variance),
        f"1 − FVU around the mean of these {len(counted)} tokens",
    )
    figures.add_row("mean L0", number(report.l0, 1), "active features a token (>1: above 1)")
    figures.add_row("mean error", number(report.relative_error), "‖y − ŷ‖ / ‖y‖ of a token")
    if math.isfinite(report.notebook_score):
        figures.add_row(
            "notebook score",
            number(report.notebook_score),
            "as in Gemma Scope's tutorial: from mlp_in, with <bos>",
        )
    return Group(figures, *_links(report))


def _links(report: LayerReport) -> list[Text]:
    url = feature_url(report.transcoder, "FEATURE")
    return [Text.assemble("Neuronpedia  ", (url, FEATURE))] if url else []


def _all_layers(found: Explanation) -> Group:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in (("layer", 5), ("EV", 6), ("L0", 5), ("error", 5), ("notebook", 8)):
        table.add_column(name, justify="right", min_width=width)
    last = Text.assemble(
        "strongest at ", _pieces(found.tokens[-1], "bold"), " and what it promotes"
    )
    table.add_column(_one_line(last))
    for report in found.layers:
        strongest = report.tokens[-1].features[:1]
        table.add_row(
            Text(str(report.layer), "bold"),
            number(report.explained_variance),
            number(report.l0, 1),
            number(report.relative_error),
            number(report.notebook_score),
            _one_line(_feature(strongest[0])) if strongest else Text("none active", FAINT),
        )
    counted = sum(not token.masked for token in found.layers[0].tokens)
    meaning = Text(
        f"EV: explained variance, 1 − FVU around the mean vector of these {counted} tokens. "
        "L0: active features a token. error: mean ‖y − ŷ‖ / ‖y‖. All three without special tokens. "
        "notebook: the Gemma Scope tutorial's score (reads mlp_in, keeps <bos>, one scalar "
        "variance).",
        FAINT,
    )
    return Group(table, meaning)


def _continuation(found: Explanation) -> Padding:
    if not found.continuation_ids:
        return Padding("", 0)
    new = found.continuation or "(the model ends the text here)"
    return Padding(Text.assemble(found.prompt, (new, "bold green")), (1, 0, 0, 0))
