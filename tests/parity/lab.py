"""Edits side by side: a batch of prompts through jaxtc, and through the hooked reference.

A batch row is a variant: in one compiled program each site has two rows of its own, behind six that
are not edited. What a site's rows are and what is done to them depends on its name alone, so that a
new site leaves the others as they are.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import jaxtc
from jaxtc.tap.sites import BY_NAME, Address, Site
from tests.parity import oracles, reference, torch_hooks
from tests.parity.figures import note
from tests.parity.torch_hooks import Hooked

TOLERANCE = 1e-5
# What an edit must do to the logits of its rows for the test to mean something.
VISIBLE = 1e-4
LAYERS = oracles.COMMON["num_hidden_layers"]
ORACLES = ("9b", oracles.EMBEDDED)
# Compiling takes long: the shipped model takes its turn in `pytest -m slow`.
on_each_oracle = pytest.mark.parametrize(
    "name", [ORACLES[0], pytest.param(ORACLES[1], marks=pytest.mark.slow)]
)
SITES = tuple(BY_NAME)


def both(**fields) -> tuple[dict, dict]:
    """Targets that are spelled the same for jaxtc and for :class:`torch_hooks.Where`."""
    return dict(fields), dict(fields)


def number(site: str) -> int:
    """Of a site, the same whatever other sites there are."""
    return zlib.crc32(site.encode())


def targets(which: int, site: Site, here: "Lab", draw) -> tuple[dict, dict]:
    """(targets for jaxtc, the same for the hooks), one of several ways to say where."""
    prompts, lengths = here.prompts, list(map(len, here.own))
    masks = [draw.random(n) < 0.4 for n in lengths]
    for mask in masks:
        mask[3] = True
    pairs = [(int(draw.integers(n)), int(draw.integers(-n, 0))) for n in lengths]
    masks, pairs = ([drawn[row] for row in here.whose] for drawn in (masks, pairs))
    full = np.zeros((len(prompts), max(lengths)), bool)
    for row, mask in zip(full, masks, strict=True):
        row[: len(mask)] = mask
    ways = [
        both(layer=0, position=-1),
        both(layer=(0, -1), position=slice(1, -2)),
        ({"position": full}, {"position": masks}),
        both(layer=2, position=(1, -3, 4), **entries(site)),
        (
            {"position": jaxtc.Token(oracles.BOS, offset=2)},
            {"position": [prompt.index(oracles.BOS) + 2 for prompt in prompts]},
        ),
        both(layer=3, position=slice(1, None)),
        ({"layer": (1, 2), "position": np.array(pairs)}, {"layer": (1, 2), "position": pairs}),
    ]
    here, there = ways[which % len(ways)]
    if not site.per_layer:
        here, there = ({k: v for k, v in at.items() if k != "layer"} for at in (here, there))
    return here, there


def entries(site: Site) -> dict[str, Any]:
    """Some heads or coordinates, where the site has them."""
    head = {"head": 1} if {"N", "K"} & set(site.letters) else {}
    return head | ({"coordinate": (0, 2, 5)} if site.kind == "vector" else {})


@dataclasses.dataclass(frozen=True)
class At:
    """A site in a model, and what making an edit of it takes.

    Attributes:
        site: of the table.
        shape: of its array, (B, T, ...).
        size: root mean square of what the model has there.
        draw: random numbers.
        lab: the model and its batch.
        here, there: targets, for jaxtc and for the hooks.
    """

    site: Site
    shape: tuple[int, ...]
    size: float
    draw: np.random.Generator
    lab: "Lab"
    here: dict[str, Any]
    there: dict[str, Any]

    @property
    def token(self) -> tuple[int, ...]:
        """Shape of one token's value: the axes after the tokens'."""
        return self.shape[self.site.sequence_axis + 1 :]

    def pair(self, *shape: int) -> tuple[np.ndarray, torch.Tensor]:
        """Random values of the site's size, in both frameworks."""
        if self.site.kind == "scale":  # a rate of about 0 would blow up every rounding after it
            values = self.draw.uniform(0.5, 2, shape)
        else:
            values = self.draw.normal(size=shape)
        values = np.asarray(values * self.size, np.float32)
        return values, torch.from_numpy(values)


def cut(logits, prompts: Sequence[Sequence[int]]) -> list:
    """The logits of each prompt's real tokens."""
    if not isinstance(logits, torch.Tensor):
        logits = np.asarray(logits)  # taking a jax array apart would compile something
    return [row[: len(prompt)] for row, prompt in zip(logits, prompts, strict=True)]


class Lab:
    """An oracle in both frameworks and a batch of rows, two for each site.

    Attributes:
        own: the oracle's prompts and, of the same lengths, random ones: any three in turn differ in
            length, and three on stands another prompt of the same length.
        whose: (B,) which of them each row is: each in order, then two for each site.
        prompts: of the rows.
        sources: (B,) for each row one of the same length and other tokens.
        size: of each site, the root mean square without edits; the median where it is 1/rms, which
            differs much from layer to layer.
        clean: the reference's activations of the oracle's prompts.
    """

    def __init__(self, name: str, ours, hf, prompts, clean: reference.Captured):
        self.name, self.ours, self.hf, self.clean = name, ours, hf, clean
        draw, vocab = np.random.default_rng(11), ours.config.vocab_size
        twins = [[p[0], *draw.integers(3, vocab, len(p) - 1).tolist()] for p in prompts]
        self.own = [*map(list, prompts), *twins]
        starts = np.array([number(site) for site in SITES])
        pairs = np.stack([starts, starts + 1], axis=1).ravel()
        self.whose = np.concatenate([np.arange(6), pairs]) % 6
        self.prompts = [self.own[index] for index in self.whose]
        self.sources = (self.whose + 3) % 6
        self.size = {site: self._size(site) for site in SITES}

    def _size(self, site: str) -> float:
        rows = [x for key, xs in self.clean.items() if key.site == site for x in xs]
        values = torch.cat([x[~x.isnan()] for x in rows])
        scale = BY_NAME[site].kind == "scale"
        return float(values.median() if scale else values.square().mean().sqrt())

    def rows(self, site: str) -> tuple[int, int]:
        """Of a site."""
        first = 6 + 2 * SITES.index(site)
        return first, first + 1

    def at(self, site: str, seed: int) -> At:
        """What makes an edit at a site; each seed says where in its own way."""
        row, draw = BY_NAME[site], np.random.default_rng([number(site), seed])
        here, there = targets(number(site) + seed, row, self, draw)
        return At(row, self.shape(row), self.size[site], draw, self, here, there)

    def shape(self, site: Site) -> tuple[int, ...]:
        """Of the site's array for the whole batch."""
        width = max(map(len, self.prompts))
        return site.shape(
            {**self.ours.config.sizes, "B": len(self.prompts), "T": width, "S": width}
        )

    @torch.no_grad()
    def hooked(self, edits, prompts=None, side="right") -> torch.Tensor:
        """(B, T, V) logits of the reference."""
        return torch_hooks.run(self.hf, prompts or self.prompts, edits, side)

    @functools.cached_property
    def base(self) -> torch.Tensor:
        """The batch without edits."""
        return self.hooked(())

    @functools.cached_property
    def stored(self) -> tuple[Any, dict[str, Any]]:
        """Activations of the rows' sources: a run's, and the reference's, padded, by layer."""
        others = [self.prompts[row] for row in self.sources]
        ours = jaxtc.run(self.ours, others, capture=list(SITES), logits=None).activations
        hooks: dict[str, Any] = {}
        for address, rows in reference.capture(self.hf, others, "right").items():
            array = torch.zeros(self.shape(BY_NAME[address.site]))
            for into, row, prompt in zip(array, rows, others, strict=True):
                n = len(prompt)
                if BY_NAME[address.site].kind == "pairs":
                    into[:, :n, :n] = row
                else:
                    into[:n] = row.view(n, *into.shape[1:])
            if address.layer is None:
                hooks[address.site] = array
            else:
                hooks.setdefault(address.site, [None] * LAYERS)[address.layer] = array
        return ours, hooks

    def lively(self, transcoder, layer: int, count: int) -> tuple[list[int], float]:
        """Features that some tokens of a layer activate and others all but activate.

        Those others are between 0 and the threshold. Also the features' largest value.
        """
        x = torch.cat([x[1:] for x in self.clean[Address("mlp_in_normed", layer)]])
        z, a = x @ transcoder.W_enc + transcoder.b_enc, transcoder.encode(x)
        active, nearly = (on.float().mean(0) for on in (a > 0, (z > 0) & (a == 0)))
        ids = torch.minimum(active, nearly).topk(count).indices.tolist()
        assert (active[ids] > 0).all() and (nearly[ids] > 0).all()
        return ids, float(a[:, ids].max())

    def check_rows(
        self,
        figure: str,
        prompts: Sequence[list[int]],
        edits: Sequence[jaxtc.Edit],
        hooks: Sequence[Hooked],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Both models with the edits give the same logits, in ``rows`` others than without."""
        prompts = list(prompts)
        ours = cut(jaxtc.run(self.ours, prompts, edits=edits).logits, prompts)
        theirs, base = (cut(self.hooked(h, prompts), prompts) for h in (hooks, ()))
        for row in range(len(prompts)) if rows is None else rows:
            moved = reference.relative([theirs[row]], [base[row]])
            assert moved > VISIBLE, f"row {row} moved by {moved:.1e} only"
            error = reference.relative([ours[row]], [theirs[row]])
            note("float32", figure, error, f"{self.name} row {row}")
            assert error <= TOLERANCE, f"row {row}: {error:.2e}"
