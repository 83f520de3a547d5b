"""A JEM-like loop on one page: a classifier whose logsumexp is minus the energy, SGLD from a replay buffer."""

import torch
import torch.nn.functional as F
from torch import nn

from mebm import Monitor

with Monitor(n_steps=4, alpha=1.0, sigma=0.01, rho=0.05, B=64, batch=16, lr=0.02, iterations=24, seed=0) as run:
    a = run.args
    torch.manual_seed(run.seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 4))
    optimiser = torch.optim.SGD(net.parameters(), lr=a.lr, momentum=0.9)
    buffer = torch.rand(a.B, 1, 8, 8) * 2 - 1
    run.metric("accuracy", "maximize")
    buffer = run.restore(net=net, optimiser=optimiser, buffer=buffer)["buffer"]
    centres = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def energy(x):
        return -net(x).logsumexp(1)

    for i in range(run.iteration, a.iterations):
        draw = torch.Generator().manual_seed(1000 * run.seed + i)  # batch i depends on (seed, i) alone
        y = torch.randint(4, (a.batch,), generator=draw)
        x = centres[y] + 0.3 * torch.randn(a.batch, 1, 8, 8, generator=draw)
        at = torch.randint(a.B, (a.batch,), generator=draw)
        fresh = torch.rand(a.batch, 1, 1, 1, generator=draw) < a.rho
        z = torch.where(fresh, torch.rand(a.batch, 1, 8, 8, generator=draw) * 2 - 1, buffer[at])
        for _ in range(a.n_steps):
            z.requires_grad_(True)
            gradient = torch.autograd.grad(energy(z).sum(), z)[0]
            z = (z - a.alpha * gradient + a.sigma * torch.randn(z.shape, generator=draw)).detach()
        buffer[at] = z.clamp(-1, 1)
        e_data, e_samples = energy(x), energy(z)
        logits = net(x)
        loss = e_data.mean() - e_samples.mean() + F.cross_entropy(logits, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if run.step(i, e_data, e_samples, loss):
            break
        if i % 8 == 7:
            run.epoch(samples=z, accuracy=(logits.argmax(1) == y).float().mean().item())
