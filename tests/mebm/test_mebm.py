"""`import mebm`: nothing is imported before it is used, a study runs from a script, mistakes are exceptions."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import analysis
import mebm
from benchmarks.example import write_example
from study.config.load import validate_study


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "ray", "plotly", "pandas", "numpy", "pyarrow", "optuna", "pydantic", "rich", "study", "analysis")
    found = python(f"import sys, mebm; print([m for m in {heavy} if m in sys.modules])", tmp_path)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


def test_results_are_loaded_without_torch_or_ray(tmp_path: Path) -> None:
    write_example(tmp_path / "example")
    code = "import sys, mebm; r = mebm.load('example'); mebm.phase_figure(r.trials); mebm.describe('trials')"
    found = python(f"{code}; print(len(r.trials), 'torch' in sys.modules, 'ray' in sys.modules)", tmp_path)
    assert (found.returncode, found.stdout) == (0, "48 False False\n"), found.stderr


def test_it_has_all_that_analysis_has_and_says_so() -> None:
    for name in analysis.__all__:
        assert getattr(mebm, name) is getattr(analysis, name)
    assert {*analysis.__all__, "run", "resume", "UserError", "RunError"} <= set(dir(mebm))
    assert all(name in mebm.__doc__ for name in ("run", "resume", "load", "describe", "UserError", "RunError"))
    with pytest.raises(AttributeError, match=r"module 'mebm' has no attribute 'phase_figur'"):
        _ = mebm.phase_figur


@pytest.mark.parametrize("form", ["analysis.py", "study/__init__.py", "configs.py"])
def test_a_file_in_the_way_is_named(tmp_path: Path, form: str) -> None:
    file = tmp_path / form
    file.parent.mkdir(exist_ok=True)
    file.write_text("", encoding="utf-8")
    name = form.partition("/")[0].removesuffix(".py")
    found = python("import mebm; mebm.load('x')", tmp_path)
    last = found.stderr.splitlines()[-1]
    assert last == f"ImportError: {file}: is in the way of mebm's own package '{name}'; rename it or move it"


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        ("quickstrt", None, "quickstrt: no such file, and no packaged config"),
        ("quickstart", {"epoch": 3}, "--set epoch: unknown key; did you mean epochs?"),
        ({"name": "mine", "search": {"sampler": "grid"}}, None, "config: "),
        ({"name": "mine"}, {"trial.method": "m-ebn"}, "config: "),
    ],
)
def test_mistakes_are_exceptions_and_write_nothing(tmp_path, monkeypatch, config, changes, expected) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mebm.UserError) as caught:
        mebm.run(config, changes=changes)
    assert str(caught.value).startswith(expected)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(mebm.UserError, match="nowhere: no such folder"):
        mebm.resume("nowhere")


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_runs_and_is_resumed(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("MEBM_CACHE", str(tmp_path / "cache"))
    trial = {"dataset": "digits", "epochs": 1, "iterations_per_epoch": 12, "evaluation": {"fresh_steps": 2}}
    trial |= {"batch_size": 16, "buffer_size": 100}
    grid = [{"initial": ["gaussian", "uniform"], "sampling_steps": [1, 2]}]
    tiny = {"name": "tiny", "trial": trial, "search": {"sampler": "grid", "grid": grid}, "seeds": [0]}
    results = mebm.run(validate_study(tiny, "tiny"), changes={"description": "from a script"}, results=tmp_path)
    assert capfd.readouterr().out == ""
    assert (len(results.trials), results.studies) == (4, ["tiny"])
    assert results.manifests["tiny"]["description"] == "from a script"
    assert results.notes == []
    signals = results.signals("tiny", "t0001")
    assert signals is not None and len(signals)
    assert (tmp_path / "tiny" / "report.html").is_file()
    with pytest.raises(mebm.UserError, match="holds this study already; continue with: mebm resume"):
        mebm.run(tiny | {"description": "from a script"}, results=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = mebm.resume(tmp_path / "tiny", changes={"seeds": [0, 1]}, show=True)
    assert len(more.trials) == 8
    assert "tiny: 8 trials, results in" in capfd.readouterr().out
    same = ["setting_id", "outcome", "fd_buffer_best"]
    before = more.trials[more.trials["seed"] == 0].sort_values("setting_id")[same].reset_index(drop=True)
    assert before.equals(results.trials.sort_values("setting_id")[same].reset_index(drop=True))
