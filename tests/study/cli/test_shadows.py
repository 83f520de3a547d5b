"""A user's own modules with the names of this project's packages: the command and its workers find its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pandas as pd
import pytest
import yaml

from _mebm_study import PACKAGES, ROOT

MEBM = (str(Path(sysconfig.get_path("scripts")) / "mebm"),)
MODULE = (sys.executable, "-m", "study.cli")
BREAKS = "raise RuntimeError('a module of the user was imported')\n"


def put(folder: Path, name: str, form: str) -> None:
    """A module of the user that must not be imported."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py" if form == "file" else folder / name / "__init__.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(BREAKS, encoding="utf-8")


def run(arguments: tuple[str, ...], cwd: Path, *search: Path | str) -> subprocess.CompletedProcess[str]:
    """A command in a folder, with a search path; the project's own place comes last on it, as where it is installed."""
    path = os.pathsep.join([*map(str, search), ROOT])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("form", ["file", "package"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_module_of_the_user_is_not_imported(tmp_path: Path, name: str, form: str) -> None:
    user = tmp_path / "user"
    put(user, name, form)
    code = f"import _mebm_study, sys; _mebm_study.install(); import {name}; print({name}.__file__)"
    for cwd, search in ((tmp_path, user), (user, ".")):
        found = run((sys.executable, "-c", code), cwd, search)
        assert found.stdout.startswith(ROOT), found.stderr
        found = run((*MEBM, "--version"), cwd, search)
        assert (found.returncode, found.stderr) == (0, "")
    if name != "study":  # there Python itself finds the user's file, before anything of this project runs
        found = run((*MODULE, "--version"), user)
        assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("form", ["file", "package"])
def test_nor_with_all_of_them_there(tmp_path: Path, form: str) -> None:
    for name in PACKAGES:
        put(tmp_path, name, form)
    found = run((*MEBM, "sweep", "quickstart", "--dry-run"), tmp_path, ".")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("study       quickstart")


def test_what_was_imported_before_gives_way(tmp_path: Path) -> None:
    for name in PACKAGES:
        put(tmp_path, name, "package")
        (tmp_path / name / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(f"import {', '.join(PACKAGES)}\n", encoding="utf-8")
    found = run((*MEBM, "methods"), tmp_path, tmp_path)
    assert (found.returncode, found.stderr) == (0, "")


def test_everything_else_is_imported_as_ever(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("", encoding="utf-8")
    put(tmp_path, "analysis", "file")
    (tmp_path / "analysis.py").write_text("MINE = True\n", encoding="utf-8")
    code = f"import mine, analysis; assert analysis.MINE and mine.__file__.startswith({str(tmp_path)!r})"
    found = run((sys.executable, "-c", code), tmp_path, tmp_path)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.ray
@pytest.mark.slow
def test_workers_find_the_projects_own_too(tiny: dict, tmp_path: Path) -> None:
    for name in PACKAGES:
        put(tmp_path, name, "file")
    tiny["seeds"] = [0]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny), encoding="utf-8")
    found = run((*MEBM, "sweep", "tiny.yaml"), tmp_path, ".")
    assert (found.returncode, found.stderr) == (0, ""), found.stdout
    trials = pd.read_parquet(tmp_path / "results" / "tiny" / "trials.parquet")
    assert len(trials) == 4
    assert set(trials["outcome"]) <= {"completed", "diverged"}
