# parts.py
import numpy as np
import torch
from torch import nn


class MyNet(nn.Module):
    def __init__(self, shape, classes, width: int = 8):  # (channels, height, width) of an image
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(shape[0], width, 3), nn.BatchNorm2d(width), nn.SiLU(), nn.Flatten())

    def forward(self, x):  # float32 (N, C, H, W) in the trial's pixel range
        return self.layers(x)  # (N, F): an energy head is added; or (N,): the energy itself, low on data


class Grey:
    def __init__(self, images, spread: float = 0.2):  # images.images, .labels: uint8 (N, C, H, W), int64 (N,); .shape
        self.mean, self.spread = images.images.float().mean(0) / 127.5 - 1, spread

    def sample(self, count, generator):  # float32 (count, C, H, W) in [-1, 1], on the generator's device
        noise = torch.randn(count, *self.mean.shape, generator=generator, device=generator.device)
        return (self.mean + self.spread * noise).clamp(-1, 1)


def load(count: int = 500):  # uint8 (N, C, H, W), 1 or 3 channels, and labels from 0
    labels = np.arange(count) % 3
    noise = np.random.default_rng(0).integers(0, 50, (count, 1, 8, 8))
    return (60 * labels[:, None, None, None] + noise).astype(np.uint8), labels


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(group["lr"] * mean.lerp_(p.grad, 1 - group["beta"]).sign())


class Roughness:
    name, label, direction, unit = "rough", "roughness", "minimize", "grey level"

    def __call__(self, samples, ctx):  # float32 (N, C, H, W) in [-1, 1], rounded as their protocol says
        return (samples[..., 1:] - samples[..., :-1]).abs().mean()
