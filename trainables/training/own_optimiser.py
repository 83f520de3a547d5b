"""An optimiser of a user's own, made of a network's parameters."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn

from trainables.config.arguments import Arguments, own_part, parse_arguments
from trainables.plugins.calling import calling, said


def own_optimiser(
    name: str, arguments: Arguments, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser of a name, called as `NAME(parameters, lr=..., **arguments)`.

    Raises:
        ValueError: it cannot be made, or is not `torch.optim.Optimizer` of these parameters.
    """
    make, given = own_part("optimiser", name), list(parameters)
    with calling("optimiser", name, "is built", make):
        made = make(given, lr=learning_rate, **parse_arguments("optimiser", name, arguments).model_dump())
    if not isinstance(made, torch.optim.Optimizer):
        kind = type(made).__name__
        raise ValueError(said("optimiser", name, f"gives a {kind}, expected a torch.optim.Optimizer", make))
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if held != {id(p) for p in given}:
        raise ValueError(said("optimiser", name, "does not hold the parameters it was given", make))
    if missing := [group for group in made.param_groups if "lr" not in group]:
        raise ValueError(said("optimiser", name, f"{len(missing)} of its parameter groups have no lr to set", make))
    return made


def check_optimiser(name: str, arguments: Arguments) -> None:
    """Two steps on a small problem, with the state saved and loaded between them as a checkpoint does.

    Raises:
        ValueError: a step fails, or leaves weights that are not finite, or the state is not plain tensors and numbers.
    """
    make = own_part("optimiser", name)
    weights = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimiser = own_optimiser(name, arguments, [weights], 1e-3)
    for number in range(2):
        weights.grad = torch.full_like(weights, 0.1)
        with calling("optimiser", name, "step()", make):
            optimiser.step()
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(said("optimiser", name, "its step leaves weights that are not finite", make))
        if number == 0:
            _reload(name, make, optimiser)


def _reload(name: str, make: object, optimiser: torch.optim.Optimizer) -> None:
    file = io.BytesIO()
    with calling("optimiser", name, "state_dict()", make):
        torch.save(optimiser.state_dict(), file)
    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:
        what = "its state_dict() holds more than tensors, numbers, texts, lists and mappings of them"
        raise ValueError(said("optimiser", name, f"{what}, so no checkpoint can hold it", make)) from error
    with calling("optimiser", name, "load_state_dict()", make):
        optimiser.load_state_dict(state)


@lru_cache(maxsize=64)
def state_copies(name: str, arguments: Arguments) -> int:
    """Numbers that an optimiser keeps for each weight, rounded up; 2, as Adam, where that cannot be seen."""
    try:
        weights = nn.Parameter(torch.zeros(16, 16))
        weights.grad = torch.ones_like(weights)
        optimiser = own_optimiser(name, arguments, [weights], 1e-3)
        optimiser.step()
    except Exception:  # said elsewhere
        return 2
    kept = sum(v.numel() for state in optimiser.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return -(-(kept - kept % 16) // weights.numel())


def gated(name: str, arguments: Arguments) -> bool:
    """Whether its steps are gated by a copy of weights and state, because it does not know `found_inf`."""
    weights = nn.Parameter(torch.zeros(1))
    return not getattr(own_optimiser(name, arguments, [weights], 1e-3), "_step_supports_amp_scaling", False)
