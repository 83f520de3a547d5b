"""The generative loss: contrastive divergence plus the L2 term in its three published forms.

L = [mean E(x+) - mean E(x-)] + lambda L2. It splits into a term of x+ and a term of x-, so each can be propagated back
as soon as its energies are known and no graph has to live while the sampler runs.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

L2Form = Literal["paper", "released", "batch_means"]


def data_term(energy: Tensor, l2_weight: float, l2_form: L2Form) -> Tensor:
    """The part of L that depends on E(x+): float (N,) to a scalar."""
    mean = energy.mean()
    if l2_weight == 0:
        return mean
    square = mean**2 if l2_form == "batch_means" else (energy**2).mean()
    return mean + l2_weight * square


def sample_term(energy: Tensor, l2_weight: float, l2_form: L2Form) -> Tensor:
    """The part of L that depends on E(x-): float (N,) to a scalar."""
    mean = energy.mean()
    if l2_weight == 0:
        return -mean
    # The released train_maebm.py:219 squares the batch mean here and the single energies for x+.
    square = (energy**2).mean() if l2_form == "paper" else mean**2
    return -mean + l2_weight * square


def learning_rate(
    iteration: int, epoch: int, *, base: float, warmup_iterations: int, decay_epochs: tuple[int, ...], factor: float
) -> float:
    """Learning rate of an iteration: linear warm-up from 0, then steps (train_maebm.py:183-193).

    Args:
        iteration: iterations done before this one, from 0; iteration 0 of a warm-up has rate 0.
        epoch: epoch it belongs to, from 0; a decay at epoch n holds from that epoch's first iteration.
    """
    if iteration <= warmup_iterations and warmup_iterations > 0:
        return base * iteration / warmup_iterations
    return base * factor ** sum(epoch >= e for e in decay_epochs)
