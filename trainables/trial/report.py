"""What a step of a trial shows: the columns of its epoch, and its own."""

from __future__ import annotations

from dataclasses import dataclass

from trainables.results.schema import Outcome

Value = float | int | str | None


@dataclass(frozen=True)
class Report:
    """What a step of a trial showed.

    Attributes:
        row: the step's columns of `epochs.parquet`, but for study, trial_id, attempt and reported_at; None where the
            step ended in a verdict before its epoch was over.
        trial: the trial's columns of `trials.parquet` as far as a trial knows them.
        outcome: `RUNNING` until the trial is over.
    """

    row: dict[str, Value] | None
    trial: dict[str, Value]
    outcome: Outcome

    @property
    def done(self) -> bool:
        """True for the trial's last report."""
        return self.outcome is not Outcome.RUNNING
