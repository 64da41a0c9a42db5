"""A tiny model on disk, and the command run on it."""

import importlib

import pytest

import jaxtc
from jaxtc import cli
from tests.unit import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny model with its tokenizer, and transcoders for both layers."""
    root = tmp_path_factory.mktemp("tiny")
    jaxtc.save_model(tiny.model(), root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    for layer in (0, 1):
        place = root / "transcoders" / f"layer_{layer}" / "width_50" / "average_l0_20"
        jaxtc.save_transcoder(tiny.transcoder(layer), place)
    jaxtc.save_transcoder(tiny.transcoder(1, width=16), root / "narrow" / "params.npz")
    return root


@pytest.fixture
def cli_run(capsys, monkeypatch):
    """Run the command in this process, its process-wide settings left out: (code, out, err)."""
    runtime = importlib.import_module("jaxtc.cli.runtime")
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda console: None)
    monkeypatch.setattr(runtime, "quiet", lambda: None)

    def run(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run
