"""Which errors another start may help, and that a trial which meets one of the others is not started again."""

from __future__ import annotations

import errno
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from trainables.trial.checkpoint import STATE_FILE, write_checkpoint
from trainables.trial.ray_report import read_report
from trainables.trial.ray_trainable import MebmTrainable
from trainables.trial.transient_errors import is_transient
from trainables.trial.trial import Trial


def caused(by: BaseException, error: BaseException | None = None) -> BaseException:
    error = error or ValueError("cannot go on")
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (FileNotFoundError("data"), True),
        (PermissionError("results"), True),
        (ConnectionResetError("by peer"), True),
        (TimeoutError("store"), True),
        (MemoryError(), True),
        (EOFError("file was cut"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuda error: device-side assert triggered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file"), True),
        (RuntimeError("basic_ios::clear: No space left on device"), True),
        (caused(OSError("disk")), True),
        (caused(caused(MemoryError()), RuntimeError("worker")), True),
        (ValueError("energies must be one per image"), False),
        (ValueError("out of memory"), False),  # not the machine's words for it
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (16x64 and 32x10)"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (2)"), False),
        (TypeError("unsupported operand"), False),
        (KeyError("weights"), False),
        (AssertionError(), False),
        (ZeroDivisionError(), False),
        (NotImplementedError("aten::frobnicate on this device"), False),
        (ModuleNotFoundError("No module named 'x'"), False),
        (pickle.UnpicklingError("Weights only load failed"), False),
        (caused(ValueError("a bug")), False),
    ],
)
def test_what_another_start_may_help(error: BaseException, passes: bool) -> None:
    assert is_transient(error) == passes


# ----------------------------------------------------------------------- in a worker, without the rest of Ray's machine


@pytest.fixture
def config(quick: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        "trial": quick().to_json(),
        "trial_id": "t0001",
        "folder": str(tmp_path / "study"),
        "cpus": 1,
        "gpus": 0.0,
        "checkpoint_seconds": 0,
    }


def bare(config: dict[str, Any]) -> MebmTrainable:
    """The trainable as Ray's `__init__` leaves it, set up."""
    made = MebmTrainable.__new__(MebmTrainable)
    made.setup(config)
    return made


def test_a_bug_is_the_trials_result_and_nobody_starts_it_again(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainable = bare(config)
    trainable.step()

    def bug(*_: Any) -> None:
        raise ValueError("a bug\nof two lines")

    monkeypatch.setattr(trainable._trial, "step", bug)
    result = trainable.step()
    assert result[DONE] is True
    assert read_report(result)[0] is None
    assert read_report(result)[1]["outcome"] == "failed"
    assert read_report(result)[1]["message"].startswith("ValueError: a bug")
    with pytest.raises(RuntimeError, match="a trial that failed has no state"):
        trainable.save_checkpoint(str(tmp_path))
    trainable.cleanup()


def test_a_setting_that_cannot_be_built_fails_as_a_result(config: dict[str, Any], quick: Any) -> None:
    # Without jitter the covariance of digits is singular: its corners never vary.
    trainable = bare(config | {"trial": quick(covariance_jitter=0.0).to_json()})
    result = trainable.step()
    assert (result[DONE], read_report(result)[1]["outcome"]) == (True, "failed")
    assert "not positive definite" in read_report(result)[1]["message"]
    trainable.load_checkpoint("/nowhere")  # what a failed trial is asked for next raises nothing else
    trainable.cleanup()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), torch.OutOfMemoryError("CUDA")])
def test_an_error_of_the_machine_is_raised_for_ray(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainable = bare(config)

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trainable._trial, "step", broken)
    with pytest.raises(type(error)):
        trainable.step()
    trainable.cleanup()


def test_a_trial_goes_on_while_its_store_is_away_and_stores_its_checkpoint_later(
    config: dict[str, Any], quick: Any, memory_url: str, breakable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainable = bare(config | {"store": memory_url, "trial": quick(epochs=8).to_json()})
    trainable._store, faults = breakable(memory_url)
    assert trainable.step()[SHOULD_CHECKPOINT] is True
    faults.away = True
    assert SHOULD_CHECKPOINT not in trainable.step()
    before, faults.away = faults.calls, False
    assert SHOULD_CHECKPOINT not in trainable.step()  # it is left alone for a while, as an attempt takes seconds
    assert faults.calls == before
    trainable._away_until = 0.0
    assert trainable.step()[SHOULD_CHECKPOINT] is True
    faults.away, waited = True, []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        trainable._away_until = 0.0
        faults.away = len(waited) < 3

    monkeypatch.setattr(time, "sleep", sleep)
    trainable._await_store()  # before it reads from there
    assert len(waited) == 3
    trainable.cleanup()


def test_a_trial_that_ends_while_its_store_is_away_waits_to_leave_its_files_there(
    config: dict[str, Any], quick: Any, memory_url: str, breakable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainable = bare(config | {"store": memory_url, "trial": quick(epochs=1).to_json()})
    store, faults = breakable(memory_url)
    trainable._store = trainable._recorder.store = store
    faults.away, waited = True, []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        trainable._away_until = 0.0
        faults.away = len(waited) < 3

    monkeypatch.setattr(time, "sleep", sleep)
    report = trainable.step()
    while not report[DONE]:
        report = trainable.step()
    values = read_report(report)[1]
    assert (values["outcome"], values["message"]) == ("completed", None)
    assert len(waited) == 3
    trainable_id = trainable._trial_id
    assert {f"models/{trainable_id}.pt", f"signals/{trainable_id}.parquet"} <= set(store.list())
    trainable.cleanup()


def rows(trainable: MebmTrainable, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        row = read_report(trainable.step())[0]
        assert row is not None
        found.append({k: v for k, v in row.items() if "seconds" not in k})
    return found


def test_a_damaged_checkpoint_of_this_run_gives_way_to_the_one_before(config: dict[str, Any], tmp_path: Path) -> None:
    trainable = bare(config)
    folders = [tmp_path / f"checkpoint_{i:06d}" for i in range(2)]
    rows(trainable, 2)
    for folder in folders:
        folder.mkdir()
        trainable.save_checkpoint(str(folder))
        expected = rows(trainable, 1)
    assert expected[0]["epoch"] == 3
    (folders[1] / STATE_FILE).write_bytes(b"")
    again = bare(config)
    again.load_checkpoint(str(folders[1]))
    assert rows(again, 2)[1:] == expected
    assert "went on from epoch 1" in "; ".join(again._trial._found.remarks)
    for each in (trainable, again):
        each.cleanup()


@pytest.mark.parametrize("wrong", ["damaged", "gone"])
def test_a_newest_checkpoint_of_this_run_gives_way_to_the_one_before(
    config: dict[str, Any], tmp_path: Path, store_place: str, wrong: str
) -> None:
    from ray.tune import Checkpoint

    from trainables.results.store import Store

    store = Store(store_place)
    config |= {"store": store_place} if "://" in store_place else {}
    trainable = bare(config)
    rows(trainable, 2)
    for number in range(2):
        folder = tmp_path / f"checkpoint_{number:06d}"
        folder.mkdir()
        trainable.save_checkpoint(str(folder))
        if number == 1:
            (folder / STATE_FILE).write_bytes(b"")
        for file in [] if number == 1 and wrong == "gone" else folder.iterdir():
            store.put(file, f"tune/run-001/t0001/{folder.name}/{file.name}")
        expected = rows(trainable, 1)
    assert expected[0]["epoch"] == 3
    again = bare(config)
    newest = f"{store.root}/tune/run-001/t0001/checkpoint_000001"
    again._local_ip = "127.0.0.1"  # what the start of an actor sets
    again.restore(Checkpoint(newest, store.filesystem))
    assert rows(again, 2)[1:] == expected
    assert "went on from epoch 1" in "; ".join(again._trial._found.remarks)
    for each in (trainable, again):
        each.cleanup()


def test_a_worker_that_outlives_its_ray_leaves_alone_what_another_has_finished(
    config: dict[str, Any], tmp_path: Path, store_place: str
) -> None:
    from trainables.results.store import Store

    store = Store(store_place) if "://" in store_place else Store(config["folder"])
    config |= {"store": store_place} if "://" in store_place else {}
    orphan = bare(config)
    rows(orphan, 2)
    folder = tmp_path / "checkpoint_000000"
    folder.mkdir()
    orphan.save_checkpoint(str(folder))
    newer = bare(config | {"resume_from": [str(folder)]} if "://" not in store_place else config)
    while not newer.step()[DONE]:
        pass
    newer.cleanup()
    left = {name: store.read_bytes(name) for name in store.list()}
    assert {"signals/t0001.parquet", "models/t0001.pt"} <= set(left)
    with pytest.raises(OSError, match="another worker"):
        orphan.save_checkpoint(str(tmp_path))
    with pytest.raises(OSError, match="another worker"):  # Ray would start it again if it were still its own
        while not orphan.step()[DONE]:
            pass
    orphan.cleanup()
    assert {name: store.read_bytes(name) for name in store.list()} == left


def test_a_worker_to_spare_takes_no_trial_from_the_one_that_trains_it(config: dict[str, Any], tmp_path: Path) -> None:
    """Ray sets up a worker for a trial, and may then give the trial to one that has become free."""
    trainable = bare(config)
    rows(trainable, 2)
    folder = tmp_path / "checkpoint_000000"
    folder.mkdir()
    trainable.save_checkpoint(str(folder))
    spare = bare(config | {"resume_from": [str(folder)]})
    while not trainable.step()[DONE]:
        pass
    left = {p: p.read_bytes() for p in (tmp_path / "study").rglob("*.parquet")}
    assert len(left) == 1
    spare.cleanup()
    trainable.cleanup()
    assert {p: p.read_bytes() for p in left} == left


def test_without_any_whole_checkpoint_a_trial_begins_anew(config: dict[str, Any], tmp_path: Path) -> None:
    calm = bare(config)
    expected = rows(calm, 2)
    folder = tmp_path / "checkpoint_000000"
    folder.mkdir()
    write_checkpoint(folder, calm._trial.state_dict())
    (folder / STATE_FILE).write_bytes(b"no")
    again = bare(config | {"resume_from": [str(folder)]})
    assert rows(again, 2) == expected
    for each in (calm, again):
        each.cleanup()


def test_a_checkpoint_of_another_trial_is_refused_as_a_result(
    config: dict[str, Any], quick: Any, digits: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint_000000"
    folder.mkdir()
    write_checkpoint(folder, Trial(quick(seed=9), digits).state_dict())
    trainable = bare(config | {"resume_from": [str(folder)]})
    result = trainable.step()
    assert (result[DONE], read_report(result)[1]["outcome"]) == (True, "failed")
    assert "another trial configuration" in read_report(result)[1]["message"]
    trainable.cleanup()


def test_a_worker_that_takes_on_another_trial_trains_it_as_a_fresh_one_does(config: dict[str, Any], quick: Any) -> None:
    other = config | {"trial": quick(seed=5, sampling_steps=3).to_json(), "trial_id": "t0002"}
    fresh = bare(other)
    expected = rows(fresh, 3)
    used = bare(config)
    rows(used, 2)
    assert used.reset_config(other) is True
    assert rows(used, 3) == expected
    used.cleanup()
    used.cleanup()  # Ray may ask twice
    fresh.cleanup()


def test_a_worker_that_failed_takes_on_another_trial(config: dict[str, Any], quick: Any) -> None:
    used = bare(config | {"trial": quick(covariance_jitter=0.0).to_json()})
    assert read_report(used.step())[1]["outcome"] == "failed"
    used.reset_config(config)
    assert read_report(used.step())[1]["outcome"] == "running"
    used.cleanup()
