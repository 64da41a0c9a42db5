"""Pictures of results, with matplotlib: ``pip install 'jaxtc[notebooks]'``.

Axis letters: L layers, T tokens, N heads, B batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtc.errors import InputError, JaxtcError
from jaxtc.experiments.patching import Patching
from jaxtc.experiments.sweep import Sweep
from jaxtc.helpers import explicit_transfers
from jaxtc.interchange import to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heat_map"]

# Axes that run along a prompt, and so are labelled with its tokens.
ALONG = ("position", "key")
# More labels than these on an axis would run into each other.
MOST_ROWS, MOST_COLUMNS = 40, 64
RECOVERED = "share of the score recovered\n0 as corrupted, 1 as clean"


@explicit_transfers
def heat_map(
    found: Patching | Sweep | Any,
    tokens: Sequence[str] | None = None,
    *,
    ax: "Axes | None" = None,
    title: str | None = None,
    label: str | None = None,
    limit: float | None = None,
) -> "Axes":
    """Draw numbers over layers and positions, or over any two axes of a sweep.

    Layers go up, tokens to the right. Where values have both signs, colours are centred at 0: red
    above, blue below; NaN is gray.

    Args:
        found: a :class:`jaxtc.experiments.patching.Patching`, of which the recovered share is
            drawn (one row of cells for each layer and head, where heads were patched one by one);
            the result of a sweep over two axes; or an array (L, T). A batch axis behind it is
            averaged; of a patching over the pairs that have the token, and a cell is empty (gray)
            where none has it.
        tokens: the prompt's pieces, from ``tokenizer.convert_ids_to_tokens``; written below the
            cells with their positions.
        ax: where to draw; a new figure by default.
        title: above the picture; the site that was patched, by default.
        label: of the colour bar: what the number is. Give it for anything but a patching.
        limit: the value where colours end, both ways; the largest by default. Pictures to be
            compared want the same.

    Raises:
        InputError: not two axes, no number to draw, or tokens of another prompt.
        JaxtcError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise JaxtcError(
            "Pictures need matplotlib, which is not installed: pip install 'jaxtc[notebooks]'"
        ) from error
    values, (rows, columns), ticks = _grid(found)
    if not np.isfinite(values).any():
        raise InputError(
            "There is no number to draw, all are NaN: an edit names what does not exist."
        )
    share = isinstance(found, Patching)
    low, high = np.nanmin(values), np.nanmax(values)
    signed = share or low < 0 < high
    if signed or limit is not None:
        high = max(-low, high, 1.0 if share else 0.0) if limit is None else limit
        low = -high if signed or low < 0 else 0.0
    if ax is None:
        size = 2.4 + 0.42 * values.shape[1], max(3.2, 1.6 + 0.25 * values.shape[0])
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    colors = plt.get_cmap("RdBu_r" if signed else "viridis").with_extremes(bad="lightgray")
    image = ax.imshow(values, cmap=colors, vmin=low, vmax=high, origin="lower", aspect="auto")
    _label(ax.set_yticks, ticks[0], MOST_ROWS)
    ax.set_ylabel(rows)
    named = isinstance(ticks[1][0], str)  # places of a patching that were found from tokens
    if tokens is None or columns not in ALONG or named:
        _label(ax.set_xticks, ticks[1], MOST_COLUMNS)
    else:
        words = _words(tokens, ticks[1])
        _label(ax.set_xticks, words, MOST_COLUMNS, rotation=60, ha="right", rotation_mode="anchor")
    if tokens is None or columns != "position":
        ax.set_xlabel(columns)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.outline.set_visible(False)
    bar.set_label(label or (RECOVERED if share else "value"))
    ax.set_title(title if title is not None else (f"{found.site} patched" if share else ""))
    return ax


def _grid(found: Any) -> tuple[np.ndarray, list[str], list[list]]:
    """Values (rows, columns), the names of the two axes, and what is along them."""
    if isinstance(found, Patching | Sweep):
        values = found.recovered if isinstance(found, Patching) else found.values
        axes = dict(found.axes)
    else:
        values = to_numpy(found)
        axes = dict(zip(("layer", "position"), map(range, np.shape(found)), strict=False))
    shape = np.shape(values)  # () of a pytree that is not an array
    values = np.asarray(values, np.float64) if shape else np.zeros(())
    if {"layer", "head"} < axes.keys() and len(axes) == 3 and values.ndim in (3, 4):
        (other,) = axes.keys() - {"layer", "head"}  # it gets one row a head
        order = [list(axes).index(name) for name in ("layer", "head", other)]
        values = np.moveaxis(values, order, [0, 1, 2])
        values = values.reshape(-1, *values.shape[2:])
        heads = [f"{layer}.{head}" for layer in axes["layer"] for head in axes["head"]]
        axes = {"layer.head": heads, other: axes[other]}
    if values.ndim == 3 and len(axes) == 2:
        missing = np.isnan(values) if isinstance(found, Patching) else np.zeros(values.shape, bool)
        some = ~missing.all(-1)
        values = np.where(missing, 0, values).sum(-1) / np.where(some, (~missing).sum(-1), np.nan)
    if values.ndim != 2 or len(axes) != 2:
        named = ", ".join(axes) or "none"
        raise InputError(
            f"A heat map has two axes, and perhaps a batch behind them; got values of shape "
            f"{shape} with the axes {named}. Pick or average the others first, and draw the array."
        )
    names = list(axes)
    if names[0] in ALONG and names[1] not in ALONG:
        values, names = values.T, names[::-1]
    # Entries of an axis that are arrays are called by their numbers.
    along = [range(len(x)) if np.ndim(x) > 1 else x for x in map(axes.get, names)]
    return values, names, list(map(list, along))


def _words(tokens: Sequence[str], positions: list) -> list[str]:
    """A label for each position, as people write the token."""
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise InputError(
            "tokens are the prompt's pieces, a list of strings: "
            "tokenizer.convert_ids_to_tokens(ids) gives them."
        )
    if max(positions) >= len(tokens) or -min(positions) > len(tokens):
        raise InputError(
            f"There are {len(tokens)} tokens, but positions from {min(positions)} to "
            f"{max(positions)}; give the pieces of the prompt that was run, <bos> among them."
        )
    words = [tokens[p].replace("▁", " ").strip() or repr(tokens[p]) for p in positions]
    return [f"{word} {p}" for word, p in zip(words, positions, strict=True)]


def _label(place: Any, labels: list, most: int, **style: Any) -> None:
    """Ticks at all entries, or at every nth where there are too many to read."""
    step = -(-len(labels) // most)
    shown = [f"{x:g}" if isinstance(x, float | np.floating) else str(x) for x in labels]
    place(range(0, len(labels), step), shown[::step], **style)
