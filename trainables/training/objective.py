"""The generative loss: contrastive divergence plus the L2 term in its three published forms.

L = [mean E(x+) - mean E(x-)] + lambda L2. It splits into a term of x+ and a term of x-, so each can be propagated back
as soon as its energies are known and no graph has to live while the sampler runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

L2Form = Literal["paper", "released", "batch_means"]


def data_term(energy: Tensor, l2_weight: float, l2_form: L2Form) -> Tensor:
    """The part of L that depends on E(x+), (N,) or (N, scales): a scalar."""
    mean = energy.mean()
    if l2_weight == 0:
        return mean
    square = mean**2 if l2_form == "batch_means" else (energy**2).mean()
    return mean + l2_weight * square


def sample_term(energy: Tensor, l2_weight: float, l2_form: L2Form) -> Tensor:
    """The part of L that depends on E(x-), (N,) or (N, scales): a scalar."""
    mean = energy.mean()
    if l2_weight == 0:
        return -mean
    # The released train_maebm.py:219 squares the batch mean here and the single energies for x+.
    square = (energy**2).mean() if l2_form == "paper" else mean**2
    return -mean + l2_weight * square


def l2_term(data: Tensor, samples: Tensor, l2_form: L2Form) -> Tensor:
    """The L2 term of E(x+) and E(x-), each (N,), without its weight: a scalar."""
    of_data = data_term(data, 1.0, l2_form) - data.mean()
    return of_data + sample_term(samples, 1.0, l2_form) + samples.mean()


def gradient_penalty(energy: Tensor, x: Tensor) -> Tensor:
    """Mean over the batch of |dE/dx|^2 / 2 with a graph, for E(x) of (N,) (VERA train.py:509-516)."""
    (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return (slope.flatten(1) ** 2).sum(1).mean() / 2


def sampler_term(
    energy: Callable[[Tensor], Tensor],
    moved: Tensor,
    neighbours: Tensor | None,
    *,
    kl_weight: float,
    entropy_weight: float,
) -> Tensor:
    """KL-EBM's terms through the sampler, propagated back at once; the energy's own parameters count as constants.

    kl_weight mean E(x) - entropy_weight mean_i log min_j |x_i - b_j| (yilundu/improved_contrastive_divergence
    train.py:417-455). Returned is their value, a scalar without a graph.

    Args:
        moved: x as a function of the parameters: the chain's last step with a graph, (N, C, H, W).
        neighbours: b, images of the replay buffer, (M, C, H, W); None leaves the entropy term out.
    """
    leaf = moved.detach().requires_grad_()
    loss = kl_weight * energy(leaf).mean()
    if neighbours is not None and entropy_weight > 0:
        distances = torch.cdist(leaf.flatten(1), neighbours.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        loss = loss - entropy_weight * distances.amin(1).log().mean()
    # The loss's slope at x is all that reaches theta: the parameters inside `energy` here are frozen.
    (slope,) = torch.autograd.grad(loss, leaf)
    moved.backward(slope)
    return loss.detach()


def learning_rate(
    iteration: int, epoch: int, *, base: float, warmup_iterations: int, decay_epochs: tuple[int, ...], factor: float
) -> float:
    """Learning rate of an iteration: linear warm-up from 0, then steps (train_maebm.py:183-193).

    Both count from 0: iteration 0 of a warm-up has rate 0, and a decay at epoch n holds from its first iteration.
    """
    if iteration <= warmup_iterations and warmup_iterations > 0:
        return base * iteration / warmup_iterations
    return base * factor ** sum(epoch >= e for e in decay_epochs)
