"""Records of metrics: found without torch, their columns in one order, the best model chosen by rank."""

from __future__ import annotations

import subprocess
import sys

from trainables.results.metric import of_samples
from trainables.results.schema import EPOCH_COLUMNS, METRIC_BY_NAME, METRICS, RANKING


def test_the_metrics_and_their_order() -> None:
    names = ["fd_buffer", "fd_fresh", "fid_buffer", "fid_fresh", "isc_buffer", "isc_fresh", "accuracy"]
    names += [f"extractor_{name}_{source}" for name in ("fd", "mmd") for source in ("buffer", "fresh")]
    assert [m.name for m in METRICS] == [*METRIC_BY_NAME] == names
    assert [c.name for c in EPOCH_COLUMNS if c.name in METRIC_BY_NAME] == names
    distances = [f"{name}_{source}" for source in ("buffer", "fresh") for name in ("fid", "fd", "extractor_fd")]
    assert (*distances, "accuracy") == RANKING
    assert [m.sign for m in METRICS] == [1, 1, 1, 1, -1, -1, -1, 1, 1, 1, 1]


def test_records_are_found_without_torch() -> None:
    code = "import sys, trainables.results.schema; from trainables.config.dataset import datasets; " \
           "assert len(datasets()) > 4; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_metric_of_samples_is_two() -> None:
    buffer, fresh = of_samples("x", "X", "maximize", "mean of {}", len, (1, None), unit="u")
    assert (buffer.name, buffer.label, buffer.meaning) == ("x_buffer", "X (buffer)", "mean of replay-buffer samples")
    assert (fresh.name, fresh.source, fresh.rank, fresh.unit) == ("x_fresh", "fresh", None, "u")
    assert (fresh.protocol_column, fresh.error_column) == ("x_fresh_protocol", "x_fresh_se")
