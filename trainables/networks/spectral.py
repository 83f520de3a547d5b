"""Convolutions and linear layers with spectral norm whose power iteration goes on in every forward of training.

PyTorch's and most TensorFlow code's way, of DiffuRecov, CF-EBM and GEBM. IGEBM's and f-EBM's, one iteration for all the
forwards of a training iteration, is in `igebm`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.networks.layers import without_autocast

SIGMA_FLOOR = 1e-6
CLOSING_GAIN = 1e-5
"""Of the initial weights of a layer that starts near zero."""


class _Spectral(nn.Module):
    """A weight W, seen as a matrix of (outputs, inputs), that is divided by its largest singular value.

    In train mode a forward takes v = norm(W^T u), u = norm(W v) and keeps both, in eval mode it takes those that were
    kept; sigma = u^T W v, with gradients through W alone.

    Args:
        closing: W / sigma * min(sigma, 1): a weight that starts near zero stays there.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, bias: bool, *, closing: bool = False) -> None:
        super().__init__()
        self.closing = closing
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight))) if bias else None
        self.register_buffer("u", F.normalize(torch.randn(len(weight)), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(weight[0].numel()), dim=0))

    def normalised(self) -> Tensor:
        """The weight of this forward."""
        with without_autocast(self.weight):
            with torch.no_grad():
                matrix = self.weight.flatten(1)
                if self.training:
                    v = F.normalize(matrix.T @ self.u, dim=0)
                    u = F.normalize(matrix @ v, dim=0)
                    self.u.copy_(u)
                    self.v.copy_(v)
                else:
                    u, v = self.u.clone(), self.v.clone()  # a graph may outlive what the next forward keeps
            sigma = torch.dot(u, self.weight.flatten(1) @ v)
            if self.closing:
                sigma = (sigma + SIGMA_FLOOR).clamp_min(1)
            return self.weight / sigma


class SpectralConv(_Spectral):
    """A convolution: (N, inputs, H, W) to (N, outputs, H', W')."""

    def __init__(self, weight: Tensor, *, padding: int, bias: bool = True, closing: bool = False) -> None:
        super().__init__(weight, bias, closing=closing)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        return F.conv2d(x, self.normalised(), self.bias, padding=self.padding)


class SpectralLinear(_Spectral):
    """A linear layer: (N, inputs) to (N, outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return F.linear(x, self.normalised(), self.bias)


def xavier(outputs: int, inputs: int, *kernel: int, gain: float = 1.0) -> Tensor:
    """Xavier uniform weights (TensorFlow's variance scaling by the mean of both fans)."""
    return nn.init.xavier_uniform_(torch.empty(outputs, inputs, *kernel), gain=gain)


def conv(inputs: int, outputs: int, norm: str, *, size: int = 3, padding: int = 1, closing: bool = False) -> nn.Module:
    """A convolution with Xavier uniform weights, near zero if `closing`, and biases of 0; `norm`: spectral or none."""
    weight = xavier(outputs, inputs, size, size, gain=CLOSING_GAIN if closing else 1.0)
    if norm == "spectral":
        return SpectralConv(weight, padding=padding, closing=closing)
    made = nn.Conv2d(inputs, outputs, size, padding=padding)
    return _filled(made, weight)


def linear(inputs: int, outputs: int, norm: str, *, bias: bool = True) -> nn.Module:
    """A linear layer, likewise."""
    weight = xavier(outputs, inputs)
    if norm == "spectral":
        return SpectralLinear(weight, bias)
    return _filled(nn.Linear(inputs, outputs, bias=bias), weight)


def _filled(made: nn.Conv2d | nn.Linear, weight: Tensor) -> nn.Module:
    with torch.no_grad():
        made.weight.copy_(weight)
        if made.bias is not None:
            made.bias.zero_()
    return made


def sinusoids(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of t, (N,), at frequencies from 1 to 1e-4: (N, size), the sines first (size even)."""
    half = size // 2
    step = math.log(10_000) / max(1, half - 1)
    phases = t.float()[:, None] * torch.exp(-step * torch.arange(half, device=t.device))[None, :]
    return torch.cat([phases.sin(), phases.cos()], dim=1)
