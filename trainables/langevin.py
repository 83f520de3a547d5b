"""Langevin sampling (SGLD) in the forms the published methods use, and JEM++'s proximal variant.

M-EBM, JEM, ShortRun: x <- clamp(x - alpha clamp(dE/dx) + sigma N(0, I)) (sndnyang/mebm train_maebm.py:98-108).
IGEBM, f-EBM, KL-EBM: x <- x + sigma N(0, I), then x <- clamp(x - alpha clamp(dE/dx)) at the noisy x
(openai/ebm_code_release train.py:734-783; yilundu/improved_contrastive_divergence train.py:241-306).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from trainables.pixels import SIGNED, PixelRange

Energy = Callable[[Tensor], Tensor]
"""(N, C, H, W) to (N,)."""


class Stemmed(Protocol):
    """A network whose first layer can be taken apart from the rest."""

    def stem(self, x: Tensor) -> Tensor:
        """First layer: (N, C, H, W) to (N, C', H', W')."""
        ...

    def energy_from_stem(self, h: Tensor) -> Tensor:
        """The rest: (N, C', H', W') to (N,)."""
        ...


@dataclass(frozen=True)
class Langevin:
    """The settings of a chain.

    Attributes:
        step_size: alpha.
        noise_std: sigma; 0 draws no noise at all.
        gradient_clamp: elementwise bound on dE/dx before the step; None: none.
        clamp_to: the box chains are clamped to at every step; None: none.
        noise_placement: `after` the gradient step, or `before` the gradient is taken.
        inner_steps: N of JEM++; 1 is plain SGLD.
    """

    step_size: float
    noise_std: float
    gradient_clamp: float | None = None
    clamp_to: PixelRange | None = SIGNED
    noise_placement: Literal["after", "before"] = "after"
    inner_steps: int = 1

    def run(
        self,
        energy: Energy,
        start: Tensor,
        steps: int,
        generator: torch.Generator,
        stemmed: Stemmed | None = None,
    ) -> Tensor:
        """One chain per image: `start` (N, C, H, W), not modified, to its state after `steps` steps, detached.

        The gradient is of the sum of the energies, so it is not scaled by the batch size. Parameters get no gradient.

        Args:
            energy: what the chains descend.
            steps: K.
            stemmed: the network, needed where `inner_steps` > 1.
        """
        return self.run_keeping(energy, start, steps, generator, stemmed)[0]

    def run_keeping(
        self,
        energy: Energy,
        start: Tensor,
        steps: int,
        generator: torch.Generator,
        stemmed: Stemmed | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `run`, and the points at which the last gradient was taken, for `differentiable_step`."""
        x = point = start.detach()
        for _ in range(steps):
            if self.noise_placement == "before":
                x = self._noisy(x, generator)
            point = x
            if self.inner_steps > 1:
                if stemmed is None:
                    raise ValueError("inner_steps > 1 needs a network with a first layer of its own")
                x = self._proximal(stemmed, x)
            else:
                x = self._descend(energy, x)
            if self.noise_placement == "after":
                x = self._noisy(x, generator)
            x = self._boxed(x)
        return x.detach(), point.detach()

    def _descend(self, energy: Energy, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            total = energy(x).sum()
        (gradient,) = torch.autograd.grad(total, x)
        with torch.no_grad():
            return x.detach().sub(self._clamped(gradient), alpha=self.step_size)

    def _proximal(self, network: Stemmed, x: Tensor) -> Tensor:
        """JEM++'s inner loop (sndnyang/JEMPP train_jempp.py:83-113): N steps through the first layer alone.

        p = dE/d(first layer's output) is taken once at x and frozen; each inner step descends <stem(x), p>. The first
        layer being affine, that gradient is the same at every inner step.
        """
        with torch.enable_grad():
            h = network.stem(x.detach()).detach().requires_grad_()
            (p,) = torch.autograd.grad(network.energy_from_stem(h).sum(), h)
        for _ in range(self.inner_steps):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                hamiltonian = (network.stem(x) * p).sum()
            (gradient,) = torch.autograd.grad(hamiltonian, x)
            with torch.no_grad():
                x = x.detach().sub(self._clamped(gradient), alpha=self.step_size / self.inner_steps)
                x = self._boxed(x)
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
            moved = x - self.step_size * gradient
            return moved if self.clamp_to is None else moved.clamp(self.clamp_to.low, self.clamp_to.high)

    def _clamped(self, gradient: Tensor) -> Tensor:
        bound = self.gradient_clamp
        return gradient if bound is None else gradient.clamp_(-bound, bound)

    def _boxed(self, x: Tensor) -> Tensor:
        return x if self.clamp_to is None else x.clamp(self.clamp_to.low, self.clamp_to.high)

    def _noisy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.noise_std == 0:
            return x
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x.detach().add(noise, alpha=self.noise_std)
