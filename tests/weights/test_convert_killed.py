"""Conversions that are killed, that find no room, or that find something in their place."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxtc
from jaxtc.errors import SourceError
from jaxtc.weights.checkpoints import job as job_module
from jaxtc.weights.checkpoints.job import Job
from jaxtc.weights.conversion.convert import convert
from tests.support.weights_files import random_model
from tests.weights.killed_conversions import contents

# CI kills a few; JAXTC_KILLS=30 takes about a minute.
KILLS = int(os.environ.get("JAXTC_KILLS", "5"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_moments_and_continued_nothing_is_lost(tmp_path, seed):
    command = [sys.executable, "-m", "tests.weights.killed_conversions"]
    done = subprocess.run(
        [*command, str(tmp_path), str(KILLS), str(seed)],
        capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(seen)
    assert seen["kills"] >= KILLS
    assert seen["kept"] > 0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return jaxtc.save_model(random_model(), tmp_path_factory.mktemp("models") / "hf")


class Stop(Exception):
    pass


def stopped_after(monkeypatch, count: int, error: Exception) -> None:
    """Let the files after the first ``count`` fail in the middle of being written."""
    real, seen = job_module._sync, []

    def sync(stream) -> None:
        seen.append(stream)
        if len(seen) > count:
            raise error
        real(stream)

    monkeypatch.setattr(job_module, "_sync", sync)


def test_what_was_interrupted_goes_on(model, tmp_path, monkeypatch):
    whole = contents(convert(model, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        stopped_after(patched, 10, Stop())
        with pytest.raises(Stop):
            convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = (tmp_path / "out.partial/done.0.jsonl").read_text().splitlines()
    assert len(done) == 8  # job.json and the empty log were the first two
    # A file that was damaged in the meantime is written again.
    damaged = tmp_path / "out.partial/files" / json.loads(done[3])[0]
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert contents(convert(model, tmp_path / "out")) == whole
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_told_with_what_was_needed_and_can_be_gone_on_from(
    model, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        stopped_after(patched, 10, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(SourceError, match=r"no room .* are needed, of which .* are done") as at:
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
            Job(disk / "other", {}, 10) as job,
        ):
            job.write("small", [b"1" * 1000])
            job.write("large", (b"1" * 65536 for _ in range(100)))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_exists_is_not_written_over(model, tmp_path):
    (tmp_path / "out").mkdir()
    convert(model, tmp_path / "out")  # an empty one is fine
    before = contents(tmp_path / "out")
    with pytest.raises(SourceError, match="exists already and is not written over"):
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
        stopped_after(patched, 5, Stop())
        with pytest.raises(Stop):
            convert(model, tmp_path / "out")
    with pytest.raises(SourceError, match=r"another conversion \(dtype None, not 'bfloat16'\)"):
        convert(model, tmp_path / "out", dtype="bfloat16")
    (model / "model.safetensors").touch()
    with pytest.raises(SourceError, match="state of its files"):
        convert(model, tmp_path / "out")


def test_saving_does_not_replace_what_a_conversion_has_begun(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_after(patched, 5, Stop())
        with pytest.raises(Stop):
            convert(model, tmp_path / "out")
    with pytest.raises(SourceError, match="holds the beginning of another conversion"):
        jaxtc.save_checkpoint(random_model(), tmp_path / "out")
    convert(model, tmp_path / "out")


def test_two_at_a_time_do_not_mix(model, tmp_path):
    busy = pytest.raises(SourceError, match="being written by another process")
    with Job(tmp_path / "out", {"to": "orbax"}, 10), busy:
        convert(model, tmp_path / "out")


def test_a_folder_that_may_not_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written: Not a directory"):
        convert(model, tmp_path / "file/out")
