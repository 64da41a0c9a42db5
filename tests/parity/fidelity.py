"""Write docs/fidelity.md anew: what `jaxtc parity` says of right models and of wrong ones.

python -m tests.parity.fidelity
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax

from jaxtc.parity import Certificate, certify
from tests.parity import oracles
from tests.parity.wrong import CODE, CONSTANTS, changed

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
TRANSCODER = ["--transcoder", "embedded", "--transcoder-layer", "3"]
RUNS = (
    ["parity", "--truth", *TRANSCODER],
    ["parity", "--dtype", "bfloat16", "--truth", *TRANSCODER],
)

INTRODUCTION = """\
# Fidelity

What `jaxtc parity` says about jaxtc on the model that ships with it, and about models made wrong
on purpose. Nothing here is typed in: `python -m tests.parity.fidelity` writes this page, and the
command does the same for your weights, prompts, dtype and device:

```bash
pip install -e '.[parity]'
jaxtc parity google/gemma-2-2b --dtype bfloat16 --truth --report parity.html \\
    --transcoder google/gemma-scope-2b-pt-transcoders --transcoder-layer 20
```

It runs `transformers`' PyTorch model and ours on the same tokens, one after the other so that only
one of them is in memory, compares every site of every layer, the predictions, a greedy continuation
and a transcoder's features, and exits with 0 or 1. *Isolated* errors start each half of each layer
from PyTorch's own residual stream, so that a mistake shows where it is made; *accumulated* ones let
our model run by itself. `--truth` also runs the reference in float64 on the same rounded weights:
`ours/HF` is our error against that, over PyTorch's own.
"""
WRONG = """\
## Would it notice?

Ours made wrong, one mistake at a time, on random models perturbed so that every constant matters;
the reference stays right. Each is refused, at the site where it begins:

| what is wrong with ours | dtype | begins at | isolated error there | tolerance |
|---|---|---|---|---|
"""
RANDOM = """\

## Random architectures

`pytest tests/parity/test_fuzz.py` draws configs (layers, widths, heads and key/value heads, head
dim, query scale, softcaps on and off, window, rope base, eps, vocabulary, batch, padding side,
lengths from 1 to past the window) with weights perturbed alike, compares every site with PyTorch's
in float32, and then changes each constant on our side only, which must be seen. `JAXTC_FUZZ=500`
runs 500 of them.
"""


def command(arguments: list[str]) -> tuple[str, Certificate]:
    """What it prints, and the certificate."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "certificate.json"
        code = "from jaxtc.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--json", str(place)],
            env={**os.environ, "COLUMNS": "96"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout, Certificate.from_dict(json.loads(place.read_text()))


def versions(found: Certificate) -> str:
    """Of everything that took part."""
    names = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    return f"{names}; ours on {found.machine['ours']}, PyTorch on {found.machine['theirs']}"


def mistakes() -> Iterator[tuple[str, Certificate]]:
    """(what is wrong, the certificate) of each wrong model."""
    with tempfile.TemporaryDirectory() as root:
        for name, wrong in {**CONSTANTS, **CODE}.items():
            shape, dtype = (wrong[1], "float32") if name in CONSTANTS else ("9b", wrong[3])
            folder = Path(root) / shape
            if not folder.exists():
                oracles.perturbed(shape, num_hidden_layers=2).save_pretrained(folder)
            vocab = oracles.SHAPES[shape]["vocab_size"]
            options = {"prompts": oracles.random_prompts(vocab, (21,), seed=1), "new_tokens": 0}
            jax.clear_caches()
            with contextlib.ExitStack() as stack:
                if name in CONSTANTS:
                    options["load"] = changed(**wrong[0])
                else:
                    stack.enter_context(mock.patch.object(*wrong[:3]))
                yield name, certify(folder, dtype=dtype, **options)


def page() -> str:
    """The page."""
    text = INTRODUCTION
    for arguments in RUNS:
        out, found = command(arguments)
        shown = "\n".join(line.rstrip() for line in out.strip("\n").splitlines())
        text += f"\n## The embedded model in {found.dtype}\n\n"
        text += f"```console\n$ jaxtc {' '.join(arguments)}\n{shown}\n```\n\n{versions(found)}.\n"
    text += "\n" + WRONG
    for name, found in mistakes():
        jump = found.first_jump
        assert jump and not found.passed, name
        error = f"{jump.relative:.1e}" if math.isfinite(jump.relative) else "another mask"
        text += f"| {name} | {found.dtype} | `{jump.address}` | {error} | {jump.tolerance:.1e} |\n"
    return text + RANDOM


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
