"""`mebm compare`: pairs of trials that differ in one field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.cli.options import FIELD, json_option, option, show, studies


@dataclass(frozen=True)
class Compare:
    """Do trials end the same way at another value of one field? Pairs of the same setting and seed.

    \b
    Examples:
      mebm compare results/precision_parity --by precision
      mebm compare results/NAME --by K --reference 5 --json
    """

    folders: tuple[Path | str, ...] = studies()
    field: str = option(
        "The field in which the trials of a pair differ, such as precision or K.",
        "--by",
        required=True,
        type=FIELD,
        metavar="FIELD",
    )
    reference: str | None = option("Its value to compare with. Default: the first trial's.", metavar="VALUE")
    as_json: bool = json_option()

    def __call__(self) -> None:
        from analysis.results.load import load
        from analysis.results.parquet import records
        from analysis.stats.comparison.parity import parity

        found = parity(load(*self.folders), self.field, self.reference)

        def values() -> dict[str, Any]:
            pairs = records(found.pairs)
            different = sum(not p["same"] for p in pairs)
            shown = {"field": self.field, "reference": found.reference, "pairs": len(pairs), "different": different}
            return shown | {"unpaired": found.unpaired, "rows": pairs, "further": list(found.further)}

        show(self.as_json, values, found.lines)
