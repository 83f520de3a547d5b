"""`mebm resume`: continue a study."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from study.cli.exit_codes import INTERRUPTED, ending_code
from study.cli.options import PLACE, address_option, argument, flag, set_option, trust_option
from study.config.errors import UserError
from study.display.console import StudyConsole


@dataclass(frozen=True)
class Resume:
    """Go on with the study in DIR, or with what `mebm train` left there, from the last checkpoints.

    What is damaged is repaired where that is exact (and said) and refused where it is not. budget, resources, run and
    description may be changed with --set; search.trials may grow, and seeds may be added at their end.

    \b
    Examples:
      mebm resume results/NAME
      mebm resume results/NAME --set budget.gpu_hours=500
      mebm resume results/NAME --set seeds=[0,1,2,3,4] --retry-failed
    """

    folder: Path | str = argument(type=PLACE, metavar="DIR")
    assignments: tuple[str, ...] = set_option()
    address: str | None = address_option()
    retry_failed: bool = flag("Run trials that failed once more, from their last checkpoint.")
    trust_code: bool = trust_option()
    accept_changes: bool = flag("Go on with other code or images than the study began with.")

    def __call__(self) -> None:
        from study.cli import running

        if isinstance(self.folder, Path) and (outcome := self._one_trial(self.folder)) is not None:
            sys.exit(outcome)
        how = {"retry_failed": self.retry_failed, "accept_changes": self.accept_changes}
        how["trust_code"] = self.trust_code
        ending, _ = running.resume(self.folder, self.assignments, self.address, StudyConsole(), **how)
        sys.exit(ending_code(ending))

    def _one_trial(self, folder: Path) -> int | None:
        """Go on with what `mebm train` left, and return the exit code; None where the folder is a study's."""
        from study.record.folder import is_one_trial

        if not is_one_trial(folder):
            return None
        if self.assignments or self.address is not None:
            given = "--set" if self.assignments else "--address"
            raise UserError(f"{given}: {folder} is one trial of mebm train, which goes on as it began, and here")
        from study.models.train import resume_one

        how = {"retry_failed": self.retry_failed, "accept_changes": self.accept_changes}
        return INTERRUPTED if resume_one(folder, StudyConsole(), **how) is None else 0
