"""`mebm sweep --check-resume`: a trial that is cut and taken up, beside one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import random
from mebm import Monitor
with Monitor(iterations=12, k=1.0, seed=0) as run:
    {seeds}
    total = run.restore(total=[0.0])["total"] if {saves} else [0.0]
    hidden = 0.0
    for i in range(run.iteration, run.args.iterations):
        hidden += 1
        total[0] += run.args.k * random.random()
        if run.step(i, total[0], 0.1): break
        if i % 4 == 3: run.epoch(total={reports})
"""


@pytest.mark.parametrize(
    ("seeds", "saves", "reports", "code", "said"),
    [
        (False, True, "total[0]", 1, "two runs of one seed differ before any cut, at epoch 1: energy_gap"),
        (True, True, "total[0]", 0, "cut at epoch 1 (iteration 4) and taken up: the same to its end"),
        (True, True, "hidden", 1, "cut at epoch 1 and taken up, epoch 2 differs: total 8.0 and 4.0"),
        (True, False, "total[0]", 1, "train.py saved nothing before its last epoch: one that is cut off starts over"),
    ],
)
def test_what_resumes_and_what_does_not(
    seeds: bool,
    saves: bool,
    reports: str,
    code: int,
    said: str,
    tmp_path: Path,
    run_mebm: Callable[..., tuple[int, str, str]],
) -> None:
    (tmp_path / "train.py").write_text(
        SCRIPT.format(saves=saves, reports=reports, seeds="random.seed(run.seed)" if seeds else "pass")
    )
    words = ("--script", tmp_path / "train.py", "-s", "k=1,2", "--check-resume", "--results", tmp_path / "results")
    found, out, err = run_mebm("sweep", *words)
    assert (found, err, out.count("\n")) == (code, "", 1) and out.startswith(said), out
    assert not (tmp_path / "results").exists()
