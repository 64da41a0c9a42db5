"""Our side: the prompts through our model, each compared with the reference's files at once."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxtc.edits.values import SetTo
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.parity.certificate import TruthRow
from jaxtc.parity.compare import Features, Predictions, Tally
from jaxtc.parity.job import Job
from jaxtc.parity.tolerances import Tolerances
from jaxtc.programs.run import run
from jaxtc.tap.context import PerLayer
from jaxtc.tap.sites import SITES, Address

# At these sites of each layer the isolated run is given the reference's own values.
GIVEN = ("resid_pre", "resid_mid")
# Bytes of captures held at once: more layers than fit are captured in several passes.
_CAPTURED = 256 * 2**20


class Comparison:
    """Our model on the prompts, against the reference's files.

    Args:
        model: ours.
        work: the reference's pass.
        exact: its float64 pass, or None.
        tolerances: for the dtype.
        features: for the transcoder, or None.

    Attributes:
        accumulated, isolated: a tally for each address, in the order of computation.
        truth: by site, (ours, the reference) against float64.
        predictions: of the logits.
    """

    def __init__(
        self,
        model: Gemma2,
        work: Job,
        exact: Job | None,
        tolerances: Tolerances,
        features: Features | None,
    ):
        self.model, self.work, self.exact, self.features = model, work, exact, features
        self.predictions = Predictions(tolerances)
        order = list(in_order(work.layers))
        self.accumulated = {address: Tally(address.site) for address in order}
        # And here: the final sites start from it.
        self.end = Address("resid_post", model.config.num_hidden_layers - 1)
        self.isolated = {a: Tally(a.site) for a in order if a.site not in GIVEN and a != self.end}
        names = [site.name for site in SITES] if exact else []
        self.truth = {name: (Tally(name), Tally(name)) for name in names}

    def prompt(self, index: int) -> None:
        """Run one prompt both ways and compare it; its files are deleted."""
        work, ids = self.work, self.work.prompts[index]
        parts = list(groups(self.model.config, work.layers, len(ids), self.model.dtype.itemsize))
        for number, group in enumerate(parts):
            wanted = list(in_order(group, first=number == 0, last=number == len(parts) - 1))
            found = self._run(ids, wanted, ())
            self._accumulated(index, wanted, found)
            edits = self._starts(index, group, last=number == len(parts) - 1)
            isolated = [address for address in wanted if address in self.isolated]
            found = self._run(ids, isolated, edits)
            for address in isolated:
                self.isolated[address].add(found(address), work.array(index, address))
        work.forget(index)
        if self.exact:
            self.exact.forget(index)

    def _run(self, ids, wanted, edits) -> Callable[[Address], np.ndarray]:
        logits = "all" if Address("logits") in wanted else None
        capture = [address for address in wanted if address.site != "logits"]
        result = run(self.model, [ids], capture=capture, edits=edits, logits=logits)

        def read(address: Address) -> np.ndarray:
            x = result.logits if address.site == "logits" else result.activations[address]
            return np.asarray(x)[0]

        return read

    def _accumulated(self, index: int, wanted: list[Address], found) -> None:
        work = self.work
        for address in wanted:
            ours, theirs = found(address), work.array(index, address)
            self.accumulated[address].add(ours, theirs)
            if self.exact:
                right = self.exact.array(index, address)
                for tally, x in zip(self.truth[address.site], (ours, theirs), strict=True):
                    tally.add(x, right)
            if address.site == "logits":
                self.predictions.add(ours, theirs, work.prompts[index])
        layer = work.transcoder_layer
        if self.features and Address("mlp_out", layer) in wanted:
            names = ("mlp_in_normed", "mlp_out")
            own = {name: found(Address(name, layer)) for name in names}
            theirs = {name: work.array(index, Address(name, layer)) for name in names}
            for name in ("pre_activations", "activations", "reconstruction"):
                theirs[name] = work.array(index, f"transcoder.{name}")
            self.features.add(own, theirs, work.prompts[index])

    def _starts(self, index: int, group: list[int], last: bool) -> list[SetTo]:
        """Edits that put the reference's own residual stream before each half of these layers."""
        count = self.model.config.num_hidden_layers
        edits = []
        for site in GIVEN:
            rows = {layer: self.work.array(index, Address(site, layer)) for layer in group}
            stacked = np.zeros((count, 1, *rows[group[0]].shape), np.float32)
            for layer, row in rows.items():
                stacked[layer, 0] = row
            edits.append(SetTo(PerLayer(stacked), site=site, layer=group))
        if last:
            end = self.work.array(index, self.end)
            edits.append(SetTo(np.asarray(end)[None], site=str(self.end)))
        return edits

    def truth_rows(self) -> list[TruthRow] | None:
        """Who is nearer, by site."""
        if not self.exact:
            return None
        pairs = {site: (a.mean, b.mean) for site, (a, b) in self.truth.items() if a.tokens}
        return [
            TruthRow(site, a, b, a / b if b > 0 else math.inf if a > 0 else None)
            for site, (a, b) in pairs.items()
        ]


def in_order(layers: Iterable[int], first: bool = True, last: bool = True) -> Iterator[Address]:
    """Addresses in the order of computation.

    Args:
        layers: whose.
        first: with what comes before them.
        last: with what comes after them.
    """
    names = [site.name for site in SITES if not site.per_layer]
    yield from (Address(name) for name in names if first and name == "embed")
    for layer in layers:
        yield from (Address(site.name, layer) for site in SITES if site.per_layer)
    yield from (Address(name) for name in names if last and name != "embed")


def groups(
    config: Gemma2Config, layers: list[int], length: int, itemsize: int
) -> Iterator[list[int]]:
    """Layers in groups whose captures fit in ``_CAPTURED`` bytes; at least one layer each."""
    step = max(1, _CAPTURED // captured(config, length, itemsize))
    for start in range(0, len(layers), step):
        yield layers[start : start + step]


def captured(config: Gemma2Config, length: int, itemsize: int = 4, per_layer: bool = True) -> int:
    """Bytes of every site of one layer, or of those that the model has once, for one prompt."""
    sizes = {**config.sizes, "B": 1, "T": length, "S": length}
    return sum(
        math.prod(site.shape(sizes)) * (4 if site.float32 else itemsize)
        for site in SITES
        if site.per_layer == per_layer
    )
