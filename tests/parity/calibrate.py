"""Measure what `jaxtc parity` finds where both are right: what its tolerances are set from.

    python -m tests.parity.calibrate [float32 bfloat16]

Models: the embedded one, the three perturbed shapes, one of them 26 layers deep, and two layers of
the widths of 2B. Prints, by site, the worst layer's mean error and the worst token's.
"""

import collections
import sys
import tempfile

from jaxtc.parity import Certificate, certify
from tests.parity import oracles

LENGTHS = (21, 13, 10, 277)
WIDE = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 2, "head_dim": 256,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
MODELS = {
    **{name: (name, 0, {}) for name in oracles.RANDOM},
    "27b, seed 1": ("27b", 1, {}),
    "2b, 26 layers": ("2b", 0, {"num_hidden_layers": 26}),
    "2b, its widths": ("2b", 0, WIDE),
}


def certificates(dtype: str, names: list[str]):
    """The embedded model's, then the random models'."""
    if oracles.EMBEDDED in names:
        yield oracles.EMBEDDED, certify(dtype=dtype, transcoder="embedded", transcoder_layer=3)
    for name in names:
        if name in MODELS:
            shape, seed, changes = MODELS[name]
            with tempfile.TemporaryDirectory() as folder:
                model = oracles.perturbed(shape, seed, **changes)
                model.save_pretrained(folder)
                prompts = oracles.random_prompts(model.config.vocab_size, LENGTHS, seed=1)
                del model
                yield name, certify(folder, dtype=dtype, prompts=prompts)


def show(dtype: str, found: dict[str, Certificate]) -> None:
    """A line a site, and the figures of the predictions."""
    shallow = {name: one for name, one in found.items() if len(one.layers) <= 4}
    deep = {name: one for name, one in found.items() if name not in shallow}
    table(f"{dtype}, isolated", found, "isolated")
    table(f"{dtype}, accumulated over at most 4 layers", shallow, "accumulated")
    table(f"{dtype}, accumulated over more", deep, "accumulated")
    print()
    for name, one in found.items():
        logits, new = one.logits, one.generation
        loss = abs(logits.loss_ours - logits.loss_theirs)
        lead = max((d.margin for d in new.divergences), default=0)
        far = next(row for row in one.sites if row.site == "logits").accumulated.largest
        print(
            f"{name:<18} KL {logits.kl_mean:.1e} max {logits.kl_max:.1e} loss {loss:.1e} top-1 "
            f"{logits.top1:.3f} top-5 {logits.top5:.3f} logits differ by at most {far:.1e}; "
            f"{new.identical} of {new.prompts} texts equal, leads where they part: {lead:.1e}; "
            f"{one.transcoder or ''} passed: {one.passed} {' '.join(one.failures[:3])}"
        )


def table(title: str, found: dict[str, Certificate], kind: str) -> None:
    """By site, the worst layer's mean error and the worst token's."""
    worst = collections.defaultdict(lambda: (0.0, ""))
    token = collections.defaultdict(lambda: (0.0, ""))
    for name, one in found.items():
        for row in one.sites:
            figures = getattr(row, kind)
            if figures:
                where = f"{name} {row.layer}"
                worst[row.site] = max(worst[row.site], (figures.relative, where))
                token[row.site] = max(token[row.site], (figures.worst, where))
    print(f"\n{title}: mean over tokens, worst token")
    for site in worst:
        mean, most = worst[site], token[site]
        print(f"  {site:<16} {mean[0]:.1e}  {mean[1]:<22} {most[0]:.1e}  {most[1]}")


if __name__ == "__main__":
    for dtype in sys.argv[1:2] or ("float32", "bfloat16"):
        show(dtype, dict(certificates(dtype, sys.argv[2:] or [oracles.EMBEDDED, *MODELS])))
