"""Exit codes of commands: 0 done (a divergence is a result), 1 a trial failed, 2 a mistake, 130 interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from study.run.ending import Ending

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130


def ending_code(ending: Ending) -> int:
    """The exit code of a command whose study has ended so."""
    return INTERRUPTED if ending.interrupted else FAILED if ending.failed else 0
