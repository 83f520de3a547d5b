"""Disks that fill or can no longer be written while a study runs. The real ones are mounted, which takes root's rights."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from benchmarks.chaos.compare import compare_folders
from study.record.ledger import Ledger
from study.run.ending import _STUCK_SECONDS, place_lost
from trainables.methods.presets import build_trial
from trainables.results.layout import JOURNAL
from trainables.results.schema import Outcome
from trainables.trial.transient_errors import of_the_disk

STUDY = """\
name: full
trial: {dataset: digits, norm: none, network: conv-4, epochs: 3, iterations_per_epoch: 10, batch_size: 16,
  buffer_size: 100, device: cpu, evaluation: {every: 1, fresh_steps: 2}}
run: {checkpoint_seconds: 0}
search: {sampler: grid, grid: [{initial: gaussian, sampling_steps: [1, 2, 3]}]}
seeds: [0, 1]
"""
START = """\
from study.run import ending
ending._STUCK_SECONDS = 5.0
from study.cli.main import main
main()
"""
WAIT = 500
"""Seconds."""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_what_a_worker_says_of_its_disk_is_understood(number):
    error = RayTaskError("step", "Traceback\n  write()\n" + str(OSError(number, os.strerror(number))), OSError(number))
    assert of_the_disk(str(error))
    assert not of_the_disk(str(OSError(errno.ENOENT, os.strerror(errno.ENOENT), "a disk")))


def test_a_study_waits_for_its_disk_and_for_the_trials_at_work_before_it_ends(tmp_path):
    ledger = Ledger(tmp_path, "s")
    reason = place_lost(ledger)
    ledger.start("t0001", build_trial({"dataset": "digits"}), "abcd", 0.0)
    assert reason(0.0) is None
    ledger.trouble = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert reason(10 * _STUCK_SECONDS) is None, "a trial is at work"
    ledger.lost("t0001", "no room")
    ledger.trouble = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    start = 20 * _STUCK_SECONDS
    assert reason(start) is None
    assert reason(start + _STUCK_SECONDS - 1) is None
    assert reason(start + _STUCK_SECONDS) == "nothing could be written for 5 minutes (No space left on device)"
    ledger.trouble, ledger.no_room = None, ledger.trouble
    assert reason(start + _STUCK_SECONDS) is not None, "the journal can be written and nothing else"
    ledger.no_room = None
    assert reason(start + 2 * _STUCK_SECONDS) is None
    ledger.trouble = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert reason(start + 3 * _STUCK_SECONDS) is None, "the time begins again"
    ledger.trouble = None
    ledger.end("t0001", Outcome.INTERRUPTED, None)
    ledger.close()


# ---------------------------------------------------------------------------------------------------- a real disk


@pytest.fixture
def disk(tmp_path):
    """Its own small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", folder], capture_output=True)
    if made.returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def failing_disk(tmp_path):
    """A disk that can be given up, as after an error of its hardware, and put right by `mend`."""
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(60 << 20)
    mount = ["mount", "-o", "loop", image, folder]
    for command in (["mkfs.ext4", "-q", image], mount):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("no disk can be mounted here")

    def mend():
        subprocess.run(["umount", "-l", folder], check=True)
        subprocess.run(mount, check=True)

    yield folder, mend
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    path = disk / "filling"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    return path


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", START, *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
        )  # fmt: skip


def said(folder: Path) -> str:
    return (folder / "output.log").read_text(encoding="utf-8")


def wait_for(process, holds, folder) -> None:
    until = time.monotonic() + WAIT
    while not holds():
        assert process.poll() is None and time.monotonic() < until, said(folder)
        time.sleep(0.05)


@pytest.fixture
def calm(tmp_path):
    """The folder of a study that met no trouble."""
    (tmp_path / "full.yaml").write_text(STUDY)
    assert start(tmp_path, "sweep", "full.yaml", "--results", tmp_path / "calm").wait(WAIT) == 0, said(tmp_path)
    (tmp_path / "output.log").unlink()
    return tmp_path / "calm" / "full"


def at_work(disk: Path, folder: Path) -> subprocess.Popen:
    """A study on the disk that has measured a few epochs."""
    process = start(folder, "sweep", "full.yaml", "--results", disk)
    journal = disk / "full" / JOURNAL
    wait_for(process, lambda: journal.is_file() and journal.read_bytes().count(b'"event": "report"') >= 5, folder)
    return process


def ends_resumable(process: subprocess.Popen, disk: Path, folder: Path) -> None:
    assert process.wait(WAIT) == 1, said(folder)
    assert f"{disk / 'full'} cannot be written (" in said(folder)
    assert f"mebm resume {disk / 'full'}" in said(folder)
    assert "Traceback" not in said(folder)


real = [pytest.mark.ray, pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(2400)]


class TestRealDisks:
    pytestmark = real

    def test_room_that_comes_back_is_used(self, tmp_path, calm, disk):
        process = at_work(disk, tmp_path)
        filling = fill(disk)
        wait_for(process, lambda: "cannot be written (No space left on device)" in said(tmp_path), tmp_path)
        filling.unlink()
        assert process.wait(WAIT) == 0, said(tmp_path)
        assert "can be written again" in said(tmp_path)
        assert compare_folders(calm, disk / "full") == []

    def test_without_room_it_ends_and_goes_on_when_there_is(self, tmp_path, calm, disk):
        process = at_work(disk, tmp_path)
        filling = fill(disk)
        ends_resumable(process, disk, tmp_path)
        filling.unlink()
        assert start(tmp_path, "resume", disk / "full").wait(WAIT) == 0, said(tmp_path)
        assert compare_folders(calm, disk / "full") == []

    def test_files_that_are_open_can_be_written_and_new_ones_cannot(self, tmp_path, calm, disk):
        process = at_work(disk, tmp_path)
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)
        ends_resumable(process, disk, tmp_path)
        subprocess.run(["umount", "-l", disk], check=True)
        assert start(tmp_path, "resume", disk / "full").wait(WAIT) == 0, said(tmp_path)
        assert compare_folders(calm, disk / "full") == []

    def test_a_disk_that_is_given_up_by_its_system(self, tmp_path, calm, failing_disk):
        disk, mend = failing_disk
        process = at_work(disk, tmp_path)
        subprocess.run(["mount", "-o", "remount,abort", disk], capture_output=True)
        ends_resumable(process, disk, tmp_path)
        mend()
        assert start(tmp_path, "resume", disk / "full").wait(WAIT) == 0, said(tmp_path)
        assert compare_folders(calm, disk / "full") == []
