"""Accuracy of a classifier under attack: projected gradient descent within a ball around every image.

Hybrid models are reported beside it (JEM section 5.4, which attacks p(y|x) in L-infinity and L2). The attack is that of
Madry et al. 2018, with the whole budget stated. It gives an upper bound of the accuracy in the ball: a stronger attack
can only find it lower.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.models.calibration import BATCH, NormMode, norms
from trainables.models.model_file import SavedModel
from trainables.results.progress import counted

Norm = Literal["linf", "l2"]
SEED = 2020
"""Of the starts, and of the draw of images."""
_OPTIONS = ("steps", "step", "restarts", "images")


@dataclass(frozen=True)
class Attack:
    """A budget. Sizes are of pixels in [0, 1], as in the literature: 8/255 in L-infinity, 0.5 in L2.

    Attributes:
        radius: of the ball.
        steps: gradient steps of one start.
        step: their size; None: 2.5 radius / steps (Madry et al. 2018), which crosses the ball.
        restarts: starts, each a uniform draw of the ball; the image is lost if one of them finds another class.
        images: test images that are attacked, drawn with a fixed seed; None: all.
    """

    norm: Norm
    radius: float
    steps: int = 20
    step: float | None = None
    restarts: int = 1
    images: int | None = None

    @property
    def step_size(self) -> float:
        """Size of a step, pixels in [0, 1]."""
        return 2.5 * self.radius / self.steps if self.step is None else self.step

    @property
    def metric(self) -> str:
        """`robust_accuracy_linf_0.0313725`."""
        return f"robust_accuracy_{self.norm}_{self.radius:.6g}"

    @property
    def text(self) -> str:
        """`pgd-linf-0.0313725-20x0.00392157-restarts1`: all that makes the number but the images."""
        budget = f"{self.radius:.6g}-{self.steps}x{self.step_size:.6g}-restarts{self.restarts}"
        return f"pgd-{self.norm}-{budget}"


def parse_attack(text: str) -> Attack:
    """`linf:8/255`, `l2:0.5,steps=100,step=0.02,restarts=5,images=1000`. ValueError: something else; one line."""
    norm, _, rest = text.partition(":")
    radius, *given = rest.split(",")
    if norm not in get_args(Norm):
        raise ValueError(f"begins with {norm[:20]!r}, expected linf:RADIUS or l2:RADIUS, such as linf:8/255")
    values: dict[str, float] = {}
    for name, value in (("radius", radius), *(option.partition("=")[::2] for option in given)):
        if name not in ("radius", *_OPTIONS) or name in values:
            raise ValueError(f"{name[:20]!r} is not one of {', '.join(_OPTIONS)}, or is given twice")
        try:
            number = Fraction(value[:40].strip())
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{name} is {value[:40]!r}, expected a number such as 8/255 or 0.5") from None
        whole = name in ("steps", "restarts", "images")
        if not 0 <= number <= 10**6 or (name != "radius" and number == 0) or (whole and number.denominator != 1):
            raise ValueError(f"{name} is {value[:40]}, expected {'a whole number' if whole else 'a number'} above 0")
        values[name] = int(number) if whole else float(number)
    return Attack(cast("Norm", norm), **values)  # type: ignore[arg-type]


def robust_accuracy(
    saved: SavedModel,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    batch_size: int = BATCH,
    norm_mode: NormMode = "eval",
) -> tuple[float, int]:
    """Share of uint8 images (N, C, H, W) whose class no point of the attack changes, and how many were attacked.

    Counted as lost is an image that is classified wrong as it is, or at any step of any start. The gradient is that of
    the cross-entropy, in float64 of the logits, so that it does not vanish where the model is certain. ValueError: the
    model has no trained class head.
    """
    if not saved.config.classifies:
        raise ValueError(f"{saved.config.method} has no trained class head to attack")
    draws = torch.Generator().manual_seed(SEED)
    if attack.images is not None and attack.images < len(images):
        index = torch.randperm(len(images), generator=draws)[: attack.images]
        images, labels = images[index.to(images.device)], labels[index.to(labels.device)]
    right = 0
    with norms(saved.model, norm_mode), torch.enable_grad(), counted("attacking test images", len(images)) as advance:
        for part, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += int(_kept(saved, part, truth.to(saved.device).long(), attack, draws).sum())
            advance(len(part))
    return right / len(images), len(images)


def _kept(saved: SavedModel, images: Tensor, truth: Tensor, attack: Attack, draws: torch.Generator) -> Tensor:
    """Which of a batch are classified right throughout, bool (N,)."""
    clean = images.to(saved.device).float() / 255
    kept = _classified(saved, clean, truth)[0]
    for _ in range(attack.restarts if attack.radius > 0 else 0):
        if not bool(kept.any()):
            break
        x = _within(clean, clean + _start(clean, attack, draws), attack)
        for _ in range(attack.steps):
            right, gradient = _classified(saved, x, truth)
            kept &= right
            x = _within(clean, x + attack.step_size * _direction(gradient, attack.norm), attack)
        kept &= _classified(saved, x, truth)[0]
    return kept


def _classified(saved: SavedModel, x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Which images in [0, 1] are classified right, and the gradient of each one's cross-entropy, float64."""
    x = x.detach().requires_grad_()
    logits = saved.model.logits(saved.inputs(2 * x - 1)).double()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, truth, reduction="sum"), x)
    return logits.argmax(1) == truth, gradient.double()


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    if norm == "linf":
        return gradient.sign().float()
    return (gradient / _lengths(gradient).clamp_min(torch.finfo(torch.float64).tiny)).float()


def _lengths(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return lengths


def _start(clean: Tensor, attack: Attack, draws: torch.Generator) -> Tensor:
    """A uniform draw of the ball for each image; on the CPU, so that it is the same on every device."""
    shape = tuple(clean.shape)
    if attack.norm == "linf":
        offset = 2 * torch.rand(shape, generator=draws) - 1
    else:
        normal = torch.randn(shape, generator=draws)
        lengths = torch.rand(len(clean), 1, 1, 1, generator=draws) ** (1 / clean[0].numel())
        offset = normal / _lengths(normal) * lengths
    return attack.radius * offset.to(clean.device)


def _within(clean: Tensor, x: Tensor, attack: Attack) -> Tensor:
    """The nearest point of the ball, and then of [0, 1], which does not leave the ball."""
    offset = x - clean
    if attack.norm == "linf":
        offset = offset.clamp(-attack.radius, attack.radius)
    else:
        offset = offset * (attack.radius / _lengths(offset).clamp_min(1e-12)).clamp_max(1)
    return (clean + offset).clamp(0, 1)
