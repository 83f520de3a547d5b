"""The residual networks of IGEBM (openai/ebm_code_release, ResNet32Large, models.py:264-349) and of f-EBM
(ermongroup/f-EBM, ResNet32, image_generation/models.py:83-155), and their spectral norm; both unconditional."""

from __future__ import annotations

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config.network import Family
from trainables.networks.layers import (
    SLOPE,
    DerivedWeight,
    Dropout,
    Shape,
    Sizes,
    Trunk,
    half_to_float,
    without_autocast,
)

Stages = tuple[tuple[int, bool], ...]
IGEBM_STAGES = ((1, True), (1, False), (1, False), (2, True), (2, False), (2, False), (4, True), (4, False), (4, False))
"""Blocks of ResNet32Large: channels in units of the filters, and whether the block ends with a 2x2 average pool."""
FEBM_STAGES = ((1, True), (1, False), (2, True), (2, False), (2, True), (2, False))
"""Blocks of ResNet32."""
CLOSING_STD = 1e-10
"""Standard deviation of a block's second convolution at the start: a block begins as its bypass."""
SIGMA_FLOOR = 1e-6
MAX_BACKWARDS = 16
"""Backward passes without `advance` after which a training forward refuses to go on. An iteration has two or three."""


class SpectralConv2d(DerivedWeight):
    """3x3 convolution without bias whose weight is divided by its largest singular value (utils.py:1019-1067).

    The weight is seen as a matrix W of (outputs, 9 inputs). Every forward takes one power iteration from the buffer u,
    v = norm(W^T u), u' = norm(W v), sigma = u'^T W v, with gradients through W only, and leaves u alone; `advance` puts
    u' in its place, once per training iteration. So x+, every sampler step and x- of an iteration see one energy, as in
    the released graph, whose forwards share one normalised weight per session run.

    Args:
        closing: the released "lower bound": W / sigma * min(sigma, 1), so that a weight is never enlarged and one that
            starts near zero stays there. Written W / max(sigma, 1), which has the same value and gradient.
    """

    u: Tensor

    def __init__(self, inputs: int, outputs: int, *, closing: bool = False) -> None:
        super().__init__()
        self.closing = closing
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * (CLOSING_STD if closing else 1.0))
        self.register_buffer("u", torch.randn(outputs))
        self._backwards = 0
        layer = weakref.ref(self)  # a hook that held the layer would keep it until a garbage collection

        def count(_weight: Tensor) -> None:
            if (alive := layer()) is not None:
                alive._backwards += 1

        self.weight.register_post_accumulate_grad_hook(count)

    def derived_weight(self) -> Tensor:
        """The normalised weight: (outputs, inputs, 3, 3)."""
        with without_autocast(self.weight):
            u, v = self._power_iteration()
            sigma = torch.dot(u, self.weight.flatten(1) @ v)
            if self.closing:
                sigma = (sigma + SIGMA_FLOOR).clamp_min(1)
            return self.weight / sigma

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        if self._backwards > MAX_BACKWARDS and self.training:
            raise RuntimeError("spectral norm stands still: call advance_power_iterations once per training iteration")
        return F.conv2d(x, self.used_weight(), padding=1)

    def advance(self) -> None:
        """Keep the power iteration that this iteration's forwards have taken."""
        self.u.copy_(self._power_iteration()[0])
        self._backwards = 0

    def _power_iteration(self) -> tuple[Tensor, Tensor]:
        """u' (outputs,) and v (9 inputs,), new tensors: `advance` overwrites nothing that a graph still needs."""
        with torch.no_grad(), without_autocast(self.weight):
            matrix = self.weight.flatten(1)
            v = F.normalize(matrix.T @ self.u, dim=0)
            return F.normalize(matrix @ v, dim=0), v


def advance_power_iterations(model: nn.Module) -> None:
    """To be called once per training iteration, after its backward passes and before the optimiser's step."""
    for module in model.modules():
        if isinstance(module, SpectralConv2d):
            module.advance()


def _conv(inputs: int, outputs: int, norm: str, *, closing: bool = False) -> nn.Module:
    """A 3x3 convolution without bias; without spectral norm Xavier uniform, or zeros if closing (utils.py:101-132)."""
    if norm == "spectral":
        return SpectralConv2d(inputs, outputs, closing=closing)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    if closing:
        nn.init.zeros_(conv.weight)
    else:
        nn.init.xavier_uniform_(conv.weight)
    return conv


class _Shift(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class _Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class _Block(nn.Module):
    """[shift - conv] - dropout - LeakyReLU - [shift - conv - scale] + bypass - average pool - LeakyReLU.

    The bypass is a bare 3x3 convolution if the channels change, else nothing. IGEBM has shifts (before the padding) and
    a scale per channel (utils.py:511-579, :654-732), f-EBM only when a label is given (its utils.py:690-714).
    """

    def __init__(self, inputs: int, outputs: int, *, pool: bool, norm: str, dropout: float, affine: bool) -> None:
        super().__init__()
        self.shift1: nn.Module = _Shift(inputs) if affine else nn.Identity()
        self.conv1 = _conv(inputs, outputs, norm)
        self.dropout = Dropout(dropout)
        self.shift2: nn.Module = _Shift(outputs) if affine else nn.Identity()
        self.conv2 = _conv(outputs, outputs, norm, closing=True)
        self.scale2: nn.Module = _Scale(outputs) if affine else nn.Identity()
        self.bypass: nn.Module = _conv(inputs, outputs, norm) if inputs != outputs else nn.Identity()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H or H // 2, ...)."""
        h = F.leaky_relu(self.dropout(self.conv1(self.shift1(x))), SLOPE)
        h = self.scale2(self.conv2(self.shift2(h))) + self.bypass(x)
        if self.pool and min(h.shape[-2:]) > 1:
            h = F.avg_pool2d(h, 2)
        return F.leaky_relu(h, SLOPE)


class ResidualSumNet(Trunk):
    """Trunk of IGEBM and f-EBM: convolution, LeakyReLU, blocks, ReLU, sum over the image.

    (N, C, H, W) to (N, 4 filters) for IGEBM, (N, 2 filters) for f-EBM. An image is pooled while more than a pixel is
    left, so every size works; at 32 pixels both end at 4x4.

    Args:
        affine: whether blocks have shifts and scales.
        sizes: filters, 128 in both papers.
        norm: `spectral` or `none`.
        dropout: of every block; IGEBM's is 0.5 in all training forwards, the sampler's too.
    """

    def __init__(
        self, stages: Stages, affine: bool, sizes: Sizes, shape: Shape, norm: str, _momentum: float, dropout: float
    ) -> None:
        super().__init__()
        (filters,) = sizes
        self.stem = _conv(shape[0], filters, norm)
        blocks: list[nn.Module] = []
        inputs = filters
        for multiple, pool in stages:
            outputs = multiple * filters
            blocks.append(_Block(inputs, outputs, pool=pool, norm=norm, dropout=dropout, affine=affine))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Sum-pooled features, summed in float32 under autocast."""
        h = self.blocks(F.leaky_relu(self.stem(x), SLOPE))
        return half_to_float(F.relu(h)).sum(dim=(2, 3))


_NORMS = ("spectral", "none")
_IGEBM, _FEBM = partial(ResidualSumNet, IGEBM_STAGES, True), partial(ResidualSumNet, FEBM_STAGES, False)
NETWORKS = (
    Family("igebm", ("FILTERS",), "igebm-128", _NORMS, _IGEBM, dropout=True, xavier_head=True),
    Family("febm", ("FILTERS",), "febm-128", _NORMS, _FEBM, xavier_head=True),
)
