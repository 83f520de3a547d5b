"""Accuracy under attack: exact where the worst case is known, never rising with the radius, and repeatable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainables.config.trial import TrialConfig
from trainables.data.datasets import ImageData
from trainables.evaluation.scores import accuracy
from trainables.models.model_file import SavedModel, load_model, model_state
from trainables.models.robustness import Attack, parse_attack, robust_accuracy
from trainables.training.trainer import Trainer


@pytest.fixture(scope="module")
def classifiers(
    quick: Callable[..., TrialConfig], digits: ImageData, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SavedModel]:
    """Trained on digits for some iterations, by method."""
    found = {}
    for method in ("softmax", "m-jem"):
        fields: dict[str, Any] = {"method": method, "epochs": 1, "iterations_per_epoch": 60}
        trainer = Trainer(quick(**fields, **({"buffer_size": 300} if method == "m-jem" else {})), digits)
        trainer.train_epoch()
        path = tmp_path_factory.mktemp(method) / "m.pt"
        torch.save(model_state(trainer), path)
        found[method] = load_model(path)
    return found


class _Linear(nn.Module):
    """Two classes of images in [-1, 1]; the logits of the second less those of the first are w.x + b."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.stack([-weight, weight]) / 2), bias

    def logits(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + torch.tensor([-self.bias / 2, self.bias / 2])


def _case(classifiers: dict[str, SavedModel], low: int, high: int) -> tuple[SavedModel, Tensor, Tensor, Tensor, float]:
    """A linear model, images with pixels in [low, high), labels mostly right, and in pixels of [0, 1]: v, c of v.x + c."""
    draws = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(64, generator=draws) / 8, 0.3
    images = torch.randint(low, high, (400, 1, 8, 8), generator=draws, dtype=torch.uint8)
    v, c = 2 * weight.double(), bias - float(weight.double().sum())
    labels = (images.flatten(1).double() / 255 @ v + c + torch.randn(400, generator=draws) / 10 > 0).long()
    return replace(classifiers["softmax"], model=_Linear(weight, bias)), images, labels, v, c  # type: ignore[arg-type]


@pytest.mark.parametrize("radius", [1 / 255, 8 / 255, 0.05, 0.2])
def test_linf_reaches_the_worst_case_of_a_linear_model(classifiers: dict[str, SavedModel], radius: float) -> None:
    """Every pixel goes as far against the class as the ball and the box let it."""
    saved, images, labels, v, c = _case(classifiers, 0, 256)
    x, side = images.flatten(1).double() / 255, (2 * labels - 1).double()
    worst = (x - radius * v.sign() * side[:, None]).clamp(0, 1)
    exact = float(((worst @ v + c) * side > 0).double().mean())
    assert exact < 0.9 if radius > 0.02 else exact > 0.5
    assert robust_accuracy(saved, images, labels, Attack("linf", radius)) == (exact, 400)
    assert robust_accuracy(saved, images, labels, Attack("linf", radius, steps=5, restarts=2))[0] == exact


@pytest.mark.parametrize("radius", [0.05, 0.15, 0.3])
def test_l2_comes_to_the_worst_case_of_a_linear_model(classifiers: dict[str, SavedModel], radius: float) -> None:
    """Inside the box the margin falls by radius times |v|: no attack can do better, and this one does it to a percent."""
    saved, images, labels, v, c = _case(classifiers, 90, 166)
    margin = (images.flatten(1).double() / 255 @ v + c) * (2 * labels - 1)
    exact, almost = (float((margin > r * v.norm()).double().mean()) for r in (radius, 0.99 * radius))
    found, _ = robust_accuracy(saved, images, labels, Attack("l2", radius, steps=40, step=radius / 4))
    assert exact - 1e-9 <= found <= almost and found < float((margin > 0).double().mean())


@pytest.mark.parametrize("method", ["softmax", "m-jem"])
@pytest.mark.parametrize(("norm", "radii"), [("linf", (0, 0.02, 0.1, 0.3)), ("l2", (0, 0.1, 0.5, 2))])
def test_accuracy_falls_with_the_radius(
    classifiers: dict[str, SavedModel], digits: ImageData, method: str, norm: Any, radii: tuple[float, ...]
) -> None:
    saved = classifiers[method]
    before = {name: value.clone() for name, value in saved.model.state_dict().items()}
    found = [robust_accuracy(saved, digits.test_images, digits.test_labels, Attack(norm, r))[0] for r in radii]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] / 2
    assert found[0] == accuracy(saved.model, digits.test_images, digits.test_labels, 100), "no ball: plain accuracy"
    again = robust_accuracy(saved, digits.test_images, digits.test_labels, Attack(norm, radii[1]))[0]
    assert again == found[1]
    assert all(torch.equal(before[name], value) for name, value in saved.model.state_dict().items())
    assert all(p.grad is None for p in saved.model.parameters())


def test_some_images_are_drawn_and_energies_have_no_class(
    classifiers: dict[str, SavedModel], digits: ImageData, quick: Callable[..., TrialConfig]
) -> None:
    attack = Attack("linf", 0.02, images=50)
    share, count = robust_accuracy(classifiers["softmax"], digits.test_images, digits.test_labels, attack)
    assert count == 50 and (share * 50) % 1 == pytest.approx(0)
    energy = replace(classifiers["m-jem"], config=quick(method="m-ebm"))
    with pytest.raises(ValueError, match="m-ebm has no trained class head"):
        robust_accuracy(energy, digits.test_images, digits.test_labels, attack)


def test_budgets_in_words() -> None:
    assert parse_attack("linf:8/255") == Attack("linf", 8 / 255)
    full = parse_attack("l2:0.5,steps=100,step=0.02,restarts=5,images=1000")
    assert full == Attack("l2", 0.5, 100, 0.02, 5, 1000)
    assert full.text == "pgd-l2-0.5-100x0.02-restarts5" and full.metric == "robust_accuracy_l2_0.5"
    assert parse_attack("linf:8/255").text == "pgd-linf-0.0313725-20x0.00392157-restarts1"
    for text, said in (
        ("l1:3", "begins with 'l1'"),
        ("linf", "radius is ''"),
        ("linf:eight", "radius is 'eight'"),
        ("linf:1/0", "radius is '1/0'"),
        ("linf:-1", "radius is -1"),
        ("linf:0.1,steps=0", "steps is 0"),
        ("linf:0.1,steps=2.5", "whole number"),
        ("linf:0.1,epochs=2", "'epochs' is not one of"),
        ("linf:0.1,steps=2,steps=3", "given twice"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            parse_attack(text)
        assert "\n" not in str(error.value)
