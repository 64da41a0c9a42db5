"""Oracles and their activations, computed once a session."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch

import jaxtc
from jaxtc.parity import torch_side
from tests.parity import oracles, reference, torch_transcoder
from tests.parity.lab import Lab
from tests.parity.oracles import Oracle
from tests.support import tiny

# These models are so small that a second thread costs torch more than it gives.
torch.set_num_threads(1)

# Prompts and the side on which the reference pads them.
CASES = {"right": ("prompts", "right"), "left": ("prompts", "left"), "long": ("long", "right")}


@pytest.fixture(scope="session")
def make_oracle(tmp_path_factory) -> Callable[[str], Oracle]:
    """An oracle by name, saved and tokenised once."""

    @functools.cache
    def make(name: str) -> Oracle:
        if name == oracles.EMBEDDED:
            return oracles.embedded()
        folder = tmp_path_factory.mktemp(name)
        model = oracles.perturbed(name)
        model.save_pretrained(folder)
        vocab = model.config.vocab_size
        prompts = oracles.random_prompts(vocab, (21, 13, 10), seed=1)
        long = oracles.random_prompts(vocab, (277,), seed=2)
        return Oracle(name, folder, str(folder), prompts, long)

    return make


# 2B's D is a square, which hides more than 9B's: it takes its turn in `pytest -m slow`.
LATER = {"2b": [pytest.mark.slow]}


@pytest.fixture(
    scope="session", params=[pytest.param(x, marks=LATER.get(x, [])) for x in oracles.ALL]
)
def oracle(request, make_oracle) -> Oracle:
    return make_oracle(request.param)


@pytest.fixture(scope="session")
def models() -> Callable:
    """``(oracle, "float32" | "bfloat16")`` to (ours, the reference)."""

    @functools.cache
    def load(oracle_name, source, folder, dtype):
        ours = jaxtc.load_model(source, dtype=jnp.dtype(dtype))
        return ours, torch_side.load(folder, getattr(torch, dtype))

    def pair(oracle, dtype="float32"):
        ours, theirs = load(oracle.name, oracle.source, oracle.folder, dtype)
        return tiny.fresh(ours), theirs

    return pair


@pytest.fixture(scope="session")
def ours(models, make_oracle) -> Callable[[Oracle, str, str], reference.Captured]:
    """Our activations at every address: ``(oracle, prompts' field, dtype)``."""

    @functools.cache
    def capture(name: str, field: str, dtype: str):
        oracle = make_oracle(name)
        return reference.ours(models(oracle, dtype)[0], getattr(oracle, field))

    return lambda oracle, field, dtype="float32": capture(oracle.name, field, dtype)


@pytest.fixture(scope="session")
def transcoder_file(tmp_path_factory) -> Callable[[Oracle], tuple[int, Path]]:
    """(layer, ``params.npz``) of a transcoder for an oracle: the embedded one, or a random one."""

    @functools.cache
    def file(name: str, folder: Path) -> tuple[int, Path]:
        if name == oracles.EMBEDDED:
            layer = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
            [path] = (folder.parent / "transcoders").glob(f"layer_{layer}/*/*/params.npz")
            return layer, path
        width = oracles.SHAPES[name]["hidden_size"]
        place = Path("layer_2") / "width_512" / "average_l0_100" / "params.npz"
        root = tmp_path_factory.mktemp(f"gemma-scope-{name}-transcoders")
        return 2, torch_transcoder.save_random(root / place, width, 512, seed=4)

    return lambda oracle: file(oracle.name, oracle.folder)


@pytest.fixture(scope="session")
def transcoders_of(transcoder_file) -> Callable[[Oracle], tuple]:
    """An oracle's transcoder in both frameworks: (ours, the reference)."""

    def load(oracle: Oracle):
        layer, file = transcoder_file(oracle)
        folder = file.parents[3]
        source = oracle.source if oracle.name == oracles.EMBEDDED else folder
        return jaxtc.load_transcoder(source, layer), torch_transcoder.JumpReLU.load(file)

    return load


@pytest.fixture(scope="session")
def transcoders(oracle, transcoders_of) -> tuple:
    return transcoders_of(oracle)


@pytest.fixture(scope="session")
def theirs(models, make_oracle) -> Callable[[Oracle, str, str], reference.Captured]:
    """The reference's: ``(oracle, case, dtype)``; dtype "truth" is float64 on bfloat16 weights."""

    @functools.cache
    def capture(name: str, case: str, dtype: str):
        oracle = make_oracle(name)
        field, side = CASES[case]
        prompts = getattr(oracle, field)
        if dtype != "truth":
            return reference.capture(models(oracle, dtype)[1], prompts, side)
        with torch_side.Float64():
            return reference.capture(truth(name), prompts, side)

    @functools.cache
    def truth(name: str):
        return torch_side.widen(torch_side.load(make_oracle(name).folder, torch.bfloat16))

    return lambda oracle, case, dtype="float32": capture(oracle.name, case, dtype)


@pytest.fixture(scope="session")
def labs(make_oracle, models, theirs) -> Callable[[str], Lab]:
    """Labs by the oracle's name."""

    @functools.cache
    def make(name: str) -> Lab:
        oracle = make_oracle(name)
        return Lab(name, *models(oracle), oracle.prompts, theirs(oracle, "right"))

    return make
