"""The critic of f-EBM: a second network H, trained against the energy for an f-divergence.

ermongroup/f-EBM train_febm.py:720-738, f_divergence.py. With r = H + E (at the critic's optimum the log ratio of data
to model density), u(r) = f'(e^r) and v(r) = f*(f'(e^r)):

- critic: minimise -[mean u(r+) - mean v(r-)] + lambda (mean H+^2 + mean H-^2);
- energy: minimise mean u(r+) + mean(E- sg v(r-)) - mean(E-) sg(mean v(r-)) - mean v(r-) + lambda (mean E+^2 +
  mean E-^2), sg stopping the gradient: the middle terms are the covariance that the model's own density brings in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trainables.igebm_networks import advance_power_iterations
from trainables.networks import EnergyModel
from trainables.optimisers import clip_by_sigma, gradient_norm, guarded_step, set_rate

EXPONENT_LIMIT = 5.0
"""Arguments of exp are clipped to this size (f_divergence.py:4-47)."""


def _exp(r: Tensor) -> Tensor:
    return torch.exp(r.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT))


F_DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "reverse-kl": (lambda r: -_exp(-r), lambda r: r - 1),
    "kl": (lambda r: 1 + r, _exp),
    "pearson": (lambda r: 2 * (_exp(r) - 1), lambda r: _exp(2 * r) - 1),
    "jensen-shannon": (
        lambda r: math.log(2) + r - torch.log1p(_exp(r)),
        lambda r: torch.log1p(_exp(r)) - math.log(2),
    ),
    "squared-hellinger": (lambda r: 1 - _exp(-r / 2), lambda r: _exp(r / 2) - 1),
}
"""u(r) and v(r) by name of the divergence."""


class Critic:
    """H with its optimiser.

    Args:
        network: H.
        optimiser: of its parameters.
        divergence: a name of `F_DIVERGENCES`.
        l2_weight: lambda.
        start_iteration: iterations before it train the L2 terms of E and H alone (train_febm.py:266-275).
        clip_sigma: see `optimisers.clip_by_sigma`; None: no bound.
        autocast: the precision in which H is passed.
    """

    def __init__(
        self,
        network: EnergyModel,
        optimiser: torch.optim.Optimizer,
        *,
        divergence: str,
        l2_weight: float,
        start_iteration: int,
        clip_sigma: float | None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.network, self.optimiser = network, optimiser
        self.u, self.v = F_DIVERGENCES[divergence]
        self._autocast = autocast
        self.l2_weight, self.start_iteration, self.clip_sigma = l2_weight, start_iteration, clip_sigma

    def playing(self, iteration: int) -> bool:
        """False for the first iterations, which train the L2 terms alone."""
        return iteration >= self.start_iteration

    def step(
        self,
        data: Tensor,
        data_energy: Tensor,
        samples: Tensor,
        sample_energy: Tensor,
        *,
        iteration: int,
        rate: float,
        tripped: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One step of H at fixed E.

        Args:
            data, samples: x+ and x-, (N, C, H, W).
            data_energy, sample_energy: E of them, (N,), without a graph.
            tripped: float32 scalar; 1 stops the step. So does a loss or a gradient that is not finite.

        Returns:
            The critic's loss and its gradient's norm, scalars on the device.
        """
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            h_data, h_samples = self.network.energy(data), self.network.energy(samples)
        loss = self.l2_weight * ((h_data**2).mean() + (h_samples**2).mean())
        if self.playing(iteration):
            loss = loss - (self.u(h_data + data_energy).mean() - self.v(h_samples + sample_energy).mean())
        loss.backward()
        advance_power_iterations(self.network)
        norm = gradient_norm(self.network.parameters())
        if self.clip_sigma is not None:
            clip_by_sigma(self.optimiser, self.clip_sigma)
        set_rate(self.optimiser, rate)
        # The loss as well: u and v are linear for some divergences, and a NaN energy then leaves the slope finite.
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        guarded_step(self.optimiser, torch.maximum(tripped, bad.to(torch.float32)))
        return loss.detach(), norm

    def data_term(self, data: Tensor, energy: Tensor, iteration: int) -> Tensor:
        """The part of the energy's loss that depends on E(x+), a scalar."""
        loss = self.l2_weight * (energy**2).mean()
        return loss + self.u(self._value(data) + energy).mean() if self.playing(iteration) else loss

    def sample_term(self, samples: Tensor, energy: Tensor, iteration: int) -> Tensor:
        """The part that depends on E(x-), a scalar."""
        loss = self.l2_weight * (energy**2).mean()
        if not self.playing(iteration):
            return loss
        v = self.v(self._value(samples) + energy)
        fixed = v.detach()
        return loss + (energy * fixed).mean() - energy.mean() * fixed.mean() - v.mean()

    def _value(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self.network.energy(x)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser."""
        return {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
