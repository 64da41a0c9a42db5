"""Conversions that are killed, that find no room, or that find something in their place."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxtc
from jaxtc.errors import SourceError, WeightsError
from jaxtc.weights.checkpoints import job as job_module
from jaxtc.weights.checkpoints import tree
from jaxtc.weights.checkpoints.job import Job
from jaxtc.weights.conversion.convert import convert
from tests.support.weights_files import random_model
from tests.weights.killed_conversions import contents, results

# Every run kills a few, ``pytest -m slow`` some more; JAXTC_KILLS=30 takes about a minute.
KILLS = int(os.environ.get("JAXTC_KILLS", "5"))
FEW_AND_MORE = pytest.mark.parametrize("kills", [2, pytest.param(KILLS, marks=pytest.mark.slow)])


def killed(*arguments) -> dict:
    """What killed_conversions saw."""
    command = [sys.executable, "-m", "tests.weights.killed_conversions", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(seen)
    return seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@FEW_AND_MORE
def test_killed_at_random_moments_and_continued_nothing_is_lost(tmp_path, kills):
    seen = killed(tmp_path, kills, 0)
    assert seen["kills"] >= kills
    assert seen["kept"] > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@FEW_AND_MORE
def test_killed_while_orbax_merges_the_layers_and_continued_nothing_is_lost(tmp_path, kills):
    seen = killed(tmp_path, "merge", max(1, 60 // kills))
    assert seen["kills"] >= kills


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return jaxtc.save_model(random_model(), tmp_path_factory.mktemp("models") / "hf")


class Stop(Exception):
    pass


def stopped_after(monkeypatch, count: int, error: Exception) -> list[set[str]]:
    """Let saving the layers after the first ``count`` fail; the names of those that were saved."""
    real, saved = tree.save_part, []

    def save_part(folder, arrays, notes) -> None:
        if len(saved) == count:
            raise error
        real(folder, arrays, notes)
        saved.append(set(arrays))

    monkeypatch.setattr(tree, "save_part", save_part)
    return saved


def test_what_was_interrupted_goes_on(model, tmp_path, monkeypatch):
    whole = results(convert(model, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        first = stopped_after(patched, 2, Stop())
        with pytest.raises(Stop):
            convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert set(tree.saved_notes(tmp_path / "out.partial/files")) == set.union(*first)
    rest = stopped_after(monkeypatch, 100, Stop())
    assert results(convert(model, tmp_path / "out")) == whole
    assert not set.union(*first) & set.union(*rest)
    assert not (tmp_path / "out.partial").exists()


def test_a_layer_that_was_damaged_in_the_meantime_is_found(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_after(patched, 2, Stop())
        with pytest.raises(Stop):
            convert(model, tmp_path / "out")
    damaged = next((tmp_path / "out.partial").rglob("embed.weight/0.0"))
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    with pytest.raises(WeightsError, match=r"does not read back .*: embed.weight in .*out.partial"):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_with_what_was_needed_and_can_be_gone_on_from(
    model, tmp_path, monkeypatch
):
    full = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")  # tensorstore's
    for error in (full, OSError(errno.ENOSPC, "No space left on device")):
        with monkeypatch.context() as patched:
            stopped_after(patched, 1, error)
            with pytest.raises(SourceError, match=r"no room .* needed, of which .* done") as at:
                convert(model, tmp_path / "out")
        assert "goes on where it stopped" in str(at.value)
    convert(model, tmp_path / "out")
    jaxtc.load_model(tmp_path / "out")


def test_room_is_looked_for_before_anything_is_written(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job_module.shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(SourceError, match=r"no room .*kB are needed, and 50.0 kB are free"):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "out.partial/files").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a disk")
@pytest.mark.skipif(shutil.which("mount") is None, reason="mounts a disk")
def test_a_disk_that_is_really_full(model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=100k", "jaxtc-test", str(disk)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(SourceError, match="no room"):
            convert(model, disk / "out")
        assert [path.name for path in disk.iterdir()] == ["out.partial"]
        # What is there by then was not there when it began.
        with (
            pytest.raises(SourceError, match=r"no room .* of which .* are done"),
            (job := Job(disk / "other", {}, 10)).begin(),
        ):
            job.write(job.files / "small", b"1" * 1000)
            job.write(job.files / "large", lambda path: path.write_bytes(b"1" * (100 * 65536)))
        with (
            pytest.raises(SourceError, match="no room"),
            (job := Job(disk / "tree", {}, 10)).begin(),
        ):
            tree.save_part(job.files, {"large": np.zeros(1 << 20)}, {})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_exists_is_not_written_over(model, tmp_path):
    (tmp_path / "out").mkdir()
    convert(model, tmp_path / "out")  # an empty one is fine
    before = contents(tmp_path / "out")
    with pytest.raises(SourceError, match="exists already and is not overwritten"):
        convert(model, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(SourceError, match="exists already"):
            convert(model, tmp_path / name)


def test_what_others_left_beside_it_is_not_touched(model, tmp_path):
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(SourceError, match=r"holds something else \(thesis.tex\)"):
        convert(model, tmp_path / "out")
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_another_conversion_that_was_begun_is_named(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_after(patched, 1, Stop())
        with pytest.raises(Stop):
            convert(model, tmp_path / "out")
    with pytest.raises(SourceError, match=r"another conversion \(dtype None, not 'bfloat16'\)"):
        convert(model, tmp_path / "out", dtype="bfloat16")
    (model / "model.safetensors").touch()
    with pytest.raises(SourceError, match="state of its files"):
        convert(model, tmp_path / "out")


def test_saving_does_not_replace_what_a_conversion_has_begun(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_after(patched, 1, Stop())
        with pytest.raises(Stop):
            convert(model, tmp_path / "out")
    with pytest.raises(SourceError, match="holds the beginning of another conversion"):
        jaxtc.save_checkpoint(random_model(), tmp_path / "out")
    convert(model, tmp_path / "out")


def test_two_at_a_time_do_not_mix(model, tmp_path):
    busy = pytest.raises(SourceError, match="being written by another process")
    with Job(tmp_path / "out", {"to": "orbax"}, 10).begin(), busy:
        convert(model, tmp_path / "out")


def test_a_folder_that_may_not_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written: Not a directory"):
        convert(model, tmp_path / "file/out")
