"""A network of a user's own as an energy model: heads are added to its features, or its output is the energy."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from trainables.config.arguments import Arguments, own_part
from trainables.networks.energy_model import EnergyModel
from trainables.networks.layers import Dropout, Shape, Trunk, half_to_float, seeded
from trainables.plugins.calling import calling, said

PROBE = 2
"""Images that a new network is shown once, to see what it gives."""
USUAL_MOMENTUM = 0.1
"""PyTorch's own of batch norm: a norm that has another was given it on purpose."""


class OwnTrunk(Trunk):
    """A user's network, (N, C, H, W) to (N, F); `features` is 1 where it gives (N,) energies."""

    def __init__(self, network: nn.Module, features: int) -> None:
        super().__init__()
        self.network, self.features = network, features

    def first(self, x: Tensor) -> Tensor:
        """The network's own `first`."""
        return self.network.first(x)  # type: ignore[no-any-return, operator]

    def after_first(self, h: Tensor) -> Tensor:
        """The network's own `after_first`."""
        return self.network.after_first(h)  # type: ignore[no-any-return, operator]

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives."""
        return self.network(x)  # type: ignore[no-any-return]


class DirectEnergy(EnergyModel):
    """A network whose output is the energy itself, (N,), low on data. It has no heads."""

    def __init__(self, trunk: OwnTrunk) -> None:
        nn.Module.__init__(self)
        self.trunk = trunk
        self.class_head = None
        self.energy_kind = "head"

    def pooled(self, x: Tensor) -> Tensor:
        """The energy as the only feature, (N, 1)."""
        return half_to_float(self.trunk(x))[:, None]

    def _terms(self, features: Tensor) -> Tensor:
        return half_to_float(features)


def own_network(
    name: str,
    arguments: Arguments,
    shape: Shape,
    classes: int,
    *,
    norm: str | None,
    momentum: float,
    energy: Literal["head", "logsumexp"],
    class_head: bool,
    seed: int,
) -> EnergyModel:
    """The energy model of a user's network, freshly initialised; see `energy_model.build_network`.

    Raises:
        ValueError: it cannot be built or passed, gives something else than it should, lacks what a field asks for.
    """
    make = own_part("network", name)

    def build() -> EnergyModel:
        with seeded(seed):
            network = _made(name, make, arguments, shape, classes)
            found = norms_of(network)
            if norm is not None and norm not in (found or ("none",)):
                has = " and ".join(found) or "no batch, instance or spectral norm: set norm to none"
                raise ValueError(f"norm is {norm}, but network {name} has {has}")
            prepare(network, momentum)
            features = _features(name, network, shape)
            trunk = OwnTrunk(network, features or 1)
            if features is not None:
                return EnergyModel(trunk, classes if class_head else None, energy=energy)
            if class_head:
                raise ValueError(
                    said("network", name, "gives energies, (N,), but this method needs class logits: give features, "
                         "(N, F)", make)
                )  # fmt: skip
            return DirectEnergy(trunk)

    if torch.get_default_device().type != "meta":
        return build()
    try:
        return build()
    except ValueError:  # code that looks at values, which tensors without memory have not
        with torch.device("cpu"):
            return build()


def _made(name: str, make: Callable[..., Any], arguments: Arguments, shape: Shape, classes: int) -> nn.Module:
    with calling("network", name, "is built", make):
        network = make(shape, classes, **arguments.model_dump())
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise ValueError(said("network", name, f"gives a {kind}, expected a torch.nn.Module", make))
    return network


def norms_of(network: nn.Module) -> tuple[str, ...]:
    """Which of the normalisations that `norm` names a network has."""
    modules = list(network.modules())
    found = {
        "batch": any(isinstance(m, _BatchNorm) for m in modules),
        "instance": any(isinstance(m, _InstanceNorm) for m in modules),
        "spectral": any(_is_spectral(m) for m in modules),
    }
    return tuple(kind for kind, there in found.items() if there)


def _is_spectral(module: nn.Module) -> bool:
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    if "SpectralNorm" in hooks:
        return True
    parametrized: Any = module.parametrizations if is_parametrized(module) else {}
    return any(type(p).__name__ == "_SpectralNorm" for several in parametrized.values() for p in several)


def prepare(network: nn.Module, momentum: float) -> None:
    """Let a network's batch norms have the trial's momentum, and its dropouts draw from the trial's generator."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.momentum == USUAL_MOMENTUM:
            module.momentum = momentum
        for child_name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, child_name, Dropout(child.p).train(child.training))


def _features(name: str, network: nn.Module, shape: Shape) -> int | None:
    """F of a network that gives (N, F); None of one that gives energies, (N,)."""
    training = network.training
    network.eval()
    x = torch.zeros(PROBE, *shape)
    with torch.no_grad(), calling("network", name, f"forward of {(PROBE, *shape)}", network):
        out = network(x)
    network.train(training)
    return checked_output(name, network, out, PROBE)


def checked_output(name: str, network: nn.Module, out: Any, count: int) -> int | None:
    """F of an output (count, F), None of energies (count,). Raises ValueError: it is neither."""
    what = None
    if not isinstance(out, Tensor):
        what = f"a {type(out).__name__}, expected a tensor"
    elif not out.is_floating_point():
        what = f"{out.dtype}, expected floating-point numbers"
    elif out.dim() not in (1, 2) or len(out) != count or out.numel() == 0:
        what = f"shape {tuple(out.shape)} for {count} images, expected (N, F) features or (N,) energies"
    elif out.dim() == 2 and out.shape[1] == 1:
        what = f"shape {tuple(out.shape)}: give (N,) energies (.squeeze(1)), or (N, F) features with F > 1"
    if what is not None:
        raise ValueError(said("network", name, f"forward gives {what}", network))
    return None if out.dim() == 1 else int(out.shape[1])


@lru_cache(maxsize=256)
def found_norm(make: Callable[..., Any], name: str, arguments: Arguments) -> str | None:
    """The normalisation of a user's network, as `norm` names it; None where that cannot be told here."""
    for shape in ((3, 32, 32), (1, 8, 8), (1, 28, 28), (3, 64, 64)):
        for device in ("meta", "cpu"):
            try:
                with torch.device(device), seeded(0):
                    network = _made(name, make, arguments, shape, 10)
            except ValueError:
                continue
            return next(iter(norms_of(network)), "none")
    return None
