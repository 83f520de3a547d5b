"""f-EBM's two losses against their table and formulas (algorithms.md, section 11.1), and the critic's steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainables.methods.f_ebm import F_DIVERGENCES, FEbm
from trainables.networks.energy_model import build_network
from trainables.training.context import Context, Found
from trainables.training.method import Batch, Outputs, Progress, Variant
from trainables.training.network import TrainedNetwork, build_optimiser, set_rate


def _exp(value: float) -> float:
    return math.exp(min(5.0, max(-5.0, value)))


# f'(e^r) and f*(f'(e^r)), exp clipped to arguments of 5, written for one number.
TABLE: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "reverse-kl": (lambda r: -_exp(-r), lambda r: -1 + r),
    "kl": (lambda r: 1 + r, _exp),
    "pearson": (lambda r: 2 * (_exp(r) - 1), lambda r: _exp(2 * r) - 1),
    "jensen-shannon": (
        lambda r: math.log(2) + r - math.log(1 + _exp(r)),
        lambda r: -math.log(2) + math.log(1 + _exp(r)),
    ),
    "squared-hellinger": (lambda r: 1 - _exp(-r / 2), lambda r: _exp(r / 2) - 1),
}
# f itself and its convex conjugate: what the table must follow from where nothing is clipped. (f-GAN, Table 6.)
GENERATORS: dict[str, Callable[[float], float]] = {
    "reverse-kl": lambda t: -math.log(t),
    "kl": lambda t: t * math.log(t),
    "pearson": lambda t: (t - 1) ** 2,
    "jensen-shannon": lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
    "squared-hellinger": lambda t: (math.sqrt(t) - 1) ** 2,
}
POINTS = [-30.0, -11.0, -7.0, -4.0, -2.0, -0.3, 0.0, 0.7, 2.4, 2.6, 4.9, 5.1, 9.0, 12.0]


def test_the_names() -> None:
    assert set(F_DIVERGENCES) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_table(name: str) -> None:
    r = torch.tensor(POINTS, dtype=torch.float64)
    for function, literal in zip(F_DIVERGENCES[name], TABLE[name], strict=True):
        wanted = torch.tensor([literal(x) for x in POINTS], dtype=torch.float64)
        torch.testing.assert_close(function(r), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TABLE)
def test_table_follows_from_the_divergence(name: str) -> None:
    """u = f'(t) and v = f*(u) = t f'(t) - f(t) at t = e^r."""
    f = GENERATORS[name]
    for r in (-1.5, -0.2, 0.0, 0.4, 1.9):
        t, step = math.exp(r), 1e-5
        slope = (f(t + step) - f(t - step)) / (2 * step)
        u, v = (float(function(torch.tensor(r, dtype=torch.float64))) for function in F_DIVERGENCES[name])
        assert u == pytest.approx(slope, abs=1e-6)
        assert v == pytest.approx(t * slope - f(t), abs=1e-6)


class _Linear(nn.Module):
    """H or E as a linear function of the pixels, in float64."""

    def __init__(self, seed: int, size: int = 12) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(size, generator=g, dtype=torch.float64) / 2)
        self.bias = nn.Parameter(torch.randn(1, generator=g, dtype=torch.float64))

    def energy(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight + self.bias


def _batch(seed: int, count: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, 2, generator=g, dtype=torch.float64)


class Latch:
    """Remembers the last step of a second network."""

    def __init__(self) -> None:
        self.tripped = torch.zeros(())
        self.seen: Any = None

    def update_companion(self, _iteration: Any, *, loss: Tensor, grad: Tensor) -> None:
        self.seen = loss, grad


class HookContext(Context):
    """A context of a few parts, to call hooks without a trial."""

    def __init__(self, method: Any, networks: dict[str, TrainedNetwork], trial: dict[str, Any], **parts: Any) -> None:
        self.method, self.networks, self.latch, self.variant = method, networks, Latch(), Variant()  # type: ignore[assignment]
        self.trial: Any = SimpleNamespace(precision="fp32", **trial)
        self.device, self.number = torch.device("cpu"), torch.zeros(())
        self._nets = {name: trained.network for name, trained in networks.items()}
        self._memo, self._found = {}, Found()
        self.__dict__ |= parts


class Critic:
    """f-EBM's hooks around a critic H, with E(x+) and E(x-) given."""

    def __init__(
        self,
        network: Any,
        optimiser: torch.optim.Optimizer,
        *,
        divergence: str,
        l2_weight: float,
        start_iteration: int,
        clip_sigma: float | None,
    ) -> None:
        self.network, self.optimiser, self.l2_weight = network, optimiser, l2_weight
        self.method = FEbm(divergence=divergence, start_iteration=start_iteration)
        self.trained = TrainedNetwork(network, optimiser, clip_sigma=clip_sigma)
        self.state_dict, self.load_state_dict = self.trained.state_dict, self.trained.load_state_dict

    def context(
        self, iteration: int, data: Tensor, samples: Tensor, sample_energy: Tensor | None = None
    ) -> HookContext:
        ctx = HookContext(self.method, {"critic": self.trained}, {"l2_weight": self.l2_weight})
        ctx.variant = self.method.variant(Progress(iteration, 0))
        value = ctx.value
        ctx.__dict__ |= {
            "data": lambda: Batch(data),
            "samples": lambda: Batch(samples),
            "chains": lambda: Batch(samples),
            "langevin": lambda start: start,
            "value": lambda x, network="energy": value(x, network=network) if network == "critic" else sample_energy,
        }
        return ctx

    def playing(self, iteration: int) -> bool:
        return self.method.variant(Progress(iteration, 0)) == Variant("play")

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
        ctx = self.context(iteration, data, samples, sample_energy)
        ctx.latch.tripped = tripped
        set_rate(self.optimiser, rate)
        self.method.step_critic(data_energy, ctx)
        found: tuple[Tensor, Tensor] = ctx.latch.seen
        return found

    def data_term(self, data: Tensor, energy: Tensor, iteration: int) -> Tensor:
        ctx = self.context(iteration, data, data)
        ctx.once("critic", lambda: None)  # has taken its step
        return self.method.data_loss(Outputs(energy), ctx)

    def sample_term(self, samples: Tensor, energy: Tensor, iteration: int) -> Tensor:
        return self.method.sample_loss(Outputs(energy), self.context(iteration, samples, samples))


def _critic(name: str = "jensen-shannon", l2: float = 0.7, start: int = 2, clip: float | None = None) -> Critic:
    network: Any = _Linear(1)
    optimiser = build_optimiser(network.parameters(), "adam", learning_rate=0.01, betas=(0.0, 0.999))
    return Critic(network, optimiser, divergence=name, l2_weight=l2, start_iteration=start, clip_sigma=clip)


def _numeric(loss: Callable[[], float], parameters: list[Tensor], step: float = 1e-6) -> list[Tensor]:
    """Central differences with respect to every element."""
    slopes = []
    for p in parameters:
        slope = torch.zeros_like(p)
        for i in range(p.numel()):
            value = p.data.view(-1)[i].item()
            p.data.view(-1)[i] = value + step
            up = loss()
            p.data.view(-1)[i] = value - step
            down = loss()
            p.data.view(-1)[i] = value
            slope.view(-1)[i] = (up - down) / (2 * step)
        slopes.append(slope)
    return slopes


@pytest.mark.parametrize("iteration", [1, 2])
@pytest.mark.parametrize("name", TABLE)
def test_critic_loss_and_step(name: str, iteration: int) -> None:
    """-[mean u(r+) - mean v(r-)] + lambda (mean H+^2 + mean H-^2), first the L2 terms alone; one step of Adam."""
    critic, energy = _critic(name), _Linear(2)
    x, y = _batch(3), _batch(4)
    e_x, e_y = energy.energy(x).detach(), energy.energy(y).detach()
    u, v = TABLE[name]
    network: Any = critic.network
    weights = [network.weight, network.bias]

    def literal() -> float:
        n = len(x)
        h_x, h_y = network.energy(x).tolist(), network.energy(y).tolist()
        loss = 0.7 * (sum(h * h for h in h_x) / n + sum(h * h for h in h_y) / n)
        if iteration >= 2:
            plus = sum(u(h + e) for h, e in zip(h_x, e_x.tolist(), strict=True)) / n
            minus = sum(v(h + e) for h, e in zip(h_y, e_y.tolist(), strict=True)) / n
            loss += -(plus - minus)
        return float(loss)

    wanted, slopes = literal(), _numeric(literal, [w.detach() for w in weights])
    before = [w.detach().clone() for w in weights]
    loss, norm = critic.step(x, e_x, y, e_y, iteration=iteration, rate=0.05, tripped=torch.zeros(()))
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert norm.item() == pytest.approx(math.sqrt(sum(float((s**2).sum()) for s in slopes)), rel=1e-5)
    for w, old, slope in zip(weights, before, slopes, strict=True):
        assert w.grad is not None
        torch.testing.assert_close(w.grad, slope, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(w.detach(), old - 0.05 * slope / (slope.abs() + 1e-8), rtol=1e-5, atol=1e-6)
    assert not e_x.requires_grad and energy.weight.grad is None


@pytest.mark.parametrize("iteration", [0, 1, 2, 50])
@pytest.mark.parametrize("name", TABLE)
def test_energy_loss_and_its_gradient(name: str, iteration: int) -> None:
    """mean u(r+) + mean(E- sg v) - mean(E-) sg(mean v) - mean v(r-) + lambda L2, sg stopping the gradient."""
    critic, model = _critic(name), _Linear(2)
    network: Any = critic.network
    x, y = _batch(3), _batch(4)
    u, v = TABLE[name]
    h_x, h_y = network.energy(x).tolist(), network.energy(y).tolist()
    fixed = [v(h + e) for h, e in zip(h_y, model.energy(y).tolist(), strict=True)]

    def literal(frozen: list[float]) -> float:
        n = len(x)
        e_x, e_y = model.energy(x).tolist(), model.energy(y).tolist()
        loss = 0.7 * (sum(e * e for e in e_x) / n + sum(e * e for e in e_y) / n)
        if iteration >= 2:
            loss += sum(u(h + e) for h, e in zip(h_x, e_x, strict=True)) / n
            loss += sum(e * f for e, f in zip(e_y, frozen, strict=True)) / n
            loss -= sum(e_y) / n * (sum(frozen) / n)
            loss -= sum(v(h + e) for h, e in zip(h_y, e_y, strict=True)) / n
        return float(loss)

    data = critic.data_term(x, model.energy(x), iteration)
    samples = critic.sample_term(y, model.energy(y), iteration)
    assert (data + samples).item() == pytest.approx(literal(fixed), rel=1e-9)
    data.backward()
    samples.backward()
    slopes = _numeric(lambda: literal(fixed), [model.weight.detach(), model.bias.detach()])
    for p, slope in zip(model.parameters(), slopes, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, slope, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in network.parameters()), "the energy's loss must not reach the critic"


def test_the_energys_gradient_is_the_divergences_own() -> None:
    """On a finite set the gradient, averaged exactly over q, is that of sum_q v - sum_p u: the covariance term is right.

    Theorem of the f-EBM paper: with q proportional to exp(-E), the objective max_H [E_p u(H+E) - E_q v(H+E)] is
    minimised over E, q itself depending on E.
    """
    g = torch.Generator().manual_seed(0)
    energies = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    h = torch.randn(7, generator=g, dtype=torch.float64)
    p = torch.rand(7, generator=g, dtype=torch.float64)
    p = p / p.sum()
    u, v = F_DIVERGENCES["kl"]
    q = torch.softmax(-energies, 0)
    objective = (p * u(h + energies)).sum() - (q * v(h + energies)).sum()
    (wanted,) = torch.autograd.grad(objective, energies)
    weights = q.detach()
    fixed = v(h + energies).detach()
    mean = (weights * energies).sum()
    surrogate = (p * u(h + energies)).sum() - (weights * v(h + energies)).sum()
    surrogate = surrogate + (weights * energies * fixed).sum() - mean * (weights * fixed).sum()
    (got,) = torch.autograd.grad(surrogate, energies)
    torch.testing.assert_close(got, wanted)


def test_first_iterations_train_the_l2_terms_alone() -> None:
    critic = _critic(start=11)
    assert [critic.playing(i) for i in (0, 10, 11, 500)] == [False, False, True, True]


def test_gradient_is_clipped_before_the_step() -> None:
    critic = _critic(clip=3.0, l2=50.0)
    network: Any = critic.network
    before = network.weight.detach().clone()
    x, y = _batch(3), _batch(4)
    zero = torch.zeros(6, dtype=torch.float64)
    _, norm = critic.step(x, zero, y, zero, iteration=5, rate=0.01, tripped=torch.zeros(()))
    assert norm.item() > 1, "the norm is reported unclipped"
    assert network.weight.grad.abs().max().item() == pytest.approx(0.1)
    second = critic.optimiser.state[network.weight]["exp_avg_sq"]
    assert second.max().item() == pytest.approx(0.001 * 0.1**2)
    assert not torch.equal(before, network.weight)


@pytest.mark.parametrize("reason", ["tripped", "nan energy", "nan weight"])
def test_a_stopped_step_moves_nothing(reason: str, same: Any, copy_of: Any) -> None:
    network = build_network("febm-4", (1, 8, 8), 4)
    optimiser = build_optimiser(network.parameters(), "adam", learning_rate=0.01, betas=(0.0, 0.999))
    critic = Critic(network, optimiser, divergence="kl", l2_weight=1.0, start_iteration=0, clip_sigma=3.0)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    energy = torch.zeros(4)
    go, stop = torch.zeros(()), torch.ones(())
    critic.step(x, energy, 1 - x, energy, iteration=0, rate=0.01, tripped=go)
    if reason == "nan weight":
        with torch.no_grad():
            next(network.parameters()).view(-1)[0] = math.nan
    before = copy_of(critic.state_dict())
    bad = torch.full((4,), math.nan) if reason == "nan energy" else energy
    loss, norm = critic.step(x, bad, 1 - x, energy, iteration=1, rate=0.01, tripped=stop if reason == "tripped" else go)
    after = critic.state_dict()
    assert same(before["optimiser"]["state"], after["optimiser"]["state"])
    weights = {name for name, _ in network.named_parameters()}
    assert same({n: before["weights"][n] for n in weights}, {n: after["weights"][n] for n in weights})
    finite = math.isfinite(loss.item()) and math.isfinite(norm.item())
    assert finite == (reason == "tripped")


def test_state_round_trip(same: Any, copy_of: Any) -> None:
    x = _batch(3)
    zero = torch.zeros(6, dtype=torch.float64)
    first, second = _critic(clip=3.0), _critic(clip=3.0)
    first.step(x, zero, -x, zero, iteration=9, rate=0.01, tripped=torch.zeros(()))
    second.load_state_dict(copy_of(first.state_dict()))
    for critic in (first, second):
        critic.step(x, zero, -x, zero, iteration=10, rate=0.01, tripped=torch.zeros(()))
    assert same(copy_of(first.state_dict()), copy_of(second.state_dict()))
