"""``jaxtc sites``: the table of sites, with the shapes of a model."""

from rich.console import Console
from rich.text import Text

from jaxtc.cli.options import STDOUT, OnlyJson, option, write_json
from jaxtc.cli.runtime import plain_table
from jaxtc.model.config import Gemma2Config
from jaxtc.tap.sites import SITES, Site
from jaxtc.weights.load_model import load_config


def command(
    model: option(str, "Whose shapes to show; only its config.json is read.") = "embedded",
    as_json: OnlyJson = False,
) -> None:
    """List every site that can be captured or edited, with its shape and its names elsewhere."""
    config = load_config(model)
    if as_json:
        write_json(STDOUT, [_row(site, config) for site in SITES])
    else:
        _draw(Console(), config, model)


def _row(site: Site, config: Gemma2Config) -> dict:
    refused = dict(site.unlike)
    aliases, names = site.aliases("N"), {"hf": site.hf, "tl": site.tl}
    return {
        "site": site.name,
        "address": f"layers.N.{site.name}" if site.per_layer else site.name,
        "axes": site.letters,
        # Sizes where the config fixes them, axis letters where the prompt does.
        "shape": site.shape(config.sizes),
        "dtype": "float32" if site.float32 else "that of the weights",
        "meaning": site.meaning,
        "hf": aliases.get("hf"),
        "transformer_lens": aliases.get("tl"),
        # Ends of other modules and hooks that hold it; some are read by a single reader there.
        "also": site.also.split(),
        "also_to_read": site.read.split(),
        "refused": {library: refused[name] for library, name in names.items() if name in refused},
    }


def _draw(console: Console, config: Gemma2Config, model: str) -> None:
    """Two lines a site: what it is, and what others call it."""
    table = plain_table()
    table.add_column("site", style="bold cyan", no_wrap=True)
    table.add_column("axes", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    names = "meaning; [green]HF[/] and [yellow]TransformerLens[/] names"
    table.add_column(names, ratio=1, overflow="fold")
    for site in SITES:
        refused = dict(site.unlike)
        names, notes = [], []
        for library, own, style in (("hf", site.hf, "green"), ("tl", site.tl, "yellow")):
            if own in refused:
                style += " strike"
                notes.append(Text(f"\nrefused: {refused[own]}", "dim"))
            if own:
                names.append(Text(site.aliases("l")[library], style))
        meaning = Text.assemble(site.meaning, "\n" if names else "", Text("  ").join(names), *notes)
        shape = " ".join(map(str, site.shape(config.sizes)))
        table.add_row(site.name, site.axes, shape, meaning)
    console.print(table)
    *once, last = (site.name for site in SITES if not site.per_layer)
    console.print(
        Text(
            f"Shapes of {model}: {config.num_hidden_layers} layers; B prompts, T (query) and S "
            "(key) positions are the prompt's. Address a site as layers.20.mlp_out, or mlp_out for "
            f"every layer; {', '.join(once)} and {last} exist once. Names of other libraries are "
            "accepted too, but those marked refused, which hold another number; --json has more.",
            "dim",
        )
    )
