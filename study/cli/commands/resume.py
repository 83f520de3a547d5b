"""`mebm resume`: continue a study."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from study.cli.exit_codes import ending_code
from study.cli.options import PLACE, address_option, argument, flag, set_option, trust_option
from study.display.console import StudyConsole


@dataclass(frozen=True)
class Resume:
    """Go on with the study in DIR: trials that were cut off continue from their last checkpoint.

    What is damaged is repaired where that is exact (and said) and refused where it is not. budget, resources, run and
    description may be changed with --set; search.trials may grow, and seeds may be added at their end.

    \b
    Examples:
      mebm resume results/NAME
      mebm resume results/NAME --set budget.gpu_hours=500 --set run.max_concurrent=8
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

        how = {"retry_failed": self.retry_failed, "accept_changes": self.accept_changes}
        how["trust_code"] = self.trust_code
        ending, _ = running.resume(self.folder, self.assignments, self.address, StudyConsole(), **how)
        sys.exit(ending_code(ending))
