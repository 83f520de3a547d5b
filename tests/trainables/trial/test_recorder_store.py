"""A recorder whose study is in a store: what it leaves there is what it leaves in a folder."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from trainables.results.schema import SIGNAL_NAMES
from trainables.results.store import Store, StoreError
from trainables.trial.recorder import Recorder
from trainables.trial.trial import Trial


def signals(first, count):
    iterations = np.arange(first, first + count)
    return iterations, np.stack([iterations + i / 10 for i in range(len(SIGNAL_NAMES))], axis=1)


def run(trial, steps=None):
    reports = []
    while steps is None or len(reports) < steps:
        reports.append(trial.step())
        if reports[-1].done:
            break
    return reports


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_trial_in_a_store_leaves_the_files_of_one_in_a_folder(digits, quick, tmp_path, store_url):
    config = quick(epochs=2, evaluation={"fresh_steps": 2})
    run(Trial(config, digits, Recorder(tmp_path / "local", "t1")))
    store = Store(store_url)
    recorder = Recorder.into(store, "t1")
    trial = Trial(config, digits, recorder)
    run(trial)
    trial.close()
    local = files(tmp_path / "local")
    assert set(store.list()) == set(local)
    assert {"signals/t1.parquet", "models/t1.pt", "samples/t1_buffer.png"} <= set(local)
    for name in local:
        if not name.endswith(".pt"):  # a model holds the time it was made
            assert store.read_bytes(name) == local[name], name
    assert recorder.folder.is_dir() and recorder.unpublished == ()
    assert recorder.close() == ()
    assert not recorder.folder.exists()


def test_a_trial_that_goes_on_elsewhere_has_the_signals_of_an_undisturbed_one(
    digits, quick, copy_of, tmp_path, store_url
):
    config = quick(epochs=3)
    run(Trial(config, digits, Recorder(tmp_path / "whole", "t1")))
    store = Store(store_url)
    first = Trial(config, digits, Recorder.into(store, "t1"))
    run(first, 2)  # the untrained model, one epoch
    state = copy_of(first.state_dict())
    run(first, 1)  # one that is lost with its worker
    recorder = Recorder.into(store, "t1")
    second = Trial(config, digits, recorder)
    second.load_state_dict(state)
    run(second)
    second.close()
    recorder.close()
    store.get("signals/t1.parquet", tmp_path / "there.parquet")
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "whole/signals/t1.parquet").read_bytes()


def test_resuming_without_the_signals_that_are_there_is_refused(memory_url, breakable):
    store, faults = breakable(memory_url)
    recorder = Recorder.into(store, "t1")
    recorder.add_signals(*signals(0, 10))
    recorder.write_signals(force=True)
    faults.away = True
    with pytest.raises(StoreError):
        Recorder.into(store, "t1").resume(5)
    Recorder.into(store, "t1").resume(0)  # nothing to be lost
    faults.away = False
    Recorder.into(store, "t2").resume(5)  # a trial that left none
    again = Recorder.into(store, "t1")
    again.resume(5)
    again.add_signals(*signals(5, 2))
    again.write_signals(force=True)
    assert again.close() == ()


def test_a_store_that_is_away_costs_neither_files_nor_the_trial(memory_url, breakable, caplog, monkeypatch):
    store, faults = breakable(memory_url)
    recorder = Recorder.into(store, "t1")
    monkeypatch.setattr(logging.getLogger("mebm"), "propagate", True)  # a study in this process may have ended it
    faults.away = True
    recorder.write_model({"weights": torch.ones(3)}, best=True)
    tried = faults.calls
    recorder.write_grids({"buffer": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)})
    assert faults.calls == tried  # it is left alone for a while: every attempt keeps the training waiting
    recorder.add_signals(*signals(0, 10))
    recorder.write_signals(force=True)
    assert faults.calls > tried  # except where the state of the trial is about to be saved
    names = ("models/t1_best.pt", "samples/t1_buffer.png", "signals/t1.parquet")
    assert recorder.unpublished == names
    assert recorder.close() == names
    assert all((recorder.folder / name).is_file() for name in names)
    assert str(recorder.folder) in caplog.text
    faults.away = False
    assert recorder.close() == ()
    assert tuple(store.list()) == names and not recorder.folder.exists()


def test_a_recorder_without_a_store_publishes_and_removes_nothing(tmp_path):
    recorder = Recorder(tmp_path, "t1")
    recorder.add_signals(*signals(0, 10))
    recorder.write_signals(force=True)
    assert recorder.unpublished == () and recorder.close() == ()
    assert recorder.signals_path.is_file()


def test_a_folder_that_is_gone_is_not_taken_for_a_trial_without_signals(tmp_path):
    place = tmp_path / "store"
    store = Store(place.as_uri())
    recorder = Recorder.into(store, "t1")
    recorder.add_signals(*signals(0, 10))
    recorder.write_signals(force=True)
    Recorder.into(store, "t2").resume(5)
    place.rename(tmp_path / "away")
    for gone in (lambda: None, place.touch):
        gone()
        with pytest.raises(StoreError, match="gone"):
            Recorder.into(store, "t1").resume(5)


@pytest.mark.parametrize("stored", [False, True], ids=["folder", "store"])
def test_a_recorder_whose_trial_another_has_claimed_writes_nothing_any_more(tmp_path, memory_url, stored):
    store = Store(memory_url if stored else tmp_path)

    def claimed():
        made = Recorder.into(store, "t1") if stored else Recorder(tmp_path, "t1")
        made.claim()
        return made

    def leave(recorder, count, force=True):
        recorder.add_signals(*signals(count, 5))
        recorder.write_signals(force=force)
        recorder.write_grids({"buffer": torch.full((4, 1, 8, 8), count, dtype=torch.uint8)})
        recorder.write_model({"weights": torch.full((3,), float(count))}, best=True)
        recorder.write_model({"weights": torch.full((3,), float(count))})
        recorder.last_is_best()

    def there():
        return {name: store.read_bytes(name) for name in store.list(skip=("tune",))}

    orphan = claimed()
    leave(orphan, 0)
    first = there()
    assert len(first) == 4 and orphan.holds()
    newer = claimed()
    newer.resume(5)
    leave(newer, 5)
    second = there()
    assert set(second) == set(first) and all(second[name] != first[name] for name in first)
    leave(orphan, 20)
    assert orphan.close() == () and orphan.superseded and not orphan.holds()
    assert there() == second
    if stored:
        assert not orphan.folder.exists()
    leave(newer, 30)
    assert newer.close() == () and there() != second and newer.holds()


def test_who_cannot_ask_whose_a_trial_is_keeps_its_files(memory_url, breakable):
    store, faults = breakable(memory_url)
    recorder = Recorder.into(store, "t1")
    recorder.claim()
    recorder.add_signals(*signals(0, 5))
    faults.away = True
    recorder.write_signals(force=True)
    assert recorder.close() == ("signals/t1.parquet",) and not recorder.superseded
    faults.away = False
    assert recorder.close() == () and store.exists("signals/t1.parquet")
