"""A copy of Optuna's storage in memory, for samplers that read all trials at every proposal."""

from __future__ import annotations

from copy import deepcopy

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from study.search.optuna_private import storage_id


class MemoryCopy:
    """A study in memory that is written on to its storage, for the one driver that works on it.

    It saves most of some twenty transactions per trial, and with them up to half of a driver's own time; and a storage
    that goes away leaves no half of a proposal: what could not be written is written later.
    """

    def __init__(self, stored: optuna.Study, storage: RDBStorage) -> None:
        self._storage, self._study_id = storage, storage.get_study_id_from_name(stored.study_name)
        self.study = optuna.create_study(directions=stored.directions, sampler=stored.sampler)
        trials = stored.get_trials(deepcopy=False)
        self.study.add_trials(trials)
        mine = self.study.get_trials(deepcopy=False)
        # Of trials that are not over: id in the storage, and the trial as it stands there.
        self._there = {
            m.number: (storage_id(t), deepcopy(m))
            for t, m in zip(trials, mine, strict=True)
            if not m.state.is_finished()
        }
        self._changed: dict[int, None] = {}
        self._broke_off = False

    def changed(self, trial: optuna.Trial) -> None:
        """A trial is to be written on."""
        self._changed[trial.number] = None

    def write(self) -> None:
        """Bring the storage up to date; raises one of `AWAY`, and what cannot be written stays for the next time."""
        while self._changed:
            number = next(iter(self._changed))
            if self._broke_off and number not in self._there:
                # One that was added just before the storage went away is not added again. Numbers are the same there.
                stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
                if number < len(stored):
                    self._there[number] = storage_id(stored[number]), deepcopy(stored[number])
            self._broke_off = True
            self._write(self.study.get_trials(deepcopy=False)[number])
            self._broke_off = False
            del self._changed[number]

    def _write(self, trial: FrozenTrial) -> None:
        if trial.number not in self._there:
            trial_id = self._storage.create_new_trial(self._study_id, template_trial=trial)
        else:
            trial_id, before = self._there[trial.number]
            if self._storage.get_trial(trial_id).state.is_finished():  # written before the storage went away
                del self._there[trial.number]
                return
            if before.state is TrialState.WAITING:
                self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            for name in trial.params.keys() - before.params.keys():
                distribution = trial.distributions[name]
                value = distribution.to_internal_repr(trial.params[name])
                self._storage.set_trial_param(trial_id, name, value, distribution)
            for step in trial.intermediate_values.keys() - before.intermediate_values.keys():
                self._storage.set_trial_intermediate_value(trial_id, step, trial.intermediate_values[step])
            for old, new, store in (
                (before.user_attrs, trial.user_attrs, self._storage.set_trial_user_attr),
                (before.system_attrs, trial.system_attrs, self._storage.set_trial_system_attr),
            ):
                for key, value in new.items():
                    if key not in old or old[key] != value:
                        store(trial_id, key, value)
            if trial.state.is_finished():
                self._storage.set_trial_state_values(trial_id, trial.state, trial.values)
        if trial.state.is_finished():
            self._there.pop(trial.number, None)
        else:
            self._there[trial.number] = trial_id, deepcopy(trial)
