"""Whose code runs for the name of a method: the package's own, and that of modules the user has named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from trainables.config.method import METHODS, TRUSTED, method_class
from trainables.config.trial import TrialConfig
from trainables.methods.presets import build_trial

CODE = """\
from pathlib import Path

from trainables.methods.m_ebm import MEbm

Path(__file__).with_name("imported").touch()


class Mine(MEbm):
    title = "mine"


class Other:
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "a_strangers_method"
    (tmp_path / f"{name}.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv(TRUSTED, raising=False)
    return name


def test_a_strangers_configuration_imports_nothing(module: str, tmp_path: Path) -> None:
    config = json.loads(build_trial({"dataset": "digits"}).to_json()) | {"method": f"{module}:Mine"}
    for read in (
        lambda: TrialConfig.model_validate(config),
        lambda: TrialConfig.model_validate_json(json.dumps(config)),
        lambda: build_trial({"method": f"{module}:Mine"}),
        lambda: method_class(f"{module}:Mine"),
    ):
        with pytest.raises((ValidationError, ValueError), match=f"{TRUSTED}={module}"):
            read()
    assert not (tmp_path / "imported").exists() and module not in sys.modules


def test_a_trusted_one_is_imported(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUSTED, f"another, {module}")
    assert build_trial({"method": f"{module}:Mine", "dataset": "digits"}).method == f"{module}:Mine"
    assert (tmp_path / "imported").exists()
    with pytest.raises(ValueError, match="Other is not a method"):
        method_class(f"{module}:Other")
    with pytest.raises(ValueError, match="cannot be imported"):
        method_class(f"{module}:Missing")


@pytest.mark.parametrize("name", ["os.path:join", "posix:system", "..x:Y", "a b:C", "x:", ":X", "x:Y:Z", "/etc/x:Y"])
def test_other_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUSTED, "os.path" if name == "os.path:join" else "")
    with pytest.raises(ValueError):
        method_class(name)


def test_the_packages_own_need_no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUSTED, raising=False)
    assert all(method_class(name).title for name in METHODS)
