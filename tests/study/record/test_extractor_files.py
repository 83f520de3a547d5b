"""Weights and TorchScript of an extractor of one's own are part of what a resume compares."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from study.config.errors import UserError
from study.config.load import validate_study
from study.config.own_code import short_names
from study.record.folder import create_folder
from study.record.ledger import Ledger
from study.record.own_code import keep_code
from study.record.verify import refuse_other_code, run_facts
from trainables.plugins.reference import allow, use

CODE = """\
import torch


def pixels(weights):
    factor = torch.load(weights, weights_only=True)
    return lambda images: images[:, 0].flatten(1)[:, ::4].float() * factor
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Code, its weights and a TorchScript file, in the working directory of a user who has named them."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(CODE)
    save("two.pth", 2.0)
    save("script.pt", 2.0)
    allow(tmp_path)
    yield tmp_path
    use(tmp_path / "elsewhere")
    use(None)


def save(name: str, factor: float) -> None:
    if name.endswith(".pth"):
        torch.save(torch.tensor(factor), name)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: x[:, 0].flatten(1).float() * factor, torch.zeros(2, 3, 8, 8).byte())
        torch.jit.save(traced, name)


@pytest.mark.parametrize("name", ["two.pth", "script.pt"])
def test_other_weights_are_refused(place: Path, name: str) -> None:
    extractor = "nets.py:pixels@two.pth" if name == "two.pth" else name
    trial = {
        "dataset": "digits",
        "epochs": 1,
        "evaluation": {"protocols": ["small-buffer", f"small-fresh@{extractor}"]},
    }
    values = {"name": "own", "trial": trial, "search": {"sampler": "grid", "grid": [{"step_size": [0.5, 1.0]}]}}
    study = validate_study(short_names(values, "own.yaml"), "own.yaml")
    folder = create_folder(study, place / "results")
    keep_code(folder, study.model_dump(mode="json"))
    ledger = Ledger(folder, study.name)
    ledger.run(run_facts(study, "", folder))
    config = study.space.trial(dict(study.space.start[0]), 0)
    ledger.start("t0001", config, "s", 0.0, 0)
    refuse_other_code(folder, ledger, study)
    before = (place / name).read_bytes()
    save(name, 3.0)
    with pytest.raises(UserError, match=rf"{name} [0-9a-f]{{12}} then, [0-9a-f]{{12}} now.*--accept-changes") as error:
        refuse_other_code(folder, ledger, study)
    assert "\n" not in str(error.value)
    (place / name).unlink()
    with pytest.raises(UserError, match=rf"{name} [0-9a-f]{{12}} then, absent now"):
        refuse_other_code(folder, ledger, study)
    (place / name).write_bytes(before)
    refuse_other_code(folder, ledger, study)
    save(name, 3.0)
    ledger.run(run_facts(study, "", folder))  # as `--accept-changes` does
    refuse_other_code(folder, ledger, study)
    ledger.close()
