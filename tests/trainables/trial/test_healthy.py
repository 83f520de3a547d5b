"""What a trial keeps for a rescue: which states, how many, whole, and without a trace on the trial itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.results.layout import RESCUE
from trainables.results.schema import Outcome
from trainables.results.store import Store
from trainables.training.device import derive_seed
from trainables.trial.checkpoint import read_checkpoint
from trainables.trial.healthy import KEPT, LEADS, HealthyStates, lead_of
from trainables.trial.recorder import Recorder
from trainables.trial.trial import Report, Trial

Quick = Callable[..., TrialConfig]
BOTH = frozenset({"diverged", "collapsed"})
DIVERGES: dict[str, Any] = {
    "norm": "batch",
    "initial": "uniform",
    "l2_weight": 0.0,
    "network": "conv-8",
    "epochs": 40,
    "iterations_per_epoch": 5,
    "batch_size": 16,
    "label_batch_size": 16,
    "buffer_size": 500,
    "warmup_iterations": 10,
    "sampling_steps": 1,
    "learning_rate": 0.1,
}
"""Batch norm, uniform p0, K = 1: its energies run away within 200 iterations."""
CLOCKS = {"seconds", "train_seconds", "evaluation_seconds", "setup_seconds", "first_iteration_seconds", "saved_seconds"}
CLOCKS |= {"seconds_per_iteration", "peak_memory_bytes"}


def _run(trial: Trial) -> list[Report]:
    reports = [trial.step()]
    while not reports[-1].done:
        reports.append(trial.step())
    return reports


def _numbers(reports: list[Report]) -> list[tuple[Any, Any]]:
    def still(values: dict[str, Any] | None) -> Any:
        return values and {k: v for k, v in values.items() if k not in CLOCKS}

    return [(still(r.row), still(r.trial)) for r in reports]


@pytest.mark.parametrize("margin", [1, 6, 69])
@pytest.mark.parametrize("epoch", [1, 5, 50, 390])
def test_two_states_are_enough(margin: int, epoch: int) -> None:
    """Whenever the alarm comes there is a state a margin older, once one of that age can be; and never more than two."""
    states = HealthyStates(BOTH)
    for iteration in range(epoch, 12 * max(margin, epoch), epoch):
        states.offer(iteration, margin, lambda: {"epoch": 0})
        assert len(states.kept) <= KEPT == 2
        for alarm in range(iteration, iteration + epoch):
            found = states.before(alarm, alarm, margin)
            assert found is None or found["iteration"] <= alarm - margin
            # The first state is of the end of the first epoch.
            assert (found is not None) == (epoch <= alarm - margin)
            if found is not None:  # not needlessly far back
                assert found["iteration"] > alarm - 2 * margin - 2 * epoch


def test_without_an_alarm_nothing_tells_how_long_it_was_healthy() -> None:
    states = HealthyStates(BOTH, kept=[{"iteration": 10}, {"iteration": 100}])
    assert states.before(None, 500, 69) is None
    assert states.before(180, 500, 69) == {"iteration": 100}
    epochs = HealthyStates(BOTH, 3, kept=[{"iteration": 10}, {"iteration": 100}])
    assert epochs.before(None, 120, 30) == {"iteration": 10}


def test_the_leads_are_those_that_the_manual_has() -> None:
    """`tests/analysis/detector/test_replay.py` measures the median of batch norm on the recorded runs."""
    manual = Path("docs/divergence.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"median lead (with batch|without) norm \| ([\d.]+) iterations", manual))
    assert {"batch": np.ceil(float(told["with batch"])), "none": np.ceil(float(told["without"]))} == LEADS
    assert lead_of("spectral") == max(LEADS.values())


def test_keeping_states_changes_nothing_of_a_trial(quick: Quick, digits: ImageData, tmp_path: Path) -> None:
    config = quick(**DIVERGES)
    plain, kept = (
        _run(Trial(config, digits, Recorder(tmp_path / name, "t"), healthy=healthy))
        for name, healthy in (("plain", None), ("kept", HealthyStates(BOTH, 2)))
    )
    assert plain[-1].outcome is Outcome.DIVERGED
    assert _numbers(plain) == _numbers(kept)
    signals = [pd.read_parquet(tmp_path / name / "signals" / "t.parquet") for name in ("plain", "kept")]
    pd.testing.assert_frame_equal(*signals, check_exact=True)
    assert not (tmp_path / "plain" / RESCUE).exists()


@pytest.fixture
def diverged(quick: Quick, digits: ImageData, tmp_path: Path) -> tuple[TrialConfig, Report, dict[str, Any]]:
    """A trial that diverged, its last report, and the healthy state it left, two epochs or more before the alarm."""
    config = quick(**DIVERGES)
    last = _run(Trial(config, digits, Recorder(tmp_path, "t"), healthy=HealthyStates(BOTH, 2)))[-1]
    return config, last, read_checkpoint(tmp_path / RESCUE / "t")


def test_the_state_is_old_enough_and_no_older(diverged: Any) -> None:
    config, last, state = diverged
    alarm = last.trial["alarm_iteration"]
    assert 0 < state["iteration"] <= alarm - 2 * config.iterations_per_epoch
    assert state["iteration"] > alarm - 6 * config.iterations_per_epoch
    assert state["epoch"] * config.iterations_per_epoch == state["iteration"]


def test_a_rescue_without_a_change_is_the_trial_again(diverged: Any, digits: ImageData, tmp_path: Path) -> None:
    """The state is whole: from it the trial diverges at the same iteration, by the same signals."""
    config, last, state = diverged
    again = Trial(config, digits, Recorder(tmp_path, "t_r1"))
    again.rescue(state)
    reports = [again.step()]
    assert reports[0].row is None or reports[0].row["epoch"] == state["epoch"] + 1
    while not reports[-1].done:
        reports.append(again.step())
    for name in ("outcome", "cause", "iteration", "alarm_iteration"):
        assert reports[-1].trial[name] == last.trial[name]
    assert reports[-1].trial["rescue_from"] == state["iteration"]
    first, second = (pd.read_parquet(tmp_path / "signals" / f"{name}.parquet") for name in ("t", "t_r1"))
    first = first[first["iteration"] >= state["iteration"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(first.drop(columns="trial_id"), second.drop(columns="trial_id"), check_exact=True)


def test_a_rescue_has_its_own_settings(diverged: Any, digits: ImageData) -> None:
    config, _, state = diverged
    changes = {"sampling_steps": 4, "learning_rate": 0.01, "weight_decay": 0.25, "momentum": 0.5, "seed": 77}
    rescue = Trial(config.model_copy(update=changes), digits)
    rescue.rescue(state)
    trainer = rescue.trainer
    (group,) = trainer.optimiser.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.25, 0.5)
    for name, weights in trainer.model.state_dict().items():
        assert torch.equal(weights, state["trainer"]["networks"]["energy"]["weights"][name])
    # Other random numbers: those of the new seed from its beginning.
    noise = torch.Generator().manual_seed(derive_seed(77, "noise"))
    assert torch.equal(trainer.context.random("noise").get_state(), noise.get_state())
    report = rescue.step()
    assert report.row is None or report.row["learning_rate"] == pytest.approx(0.01)
    assert trainer.iteration > state["iteration"]


def test_equal_seeds_go_on_with_the_same_random_numbers(diverged: Any, digits: ImageData) -> None:
    config, _, state = diverged
    rescue = Trial(config.model_copy(update={"sampling_steps": 2}), digits)
    rescue.rescue(state)
    states = state["trainer"]["generators"]
    assert all(torch.equal(g.get_state(), states[n]) for n, g in rescue.trainer.context.generators.items())


def test_no_state_old_enough_is_the_beginning(quick: Quick, digits: ImageData, tmp_path: Path) -> None:
    config = quick(**DIVERGES)
    trial = Trial(config, digits, Recorder(tmp_path, "t"), healthy=HealthyStates(BOTH, 1000))
    assert _run(trial)[-1].outcome is Outcome.DIVERGED
    state = read_checkpoint(tmp_path / RESCUE / "t")
    assert (state["iteration"], state["epoch"], state["trainer"]) == (0, 0, None)
    anew, fresh = (Trial(config.model_copy(update={"seed": 5}), digits) for _ in range(2))
    anew.rescue(state)
    fresh.step()  # scores the untrained model, which a rescue does not again
    rows = [trial.step().row for trial in (anew, fresh)]
    names = ("epoch", "iteration", "loss", "energy_gap", "grad_param_norm")
    assert all(row is not None for row in rows)
    assert [rows[0][n] for n in names] == [rows[1][n] for n in names]  # type: ignore[index]


def test_only_what_is_rescued_leaves_a_state(quick: Quick, digits: ImageData, tmp_path: Path) -> None:
    states = HealthyStates(frozenset({"collapsed"}), 2)
    assert _run(Trial(quick(**DIVERGES), digits, Recorder(tmp_path, "t"), healthy=states))[-1].done
    assert not (tmp_path / RESCUE).exists()


def test_a_trial_cut_off_leaves_the_same_state(
    quick: Quick, digits: ImageData, tmp_path: Path, same: Callable[[Any, Any], bool]
) -> None:
    """Resumed from any epoch, also one whose newest states are older than its checkpoint."""
    config = quick(**DIVERGES)
    _run(Trial(config, digits, Recorder(tmp_path / "whole", "t"), healthy=HealthyStates(BOTH, 2)))
    whole = read_checkpoint(tmp_path / "whole" / RESCUE / "t")
    for epochs in (1, 3, 6):
        first = Trial(config, digits, Recorder(tmp_path / str(epochs), "t"), healthy=HealthyStates(BOTH, 2))
        for _ in range(epochs + 1):
            assert not first.step().done
        folder = tmp_path / f"{epochs}.pt"
        torch.save(first.state_dict(), folder)
        second = Trial(config, digits, Recorder(tmp_path / str(epochs), "t"), healthy=HealthyStates(BOTH, 2))
        second.load_state_dict(torch.load(folder, weights_only=True))
        while not second.step().done:
            pass
        assert same(read_checkpoint(tmp_path / str(epochs) / RESCUE / "t"), whole)


def test_the_next_rescue_may_go_back_to_the_same_state(
    diverged: Any, digits: ImageData, tmp_path: Path, same: Callable[[Any, Any], bool]
) -> None:
    """A rescue that diverges at once goes back to where it began, untouched by its own training, if that is healthy."""
    config, last, state = diverged
    rescue = Trial(config, digits, Recorder(tmp_path, "t_r1"), healthy=HealthyStates(BOTH, 2))
    rescue.rescue(state)
    while not (report := rescue.step()).done:
        pass
    assert report.trial["iteration"] == last.trial["iteration"]
    left = read_checkpoint(tmp_path / RESCUE / "t_r1")
    assert left["iteration"] == state["iteration"]
    # What was read first has been trained on: an optimiser takes its tensors as they are.
    assert same(left["trainer"], read_checkpoint(tmp_path / RESCUE / "t")["trainer"])


def test_other_images_are_refused(diverged: Any, digits: ImageData) -> None:
    config, _, state = diverged
    with pytest.raises(ValueError, match="healthy state was trained on"):
        Trial(config, digits).rescue(state | {"data_source": "elsewhere"})


def test_a_state_of_a_study_in_a_store_is_there(diverged: Any, tmp_path: Path, store_url: str) -> None:
    _, _, state = diverged
    store = Store(store_url)
    recorder = Recorder.into(store, "t")
    recorder.write_healthy(state)
    assert recorder.close() == ()
    store.get_folder(f"{RESCUE}/t", tmp_path / "copy")
    assert read_checkpoint(tmp_path / "copy")["iteration"] == state["iteration"]
