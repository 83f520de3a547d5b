"""Checkpoints that are damaged are refused, and the one before is taken."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.trial import checkpoint as module
from trainables.trial.checkpoint import (
    SEAL_FILE,
    STATE_FILE,
    CheckpointError,
    newest_whole,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from trainables.trial.trial import Trial

STATE: dict[str, Any] = {"weights": torch.arange(6.0), "epoch": 3, "names": ["a", "b"], "rates": {"x": 0.1}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint_000003"
    made.mkdir()
    write_checkpoint(made, STATE)
    return made


def test_what_was_written_is_read(folder: Path, same: Any) -> None:
    verify_checkpoint(folder)
    assert same(read_checkpoint(folder), STATE)
    assert sorted(p.name for p in folder.iterdir()) == sorted([SEAL_FILE, STATE_FILE])


def test_a_trial_goes_on_from_what_is_read(quick: Any, digits: Any, same: Any, tmp_path: Path) -> None:
    trial = Trial(quick(), digits)
    trial.step()
    trial.step()
    write_checkpoint(tmp_path, trial.state_dict())
    again = Trial(quick(), digits)
    again.load_state_dict(read_checkpoint(tmp_path))
    one, two = trial.step(), again.step()
    assert one.row is not None and two.row is not None
    assert {k: v for k, v in one.row.items() if "seconds" not in k} == {
        k: v for k, v in two.row.items() if "seconds" not in k
    }
    assert same(
        trial.trainer.state_dict()["networks"]["energy"]["weights"],
        again.trainer.state_dict()["networks"]["energy"]["weights"],
    )


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_a_truncated_file_is_refused(folder: Path, size: int) -> None:
    whole = (folder / STATE_FILE).read_bytes()
    (folder / STATE_FILE).write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE}: \d+ bytes, but {len(whole)} were written"):
        read_checkpoint(folder)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_one_flipped_bit_is_refused(folder: Path, place: float) -> None:
    data = bytearray((folder / STATE_FILE).read_bytes())
    data[int(place * len(data))] ^= 1
    (folder / STATE_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum is not that of what was written"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "seal", [None, "", "{", "[]", "3", "null", "{}", '{"bytes": 1}', '{"bytes": "x", "sha256": "y"}', "\udcff"]
)
def test_without_a_whole_seal_it_was_cut_off(folder: Path, seal: str | None) -> None:
    path = folder / SEAL_FILE
    if seal is None:
        path.unlink()
    else:
        path.write_bytes(seal.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


@pytest.mark.parametrize("gone", [STATE_FILE, SEAL_FILE, None])
def test_what_is_gone_is_refused(folder: Path, gone: str | None) -> None:
    if gone is None:
        folder = folder.parent / "checkpoint_000004"
    else:
        (folder / gone).unlink()
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        verify_checkpoint(folder)


def test_a_folder_in_place_of_the_file_is_refused(folder: Path) -> None:
    size = (folder / STATE_FILE).stat().st_size
    (folder / STATE_FILE).unlink()
    (folder / STATE_FILE).mkdir()
    seal = {"bytes": (folder / STATE_FILE).stat().st_size, "sha256": "0"}
    assert size
    (folder / SEAL_FILE).write_text(json.dumps(seal))
    with pytest.raises(CheckpointError):
        verify_checkpoint(folder)


def test_the_newest_whole_one_is_taken_and_the_others_are_said(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint_{i:06d}" for i in (3, 2, 1, 0)]
    for number, each in enumerate(folders):
        each.mkdir()
        write_checkpoint(each, {"number": number})
    assert newest_whole(folders) == (folders[0], [])
    (folders[0] / STATE_FILE).write_bytes(b"")
    (folders[1] / SEAL_FILE).unlink()
    found, wrong = newest_whole([str(f) for f in folders])
    assert found == folders[2]
    assert len(wrong) == 2
    assert wrong[0].startswith(str(folders[0] / STATE_FILE))
    assert wrong[1].startswith(str(folders[1]))
    for each in folders[2:]:
        (each / SEAL_FILE).unlink()
    found, wrong = newest_whole(folders)
    assert found is None
    assert len(wrong) == 4
    assert newest_whole([]) == (None, [])


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(folder: Path, tmp_path: Path, protocol: str) -> None:
    """Also under a seal that fits: a seal says that nothing was damaged, not who wrote it."""
    marker = tmp_path / "executed"
    path = folder / STATE_FILE
    if protocol == "torch":
        torch.save({"weights": Bomb(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker)))
    seal = {"bytes": path.stat().st_size, "sha256": module.digest_of(path)}
    (folder / SEAL_FILE).write_text(json.dumps(seal))
    with pytest.raises((pickle.UnpicklingError, CheckpointError)):
        read_checkpoint(folder)
    assert not marker.exists()
    with contextlib.suppress(Exception):  # only what it does matters: read without the flag it runs
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_kill_at_any_moment_leaves_an_older_checkpoint_or_a_folder_without_a_seal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of the writing fails once; what is left is never taken for whole."""

    class Killed(BaseException):
        pass

    target = folder.parent / "checkpoint_000004"
    target.mkdir()

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    for owner, name in ((torch, "save"), (hashlib, "file_digest"), (Path, "replace"), (module, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(Killed):
                write_checkpoint(target, STATE)
        assert newest_whole([target, folder])[0] == folder
    write_checkpoint(target, STATE)
    assert newest_whole([target, folder])[0] == target
    assert not list(target.glob(".*.part"))


def test_a_full_disk_is_an_error_of_the_disk(folder: Path) -> None:
    """The limit of a file's size stands for the disk's: the same write fails, in the middle of torch's own."""
    from trainables.trial.transient_errors import is_transient

    target = folder.parent / "checkpoint_000004"
    target.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError) as error:
            write_checkpoint(target, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_transient(error.value)
    assert not list(target.iterdir())
    assert newest_whole([target, folder])[0] == folder
