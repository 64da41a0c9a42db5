"""Peak memory of `jaxtc parity` against that of each of the two models alone.

    python -m tests.benchmarks.make_checkpoint FOLDER --layers 26
    python -m tests.benchmarks.bench_parity_memory FOLDER [--dtype bfloat16]

FOLDER has no tokenizer, so the prompts are token ids. Each of the three runs in a process of its
own, and what it and its children hold together is read from /proc twenty times a second: all
resident pages, and those that belong to no file (the pages of a mapped checkpoint can be dropped).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

LENGTHS = (9, 33, 100)

PROMPTS = f"""
import random
random.seed(0)
prompts = [[2, *(random.randrange(3, 1000) for _ in range(n - 1))] for n in {LENGTHS}]
"""
RUNS = {
    "PyTorch alone": """
import torch
from jaxtc.parity import torch_side
model = torch_side.load(folder, getattr(torch, dtype))
for prompt in prompts:
    model(torch.tensor([prompt]), use_cache=False)
""",
    "jaxtc alone": """
import jax, jaxtc
model = jaxtc.load_model(folder, dtype=dtype)
for prompt in prompts:
    jax.block_until_ready(jaxtc.run(model, [prompt]).logits)
""",
    "jaxtc parity": """
from jaxtc.parity import certify
found = certify(folder, prompts=prompts, dtype=dtype, new_tokens=new_tokens)
print("passed" if found.passed else found.failures, found.seconds, flush=True)
""",
}
FIELDS = ("VmRSS", "RssAnon")


def family(pid: int) -> list[int]:
    """A process and all it started."""
    try:
        text = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    return [pid, *(one for child in text.split() for one in family(int(child)))]


def held(pid: int) -> dict[str, int]:
    """Bytes by field of /proc/PID/status; nothing for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    table = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(table[name].split()[0]) * 1024 for name in FIELDS if name in table}


def peak(code: str) -> dict[str, int]:
    """The most that a Python process and its children held together."""
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    most = dict.fromkeys(FIELDS, 0)
    while process.poll() is None:
        now = [held(pid) for pid in family(process.pid)]
        for name in FIELDS:
            most[name] = max(most[name], sum(one.get(name, 0) for one in now))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    return most


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=4)
    options = parser.parse_args()
    told = f"folder, dtype = {str(options.folder)!r}, {options.dtype!r}\n"
    told += f"new_tokens = {options.new_tokens}\n"
    found = {}
    for name, code in RUNS.items():
        found[name] = peak(told + PROMPTS + code)
        sizes = ", ".join(f"{field} {found[name][field] / 2**30:.2f} GiB" for field in FIELDS)
        print(f"{name:<14} {sizes}", flush=True)
    for field in FIELDS:
        alone = max(found[name][field] for name in ("PyTorch alone", "jaxtc alone"))
        print(f"{field}: {found['jaxtc parity'][field] / alone:.2f} times the larger one alone")
