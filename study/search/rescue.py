"""Which trials that ended badly are rescued, by what the ledger says: a resumed study decides as one never cut off."""

from __future__ import annotations

from typing import Any, NamedTuple

from study.config.fields import read_trial, setting_id
from study.config.rescue import rescued_trial
from study.config.study import StudyConfig
from study.record.state import StudyState
from trainables.config.trial import TrialConfig


class Rescue(NamedTuple):
    """A run that goes on where a trial was healthy, with other settings.

    Attributes:
        number: which rescue of `first`, the trial of the search, it is, from 1.
        parent: the trial it goes on from: `first`, or the rescue before.
    """

    trial_id: str
    number: int
    first: str
    parent: str
    trial: TrialConfig
    setting: int

    def config(self, digits: int) -> dict[str, Any]:
        """What Ray's configuration of a trial says of it; its setting's id has so many digits."""
        return {
            "trial": self.trial.to_json(),
            "trial_id": self.trial_id,
            "setting_id": setting_id(self.trial, digits),
            "setting": self.setting,
            "rescue_from": self.parent,
            "columns": {"rescue": self.number, "rescue_of": self.first},
        }


def rescue_of(study: StudyConfig, ledger: StudyState, trial_id: str) -> Rescue | None:
    """The rescue that follows a trial; None where none does, or it has begun. ValueError: it cannot be changed so."""
    rescue, row = study.rescue, ledger.trials.get(trial_id)
    if rescue is None or row is None or row["outcome"] not in rescue.on:
        return None
    number, first = int(row["rescue"] or 0) + 1, str(row["rescue_of"] or trial_id)
    name = f"{first}r{number}"
    if number > rescue.most or name in ledger.trials:
        return None
    trial = read_trial(row["config"])
    assert isinstance(trial, TrialConfig)
    changed = rescued_trial(rescue, trial, number, int(ledger.trials[first]["seed"]))
    return Rescue(name, number, first, trial_id, changed, ledger.settings[trial_id])


def open_rescues(study: StudyConfig, ledger: StudyState) -> list[Rescue]:
    """Rescues that were cut off, then those that are to follow trials which have ended."""
    cut_off, new, unfinished = [], [], set(ledger.unfinished())
    for trial_id, row in ledger.trials.items():
        if row["rescue"] is not None and study.rescue is not None and trial_id in unfinished:
            number, first = int(row["rescue"]), str(row["rescue_of"])
            parent = first if number == 1 else f"{first}r{number - 1}"
            trial = read_trial(row["config"])
            assert isinstance(trial, TrialConfig)
            cut_off.append(Rescue(trial_id, number, first, parent, trial, ledger.settings[trial_id]))
        else:
            try:
                new.append(rescue_of(study, ledger, trial_id))
            except ValueError:  # said when the trial ended
                continue
    return [*cut_off, *(found for found in new if found is not None)]
