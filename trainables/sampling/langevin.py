"""Langevin sampling (SGLD) in the forms the published methods use, and JEM++'s proximal variant.

M-EBM, JEM, ShortRun: x <- clamp(x - alpha clamp(dE/dx) + sigma N(0, I)) (sndnyang/mebm train_maebm.py:98-108).
IGEBM, f-EBM, KL-EBM: x <- x + sigma N(0, I), then x <- clamp(x - alpha clamp(dE/dx)) at the noisy x
(openai/ebm_code_release train.py:734-783; yilundu/improved_contrastive_divergence train.py:241-306).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from trainables.config.trial import TrialConfig
from trainables.data.pixels import RANGES, SIGNED, PixelRange

Energy = Callable[[Tensor], Tensor]
"""(N, C, H, W) to (N,)."""


Cut = tuple[Callable[[Tensor], Tensor], Energy]
"""A network cut behind its first layer: (N, C, H, W) to (N, C', H', W'), and from there to (N,)."""


@dataclass(frozen=True)
class Langevin:
    """The settings of a chain.

    Attributes:
        step_size: alpha.
        noise_std: sigma; the number 0 draws no noise at all; a tensor: one per image, (N, 1, 1, 1); several numbers:
            one per step.
        gradient_clamp: elementwise bound on dE/dx before the step; None: none.
        clamp_to: the box chains are clamped to at every step; None: none.
        noise_placement: `after` the gradient step, or `before` the gradient is taken.
        inner_steps: N of JEM++; 1 is plain SGLD.
    """

    step_size: float
    noise_std: float | Tensor | tuple[float, ...]
    gradient_clamp: float | None = None
    clamp_to: PixelRange | None = SIGNED
    noise_placement: Literal["after", "before"] = "after"
    inner_steps: int = 1

    @classmethod
    def of(cls, trial: TrialConfig) -> Self:
        """A trial's."""
        return cls(
            step_size=trial.step_size,
            noise_std=trial.noise_std,
            gradient_clamp=trial.gradient_clamp,
            clamp_to=RANGES[trial.pixel_range] if trial.sample_clamp else None,
            noise_placement=trial.noise_placement,
            inner_steps=trial.inner_steps,
        )

    def run(
        self, energy: Energy, start: Tensor, steps: int, generator: torch.Generator, cut: Cut | None = None
    ) -> Tensor:
        """One chain per image: `start` (N, C, H, W), not modified, to its state after `steps` steps, detached.

        The gradient is of the sum of the energies, so it is not scaled by the batch size. Parameters get no gradient.
        `cut` is the network, needed where `inner_steps` > 1.
        """
        return self.run_keeping(energy, start, steps, generator, cut)[0]

    def run_keeping(
        self, energy: Energy, start: Tensor, steps: int, generator: torch.Generator, cut: Cut | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `run`, and the points at which the last gradient was taken, for `differentiable_step`."""
        if self.inner_steps == 1:
            cut = None
        elif cut is None:
            raise ValueError("inner_steps > 1 needs a network with its own first layer")
        x = point = start.detach()
        for step in range(steps):
            if self.noise_placement == "before":
                x = self._noisy(x, generator, step)
            point = x
            x = self._descend(energy, x, self.step_size) if cut is None else self._proximal(cut, x)
            if self.noise_placement == "after":
                x = self._noisy(x, generator, step)
            x = self._boxed(x)
        return x.detach(), point.detach()

    def _descend(self, energy: Energy, x: Tensor, step_size: float) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            total = energy(x).sum()
        (gradient,) = torch.autograd.grad(total, x)
        with torch.no_grad():
            if self.gradient_clamp is not None:
                gradient = gradient.clamp_(-self.gradient_clamp, self.gradient_clamp)
            return x.detach().sub(gradient, alpha=step_size)

    def _proximal(self, cut: Cut, x: Tensor) -> Tensor:
        """JEM++'s inner loop (sndnyang/JEMPP train_jempp.py:83-113): N steps through the first layer alone.

        p = dE/d(first layer's output) is taken once at x and frozen; each inner step descends <stem(x), p>. The first
        layer being affine, that gradient is the same at every inner step.
        """
        stem, rest = cut
        with torch.enable_grad():
            h = stem(x.detach()).detach().requires_grad_()
            (p,) = torch.autograd.grad(rest(h).sum(), h)
        for _ in range(self.inner_steps):
            x = self._boxed(self._descend(lambda x: stem(x) * p, x, self.step_size / self.inner_steps))
        return x

    def differentiable_step(self, energy: Energy, point: Tensor) -> Tensor:
        """The gradient step at `point` as a function of the energy's parameters: (N, C, H, W) with a graph.

        KL-EBM's loss goes through the chain's last step this way (train.py:262-292); its noise is in `point` already.
        """
        with torch.enable_grad():
            x = point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
            if self.gradient_clamp is not None:
                gradient = gradient.clamp(-self.gradient_clamp, self.gradient_clamp)
            return self._boxed(x - self.step_size * gradient)

    def _boxed(self, x: Tensor) -> Tensor:
        return x if self.clamp_to is None else x.clamp(self.clamp_to.low, self.clamp_to.high)

    def _noisy(self, x: Tensor, generator: torch.Generator, step: int) -> Tensor:
        std = self.noise_std[step] if isinstance(self.noise_std, tuple) else self.noise_std
        if not isinstance(std, Tensor) and std == 0:
            return x
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if isinstance(std, Tensor):
            return x.detach() + std * noise
        return x.detach().add(noise, alpha=std)
