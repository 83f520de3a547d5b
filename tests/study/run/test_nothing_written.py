"""What fails before the first trial leaves no folder, nor one above it, and the corrected command runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from study.config.errors import RunError, UserError
from study.run import driver
from trainables.results.layout import JOURNAL, STUDY_FILE

SHORT = ["--set", "epochs=1", "--set", "iterations_per_epoch=2", "--set", "batch_size=16"]
SHORT += ["--set", "evaluation.fresh_steps=1"]
MEBM = str(Path(sys.executable).with_name("mebm"))


def refused(found, *, code=2):
    """A command's one line of what is wrong."""
    assert found[0] == code, found
    lines = found[2].strip().splitlines()  # click ends the line of a ^C
    assert len(lines) == 1, found[2]
    assert "Traceback" not in found[2]
    assert len(lines[0]) < 700
    return lines[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def config(tiny, write_config):
    return write_config(yaml.safe_dump(tiny))


@pytest.fixture
def results(tmp_path):
    """Where results go: two folders that are not there yet."""
    return tmp_path / "results" / "deep"


# ------------------------------------------------------------------------------------------------------ the cache


def not_a_folder(tmp_path):
    (tmp_path / "cache").write_text("a file")
    return tmp_path / "cache"


def nowhere(tmp_path):
    return "/proc/nobody/makes/this"


def too_long(tmp_path):
    return tmp_path / ("c" * 300)


@pytest.mark.parametrize("cache", [not_a_folder, nowhere, too_long])
@pytest.mark.parametrize("command", ["sweep", "train"])
def test_a_cache_that_cannot_be_written(command, cache, config, results, mebm, tmp_path, monkeypatch):
    _forget_images(monkeypatch)
    monkeypatch.setenv("MEBM_CACHE", str(cache(tmp_path)))
    if command == "sweep":
        text = refused(mebm("sweep", config, "--results", results))
    else:
        text = refused(mebm("train", "m-ebm", *SHORT, "--out", results / "one"))
    assert "MEBM_CACHE names another folder" in text
    assert not results.parent.exists()


def test_no_home_and_no_cache(config, results, mebm, monkeypatch):
    _forget_images(monkeypatch)
    monkeypatch.delenv("MEBM_CACHE")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert "MEBM_CACHE names a folder" in refused(mebm("sweep", config, "--results", results))
    assert not results.parent.exists()


def _forget_images(monkeypatch):
    """Nothing that an earlier test read is left in this process."""
    from trainables.data import datasets
    from trainables.sampling import gaussians

    datasets.load_dataset.cache_clear()
    monkeypatch.setattr(gaussians, "_STATES", {})


# ------------------------------------------------------------------------------------------------- where results go


PLACES = {
    "component": lambda tmp: tmp / "made" / ("x" * 256) / "deep",
    "path": lambda tmp: Path(tmp, "made", *["y" * 100] * 45),
    "file": lambda tmp: tmp / "file" / "deep",
    "system": lambda tmp: Path("/proc/made/deep"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["sweep", "train", "tables", "report", "figures", "bench", "evaluate"])
def test_a_place_that_cannot_be(command, place, config, mebm, tmp_path, finished):
    (tmp_path / "file").write_text("a file")
    out = PLACES[place](tmp_path)
    before = files(tmp_path)
    arguments = {
        "sweep": ("sweep", config, "--results", out),
        "train": ("train", "m-ebm", *SHORT, "--out", out),
        "tables": ("tables", "--out", out),
        "report": ("report", finished, "--out", out / "r.html"),
        "figures": ("figures", finished, "--only", "survival", "--out", out),
        "bench": ("bench", "--dataset", "digits", "--network", "conv-16", "--methods", "m-ebm:1", "--rounds", "1",
                  "--seconds", "0.01", "--precision", "fp32", "--no-baseline", "--out", out),
        "evaluate": ("evaluate", finished, "-p", "small-buffer", "--out", out / "e.parquet"),
    }  # fmt: skip
    refused(mebm(*arguments[command]))
    assert files(tmp_path) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_mebm):
    """A folder that commands read: one trained model."""
    folder = tmp_path_factory.mktemp("finished") / "one"
    assert run_mebm("train", "m-ebm", *SHORT, "--out", folder)[0] == 0
    return folder


def test_a_name_too_long_for_a_folder(config, results, mebm):
    refused(mebm("sweep", config, "--results", results, "--set", f"name={'n' * 300}"))
    assert not results.parent.exists()


# ------------------------------------------------------------------------------------------- mistakes and misfortunes


@pytest.mark.parametrize(
    "change",
    ["resources.cpus=99", "batch_size=100000", "dataset=nothing", "data_dir=/nowhere", "search.storage=sqlite:////proc/x/y.db"],
)  # fmt: skip
def test_a_mistake_then_the_corrected_command(change, config, results, mebm, monkeypatch):
    def enough(study, *_arguments, **_options):
        if study.resources.cpus == 99:
            raise UserError("resources.cpus = 99: the cluster has 2 CPUs")
        raise RunError("it came this far")

    monkeypatch.setattr(driver, "run_trials", enough)
    refused(mebm("sweep", config, "--results", results, "--set", change))
    assert not results.parent.exists()
    assert refused(mebm("sweep", config, "--results", results), code=1).endswith("it came this far")
    assert not results.parent.exists()


@pytest.mark.parametrize(
    "error", [RunError("Ray does not start"), OSError(28, "No space left on device"), OSError(24, "Too many open files"),
              KeyboardInterrupt()],
)  # fmt: skip
def test_whatever_fails_before_the_first_trial(error, config, results, mebm, monkeypatch):
    def fails(*_arguments, **_options):
        raise error

    monkeypatch.setattr(driver, "run_trials", fails)
    code = {RunError: 1, KeyboardInterrupt: 130}.get(type(error), 2)
    refused(mebm("sweep", config, "--results", results), code=code)
    assert not results.parent.exists()


def test_a_bug_before_the_first_trial_leaves_nothing_either(config, results, monkeypatch, mebm):
    def bug(*_arguments, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr(driver, "run_trials", bug)
    with pytest.raises(ZeroDivisionError):
        mebm("sweep", config, "--results", results)
    assert not results.parent.exists()


def test_what_failed_after_a_trial_began_stays(config, results, mebm, monkeypatch):
    def late(study, folder, console, ledger, *_arguments, **_options):
        ledger.run({"driver": "", "config": study.model_dump(mode="json")})
        raise RunError("later")

    monkeypatch.setattr(driver, "run_trials", late)
    refused(mebm("sweep", config, "--results", results), code=1)
    assert (results / "tiny" / STUDY_FILE).is_file()
    assert (results / "tiny" / JOURNAL).stat().st_size > 0


OTHERS = [
    "search.trials",
    "budget.hours",
    "budget.gpu_hours",
    "budget.trials",
    "run.max_concurrent",
    "run.checkpoint_gb",
]
ABSURD = ["0", "-1", "1e308", "1" + "0" * 30, ".nan", ".inf", "-.inf"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_absurd_numbers_are_one_line_or_run(config, results, mebm, monkeypatch, tiny):
    """Every number of a study, at values nobody means: what is refused says so, and nothing is left of any."""
    from study.config.fields import known_fields
    from study.config.load import validate_study

    def came_far(*_arguments, **_options):
        raise RunError("it came this far")

    monkeypatch.setattr(driver, "run_trials", came_far)
    fields = {*_numbers(validate_study(tiny, "tiny").model_dump(mode="json")), *known_fields(), *OTHERS}
    for field in sorted(fields):
        for value in ABSURD:
            code, _, err = mebm("sweep", config, "--results", results, "--set", f"{field}={value}")
            assert code in (1, 2), (field, value)
            assert len(err.splitlines()) == 1, (field, value, err)
            assert code == 2 or err.strip().endswith("it came this far"), (field, value, err)
            assert not results.parent.exists(), (field, value)


def _numbers(values, path=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{path}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{path}{key}"


# --------------------------------------------------------------------------------------------------- an interrupt


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_start_leaves_nothing(number, config, results, tmp_path):
    """It comes as soon as the folder is there; where that is too late, the study is resumable."""
    process = subprocess.Popen(
        [MEBM, "sweep", str(config), "--results", str(results)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300
    while not (results / "tiny" / STUDY_FILE).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.split() == ["mebm:", "interrupted"]
    assert not results.parent.exists()
