"""Optimisers and gradient bounds of the published methods. Every step takes `found_inf`, so a latch on the device
can stop it without asking the host.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CLIP_SIGMA_OFFSET = 0.1
"""Added to the bound of `clip_by_sigma` (openai/ebm_code_release custom_adam.py:150-166)."""


def build_optimiser(
    parameters: Iterable[nn.Parameter],
    kind: str,
    *,
    learning_rate: float,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """`sgd` with momentum or `adam`, in PyTorch's fused form, whose step does nothing where `found_inf` is 1."""
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)
    return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Learning rate of the next step."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def prepare_for_capture(optimiser: torch.optim.Optimizer, device: torch.device) -> None:
    """Let a CUDA graph capture the optimiser's step: the rate becomes a scalar on the device, which `set_rate` fills.

    Call it again after `load_state_dict`, which may bring a rate of another kind.
    """
    # Adam warns where a capturable step runs uncaptured, which the iterations before the capture do on purpose.
    optimiser._warned_capturable_if_run_uncaptured = True
    for group in optimiser.param_groups:
        if "capturable" in group:
            group["capturable"] = True
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)


def guarded_step(optimiser: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step, or none at all where `skip`, a float32 scalar on the device, is 1."""
    optimiser.found_inf = skip  # type: ignore[attr-defined]
    optimiser.step()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together: a scalar on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_by_norm(parameters: Iterable[nn.Parameter], bound: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm, given, is at most `bound` (KL-EBM: 0.5)."""
    torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)


def clip_by_sigma(optimiser: torch.optim.Optimizer, sigmas: float) -> None:
    """Bound every gradient element by sigmas * sqrt(v / (1 - beta2^t)) + 0.1, with Adam's v before this step.

    IGEBM's optimiser (custom_adam.py:150-166): at the first step v is 0 and the bound 0.1.
    """
    for group in optimiser.param_groups:
        decay = group["betas"][1]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimiser.state.get(p)
            if not state:
                p.grad.clamp_(-CLIP_SIGMA_OFFSET, CLIP_SIGMA_OFFSET)
                continue
            bound = (state["exp_avg_sq"] / (1 - decay ** (state["step"] + 1))).sqrt_() * sigmas + CLIP_SIGMA_OFFSET
            p.grad.copy_(torch.minimum(torch.maximum(p.grad, -bound), bound))


class MovingAverage:
    """An exponential moving average of a model's weights that starts as a copy (KL-EBM train.py:153-156).

    Attributes:
        module: the averaged model; its running statistics are copies of the model's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """Move towards the model's weights, or not at all where `skip`, a float32 scalar on the device, is 1."""
        weight = (1 - self.decay) * (1 - skip)
        for average, new in zip(self.module.parameters(), model.parameters(), strict=True):
            average.lerp_(new.detach(), weight)
        for kept, now in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.module.load_state_dict(state)
