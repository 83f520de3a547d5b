"""A study from before methods had own fields is resumed: `critic.*` searched, configurations and checkpoints of then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from study.record.journal import Mark, crc_of, decode, encode
from trainables.config.trial import TrialConfig
from trainables.trial.checkpoint import read_checkpoint, write_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STUDY = """\
name: old
trial:
  method: f-ebm
  dataset: digits
  device: cpu
  network: febm-2
  epochs: 12
  iterations_per_epoch: 4
  buffer_size: 60
  batch_size: 16
  sampling_steps: 1
  evaluation: {every: 12, fresh_steps: 1}
search:
  sampler: grid
  grid:
    - critic.start_iteration: [1, 6]
seeds: [0]
run: {checkpoint_seconds: 0}
"""
WAIT = 240


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _old_config(text: str) -> str:
    """A trial's configuration as it was written then: with the parts of both methods, whatever the method."""
    config = TrialConfig.model_validate_json(text)
    return json.dumps(json.loads(config.identity()) | {"seed": config.seed}, sort_keys=True)


def _old_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's state as it was written then."""
    energy, critic = state["networks"]["energy"], state["networks"]["critic"]
    return {
        "model": energy["weights"],
        "average": energy["average"],
        "optimiser": energy["optimiser"],
        "critic": {"network": critic["weights"], "optimiser": critic["optimiser"]},
        "generator": None,
        "batches": state["streams"]["data"],
        "label_batches": None,
        **{name: state[name] for name in ("buffer", "latch", "generators", "epoch", "iteration")},
    }


def _aged(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    aged = {key: _aged(part) for key, part in value.items() if key not in ("crc", "n", "prev")}
    return aged | {"config": _old_config(aged["config"])} if isinstance(aged.get("config"), str) else aged


def _age(folder: Path) -> int:
    """Rewrite a study as an earlier version would have left it; returns the number of its checkpoints."""
    journal, mark, lines = folder / "ledger.jsonl", Mark(), []
    for line in journal.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break  # cut off by the kill
        event = _aged(decode(line))
        lines.append(encode(event, mark))
        mark = mark.after(event, crc_of(lines[-1]))
    journal.write_bytes(b"".join(lines))
    assert b"method_args" not in journal.read_bytes() and b"critic" in journal.read_bytes()
    for table in folder.glob("*.parquet"):
        table.unlink()  # they are made from the journal, whose lines they count
    found = [seal.parent for seal in folder.rglob("trial.json")]
    for checkpoint in found:
        state = read_checkpoint(checkpoint)
        aged = {"config": _old_config(state["config"]), "trainer": _old_state(state["trainer"])}
        write_checkpoint(checkpoint, state | aged)
    return len(found)


def _epochs(folder: Path) -> pd.DataFrame:
    clocks = ["seconds", "train_seconds", "evaluation_seconds", "reported_at", "attempt"]
    found = pd.read_parquet(folder / "epochs.parquet").drop(columns=clocks)
    return found.sort_values(["trial_id", "epoch"], ignore_index=True)


@pytest.mark.usefixtures("ray_cluster")
def test_a_study_of_the_old_format_is_resumed(mebm: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(STUDY, encoding="utf-8")
    whole, cut = tmp_path / "one" / "old", tmp_path / "two" / "old"
    code, output, error = mebm("sweep", tmp_path / "old.yaml", "--results", tmp_path / "one")
    assert (code, error) == (0, ""), output

    process = _start("sweep", tmp_path / "old.yaml", "--results", tmp_path / "two")
    until, journal = time.monotonic() + WAIT, cut / "ledger.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert _age(cut) > 0
    code, output, error = mebm("resume", cut)
    assert (code, error) == (0, ""), output

    pd.testing.assert_frame_equal(_epochs(cut), _epochs(whole))
    names = ["trial_id", "setting_id", "method_args.start_iteration", "outcome"]
    tables = [pq.read_table(folder / "trials.parquet").select(names).to_pandas() for folder in (cut, whole)]
    pd.testing.assert_frame_equal(*(table.sort_values("trial_id", ignore_index=True) for table in tables))
    assert sorted(tables[0]["method_args.start_iteration"]) == [1, 6]
