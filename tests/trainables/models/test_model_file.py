"""The model a completed trial leaves: what is in the file, what comes back, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config.method import METHODS
from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.models import model_file as saved
from trainables.models.model_file import load_model, model_state
from trainables.training.trainer import Trainer, to_grid
from trainables.trial.recorder import Recorder

Quick = Callable[..., TrialConfig]


def _trained(quick: Quick, digits: ImageData, **fields: Any) -> Trainer:
    values: dict[str, Any] = {
        "epochs": 1,
        "iterations_per_epoch": 3,
        "evaluation": {"fresh_steps": 2, "protocols": "none"},
    }
    if fields.get("method") == "kl-ebm":
        values["buffer_size"] = 1002
    trainer = Trainer(quick(**(values | fields)), digits)
    trainer.train_epoch()
    return trainer


def _write(trainer: Trainer, folder: Path) -> Path:
    recorder = Recorder(folder, "t7")
    recorder.write_model(model_state(trainer))
    assert [p.name for p in (folder / "models").iterdir()] == ["t7.pt"]
    return recorder.model_path


@pytest.mark.parametrize("method", METHODS)
def test_what_comes_back_is_what_was_trained(quick: Quick, digits: ImageData, tmp_path: Path, method: str) -> None:
    trainer = _trained(quick, digits, method=method)
    path = _write(trainer, tmp_path)
    assert isinstance(torch.load(path, weights_only=True)["config"], str)
    found = load_model(path)
    assert found.config == trainer.config
    assert (found.epoch, found.iteration, found.classes) == (1, 3, 10)
    assert found.data_source == digits.source
    assert not found.model.training
    images = digits.images[:50]
    model = trainer.scored_model.eval()
    with torch.no_grad():
        x = trainer.pixels.from_signed(images.float() / 127.5 - 1)
        torch.testing.assert_close(found.inputs(images), x)
        torch.testing.assert_close(found.model.energy(found.inputs(images)), model.energy(x))
        if trainer.config.classifies:
            torch.testing.assert_close(found.model.logits(found.inputs(images)), model.logits(x))
    if method == "softmax":
        assert found.samples.shape == (0, 1, 8, 8)
    else:
        pool = trainer.sample_pool(len(found.samples))
        assert torch.equal(found.samples, to_grid(pool))
        assert found.samples.dtype == torch.uint8


def test_how_many_samples_are_kept(
    quick: Quick, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "SAMPLES", 120)
    monkeypatch.setattr(saved, "FRESH_SAMPLES", 30)
    buffered = _trained(quick, digits)
    assert len(load_model(_write(buffered, tmp_path / "a")).samples) == 120
    chains = _trained(quick, digits, method="shortrun")
    assert len(load_model(_write(chains, tmp_path / "b")).samples) == 30
    # A file with a slice of a large buffer must not carry the whole buffer.
    assert (tmp_path / "a" / "models" / "t7.pt").stat().st_size < 300_000


def test_the_scored_weights_are_kept(quick: Quick, digits: ImageData, tmp_path: Path) -> None:
    trainer = _trained(
        quick, digits, ema_decay=0.5, evaluation={"weights": "ema", "protocols": "none"}, learning_rate=0.1
    )
    weights = load_model(_write(trainer, tmp_path)).model.state_dict()
    assert trainer.average is not None
    for name, value in trainer.average.module.state_dict().items():
        assert torch.equal(weights[name], value)
    assert any(not torch.equal(weights[n], v) for n, v in trainer.model.state_dict().items())


@pytest.mark.parametrize("method", ["m-jem", "shortrun", "vera"])
def test_keeping_a_model_does_not_disturb_training(
    quick: Quick, digits: ImageData, same: Callable[[Any, Any], bool], method: str
) -> None:
    disturbed, left_alone = (_trained(quick, digits, method=method, epochs=2) for _ in range(2))
    model_state(disturbed)
    for trainer in (disturbed, left_alone):
        trainer.train_epoch()
    assert same(disturbed.state_dict(), left_alone.state_dict())


def test_files_that_are_no_model_are_refused_in_one_line(quick: Quick, digits: ImageData, tmp_path: Path) -> None:
    path = _write(_trained(quick, digits), tmp_path)
    state = torch.load(path, weights_only=True)
    cases = {
        "format 99, expected 2": state | {"format": 99},
        "format None": {"trainer": {}},
        "configuration is of another version": state | {"config": '{"method": "m-ebm", "colour": 3}'},
        "weights do not fit a conv-16": state | {"model": {}},
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as found:
            load_model(path)
        assert str(found.value).startswith(f"{path}: ")
        assert "\n" not in str(found.value)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a model file, or damaged"):
        load_model(path)
    with pytest.raises(ValueError, match=r"nowhere\.pt: cannot be read"):
        load_model(tmp_path / "nowhere.pt")
