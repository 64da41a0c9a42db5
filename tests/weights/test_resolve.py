"""What a source is and where it lies: every kind of source through the one place that looks."""

import dataclasses

import numpy as np
import pytest
from etils import epath
from flax import nnx

import jaxtc
from jaxtc.errors import SourceError
from jaxtc.model.released import RELEASED
from jaxtc.weights.files.layout import GEMMA_SCOPE_2B
from jaxtc.weights.load_model import load_config
from jaxtc.weights.sources import hub
from jaxtc.weights.sources.resolve import EMBEDDED_DATA, resolve
from tests.support.weights_files import params, random_model, write_tier


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder of each kind; the hub has a config.json in repositories called gemma only."""
    jaxtc.save_model(random_model(), tmp_path / "model")
    write_tier(tmp_path / "scope", "layer_3/width_1k/average_l0_9")
    np.savez(tmp_path / "one.npz", **params())
    made = jaxtc.Transcoder(2, 3, layer=1, rngs=nnx.Rngs(0))
    jaxtc.save_checkpoint({1: made}, tmp_path / "tree")
    has = lambda repo, file, revision: tmp_path if "gemma-2" in repo else None  # noqa: E731
    monkeypatch.setattr(hub, "download_if_there", has)
    monkeypatch.setattr(hub, "hf_hub_download", None)  # nothing else is asked of the hub
    monkeypatch.chdir(tmp_path)
    return tmp_path


TIER = "layer_20/width_16k/average_l0_11"


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("embedded", {}, ("model", "folder", EMBEDDED_DATA / "model")),
        ("embedded", {"default": "transcoders"},
         ("transcoders", "folder", EMBEDDED_DATA / "transcoders")),
        ("embedded", {"kind": "tokenizer"}, ("tokenizer", "folder", EMBEDDED_DATA / "model")),
        ("model", {}, ("model", "folder", "model")),
        ("model", {"kind": "transcoders"}, ("transcoders", "folder", "model")),
        ("scope", {}, ("transcoders", "folder", "scope")),
        ("one.npz", {}, ("transcoders", "file", "one.npz")),
        ("tree", {}, ("transcoders", "converted", "tree")),
        ("google/gemma-2-2b", {}, ("model", "hub", None)),
        ("google/gemma-2-2b", {"kind": "config"}, ("config", "hub", None)),
        (GEMMA_SCOPE_2B, {}, ("transcoders", "hub", None)),
        (f"{GEMMA_SCOPE_2B}/{TIER}", {}, ("transcoders", "hub", None)),
    ],
)  # fmt: skip
def test_what_and_where(places, source, options, expected):
    found = resolve(source, **options)
    kind, format, path = expected
    assert (found.name, found.kind, found.format) == (source, kind, format)
    assert found.path == path or found.path.absolute() == places / path
    if format == "hub":
        assert f"{found.repo}/{found.inside}".rstrip("/") == source


@pytest.mark.parametrize("name", ["2B", "gemma-2-2b", "google/gemma-2-2b", "google/gemma-2-2b-it"])
def test_configs_of_released_models_are_known(places, name):
    # The instruction-tuned ones end a turn too, by their generation_config.json.
    stops = (1, 107) if name.endswith("-it") else 1
    assert load_config(name) == dataclasses.replace(RELEASED["2b"], eos_token_id=stops)
    jaxtc.save_model(random_model(), places / name)  # a folder comes first
    assert load_config(name) == random_model().config


@pytest.mark.parametrize("size", RELEASED)
def test_stops_of_every_release(size):
    assert load_config(f"google/gemma-2-{size}").eos_token_id == 1
    assert load_config(f"google/gemma-2-{size}-it").eos_token_id == (1, 107)


@pytest.mark.parametrize("source", ["embedded", "2b", "google/gemma-2-2b-it", "folder"])
def test_a_base_of_what_is_no_adapter_is_refused(tmp_path, source):
    if source == "folder":
        source = jaxtc.save_model(random_model(), tmp_path / "m")
    with pytest.raises(SourceError, match="base='nowhere' is for an adapter's folder"):
        load_config(source, base="nowhere")


@pytest.mark.parametrize("name", ["google/gemma-2-gemma-2-2b", "gemma-2b", "google/2b"])
def test_other_names_are_not_those_of_released_models(places, monkeypatch, name):
    def download(repo, *_):
        raise SourceError(f"{repo} was asked for")

    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(SourceError, match=name):
        load_config(name)


def test_one_of_the_hub(places, monkeypatch):
    asked = []

    def download(*what):
        asked.append(what)
        return places / "one.npz"

    monkeypatch.setattr(hub, "download", download)
    found = resolve(GEMMA_SCOPE_2B, "transcoders", revision="v1").one(20)
    assert asked == [(GEMMA_SCOPE_2B, f"{TIER}/params.npz", "v1")]
    assert (found.name, found.layer, found.file) == (
        f"{GEMMA_SCOPE_2B}/{TIER}", 20, places / "one.npz",
    )  # fmt: skip


def test_a_folder_is_listed_once(places, monkeypatch):
    found = resolve("scope", "transcoders")
    assert found.layers() == [3]
    (places / "scope").rename(places / "moved")
    assert found.layers() == [3]


def test_a_checkpoint_in_a_bucket(monkeypatch):
    there = lambda path: str(path) == "gs://bucket/tree/jaxtc.json"  # noqa: E731
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", there)
    found = resolve("gs://bucket/tree", "model")
    assert (found.format, str(found.fetch())) == ("converted", "gs://bucket/tree")
    for source, kind in (("gs://bucket/other", "model"), ("gs://bucket/tree", "tokenizer")):
        with pytest.raises(SourceError, match="nothing else is read from a bucket"):
            resolve(source, kind)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing", {}, "no folder nothing, and it is not a hub id"),
        ("nothing", {"default": "transcoders"}, "no file or folder nothing"),
        ("2c", {"kind": "config"}, "nor one of 2b, 9b, 27b. Did you mean '2b'"),
        ("one.npz", {"kind": "model"}, "is a file of arrays, .*load_transcoder reads"),
        ("one.npz", {"path": "layer_1"}, "is a file, so there is no 'layer_1' in it"),
        ("scope", {"kind": "model"}, "has no config.json"),
        ("scope", {"revision": "main"}, "applies to hub ids only, and 'scope' is not one"),
        ("embedded", {"revision": "main"}, "applies to hub ids only, and 'embedded' is not one"),
        ("google/gemma-2-2b/x", {"kind": "tokenizer"}, "has two parts, such as 'google/gemma-2-2b"),
    ],
)
def test_what_is_refused(places, source, options, message):
    with pytest.raises(SourceError, match=message):
        resolve(source, **options)


def test_a_converted_checkpoint_has_no_files(places):
    found = resolve("tree", "transcoders")
    assert found.layers() == [1] and found.one(1).path.name == "tree"
    with pytest.raises(SourceError, match="no file for each transcoder"):
        _ = found.file
    for options in ({"width": "16k"}, {"l0": 11}):
        with pytest.raises(SourceError, match="give layer only, not path, width or l0"):
            found.one(1, **options)
