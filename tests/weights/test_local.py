"""Sources that the file system refuses to look up: one SourceError wherever they are given."""

import os

import pytest
from flax import nnx

import jaxtc
from jaxtc.errors import SourceError
from jaxtc.weights.files import local
from tests.support.weights_files import available_layers

CALLS = {
    "load_model": jaxtc.load_model,
    "load_tokenizer": jaxtc.load_tokenizer,
    "load_transcoder": lambda source: jaxtc.load_transcoder(source, 0),
    "available_layers": available_layers,
}


@pytest.fixture
def closed(tmp_path):
    """A folder in one that this process may not enter."""
    folder = tmp_path / "closed" / "model"
    folder.mkdir(parents=True)
    folder.parent.chmod(0)
    if os.getuid() != 0:
        yield folder
    else:  # root may enter everything
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)
    folder.parent.chmod(0o700)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("source", "message"),
    [("m" * 300, "m{100}…' .*too long"), ("~nosuchuser/m", "home"), ("a\0b", "null byte")],
)
def test_names_that_cannot_be_looked_up(call, source, message):
    with pytest.raises(SourceError, match=message) as error:
        CALLS[call](source)
    assert len(str(error.value)) < 400


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
@pytest.mark.parametrize("call", CALLS)
def test_folders_that_may_not_be_read(call, closed):
    with pytest.raises(SourceError, match="Permission denied"):
        CALLS[call](closed)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_folders_that_may_not_be_written(closed):
    with pytest.raises(SourceError, match="Permission denied"):
        jaxtc.save_transcoder(jaxtc.Transcoder(2, 3, rngs=nnx.Rngs(0)), closed)


def test_saving_in_nobodys_home():
    with pytest.raises(SourceError, match="home"):
        jaxtc.save_transcoder(jaxtc.Transcoder(2, 3, rngs=nnx.Rngs(0)), "~nosuchuser/m")


def test_what_is_there_and_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    assert local.find("~/file") == tmp_path / "file" and local.find(tmp_path) == tmp_path
    assert local.find(tmp_path / "nothing") is None and local.find("~/file/below") is None
    assert local.has(tmp_path, "file") and not local.has(tmp_path, "nothing")
