"""`TrainedNetwork`: a network with its optimiser, rate, gradient bounds and moving average; rules of its update.

Every step takes `found_inf`, so a latch on the device can stop it without asking the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainables.config.arguments import Arguments, is_own
from trainables.evaluation.scores import frozen_statistics
from trainables.networks.igebm import advance_power_iterations
from trainables.training.own_optimiser import own_optimiser

if TYPE_CHECKING:
    from trainables.training.method import Progress

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
    arguments: Arguments | None = None,
) -> torch.optim.Optimizer:
    """`sgd` with momentum or `adam`, in PyTorch's fused form, whose step does nothing where `found_inf` is 1.

    One of a user's own takes the rate and its own `arguments`.
    """
    if is_own("optimiser", kind):
        return own_optimiser(kind, arguments or Arguments(), parameters, learning_rate)
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


@torch.no_grad()
def gated_step(optimiser: torch.optim.Optimizer, skip: Tensor) -> None:
    """A step of an optimiser that does not know `found_inf`: weights and state are copied, and what holds is selected.

    State that the first step makes is zero where that step is skipped. What is not a tensor on the device, and nests of
    them, count the step all the same.
    """
    weights = [(p, p.clone()) for group in optimiser.param_groups for p in group["params"]]
    before = {key: value.clone() for key, value in _state(optimiser, skip)}
    optimiser.step()
    wanted = skip > 0
    for p, old in weights:
        p.copy_(torch.where(wanted, old, p))
    for key, value in _state(optimiser, skip):
        value.copy_(torch.where(wanted, before[key] if key in before else torch.zeros_like(value), value))


def _state(optimiser: torch.optim.Optimizer, like: Tensor) -> list[tuple[tuple[int, str], Tensor]]:
    """An optimiser's tensors on a device, by parameter and name."""
    found = ((id(p), name, value) for p, state in optimiser.state.items() for name, value in state.items())
    return [((p, name), v) for p, name, v in found if isinstance(v, Tensor) and v.device == like.device]


class MovingAverage:
    """An exponential moving average of a model's weights that starts as a copy (KL-EBM train.py:153-156).

    The running statistics of `module`, the averaged model, are copies of the model's.
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


class TrainedNetwork:
    """What an iteration trains.

    Args:
        optimiser: of the network's parameters; one whose step does not take `found_inf` is gated by copy and select.
        rate: learning rate by progress; None: the optimiser's own stays.
        clip_norm: bound on the norm of all gradients together (KL-EBM: 0.5); None: none.
        clip_sigma: see `clip_by_sigma`; None: no bound.
        watched: a step that is not finite ends the trial.
    """

    def __init__(
        self,
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        rate: Callable[[Progress], float] | None = None,
        *,
        clip_norm: float | None = None,
        clip_sigma: float | None = None,
        average: MovingAverage | None = None,
        watched: bool = True,
    ) -> None:
        self.network, self.optimiser, self.average, self.watched = network, optimiser, average, watched
        self._rate, self._clip_norm, self._clip_sigma = rate, clip_norm, clip_sigma

    @property
    def gated(self) -> bool:
        """Whether the optimiser does not know `found_inf`."""
        return not getattr(self.optimiser, "_step_supports_amp_scaling", False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that the optimiser has, in its order."""
        return (p for group in self.optimiser.param_groups for p in group["params"])

    def set_rate(self, at: Progress) -> float | None:
        """Set the learning rate of the coming step, on the host, and return it."""
        if self._rate is None:
            return None
        set_rate(self.optimiser, rate := self._rate(at))
        return rate

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients together, a scalar on the device."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    def step(self, skip: Tensor, norm: Tensor) -> None:
        """One step, or none where `skip`, a float32 scalar on the device, is 1; `norm` is the gradient's."""
        with torch.no_grad():
            advance_power_iterations(self.network)
            if self._clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters(), self._clip_norm, norm)
            if self._clip_sigma is not None:
                clip_by_sigma(self.optimiser, self._clip_sigma)
        if self.gated:
            gated_step(self.optimiser, skip)
        else:
            self.optimiser.found_inf = skip  # type: ignore[attr-defined]
            self.optimiser.step()
        if self.average is not None:
            self.average.update(self.network, skip)

    def prepare_for_capture(self, device: torch.device) -> None:
        """Let a CUDA graph capture the step: the rate becomes a scalar on the device, which `set_rate` fills.

        Call it again after `load_state_dict`, which may bring a rate of another kind.
        """
        # Adam warns where a capturable step runs uncaptured, which the iterations before the capture do on purpose.
        self.optimiser._warned_capturable_if_run_uncaptured = True
        for group in self.optimiser.param_groups:
            if "capturable" in group:
                group["capturable"] = True
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and average."""
        return {
            "weights": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.network.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])


Update = Callable[[Callable[[], None], TrainedNetwork, Callable[[], AbstractContextManager[None]]], Tensor]
"""Runs the gradients of an iteration, leaves them in the main network's parameters and returns their norm, a scalar on
the device. The third argument is a block in which nothing counts as a signal."""


def plain(gradients: Callable[[], None], main: TrainedNetwork, _muted: object) -> Tensor:
    """The gradient where the weights are."""
    main.zero_grad()
    gradients()
    return main.gradient_norm()


@dataclass(frozen=True)
class Sam:
    """Sharpness-aware minimisation (Foret et al., ICLR 2021): the gradient a step of length `rho` up the first one.

    The second pass sees the same x+, x- and labels (`Context.once`). Running statistics and signals are the first
    pass's. With `rho` 0 it is `plain`, bit by bit, where passes are deterministic.

    Args:
        rho: length of the step over all parameters that have a gradient.
        adaptive: the step is rho w^2 g / ||(|w| g)|| in place of rho g / ||g|| (ASAM: Kwon et al., ICML 2021;
            sndnyang/SADAJEM sam.py:14-48).
    """

    rho: float
    adaptive: bool = False

    def __call__(
        self, gradients: Callable[[], None], main: TrainedNetwork, muted: Callable[[], AbstractContextManager[None]]
    ) -> Tensor:
        """See `Update`."""
        norm = plain(gradients, main, muted)
        with torch.no_grad():
            moved = [(p, p.detach().clone(), p.grad) for p in main.parameters() if p.grad is not None]
            if self.adaptive:
                norm = torch.nn.utils.get_total_norm([p.abs() * gradient for p, _, gradient in moved])
            for p, _, gradient in moved:
                p.add_((p * p * gradient if self.adaptive else gradient) * (self.rho / (norm + 1e-12)))
        with frozen_statistics(main.network), muted():
            plain(gradients, main, muted)
        with torch.no_grad():
            for p, before, _ in moved:
                p.copy_(before)
        return main.gradient_norm()
