"""VERA's generator against closed forms of a linear one, and literal losses (algorithms.md, section 11.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from trainables.methods.vera import NoisyGenerator, Vera, normal_log_density
from trainables.training.context import Context, Found, Make
from trainables.training.drawing import Drawing
from trainables.training.method import Variant
from trainables.training.network import TrainedNetwork, set_rate

SHAPE = (1, 8, 8)
BETAS = (0.0, 0.9)
GO, STOP = torch.zeros(()), torch.ones(())


class _Make(Make):
    """Builds VERA's two further networks alone."""

    def __init__(self, seed: int) -> None:
        self.trial, self.device, self.shape = SimpleNamespace(betas=BETAS), torch.device("cpu"), SHAPE  # type: ignore[assignment]
        self._seed = seed

    def seed(self, purpose: str) -> int:
        assert purpose == "generator"
        return self._seed

    def energy(self, purpose: str | None = None) -> TrainedNetwork:
        return TrainedNetwork(nn.Identity(), torch.optim.SGD([torch.zeros(1)]))

    def scheduled(self, base: float) -> Callable[[Any], float]:
        return lambda at: base


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


class Generator:
    """VERA's hooks around a generator, with the energy given."""

    def __init__(self, seed: int, **fields: Any) -> None:
        self.method, self.generator = Vera(**fields), torch.Generator().manual_seed(seed)
        self.networks = self.method.networks(_Make(seed))
        made = self.networks["generator"].network
        assert isinstance(made, NoisyGenerator)
        self.made = made
        self.ctx = HookContext(self.method, self.networks, {"batch_size": 0}, generators={"generator": self.generator})

    @property
    def network(self) -> Any:
        return self.made.network

    @property
    def log_sigma(self) -> nn.Parameter:
        return self.made.log_sigma.value

    @property
    def posterior_log_std(self) -> Any:
        return self.networks["posterior"].network.value

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        return self.networks["generator"].optimiser

    @property
    def posterior_optimiser(self) -> torch.optim.Optimizer:
        return self.networks["posterior"].optimiser

    def draw(self, count: int) -> Tensor:
        self.ctx.trial.batch_size = count
        self.ctx.networks = self.networks
        self.ctx.begin(self.ctx.variant)
        return self.method.sample(self.ctx).x

    def step(self, energy: Callable[[Tensor], Tensor], *, rate: float, tripped: Tensor) -> tuple[Tensor, Tensor]:
        self.ctx.__dict__["energy"] = energy
        self.ctx.latch.tripped = tripped
        set_rate(self.optimiser, rate)
        self.method.after(self.ctx)
        found: tuple[Tensor, Tensor] = self.ctx.latch.seen
        return found

    def entropy_gradient(self, x: Tensor, latent: Tensor) -> Tensor:
        return self.method.entropy_gradient(self.ctx, x, latent)

    def step_posterior(self, x: Tensor, latent: Tensor) -> None:
        self.method.step_posterior(self.ctx, x, latent)

    def sample(self, count: int, batch_size: int, random: torch.Generator) -> Tensor:
        trial: Any = self.ctx.trial
        found: list[Tensor] = []
        drawing = Drawing(trial, torch.device("cpu"), {"generator": self.made}, None, 1, batch_size)
        self.method.draw(drawing, count, random, found.append)
        return torch.cat(found)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "log_sigma": self.log_sigma.detach(),
            "posterior_log_std": self.posterior_log_std.detach(),
            "optimiser": self.optimiser.state_dict(),
            "posterior_optimiser": self.posterior_optimiser.state_dict(),
            "networks": {name: self.networks[name].state_dict() for name in ("generator", "posterior")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, held in state["networks"].items():
            self.networks[name].load_state_dict(held)


def _generator(seed: int = 0, **fields: Any) -> Generator:
    return Generator(seed, **{"noise_dim": 3, "features": 4} | fields)


class _Linear(nn.Module):
    """g(h) = A h on 2x2 images with orthogonal columns, in float64, so that the density of x is known."""

    def __init__(self, *lengths: float) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        q, _ = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))
        self.matrix = nn.Parameter(q[:, : len(lengths)] * torch.tensor(lengths, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return (h.to(self.matrix.dtype) @ self.matrix.T).view(-1, 1, 2, 2)


def _linear_generator(sigma: float, *lengths: float, **fields: Any) -> tuple[Generator, Tensor]:
    made = _generator(**{"noise_dim": len(lengths)} | fields)
    network = _Linear(*lengths)
    made.made.network = network
    with torch.no_grad():
        made.log_sigma.fill_(math.log(sigma))
    made.networks["generator"].optimiser = torch.optim.Adam(
        [*network.parameters(), made.log_sigma], lr=1.0, betas=BETAS, fused=True
    )
    return made, network.matrix.detach()


def test_starts_as_published() -> None:
    """sigma 0.01, s 0.1 in every dimension; the second Adam has PyTorch's own betas."""
    made = _generator()
    torch.testing.assert_close(made.log_sigma.exp().detach(), torch.full((1,), 0.01))
    torch.testing.assert_close(made.posterior_log_std.exp().detach(), torch.full((3,), 0.1))
    mine, other = made.optimiser.param_groups[0], made.posterior_optimiser.param_groups[0]
    assert (mine["betas"], mine["eps"], mine["weight_decay"]) == ((0.0, 0.9), 1e-8, 0)
    assert (other["betas"], other["lr"], other["weight_decay"]) == ((0.9, 0.999), 3e-5, 0)
    assert sum(p.numel() for p in mine["params"]) == sum(p.numel() for p in made.network.parameters()) + 1


@pytest.mark.parametrize("std", [0.3, torch.tensor([0.5, 2.0, 1.0])])
def test_log_density(std: float | Tensor) -> None:
    g = torch.Generator().manual_seed(0)
    x, mean = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g)
    torch.testing.assert_close(normal_log_density(x, mean, std), Normal(mean, std).log_prob(x).sum(1))
    torch.testing.assert_close(normal_log_density(x, 0.0, 1.0), Normal(0.0, 1.0).log_prob(x).sum(1))
    images = torch.randn(5, 1, 2, 2, generator=g)
    wanted = Normal(torch.zeros(()), torch.tensor(0.2)).log_prob(images).sum((1, 2, 3))
    torch.testing.assert_close(normal_log_density(images, 0.0, 0.2), wanted)


def test_draw_is_g_of_z_plus_learned_noise() -> None:
    made = _generator()
    twin = torch.Generator()
    twin.set_state(made.generator.get_state())
    made.network.eval()
    images = made.draw(6)
    z, eps = torch.randn(6, 3, generator=twin), torch.randn(6, *SHAPE, generator=twin)
    assert made.network.training, "batch statistics, as in training"
    assert torch.equal(images, (made.network(z) + eps * made.log_sigma.exp()).detach())
    assert not images.requires_grad
    assert made.sample(4, 4, torch.Generator()).shape == (4, *SHAPE)


@pytest.mark.parametrize("lengths", [(1.0, 0.5), (0.3, 2.0)])
def test_entropy_gradient_of_a_linear_generator(lengths: tuple[float, float]) -> None:
    """c = -d log q(x) / dx. For x = A h + sigma eps that is (A A^T + sigma^2 I)^-1 x, in closed form."""
    sigma = 0.5
    made, matrix = _linear_generator(sigma, *lengths, importance_samples=10_000)
    made.posterior_log_std.data = torch.log(torch.tensor([1.5, 1.5]))  # wider than the posterior it stands for
    latent = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = (latent @ matrix.T).view(5, 1, 2, 2) + sigma * noise
    covariance = matrix @ matrix.T + sigma**2 * torch.eye(4, dtype=torch.float64)
    wanted = torch.linalg.solve(covariance, x.flatten(1).T).T.view_as(x)
    got = made.entropy_gradient(x, latent)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), wanted, rtol=0.1, atol=0.15)
    assert wanted.abs().max() > 1


def test_entropy_gradient_literally() -> None:
    """Self-normalised importance weights p(h) p(x|h) / q(h|x) of 20 draws around the latent, image by image."""
    made = _generator()
    twin = torch.Generator()
    twin.set_state(made.generator.get_state())
    images = made.draw(3)
    latent = torch.randn(3, 3, generator=twin)
    torch.randn(3, *SHAPE, generator=twin)
    got = made.entropy_gradient(images, latent)
    near = latent + 0.1 * torch.randn(20, 3, 3, generator=twin)
    with torch.no_grad():
        means = made.network(near.view(60, 3)).view(20, 3, *SHAPE)  # one batch, so one set of batch statistics
    for i in range(3):
        logs = []
        for k in range(20):
            joint = Normal(0.0, 1.0).log_prob(near[k, i]).sum() + Normal(means[k, i], 0.01).log_prob(images[i]).sum()
            logs.append(float(joint - Normal(latent[i], 0.1).log_prob(near[k, i]).sum()))
        top = max(logs)
        weights = [math.exp(v - top) for v in logs]
        total = torch.zeros(SHAPE)
        for k in range(20):
            total += weights[k] / sum(weights) * (images[i] - means[k, i]) / 0.01**2
        torch.testing.assert_close(got[i], total, rtol=1e-3, atol=1e-2)


def test_posterior_learns_its_closed_form() -> None:
    """The bound of N(z, diag(s^2)) for a linear generator is greatest at s_i^2 = 1 / (1 + |a_i|^2 / sigma^2)."""
    sigma, lengths = 0.5, (1.0, 0.25)
    made, _ = _linear_generator(sigma, *lengths, posterior_learning_rate=0.05)
    for _ in range(400):
        made.draw(64)
        images, latent = made.method.made(made.ctx)
        made.step_posterior(images.detach(), latent)
    wanted = [1 / math.sqrt(1 + a**2 / sigma**2) for a in lengths]
    assert made.posterior_log_std.exp().tolist() == pytest.approx(wanted, rel=0.15)
    assert wanted[1] - wanted[0] > 0.3


def test_posterior_gradient_literally() -> None:
    """One step of Adam down -[mean log p(x, h) + H], h = z + s n, with torch's own distributions."""
    made = _generator(posterior_learning_rate=0.01)
    twin = torch.Generator()
    twin.set_state(made.generator.get_state())
    images = made.draw(4)
    latent = torch.randn(4, 3, generator=twin)
    torch.randn(4, *SHAPE, generator=twin)
    log_std = made.posterior_log_std.detach().clone().requires_grad_()
    made.step_posterior(images, latent)
    assert all(p.grad is None for p in made.network.parameters()) and made.log_sigma.grad is None
    h = latent + log_std.exp() * torch.randn(4, 3, generator=twin)
    likelihood = Normal(made.network(h), torch.tensor(0.01)).log_prob(images).sum((1, 2, 3))
    bound = Normal(0.0, 1.0).log_prob(h).sum(1) + likelihood + Normal(latent, log_std.exp()).entropy().sum(1)
    (-bound.mean()).backward()
    assert log_std.grad is not None and made.posterior_log_std.grad is not None
    torch.testing.assert_close(made.posterior_log_std.grad, log_std.grad, rtol=1e-3, atol=1e-2)
    moved = made.posterior_log_std.detach() - log_std.detach()
    torch.testing.assert_close(moved, -0.01 * log_std.grad.sign(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1e-4, 1e-2])
def test_generator_step_literally(
    weight: float, copy_of: Callable[[Any], Any], check_adam: Callable[..., None]
) -> None:
    """-[mean log p(x) + w mean_i <c_i, x_i>], c a constant, in one backward through x = g(z) + sigma eps."""
    made, plain = _generator(entropy_weight=weight), _generator(entropy_weight=weight)
    twin = torch.Generator()
    twin.set_state(made.generator.get_state())
    scale = torch.linspace(-1, 2, 64).view(SHAPE)

    def energy(x: Tensor) -> Tensor:
        return (torch.sin(2 * x) * scale).flatten(1).sum(1)

    before = copy_of(made.optimiser.state_dict())
    weights = [p.detach().clone() for p in made.optimiser.param_groups[0]["params"]]
    made.draw(6)
    loss, norm = made.step(energy, rate=0.003, tripped=GO)

    z, eps = torch.randn(6, 3, generator=twin), torch.randn(6, *SHAPE, generator=twin)
    plain.network.train()
    x = plain.network(z) + eps * plain.log_sigma.exp()
    wanted = -(-energy(x)).mean()
    if weight > 0:
        plain.generator.set_state(twin.get_state())
        c = plain.entropy_gradient(x.detach(), z)
        assert c.abs().max() > 1
        wanted = wanted - weight * torch.stack([(c[i] * x[i]).sum() for i in range(6)]).mean()
    wanted.backward()
    parameters = [*plain.network.parameters(), plain.log_sigma]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    gradients = [p.grad for p in parameters]
    assert norm.item() == pytest.approx(
        math.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None)), rel=1e-3
    )
    moved = made.optimiser.param_groups[0]["params"]
    assert made.log_sigma is moved[-1]
    floor = math.log(0.01)  # where sigma starts: a step below is clamped back
    unclamped = moved[:-1]
    check_adam(made.optimiser, before, unclamped, weights[:-1], gradients[:-1], 0.003, BETAS)
    slope = gradients[-1]
    assert slope is not None
    wanted_sigma = max(floor, floor - 0.003 * math.copysign(1, slope.item()))
    assert made.log_sigma.item() == pytest.approx(wanted_sigma, abs=1e-6)
    if weight == 0:
        assert torch.equal(made.posterior_log_std, plain.posterior_log_std), "nothing is learned for a term of weight 0"


def test_entropy_spreads_and_energy_attracts() -> None:
    """With a flat energy the entropy widens the samples; without entropy they fall into the energy's valley."""
    made, matrix = _linear_generator(0.1, 0.5, 0.5, importance_samples=200, entropy_weight=1.0)  # shares its memory
    made.posterior_log_std.data = torch.log(torch.tensor([0.2, 0.2]))
    first = matrix.norm()
    for _ in range(40):
        made.draw(128)
        made.step(lambda x: 0 * x.flatten(1).sum(1), rate=0.01, tripped=GO)
    assert made.log_sigma.exp().item() > 0.12
    assert matrix.norm() > first
    fallen, matrix = _linear_generator(0.1, 0.5, 0.5, entropy_weight=0.0)
    for _ in range(40):
        fallen.draw(128)
        fallen.step(lambda x: (x**2).flatten(1).sum(1), rate=0.01, tripped=GO)
    assert matrix.norm() < first / 2
    assert fallen.log_sigma.exp().item() < 0.1


def test_sigma_stays_in_its_bounds() -> None:
    """0.01 to 0.3, however long the step."""
    for sign, bound in ((1, 0.01), (-1, 0.3)):
        made, _ = _linear_generator(0.1, 0.5, entropy_weight=0.0)
        made.draw(64)
        made.step(lambda x, s=sign: s * (x**2).flatten(1).sum(1), rate=5.0, tripped=GO)  # type: ignore[misc]
        assert made.log_sigma.exp().item() == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("reason", ["tripped", "nan energy", "nan slope", "nan weight"])
def test_a_stopped_step_moves_nothing(reason: str, same: Any, copy_of: Any) -> None:
    made = _generator()

    def energy(x: Tensor) -> Tensor:
        values = x.flatten(1).sum(1)
        if reason == "nan slope":
            values = values + torch.sqrt(0 * x.abs()).flatten(1).sum(1)
        return values * math.nan if reason == "nan energy" else values

    made.draw(4)
    made.step(lambda x: x.flatten(1).sum(1), rate=0.01, tripped=GO)
    if reason == "nan weight":
        with torch.no_grad():
            made.network.linear.weight[0, 0] = math.nan
    before = copy_of(made.state_dict())
    made.draw(4)
    loss, norm = made.step(energy, rate=0.01, tripped=STOP if reason == "tripped" else GO)
    after = made.state_dict()
    assert same(before["optimiser"]["state"], after["optimiser"]["state"])
    weights = {name for name, _ in made.network.named_parameters()}
    assert same({n: before["network"][n] for n in weights}, {n: after["network"][n] for n in weights})
    assert same(before["log_sigma"], after["log_sigma"])
    if reason in ("tripped", "nan weight"):
        assert same(before["posterior_log_std"], after["posterior_log_std"])
        assert same(before["posterior_optimiser"]["state"], after["posterior_optimiser"]["state"])
    finite = math.isfinite(loss.item()) and math.isfinite(norm.item())
    assert finite == (reason == "tripped")


def test_a_step_is_on_the_images_of_its_draw() -> None:
    made, seen = _generator(entropy_weight=0.0), list[Tensor]()

    def energy(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.flatten(1).sum(1)

    for _ in range(2):
        images = made.draw(4)
        made.step(energy, rate=0.01, tripped=GO)
        assert torch.equal(seen[-1], images)
    assert not torch.equal(*seen), "each draw makes new ones"


def test_samples_outside_training_leave_no_trace(same: Any, copy_of: Any) -> None:
    made = _generator()
    made.draw(4)
    made.network.train()
    before, stream = copy_of(made.state_dict()), made.generator.get_state()
    first = made.sample(10, 4, torch.Generator().manual_seed(1))
    again = made.sample(10, 4, torch.Generator().manual_seed(1))
    assert torch.equal(first, again) and first.shape == (10, *SHAPE) and not first.requires_grad
    assert same(before, copy_of(made.state_dict())) and torch.equal(stream, made.generator.get_state())
    assert made.network.training


def test_state_round_trip(same: Any, copy_of: Any) -> None:
    def turn(made: Generator) -> None:
        made.draw(4)
        made.step(lambda x: torch.cos(x).flatten(1).sum(1), rate=0.01, tripped=GO)

    first, second = _generator(0), _generator(1)
    turn(first)
    second.load_state_dict(copy_of(first.state_dict()))
    second.generator.set_state(first.generator.get_state())
    turn(first)
    turn(second)
    assert same(copy_of(first.state_dict()), copy_of(second.state_dict()))
