"""VERA's sampler: a generator trained beside the energy in place of MCMC.

After wgrathwohl/VERA train.py and models/generator.py. x = g(z) + sigma eps with z ~ N(0, I); the generator minimises
mean E(x) - w H[q], H being the entropy of its density q. The entropy's gradient is
c = E_{h ~ q(h|x)}[(x - g(h)) / sigma^2], taken by self-normalised importance sampling from N(z, diag(s^2)) around the
latent that made x; s is learned by maximising the evidence lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainables.config import GeneratorConfig
from trainables.evaluation import frozen_statistics
from trainables.generator import build_generator
from trainables.optimisers import build_optimiser, gradient_norm, guarded_step, set_rate

FIRST_NOISE_STD, FIRST_POSTERIOR_STD = 0.01, 0.1
"""Initial sigma and s (generator.py)."""


def normal_log_density(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """log N(x; mean, std^2), summed over all but the first dimension: (N, ...) to (N,)."""
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    density = -0.5 * ((x - mean) / std) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).sum(1)


class Generator:
    """g, sigma and s with their optimisers.

    Args:
        config: its settings.
        shape: (C, H, W) of an image.
        betas: of the generator's Adam; the posterior's has PyTorch's own (0.9, 0.999).
        seed: of the initial weights.
        generator: source of every latent and noise draw.
        autocast: the precision in which g is passed.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        shape: tuple[int, int, int],
        betas: tuple[float, float],
        seed: int,
        generator: torch.Generator,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config, self.generator, device = config, generator, generator.device
        self.network = build_generator(shape, noise_dim=config.noise_dim, features=config.features, seed=seed).to(
            device
        )
        self.log_sigma = nn.Parameter(torch.full((1,), math.log(FIRST_NOISE_STD), device=device))
        self.posterior_log_std = nn.Parameter(
            torch.full((config.noise_dim,), math.log(FIRST_POSTERIOR_STD), device=device)
        )
        self.optimiser = build_optimiser(
            [*self.network.parameters(), self.log_sigma], "adam", learning_rate=config.learning_rate, betas=betas
        )
        self.posterior_optimiser = build_optimiser(
            [self.posterior_log_std], "adam", learning_rate=config.posterior_learning_rate
        )
        self._made: tuple[Tensor, Tensor] | None = None
        self._autocast = autocast

    def _mean(self, latent: Tensor) -> Tensor:
        with self._autocast():
            images: Tensor = self.network(latent)
        return images

    def draw(self, count: int) -> Tensor:
        """x- of this iteration, float (count, C, H, W), detached; the next `step` trains on the same images."""
        self.network.train()
        latent = self._normal(count, self.config.noise_dim)
        mean = self._mean(latent)
        images = mean + self._normal(*mean.shape) * self.log_sigma.exp()
        self._made = images, latent
        return images.detach()

    def step(self, energy: Callable[[Tensor], Tensor], *, rate: float, tripped: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the posterior and of the generator, on the images of the last `draw`.

        Args:
            energy: (N, C, H, W) to (N,); its parameters get no gradient.
            rate: learning rate of the generator.
            tripped: float32 scalar; 1 stops the step. So does a gradient that is not finite.

        Returns:
            The generator's loss and its gradient's norm, scalars on the device.
        """
        if self._made is None:
            raise RuntimeError("draw before step")
        (images, latent), self._made = self._made, None
        x = images.detach()
        leaf = x.clone().requires_grad_()
        energies = energy(leaf)
        (slope,) = torch.autograd.grad(energies.sum(), leaf)
        loss, direction = energies.detach().mean(), slope / len(x)
        if self.config.entropy_weight > 0:
            c = self.entropy_gradient(x, latent)
            self._posterior_step(x, latent, tripped)
            loss = loss - self.config.entropy_weight * (c * x).mean(0).sum()
            direction = direction - self.config.entropy_weight * c / len(x)
        self.optimiser.zero_grad(set_to_none=True)
        images.backward(direction)
        norm = gradient_norm(p for group in self.optimiser.param_groups for p in group["params"])
        set_rate(self.optimiser, rate)
        guarded_step(self.optimiser, torch.maximum(tripped, (~torch.isfinite(norm)).to(torch.float32)))
        low, high = self.config.noise_std_range
        with torch.no_grad():
            self.log_sigma.clamp_(math.log(low), math.log(high))
        return loss, norm

    @torch.no_grad()
    def entropy_gradient(self, x: Tensor, latent: Tensor) -> Tensor:
        """c: the entropy's gradient at x, float (N, C, H, W).

        Args:
            x: images made from `latent`, (N, C, H, W).
            latent: (N, noise_dim).
        """
        n, count, sigma = len(x), self.config.importance_samples, self.log_sigma.exp()
        std = self.posterior_log_std.exp()
        near = latent + std * self._normal(count, *latent.shape)
        flat = near.flatten(0, 1)
        means = self._mean(flat)
        repeated = x.repeat(count, 1, 1, 1)
        joint = normal_log_density(flat, 0.0, 1.0) + normal_log_density(repeated, means, sigma)
        proposal = normal_log_density(flat, latent.repeat(count, 1), std)
        weights = (joint - proposal).view(count, n).softmax(0)
        slopes: Tensor = ((repeated - means) / sigma**2).view(count, *x.shape)
        return (slopes * weights.view(count, n, 1, 1, 1)).sum(0)

    def _posterior_step(self, x: Tensor, latent: Tensor, tripped: Tensor) -> None:
        std = self.posterior_log_std.exp()
        near = latent + std * self._normal(*latent.shape)
        joint = normal_log_density(near, 0.0, 1.0) + normal_log_density(
            x, self._mean(near), self.log_sigma.detach().exp()
        )
        # The entropy of N(z, diag(s^2)) up to a constant.
        bound = joint.mean() + self.posterior_log_std.sum()
        (gradient,) = torch.autograd.grad(-bound, self.posterior_log_std)
        self.posterior_log_std.grad = gradient
        bad = (~torch.isfinite(gradient).all()).to(torch.float32)
        guarded_step(self.posterior_optimiser, torch.maximum(tripped, bad))

    def sample(self, count: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """`count` images, float (count, C, H, W), outside training: batch statistics, none of them kept."""
        with frozen_statistics(self.network), torch.no_grad():
            parts = []
            for start in range(0, count, batch_size):
                size = min(batch_size, count - start)
                z = torch.randn(size, self.config.noise_dim, generator=generator, device=generator.device)
                mean = self._mean(z)
                noise = torch.randn(mean.shape, generator=generator, device=generator.device)
                parts.append(mean + noise * self.log_sigma.exp())
            return torch.cat(parts)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimisers."""
        return {
            "network": self.network.state_dict(),
            "log_sigma": self.log_sigma.detach(),
            "posterior_log_std": self.posterior_log_std.detach(),
            "optimiser": self.optimiser.state_dict(),
            "posterior_optimiser": self.posterior_optimiser.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.network.load_state_dict(state["network"])
        with torch.no_grad():
            self.log_sigma.copy_(state["log_sigma"])
            self.posterior_log_std.copy_(state["posterior_log_std"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.posterior_optimiser.load_state_dict(state["posterior_optimiser"])
