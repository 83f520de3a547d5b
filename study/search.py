"""Optuna behind Ray Tune: what is proposed, and what Optuna is told of it.

Ray ships `OptunaSearch`. It is not used here because it leaves a trial RUNNING for ever when its value is NaN, has no
way to pass a constraint, knows no seeds per setting, and cannot take up a study whose driver was killed. This searcher
is as long as the patch would be, uses only Optuna's public ask-and-tell interface, and keeps its queue in Optuna's
storage: replicates and interrupted trials are enqueued there, so a killed driver forgets nothing.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.search import Searcher

from study.config import StudyConfig
from study.space import Space, setting_id
from trainables.schema import Outcome

log = logging.getLogger("mebm")

STORAGE = "optuna.db"
STABLE = "stable"
"""Name of the constraint; a diverged or collapsed trial violates it."""
MEASURED = (Outcome.COMPLETED, Outcome.DIVERGED, Outcome.COLLAPSED)
"""Ends that are a trial's own result."""
_WORST = 1e6
"""Told where a trial ended without any value and no other trial has one."""


def storage_url(folder: Path) -> str:
    """URL of a study's Optuna storage, an SQLite file that optuna-dashboard opens. Only the driver writes it."""
    return f"sqlite:///{(folder / STORAGE).resolve()}"


def make_sampler(study: StudyConfig, already: int) -> BaseSampler:
    """The sampler of a study.

    Args:
        already: trials in the storage. It shifts the seed, because a resumed study that began its random stream anew
            would propose its first settings a second time.
    """
    search = study.search
    seed = search.seed + already
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match search.sampler:
            case "tpe":
                return TPESampler(
                    seed=seed, n_startup_trials=search.startup_trials, multivariate=True, constant_liar=True
                )
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=search.startup_trials, deterministic_objective=False)
            case "nsga2":
                return NSGAIISampler(seed=seed)
            case _:
                return RandomSampler(seed=seed)


def open_storage(study: StudyConfig, folder: Path) -> optuna.Study:
    """The Optuna study in a study's folder, created where it is not there yet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = optuna.create_study(
        study_name=study.name,
        storage=storage_url(folder),
        directions=[objective.resolved_direction for objective in study.objectives],
        load_if_exists=True,
    )
    opened.sampler = make_sampler(study, len(opened.get_trials(deepcopy=False)))
    return opened


@dataclass(frozen=True)
class Proposal:
    """A trial the searcher wants run."""

    trial_id: str
    setting: str
    config_json: str
    seed: int


class StudySearch(Searcher):
    """Proposes the trials of a study to Ray Tune and tells Optuna how they ended.

    Args:
        study: the study.
        space: its search space.
        folder: its folder, which holds the storage.
        common: what every trial's Ray configuration holds besides its own.
        checkpoints: newest checkpoint by trial id, for trials that are taken up again.
    """

    def __init__(
        self,
        study: StudyConfig,
        space: Space,
        folder: Path,
        common: Mapping[str, Any],
        checkpoints: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self.study, self.space, self.folder = study, space, folder
        self.common, self.checkpoints = dict(common), dict(checkpoints or {})
        self._optuna = open_storage(study, folder)
        self._live: dict[str, optuna.Trial] = {}
        self.proposals: dict[str, Proposal] = {}
        if not self._optuna.get_trials(deepcopy=False):
            for point in space.start[: space.settings]:
                self._optuna.enqueue_trial(dict(point))

    # -------------------------------------------------------------------------------------------- proposing

    def _settings_so_far(self) -> int:
        numbers = [t.user_attrs.get("setting") for t in self._optuna.get_trials(deepcopy=False)]
        return len({n for n in numbers if n is not None})

    def remaining(self) -> int:
        """Trials still to be run: those in the queue and those of settings not yet proposed."""
        trials = self._optuna.get_trials(deepcopy=False)
        queued = sum(t.state is TrialState.WAITING and "seed" in t.user_attrs for t in trials)
        return queued + max(0, self.space.settings - self._settings_so_far()) * len(self.study.seeds)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial's configuration, or `FINISHED`."""
        if self.remaining() == 0:
            return str(Searcher.FINISHED)
        trial = self._optuna.ask(self.space.distributions)
        if "seed" not in trial.user_attrs:
            number = self._settings_so_far()
            first, *others = self.study.seeds
            trial.set_user_attr("setting", number)
            trial.set_user_attr("seed", first)
            for seed in others:
                self._optuna.enqueue_trial(trial.params, user_attrs={"setting": number, "seed": seed})
        if "trial_id" not in trial.user_attrs:
            known = {t.user_attrs.get("trial_id") for t in self._optuna.get_trials(deepcopy=False)} - {None}
            trial.set_user_attr("trial_id", f"t{len(known) + 1:04d}")
        attrs = trial.user_attrs
        config = self.space.trial(trial.params, int(attrs["seed"]))
        proposal = Proposal(str(attrs["trial_id"]), setting_id(config), config.to_json(), int(attrs["seed"]))
        trial.set_user_attr("setting_id", proposal.setting)
        self._live[trial_id] = trial
        self.proposals[trial_id] = proposal
        return {
            **self.common,
            "trial": proposal.config_json,
            "trial_id": proposal.trial_id,
            "setting_id": proposal.setting,
            "resume_from": self._checkpoint(proposal.trial_id),
        }

    def _checkpoint(self, trial_id: str) -> str | None:
        """The trial's newest checkpoint, if it is still there; a trial without one starts from its beginning."""
        path = self.checkpoints.get(trial_id)
        if path is not None and not Path(path).is_dir():
            log.warning("%s: its checkpoint %s is gone; it starts from its beginning", trial_id, path)
            return None
        return path

    # ---------------------------------------------------------------------------------------------- telling

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a trial is told once, when it is over."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended."""
        trial = self._live.pop(trial_id, None)
        if trial is None:
            return
        # Ray flattens what it passes to a searcher: `trial/outcome` is the column `outcome`.
        values = {k.removeprefix("trial/"): v for k, v in (result or {}).items() if k.startswith("trial/")}
        if error or not values or not Outcome(values["outcome"]).finished:
            trial.set_user_attr("reason", "error" if error else "interrupted")
            self._optuna.tell(trial, state=TrialState.FAIL)
            return
        tell(self._optuna, self.study, trial, values)

    def abandon(self, reason: str, ledger_trials: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell Optuna of every trial that is still live; no end of a run leaves one RUNNING.

        One whose end is in the ledger already (the run ended during its last save) is told; any other is told FAIL.
        """
        for trial in self._live.values():
            known = ledger_trials.get(trial.user_attrs["trial_id"])
            if known is not None and Outcome(known["outcome"]) in MEASURED:
                tell(self._optuna, self.study, trial, known)
                continue
            trial.set_user_attr("reason", reason)
            self._optuna.tell(trial, state=TrialState.FAIL)
        self._live.clear()

    # ------------------------------------------------------------------------------------------------ state

    def save(self, checkpoint_path: str) -> None:
        """Nothing worth saving: the queue and every result are in Optuna's storage."""
        Path(checkpoint_path).write_text("the state of this searcher is the study's Optuna storage\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles its tuner and with it the searcher; a database connection stays behind."""
        return {"study": self.study, "folder": self.folder}


def objective_values(study: StudyConfig, trials: optuna.Study, values: Mapping[str, Any]) -> list[float]:
    """A finite value for every objective of a trial that is over.

    A trial that diverged counts with its best before that; one that was never scored counts as its untrained p0, and
    where there is not even that, as the worst value told so far. Optuna learns what a divergence means from the
    constraint, not from the value.
    """
    told = []
    for number, objective in enumerate(study.objectives):
        value = values.get(objective.column)
        if value is None:
            value = values.get(f"{objective.metric}_initial")
        if value is None or not math.isfinite(value):
            complete = trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            seen = [t.values[number] for t in complete]
            worst = max if objective.resolved_direction == "minimize" else min
            sign = 1 if objective.resolved_direction == "minimize" else -1
            value = worst(seen) if seen else sign * _WORST
        told.append(float(value))
    return told


def tell(trials: optuna.Study, study: StudyConfig, trial: optuna.Trial, values: Mapping[str, Any]) -> None:
    """Tell Optuna of a trial that is over: COMPLETE, finite values, and a constraint that says whether it was stable.

    Args:
        values: the trial's columns of `trials.parquet`.
    """
    outcome = Outcome(values["outcome"])
    if outcome in (Outcome.FAILED, Outcome.STOPPED):
        trial.set_user_attr("reason", str(values.get("message") or outcome.value))
        trials.tell(trial, state=TrialState.FAIL)
        return
    for name in ("outcome", "cause", "iteration"):
        trial.set_user_attr(name, values.get(name))
    trial.set_constraint(STABLE, -1.0 if outcome is Outcome.COMPLETED else 1.0)
    trials.tell(trial, objective_values(study, trials, values), state=TrialState.COMPLETE)


def reconcile(study: StudyConfig, folder: Path, ledger_trials: Mapping[str, Mapping[str, Any]]) -> None:
    """Bring the storage in line with the ledger after a run that ended anyhow.

    A RUNNING trial whose end is in the ledger is told; any other is told FAIL. Then every trial that is not over is in
    the queue again, with its parameters, seed and id, and so is every seed that was never enqueued.
    """
    if not (folder / STORAGE).is_file():
        return
    opened = open_storage(study, folder)
    for frozen in opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        known = ledger_trials.get(frozen.user_attrs.get("trial_id", ""))
        live = optuna.Trial(opened, frozen._trial_id)
        if known is not None and Outcome(known["outcome"]).finished:
            tell(opened, study, live, known)
            continue
        live.set_user_attr("reason", "interrupted")
        opened.tell(live, state=TrialState.FAIL)
        if "seed" not in frozen.user_attrs and frozen.params:
            opened.enqueue_trial(frozen.params)  # killed between its proposal and its naming
    over = {t for t, known in ledger_trials.items() if Outcome(known["outcome"]).finished}
    newest: dict[tuple[int, int], optuna.trial.FrozenTrial] = {}
    for frozen in opened.get_trials(deepcopy=False):
        if "setting" in frozen.user_attrs and "seed" in frozen.user_attrs:
            newest[frozen.user_attrs["setting"], frozen.user_attrs["seed"]] = frozen
    for setting in sorted({number for number, _ in newest}):
        replicates = {seed: newest[setting, seed] for seed in study.seeds if (setting, seed) in newest}
        # A trial that waits has no parameters yet, only those it was enqueued with.
        known_parameters = (t.params or t.system_attrs.get("fixed_params") for t in replicates.values())
        parameters = next((p for p in known_parameters if p), None)
        if parameters is None:
            continue
        for seed in study.seeds:
            frozen_or_none = replicates.get(seed)
            attrs: dict[str, Any] = {"setting": setting, "seed": seed}
            if frozen_or_none is not None:
                trial_id = frozen_or_none.user_attrs.get("trial_id")
                if frozen_or_none.state is not TrialState.FAIL or trial_id in over:
                    continue
                if trial_id:
                    attrs["trial_id"] = trial_id
            opened.enqueue_trial(parameters, user_attrs=attrs)
