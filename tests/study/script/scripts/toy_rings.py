"""A toy energy in the plane, trained with a persistent bank of Langevin chains.

Rewritten, in other words and smaller, from the two-dimensional toy experiment of the code to "On the Anatomy of
MCMC-Based Maximum Likelihood Learning of Energy-Based Models" (Nijkamp et al., AAAI 2020; github.com/point0bar1/
ebm-anatomy, train_toy.py): rings, a network of leaky ReLUs, shared step size and noise, chains that persist. The five
lines that end in `# mebm` were added.
"""

import argparse
import math

import torch
from torch import nn

from mebm import Monitor  # mebm


def rings(count, generator):
    radius = torch.randint(1, 4, (count, 1), generator=generator).float()
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
    points = radius * torch.cat([angle.cos(), angle.sin()], 1)
    return points + 0.05 * torch.randn(count, 2, generator=generator)


def langevin(energy, x, steps, epsilon, generator):
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(energy(x).sum(), x)
        x = x - epsilon**2 / 2 * slope + epsilon * torch.randn(x.shape, generator=generator)
    return x.detach()


def main(args, run):
    torch.manual_seed(args.seed)
    energy = nn.Sequential(nn.Linear(2, args.width), nn.LeakyReLU(0.05), nn.Linear(args.width, 1), nn.Flatten(0))
    optimiser = torch.optim.Adam(energy.parameters(), lr=args.lr)
    bank = 3 * torch.randn(args.bank, 2)
    bank = run.restore(energy=energy, optimiser=optimiser, bank=bank)["bank"]  # mebm
    for step in range(run.iteration, args.iterations):
        generator = torch.Generator().manual_seed(args.seed * 100_000 + step)
        data = rings(args.batch, generator)
        chosen = torch.randperm(args.bank, generator=generator)[: args.batch]
        samples = langevin(energy, bank[chosen], args.langevin_steps, args.epsilon, generator)
        bank[chosen] = samples
        e_data, e_samples = energy(data), energy(samples)
        loss = e_data.mean() - e_samples.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if run.step(step, e_data, e_samples, loss):  # mebm
            break
        if (step + 1) % args.log_every == 0:
            run.epoch(radius_error=(samples.norm(dim=1) - 2).abs().mean().item())  # mebm


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--langevin-steps", type=int, default=10)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--bank", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    with Monitor(**vars(arguments())) as run:  # mebm
        main(run.args, run)
