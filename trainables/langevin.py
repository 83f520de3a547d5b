"""Short-run Langevin sampling (SGLD) as the released code does it (train_maebm.py:98-108; paper, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def langevin(
    energy: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    step_size: float,
    noise_std: float,
    gradient_clamp: float | None,
    sample_clamp: bool,
    generator: torch.Generator,
) -> Tensor:
    """Run one chain per image for `steps` steps: x <- clamp(x - alpha clamp(dE/dx) + sigma N(0, I)).

    The gradient is of the sum of the energies, so it is not scaled by the batch size. Parameters get no gradient.

    Args:
        energy: (N, C, H, W) to (N,).
        start: (N, C, H, W), not modified.
        steps: K.
        step_size: alpha.
        noise_std: sigma; 0 draws no noise at all.
        gradient_clamp: elementwise bound on dE/dx before the step; None: none.
        sample_clamp: clamp to [-1, 1] after every step.

    Returns:
        (N, C, H, W), detached.
    """
    x = start.detach()
    for _ in range(steps):
        x = x.requires_grad_()
        with torch.enable_grad():
            total = energy(x).sum()
        (gradient,) = torch.autograd.grad(total, x)
        with torch.no_grad():
            if gradient_clamp is not None:
                gradient = gradient.clamp_(-gradient_clamp, gradient_clamp)
            x = x.detach().sub(gradient, alpha=step_size)
            if noise_std > 0:
                noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = x.add_(noise, alpha=noise_std)
            if sample_clamp:
                x = x.clamp_(-1, 1)
    return x.detach()
