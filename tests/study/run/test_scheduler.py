"""What ends a trial or a study early: signals that drain, hangs, and which of the reasons comes first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from study.config.load import validate_study
from study.record.ledger import Ledger
from study.run import scheduler as module
from study.run.scheduler import HangDetector, StudyScheduler
from study.run.stopping import StopPolicy
from study.run.workers import Workers
from trainables.methods.presets import build_trial
from trainables.results.schema import EPOCH_COLUMNS, Outcome
from trainables.trial import ray_kv
from trainables.trial.ray_report import pack_report

VALUES = {"iterations_planned": 90, "iterations_per_epoch": 10, "outcome": "running"}


def a_study(**changes):
    values = {
        "name": "s",
        "trial": {"dataset": "digits", "epochs": 9, "iterations_per_epoch": 10},
        "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3, 4]}]},
    }
    return validate_study({**values, **changes}, "test")


def epoch(number, **values):
    return {**dict.fromkeys(c.name for c in EPOCH_COLUMNS), "epoch": number, "train_seconds": 1.0, **values}


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of the module, moved by hand."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: found.now)
    return found


@pytest.fixture
def pulses(monkeypatch):
    """The cluster's key-value store, as a dictionary; `fails` makes it unreachable."""
    found = SimpleNamespace(values={}, fails=False, reads=0)

    def get(namespace, key):
        assert namespace == ray_kv.HEARTBEAT
        found.reads += 1
        if found.fails:
            raise ConnectionError("away")
        return found.values.get(key)

    def delete(namespace, key):
        if found.fails:
            raise ConnectionError("away")
        found.values.pop(key, None)

    monkeypatch.setattr(ray_kv, "get", get)
    monkeypatch.setattr(ray_kv, "delete", delete)
    return found


@pytest.fixture
def control(tmp_path):
    def make(**changes):
        study = a_study(**changes)
        ledger = Ledger(tmp_path, study.name)
        ledger.run({"driver": "", "config": study.model_dump(mode="json"), "code": {}})
        return StopPolicy(study, ledger)

    return make


def ray_trial(name, status=RayTrial.RUNNING, actor="actor"):
    state = SimpleNamespace(ray_actor=actor)
    return SimpleNamespace(trial_id=f"ray-{name}", config={"trial_id": name}, status=status, temporary_state=state)


# ---------------------------------------------------------------------------------------------------------- drain


def test_a_draining_study_ends_every_trial_at_its_report_and_starts_none(control, clock):
    made = control(run={"drain_seconds": 90})
    made.ledger.start("t0001", build_trial({"dataset": "digits"}), "abcd", 0.0)
    assert made.closed() is None
    assert not made.judge("t0001", epoch(1), VALUES)
    made.drain("SIGUSR1")
    assert made.closed() == made.closed(None) == "SIGUSR1"
    assert made.judge("t0001", epoch(2), VALUES)
    assert made.ending == {"t0001": (Outcome.INTERRUPTED, None)}
    assert not made.stop_all()  # the others may finish their epoch
    clock.now += 89
    assert not made.stop_all()
    clock.now += 1
    assert made.stop_all()


def test_a_second_signal_does_not_prolong_the_drain(control, clock):
    made = control(run={"drain_seconds": 90})
    made.drain("SIGUSR1")
    clock.now += 60
    made.drain("SIGUSR1")
    clock.now += 30
    assert made.stop_all()


def test_an_interrupt_ends_the_study_now(control):
    made = control()
    made.interrupt("SIGTERM")
    assert made.stop_all()
    assert made.closed(None) == "SIGTERM"


def test_a_verdict_is_the_trials_own_end_even_while_draining(control):
    made = control()
    made.drain("SIGUSR1")
    assert not made.judge("t0001", None, {**VALUES, "outcome": "diverged"})
    assert made.ending == {}


def test_reports_inside_rays_results_are_read(control):
    made = control()
    made.ledger.start("t0001", build_trial({"dataset": "digits"}), "abcd", 0.0)
    scheduler = StudyScheduler(made)
    result = pack_report(epoch(1), VALUES)
    assert scheduler.on_trial_result(None, ray_trial("t0001"), result) == TrialScheduler.CONTINUE
    made.drain("SIGUSR1")
    assert scheduler.on_trial_result(None, ray_trial("t0001"), pack_report(None, {"outcome": "failed"})) == (
        TrialScheduler.CONTINUE
    )
    assert scheduler.on_trial_result(None, ray_trial("t0001"), result) == TrialScheduler.STOP


def test_a_study_that_drains_ends_before_its_budget_and_its_pruning(control):
    made = control(budget={"hours": 1e-9}, pruning={"rule": "asha"})
    made.ledger.start("t0001", build_trial({"dataset": "digits"}), "abcd", 0.0)
    made.ledger.alive()
    made.judge("t0001", epoch(1, fd_buffer=1.0), VALUES)
    assert made.ending.pop("t0001")[0] is Outcome.STOPPED
    made.drain("SIGUSR1")
    made.judge("t0001", epoch(1, fd_buffer=1.0), VALUES)
    assert made.ending["t0001"] == (Outcome.INTERRUPTED, None)


def test_rays_pickle_of_the_tuner_takes_no_open_file_along(control):
    import pickle

    made = control()
    for thing in (made, StudyScheduler(made)):
        assert pickle.loads(pickle.dumps(thing)).__dict__ == {}


# ---------------------------------------------------------------------------------------------------------- watch


def test_a_trial_that_reports_or_iterates_is_alive(clock, pulses):
    watch = HangDetector(1.0)
    watch.seen("t0001", clock.now)
    for number in range(20):
        clock.now += 50
        pulses.values["t0001"] = str(number).encode()  # iterations without a report: a long epoch
        assert watch.silent("t0001", clock.now) is None
    for _ in range(5):
        clock.now += 55
        watch.seen("t0001", clock.now)  # reports without a new pulse
        assert watch.silent("t0001", clock.now) is None


def test_silence_is_counted_from_the_last_sign_of_life(clock, pulses):
    watch = HangDetector(1.0)
    watch.seen("t0001", clock.now)
    clock.now += 30
    pulses.values["t0001"] = b"7"
    assert watch.silent("t0001", clock.now) is None
    clock.now += 59
    assert watch.silent("t0001", clock.now) is None
    clock.now += 1
    assert watch.silent("t0001", clock.now) == 60


def test_a_trial_that_never_said_anything_is_watched_from_its_first_turn(clock, pulses):
    watch = HangDetector(1.0)
    assert watch.silent("t0001", clock.now) is None
    clock.now += 60
    assert watch.silent("t0001", clock.now) == 60


def test_the_store_is_asked_no_more_often_than_needed(clock, pulses):
    watch = HangDetector(60.0)
    watch.seen("t0001", clock.now)
    for _ in range(4):
        clock.now += 2
        watch.silent("t0001", clock.now)
    assert pulses.reads == 0


def test_a_store_that_is_away_neither_raises_nor_keeps_a_trial_alive(clock, pulses):
    watch = HangDetector(1.0)
    watch.seen("t0001", clock.now)
    pulses.fails = True
    clock.now += 61
    assert watch.silent("t0001", clock.now) == 61
    watch.forget("t0001")


def test_without_a_limit_nothing_hangs(clock, pulses):
    watch = HangDetector(None)
    watch.seen("t0001", clock.now)
    clock.now += 1e9
    assert watch.silent("t0001", clock.now) is None
    assert pulses.reads == 0


def test_what_does_not_run_is_forgotten_with_its_pulse(clock, pulses):
    watch = HangDetector(1.0)
    watch.seen("t0001", clock.now)
    pulses.values["t0001"] = b"7"
    watch.forget("t0001")
    assert pulses.values == {}
    clock.now += 1000
    assert watch.silent("t0001", clock.now) is None  # its next attempt starts with a clean slate


def test_a_hanging_trial_is_killed_once_and_the_others_are_not(control, clock, pulses, monkeypatch):
    killed, workers = [], Workers()
    monkeypatch.setattr(module.ray, "kill", killed.append)
    made = StudyScheduler(control(run={"hang_minutes": 1}), workers)
    trials = [ray_trial("t0001", actor="one"), ray_trial("t0002", actor="two"), ray_trial("t0003", RayTrial.PENDING)]
    for number in range(40):
        pulses.values["t0001"] = str(number).encode()
        made.look_after(trials)
        clock.now += 3
        if killed:
            break
    assert killed == ["two"]
    assert list(workers.killed) == ["t0002"]
    assert workers.killed["t0002"].startswith("no sign of life for 1")
    trials[1].status = RayTrial.PENDING  # Ray starts it again
    for number in range(40, 55):
        pulses.values["t0001"] = str(number).encode()
        made.look_after(trials)
        clock.now += 3
    assert killed == ["two"]


def test_a_trial_whose_worker_is_gone_already_is_left_to_ray(control, clock, pulses, monkeypatch):
    killed = []
    monkeypatch.setattr(module.ray, "kill", killed.append)
    made = StudyScheduler(control(run={"hang_minutes": 1}))
    for _ in range(40):
        made.look_after([ray_trial("t0001", actor=None)])
        clock.now += 3
    assert killed == []


def test_a_worker_is_not_to_blame_for_the_silence_of_the_one_before(control, clock, pulses, monkeypatch):
    killed, workers = [], Workers()
    monkeypatch.setattr(module.ray, "kill", killed.append)
    made = StudyScheduler(control(run={"hang_minutes": 1}), workers)
    trial = ray_trial("t0001", RayTrial.PENDING)
    for second in range(0, 180, 3):
        # First its own worker is started, then one that has become free is given to it, then it runs there.
        workers.preparing = {"ray-t0001": "own" if second < 45 else "free"} if second < 90 else {}
        if second >= 90:
            trial.status, trial.temporary_state.ray_actor = RayTrial.RUNNING, "free"
        made.look_after([trial])
        if killed:
            break
        clock.now += 3
    assert killed == ["free"]
    assert 90 + 60 <= second <= 90 + 66


def test_a_trial_that_waits_for_its_worker_is_not_chosen_in_every_turn(control, clock):
    """With Ray's FIFO it is, and whatever worker becomes free is put in place of the one being started for it."""

    def waiting(name, status=RayTrial.PENDING):
        return SimpleNamespace(trial_id=f"ray-{name}", status=status, config={"trial_id": name})

    trials = [waiting("t0003"), waiting("t0002"), waiting("t0001", RayTrial.RUNNING)]
    controller = SimpleNamespace(get_live_trials=lambda: trials, get_trials=lambda: trials)
    assert [FIFOScheduler().choose_trial_to_run(controller) for _ in range(2)] == trials[:1] * 2
    scheduler = StudyScheduler(control())
    assert [scheduler.choose_trial_to_run(controller) for _ in range(3)] == [trials[1], trials[0], None]
    trials.append(waiting("t0004"))
    assert scheduler.choose_trial_to_run(controller) is trials[3]
    trials[1].status = RayTrial.RUNNING
    assert scheduler.choose_trial_to_run(controller) is None
    trials[1].status = RayTrial.PENDING  # its worker was lost
    assert scheduler.choose_trial_to_run(controller) is trials[1]
    clock.now += 61
    assert scheduler.choose_trial_to_run(controller) is trials[1]  # nothing that waits is forgotten
