"""When a budget is spent, and that an epoch which would not fit into it is not begun."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from study.config.load import validate_study
from study.config.study import BudgetConfig
from study.record.ledger import Ledger
from study.run.stopping import Budget, Spent, StopPolicy
from trainables.methods.presets import build_trial
from trainables.results.schema import EPOCH_COLUMNS, Outcome

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
CONFIG = build_trial({"dataset": "digits"})


def spent(trials=0, hours=0.0, gpu_hours=0.0, now=NOON):
    return Spent(trials, hours, gpu_hours, now.timestamp())


@pytest.mark.parametrize(
    ("limit", "so_far", "said"),
    [
        ({}, spent(10**6, 1e6, 1e6), None),
        ({"hours": 2}, spent(hours=1.999), None),
        ({"hours": 2}, spent(hours=2.0), "the study's budget of 2 h is spent"),
        ({"gpu_hours": 0.5}, spent(gpu_hours=0.499, hours=9), None),
        ({"gpu_hours": 0.5}, spent(gpu_hours=0.5), "the study's budget of 0.5 GPU-hours is spent"),
        ({"deadline": NOON}, spent(now=NOON - timedelta(seconds=1)), None),
        ({"deadline": NOON}, spent(now=NOON), "the study's deadline, 2026-03-01 12:00+00:00, is reached"),
        ({"deadline": "2026-03-01T13:00+01:00"}, spent(), "the study's deadline, 2026-03-01 13:00+01:00, is reached"),
        ({"hours": 2, "gpu_hours": 1}, spent(hours=1, gpu_hours=1), "the study's budget of 1 GPU-hours is spent"),
    ],
)
def test_a_limit_is_reached_at_its_number(limit, so_far, said):
    budget = Budget(BudgetConfig(**limit))
    assert budget.spent_on(so_far) == said
    assert budget.full(so_far) == said


def test_the_number_of_trials_keeps_new_ones_out_and_ends_none_that_runs():
    budget = Budget(BudgetConfig(trials=3))
    assert budget.full(spent(trials=2)) is None
    assert budget.full(spent(trials=3)) == "the study's budget of 3 trials is spent"
    assert budget.spent_on(spent(trials=99)) is None


@pytest.mark.parametrize(
    ("limit", "so_far", "gpus", "seconds", "fits"),
    [
        ({"hours": 1}, spent(hours=0.5), 0, 1799, True),
        ({"hours": 1}, spent(hours=0.5), 0, 1801, False),
        ({"gpu_hours": 1}, spent(gpu_hours=0.5), 2, 899, True),  # two GPUs for a quarter of an hour
        ({"gpu_hours": 1}, spent(gpu_hours=0.5), 2, 901, False),
        ({"gpu_hours": 1}, spent(gpu_hours=0.5), 0, 1e6, True),
        ({"deadline": NOON}, spent(now=NOON - timedelta(minutes=10)), 0, 599, True),
        ({"deadline": NOON}, spent(now=NOON - timedelta(minutes=10)), 0, 601, False),
    ],
)
def test_what_is_about_to_be_done_counts(limit, so_far, gpus, seconds, fits):
    assert (Budget(BudgetConfig(**limit)).spent_on(so_far, gpus, seconds) is None) == fits


# ------------------------------------------------------------------------------------------- of a running study


def a_study(**budget):
    return validate_study(
        {
            "name": "s",
            "trial": {"dataset": "digits", "epochs": 9, "iterations_per_epoch": 10},
            "search": {"sampler": "grid", "grid": [{"sampling_steps": [1, 2, 3, 4]}]},
            "budget": budget,
        },
        "test",
    )


def epoch(number, train=60.0, evaluation=None):
    blank = dict.fromkeys(c.name for c in EPOCH_COLUMNS)
    return {
        **blank,
        "trial_id": "t0001",
        "epoch": number,
        "iteration": number,
        "train_seconds": train,
        "evaluation_seconds": evaluation,
    }


VALUES = {"iterations_planned": 90, "iterations_per_epoch": 10}


class Clock:
    """`time` as the study's modules see it, moved by hand."""

    def __init__(self, now):
        self.now = now

    def time(self):
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch):
    from study.record import ledger
    from study.run import scheduler

    found = Clock(NOON.timestamp())
    for module in (ledger, scheduler):
        monkeypatch.setattr(module, "time", found)
    return found


def begin(folder, study, gpus=0.0, trials=1):
    ledger = Ledger(folder, study.name)
    ledger.run({"driver": "", "config": study.model_dump(mode="json"), "code": {}})
    control = StopPolicy(study, ledger)
    control.gpus = gpus
    for number in range(trials):
        ledger.start(f"t{number + 1:04d}", CONFIG, "abcd", gpus)
    return ledger, control


@pytest.mark.parametrize(
    ("minutes", "train", "evaluation", "ends"),
    [
        (50, 60, None, False),
        (58, 60, 30, False),  # 58 min + 90 s is less than an hour
        (58, 60, 61, True),
        (58, 130, None, True),
    ],
)
def test_an_epoch_that_would_not_be_over_in_time_is_not_begun(tmp_path, clock, minutes, train, evaluation, ends):
    ledger, control = begin(tmp_path, a_study(hours=1))
    clock.now += minutes * 60
    ledger.alive()
    assert control.judge("t0001", epoch(1, train, evaluation), VALUES) == ends
    assert not control.stop_all()  # the others finish their epoch
    if ends:
        assert control.ending == {"t0001": (Outcome.STOPPED, "the study's budget of 1 h is spent")}
    else:
        assert control.ending == {}


def test_scoring_the_untrained_model_is_no_measure_of_an_epoch(tmp_path, clock):
    ledger, control = begin(tmp_path, a_study(hours=1))
    clock.now += 59 * 60
    ledger.alive()
    assert not control.judge("t0001", epoch(0, None, 3000.0), VALUES)


def test_gpu_hours_of_trials_at_work_grow_by_the_clock(tmp_path, clock):
    ledger, control = begin(tmp_path, a_study(gpu_hours=1), gpus=0.5, trials=2)
    clock.now += 1800
    assert ledger.gpu_hours() == pytest.approx(0.5)
    ledger.end("t0001", Outcome.FAILED, "ValueError")
    clock.now += 1800
    assert ledger.gpu_hours() == pytest.approx(0.75)
    assert not control.stop_all()
    # One trial on half a GPU: 1800 s would reach the limit.
    assert not control.judge("t0002", epoch(1, 1799.0), VALUES)
    assert control.judge("t0002", epoch(2, 1801.0), VALUES)
    clock.now += 1800
    assert control.stop_all()
    assert not control("t0002", {})


def test_a_driver_that_was_killed_keeps_what_its_trials_had_spent(tmp_path, clock):
    ledger, _ = begin(tmp_path, a_study(gpu_hours=1), gpus=2.0)
    clock.now += 600
    ledger.report("t0001", epoch(1), {**VALUES, "outcome": "running", "train_seconds": 1, "evaluation_seconds": 1})
    clock.now += 86_400  # nobody ran it: from its last sign of life on nothing is counted
    again, control = begin(tmp_path, a_study(gpu_hours=1), gpus=2.0, trials=0)
    assert again.gpu_hours() == pytest.approx(2 * 600 / 3600)
    assert again.hours() == pytest.approx(600 / 3600)
    assert again.running == 0
    assert not control.stop_all()


def test_a_study_that_is_full_starts_nothing_new_but_takes_up_what_was_cut_off(tmp_path, clock):
    _, control = begin(tmp_path, a_study(trials=3), trials=2)
    assert control.closed(0) is None
    assert control.closed(1) == "the study's budget of 3 trials is spent"  # one is proposed and has not started
    assert control.closed(None) is None
    assert not control.stop_all()
    assert not control.judge("t0001", epoch(1, 1e6), VALUES)


def test_a_spent_budget_takes_up_nothing(tmp_path, clock):
    ledger, control = begin(tmp_path, a_study(hours=1))
    clock.now += 3600
    ledger.alive()
    assert control.closed(None) == control.closed(0) == "the study's budget of 1 h is spent"


def test_a_study_without_limits_is_never_closed(tmp_path, clock):
    _, control = begin(tmp_path, a_study())
    clock.now += 10**9
    assert control.closed(10**6) is None
    assert not control.stop_all()
    assert not control.judge("t0001", epoch(1, 1e9), VALUES)
