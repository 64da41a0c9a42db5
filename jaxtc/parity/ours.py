"""Our side: the prompts through our model, each compared with the reference's files at once."""

import math
import shutil

import numpy as np

from jaxtc.edits.values import SetTo
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.parity.certificate import SiteRow, TruthRow
from jaxtc.parity.compare import Features, Predictions, Tally
from jaxtc.parity.job import Job, addresses
from jaxtc.parity.tolerances import Tolerances
from jaxtc.programs.run import run
from jaxtc.tap.context import PerLayer
from jaxtc.tap.sites import SITES, Address

# Sites of each layer that the isolated run replaces with the reference's values.
GIVEN = ("resid_pre", "resid_mid")
# Bytes of captures held at once: more layers than fit are captured in several passes.
_CAPTURED = 256 * 2**20


class Comparison:
    """Our model on the prompts, against the files of the reference's pass ``work``.

    ``exact`` is its float64 pass, or None; ``features`` compare the transcoder, if there is one.

    Attributes:
        accumulated, isolated: a tally per address, in the order of computation.
        truth: by site, (ours, the reference) against float64.
        predictions: of the logits.
    """

    def __init__(
        self,
        model: Gemma2,
        work: Job,
        exact: Job | None,
        limits: Tolerances,
        features: Features | None,
    ):
        self.model, self.work, self.exact, self.features = model, work, exact, features
        self.limits, self.predictions = limits, Predictions(limits)
        order = addresses(work.layers)
        self.accumulated = {address: Tally(address.site) for address in order}
        # Given too: the final sites start from it.
        self.end = Address("resid_post", model.config.num_hidden_layers - 1)
        self.isolated = {a: Tally(a.site) for a in order if a.site not in GIVEN and a != self.end}
        self.truth = {site.name: (Tally(site.name), Tally(site.name)) for site in SITES if exact}

    def prompt(self, index: int) -> None:
        """Run one prompt both ways and compare it; its files are deleted."""
        work, ids = self.work, self.work.prompts[index]
        parts = groups(self.model.config, work.layers, len(ids), self.model.dtype.itemsize)
        for group in parts:
            first, last = group is parts[0], group is parts[-1]
            wanted = [
                address
                for address in addresses(group)
                if address.layer is not None or (first if address.site == "embed" else last)
            ]
            self._accumulated(index, self._run(ids, wanted, ()))
            isolated = [address for address in wanted if address in self.isolated]
            found = self._run(ids, isolated, self._starts(index, group, last))
            for address, ours in found.items():
                self.isolated[address].add(ours, work.array(index, address))
        for job in filter(None, (work, self.exact)):
            shutil.rmtree(job.folder(index))

    def _run(self, ids, wanted, edits) -> dict[Address, np.ndarray]:
        found = run(self.model, [ids], capture=wanted, edits=edits, logits=None).activations
        return {address: np.asarray(found[address])[0] for address in wanted}

    def _accumulated(self, index: int, found: dict[Address, np.ndarray]) -> None:
        work = self.work
        for address, ours in found.items():
            theirs = work.array(index, address)
            self.accumulated[address].add(ours, theirs)
            if self.exact:
                right = self.exact.array(index, address)
                for tally, x in zip(self.truth[address.site], (ours, theirs), strict=True):
                    tally.add(x, right)
            if address.site == "logits":
                self.predictions.add(ours, theirs, work.prompts[index])
        ends = [Address(name, work.transcoder_layer) for name in ("mlp_in_normed", "mlp_out")]
        if self.features and ends[0] in found:
            own = {end.site: found[end] for end in ends}
            theirs = {end.site: work.array(index, end) for end in ends}
            for name in ("pre_activations", "activations", "reconstruction"):
                theirs[name] = work.array(index, f"transcoder.{name}")
            self.features.add(own, theirs, work.prompts[index])

    def _starts(self, index: int, group: list[int], last: bool) -> list[SetTo]:
        """Edits that put the reference's own residual stream before each half of these layers."""
        count = self.model.config.num_hidden_layers
        edits = []
        for site in GIVEN:
            rows = [self.work.array(index, Address(site, layer)) for layer in group]
            stacked = np.zeros((count, 1, *rows[0].shape), np.float32)
            stacked[group, 0] = rows
            edits.append(SetTo(PerLayer(stacked), site=site, layer=group))
        if last:
            end = self.work.array(index, self.end)
            edits.append(SetTo(np.asarray(end)[None], site=str(self.end)))
        return edits

    def rows(self) -> list[SiteRow]:
        """The figures of every address, judged."""
        rows = []
        for address, whole in self.accumulated.items():
            alone = self.isolated.get(address)
            accumulated = whole.figures(self.limits, "accumulated")
            isolated = alone and alone.figures(self.limits, "isolated")
            passed = accumulated.passed and (isolated is None or isolated.passed)
            masks = (alone or whole).masks_differ
            rows.append(SiteRow(address.site, address.layer, accumulated, isolated, masks, passed))
        return rows

    def truth_rows(self) -> list[TruthRow] | None:
        """The errors of both against float64, by site."""
        if not self.exact:
            return None
        pairs = {site: (a.mean, b.mean) for site, (a, b) in self.truth.items() if a.tokens}
        return [
            TruthRow(site, a, b, a / b if b > 0 else math.inf if a > 0 else None)
            for site, (a, b) in pairs.items()
        ]


def groups(config: Gemma2Config, layers: list[int], length: int, itemsize: int) -> list[list[int]]:
    """Layers in groups whose captures fit in ``_CAPTURED`` bytes; at least one layer each."""
    step = max(1, _CAPTURED // captured(config, length, itemsize))
    return [layers[start : start + step] for start in range(0, len(layers), step)]


def captured(config: Gemma2Config, length: int, itemsize: int = 4, per_layer: bool = True) -> int:
    """Bytes of every site of one layer, or of those that the model has once, for one prompt."""
    sizes = {**config.sizes, "B": 1, "T": length, "S": length}
    return sum(
        math.prod(site.shape(sizes)) * (4 if site.float32 else itemsize)
        for site in SITES
        if site.per_layer == per_layer
    )
