"""Code of a user's own in a study: copied, resumed, changed, sent to somebody else. Through the real command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

METHOD = """\
import os
from pathlib import Path
import util
from trainables.config.method import field
from trainables.training.method import Method

print("imported")
if canary := os.environ.get("CANARY"):
    Path(canary).touch()


class Mine(Method):
    temperature: float = field(1.0, gt=0, description="T")

    def loss(self, e_data, e_samples, ctx):
        return util.difference(e_data, e_samples)
"""
STUDY = """\
name: own
trial:
  method: code here/my_ebm.py:Mine
  dataset: digits
  device: cpu
  network: conv-4
  norm: none
  epochs: 1
  iterations_per_epoch: 3
  buffer_size: 60
  batch_size: 8
  sampling_steps: 1
  evaluation: {protocols: none}
search: {sampler: grid, grid: [{method_args.temperature: [0.5, 2.0]}]}
seeds: [0]
"""


def mebm(*arguments: object, cwd: Path, code: int = 0, **env: str) -> tuple[str, str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mebm")), *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=240,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, the user's code, and a study of it."""
    place = tmp_path_factory.mktemp("own")
    (place / "code here").mkdir()
    (place / "code here" / "my_ebm.py").write_text(METHOD, encoding="utf-8")
    (place / "code here" / "util.py").write_text("def difference(a, b):\n    return a.mean() - b.mean()\n")
    (place / "code here" / "study.py").write_text("raise SystemExit('nobody imports this')\n")
    (place / "own.yaml").write_text(STUDY, encoding="utf-8")
    (place / "elsewhere").mkdir()
    out, _ = mebm("sweep", place / "own.yaml", "--results", place / "results", cwd=place / "elsewhere",
                  MEBM_CACHE=str(place / "cache"))  # fmt: skip
    assert "imported" not in out
    return place


def test_a_study_takes_its_code_along(made: Path) -> None:
    study = made / "results" / "own"
    table = pq.read_table(study / "trials.parquet")
    assert table["outcome"].to_pylist() == ["completed"] * 2
    assert set(table["method"].to_pylist()) == {"my_ebm.py:Mine"}
    index = json.loads((study / "code" / "code.json").read_text())
    code = index["my_ebm.py"]["hash"]
    assert sorted(p.name for p in (study / "code" / code).iterdir()) == ["my_ebm.py", "util.py"]
    assert str(made) not in (study / "study.yaml").read_text().replace(str(study), "")
    shutil.move(made / "code here", made / "away")  # the copy is enough
    try:
        cache = {"MEBM_CACHE": str(made / "cache")}
        mebm("resume", study, cwd=made, **cache)
        mebm("status", study, cwd=made, **cache)
        mebm("sample", study / "models" / "t0001.pt", "--count", 4, "--out", made / "x.png", cwd=made, **cache)
        mebm("evaluate", study, "-p", "small-fresh", cwd=made, **cache)
    finally:
        shutil.move(made / "away", made / "code here")


def test_resume_notices_a_change(made: Path) -> None:
    study, cache = made / "results" / "own", {"MEBM_CACHE": str(made / "cache")}
    util = made / "code here" / "util.py"
    before = util.read_text()
    util.write_text(before + "# changed\n")
    try:
        _, err = mebm("resume", study, cwd=made, code=2, **cache)
        assert "util.py has changed since the study began" in err and "--accept-changes" in err
        assert err.removeprefix("imported\n").count("\n") == 1  # it prints that itself
        mebm("resume", study, "--set", "seeds=[0,1]", "--accept-changes", cwd=made, **cache)
        assert pq.read_table(study / "trials.parquet")["outcome"].to_pylist() == ["completed"] * 4
        index = json.loads((study / "code" / "code.json").read_text())
        assert (study / "code" / index["my_ebm.py"]["hash"] / "util.py").read_text().endswith("# changed\n")
        mebm("resume", study, cwd=made, **cache)
    finally:
        util.write_text(before)


COMMANDS = {
    "resume": [], "status": [], "report": [], "tables": ["--out", "t"], "figures": ["--out", "f"],
    "evaluate": ["-p", "small-fresh"], "sample": ["--out", "s.png"], "recommend": [], "compare": [], "detector": [],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_strangers_study_runs_nothing(made: Path, tmp_path: Path, command: str) -> None:
    study = tmp_path / "own"
    shutil.copytree(made / "results" / "own", study)
    for other in sorted((study / "models").glob("*.pt"))[1:]:
        other.unlink()
    env = {"CANARY": str(tmp_path / "canary"), "MEBM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mebm")), command, str(study), *COMMANDS[command]],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **env}, timeout=240,
    )  # fmt: skip
    assert not (tmp_path / "canary").exists() and "Traceback" not in done.stderr
    if command in ("resume", "status", "evaluate", "sample"):
        assert done.returncode == 2 and "--trust-code" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    if command == "sample":
        mebm(command, study, *COMMANDS[command], "--trust-code", cwd=tmp_path, **env)
        assert (tmp_path / "canary").exists()
        mebm("status", study, cwd=tmp_path, **env)  # from now on it is one that ran here


def test_a_changed_copy_is_refused(made: Path, tmp_path: Path) -> None:
    study = tmp_path / "own"
    shutil.copytree(made / "results" / "own", study)
    for copy in study.glob("code/*/my_ebm.py"):
        copy.write_text(METHOD + "\n# worse\n")
    for more in ((), ("--trust-code",)):
        _, err = mebm("resume", study, *more, cwd=tmp_path, code=2, MEBM_CACHE=str(made / "cache"))
        assert "my_ebm.py" in err and "was changed" in err and err.count("\n") == 1
