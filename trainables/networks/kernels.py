"""Batch norm with its LeakyReLU, and what stands before it, in few passes over memory: Triton kernels for a GPU.

Between its convolutions a Wide ResNet is bound by memory. PyTorch adds a bias, adds the shortcut, takes statistics,
normalises and activates in a pass each; these kernels do so in two passes, and backward likewise, with fewer roundings.
Statistics are summed in float32 about a value of their channel, so their error does not grow with the mean.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs alone
    triton = None

PROGRAMS, ROWS, WARPS = 264, 128, 4
"""Programs of a kernel, about (two for each multiprocessor of a large GPU); rows of a tile; warps of a program."""


def fusible(x: Tensor) -> bool:
    """Whether the kernels take such a feature map."""
    return triton is not None and x.is_cuda and x.shape[1] % 16 == 0


def plain(
    x: Tensor, norm: nn.BatchNorm2d, slope: float, added: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """LeakyReLU of the train-mode norm of s = x + added + bias, and s: both (N, C, H, W), by PyTorch's own kernels.

    Args:
        x, added: (N, C, H, W); running statistics are updated as `norm` does it.
        bias: (C,).
    """
    s = x if added is None else x + added
    if bias is not None:
        s = s + bias.to(s.dtype).view(-1, 1, 1)
    return F.leaky_relu(norm(s), slope, inplace=True), s


def plain_without_bias(x: Tensor, norm: nn.BatchNorm2d, slope: float, bias: Tensor) -> Tensor:
    """LeakyReLU of the train-mode norm of x + bias without adding it: the norm takes it away with the mean.

    The running mean has it nonetheless, and the bias gets the gradient 0 that it has in exact arithmetic. The norm's
    momentum must be below 1.
    """
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    momentum = norm.momentum or 0.0
    # Before the norm, which keeps its buffers for the backward pass: (1 - m) m / (1 - m) b = m b. Through data, because
    # the norm of another pass may be waiting for its own, which does not use them in train mode.
    norm.running_mean.data.add_(bias.detach(), alpha=momentum / (1 - momentum))
    norm.num_batches_tracked.data.add_(1)
    offset = norm.bias + 0 * bias
    h = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, offset, True, momentum, norm.eps)
    return F.leaky_relu(h, slope, inplace=True)


def fused(
    x: Tensor, norm: nn.BatchNorm2d, slope: float, added: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `plain`, by the kernels of this module. They have no second derivative.

    Without `added` the bias is not put into s, which is x itself: see `plain_without_bias`.
    """
    y, s = _NormActivation.apply(
        x, added, bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        norm.momentum, norm.eps, slope,
    )  # fmt: skip
    return y, s


def _tiling(x: Tensor) -> tuple[tuple[int, int], dict[str, int], dict[str, int]]:
    """The grid (strips of rows, blocks of channels), the sizes that kernels are told, and the constants of a tile."""
    channels = x.shape[1]
    rows = x.numel() // channels
    width = min(64, channels & -channels)
    strips = max(1, min(PROGRAMS * width // channels, -(-rows // ROWS)))
    each = -(-rows // (strips * ROWS)) * ROWS
    strips = -(-rows // each)
    sizes = {"rows": rows, "channels": channels, "each": each, "strips": strips}
    return (strips, channels // width), sizes, {"BLOCK_C": width, "BLOCK_M": ROWS, "num_warps": WARPS}


def flips(conv: nn.Conv2d) -> bool:
    """Whether `flipped_convolution` serves a convolution, and better than cuDNN does: see there."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.in_channels > 16
        and conv.out_channels % 64 != 0
    )


def flipped_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """3x3 convolution of stride 1 without bias whose gradient to x is another such convolution, of flipped weights.

    It is that in exact arithmetic. cuDNN's own kernel for it wants output channels in multiples of 64: on an H100 in
    bfloat16 it takes 1.9 times as long as the forward pass at 160 channels, the first stage of a WRN-28-10.

    Args:
        x: (N, inputs, H, W).
        weight: (outputs, inputs, 3, 3).
    """
    return _FlippedConvolution.apply(x, weight.to(x.dtype))  # type: ignore[no-any-return]


class _FlippedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = F.conv2d(gradient, weight.flip(2, 3).transpose(0, 1), padding=1)
        if ctx.needs_input_grad[1]:
            dw = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
            )[1]
        return dx, dw


class _NormActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        offset: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        count: Tensor,
        momentum: float,
        eps: float,
        slope: float,
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        grid, sizes, tile = _tiling(x)
        partial = torch.empty(2, sizes["strips"], sizes["channels"], dtype=torch.float32, device=x.device)
        statistics = torch.empty(2, sizes["channels"], dtype=torch.float32, device=x.device)
        y, s = torch.empty_like(x), x
        if added is not None:
            added, s = added.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        _sums[grid](x, added, bias, s, partial, **sizes, ADDS=added is not None, BIASED=bias is not None, **tile)
        _apply[grid](
            s, y, partial, statistics, weight, offset, running_mean, running_var, count,
            bias if added is None else None, momentum, eps, slope, **sizes,
            BIASED=added is None and bias is not None, STRIPS=triton.next_power_of_2(sizes["strips"]), **tile,
        )  # fmt: skip
        ctx.save_for_backward(s, weight, offset, statistics)
        ctx.slope, ctx.adds, ctx.biased = slope, added is not None, bias is not None
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, offset, statistics = ctx.saved_tensors
        if gradient is None:  # nothing went through the norm
            gradient = torch.zeros_like(s)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        grid, sizes, tile = _tiling(s)
        partial = torch.empty(2, sizes["strips"], sizes["channels"], dtype=torch.float32, device=s.device)
        found = torch.empty(2, sizes["channels"], dtype=torch.float32, device=s.device)
        dx = torch.empty_like(s)
        needed = ctx.needs_input_grad
        # A bias that the norm takes away has no gradient but the residual's.
        summed = torch.empty_like(partial[0]) if needed[2] and ctx.adds and residual is not None else None
        parts = (gradient, s, partial, statistics, weight, offset, ctx.slope)
        _backward_sums[grid](*parts, **sizes, **tile)
        constants = {"ADDS": residual is not None, "SUMS": summed is not None, **tile}
        constants["STRIPS"] = triton.next_power_of_2(sizes["strips"])
        _backward[grid](*parts, residual, dx, found, summed, **sizes, **constants)
        d_bias = None
        if needed[2]:
            d_bias = torch.zeros_like(found[0]) if summed is None else summed.sum(0)
        return (
            dx,
            dx if needed[1] else None,
            d_bias,
            found[1] if needed[3] else None,
            found[0] if needed[4] else None,
            *[None] * 6,
        )


# Feature maps are (rows, channels) in memory, rows = N H W. A program has a strip of rows and a block of channels.

if triton is not None:

    @triton.jit
    def _sums(
        x, added, bias, s, partial, rows, channels, each, strips,
        ADDS: tl.constexpr, BIASED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    ):  # fmt: skip
        """Sums of s - s[0] and of its square over a strip; s = x + added + bias is written where something is added."""
        strip = tl.program_id(0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        shift = tl.load(x + c).to(tl.float32)
        constant = tl.zeros((BLOCK_C,), dtype=tl.float32)
        if ADDS:
            if BIASED:
                constant = tl.load(bias + c).to(tl.float32)
            shift += tl.load(added + c).to(tl.float32) + constant  # in the order of the sums below, to round alike
            shift = shift.to(s.dtype.element_ty).to(tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        square = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for first in range(0, each, BLOCK_M):
            m = strip * each + first + tl.arange(0, BLOCK_M)
            inside = (m < rows)[:, None]
            place = m[:, None] * channels + c[None, :]
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            if ADDS:
                value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32) + constant[None, :]
                rounded = value.to(s.dtype.element_ty)
                tl.store(s + place, rounded, mask=inside)
                value = rounded.to(tl.float32)
            value = tl.where(inside, value - shift[None, :], 0.0)
            total += value
            square += value * value
        tl.store(partial + strip * channels + c, tl.sum(total, 0))
        tl.store(partial + (strips + strip) * channels + c, tl.sum(square, 0))

    @triton.jit
    def _apply(
        s, y, partial, statistics, weight, offset, running_mean, running_var, count, bias,
        momentum, eps, slope, rows, channels, each, strips,
        BIASED: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    ):  # fmt: skip
        """Normalise and activate; the first strip keeps the statistics."""
        strip = tl.program_id(0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        i = tl.arange(0, STRIPS)
        there = (i < strips)[:, None]
        total = tl.sum(tl.load(partial + i[:, None] * channels + c[None, :], mask=there, other=0.0), 0)
        square = tl.sum(tl.load(partial + (strips + i)[:, None] * channels + c[None, :], mask=there, other=0.0), 0)
        distance = total / rows
        mean = tl.load(s + c).to(tl.float32) + distance
        variance = square / rows - distance * distance
        variance = tl.where(variance < 0, 0.0, variance)  # rounding; NaN stays
        inverse = 1.0 / tl.sqrt(variance + eps)
        if strip == 0:
            tl.store(statistics + c, mean)
            tl.store(statistics + channels + c, inverse)
            seen = mean
            if BIASED:
                seen += tl.load(bias + c).to(tl.float32)
            before = tl.load(running_mean + c)
            tl.store(running_mean + c, before + momentum * (seen - before))
            before = tl.load(running_var + c)
            tl.store(running_var + c, before + momentum * (variance * (rows / (rows - 1.0)) - before))
            if tl.program_id(1) == 0:
                tl.store(count, tl.load(count) + 1)
        gain = inverse * tl.load(weight + c)
        constant = tl.load(offset + c) - mean * gain
        for first in range(0, each, BLOCK_M):
            m = strip * each + first + tl.arange(0, BLOCK_M)
            inside = (m < rows)[:, None]
            place = m[:, None] * channels + c[None, :]
            z = tl.load(s + place, mask=inside, other=0.0).to(tl.float32) * gain[None, :] + constant[None, :]
            tl.store(y + place, tl.where(z > 0, z, z * slope).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_sums(
        gradient, s, partial, statistics, weight, offset, slope, rows, channels, each, strips,
        BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    ):  # fmt: skip
        """Sums over a strip of dz and of dz times the normalised value; dz is the gradient behind the norm."""
        strip = tl.program_id(0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mean, inverse = tl.load(statistics + c), tl.load(statistics + channels + c)
        gain = inverse * tl.load(weight + c)
        constant = tl.load(offset + c) - mean * gain
        total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        product = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for first in range(0, each, BLOCK_M):
            m = strip * each + first + tl.arange(0, BLOCK_M)
            inside = (m < rows)[:, None]
            place = m[:, None] * channels + c[None, :]
            value = tl.load(s + place, mask=inside, other=0.0).to(tl.float32)
            dz = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
            dz = tl.where(value * gain[None, :] + constant[None, :] > 0, dz, dz * slope)
            total += dz
            product += dz * ((value - mean[None, :]) * inverse[None, :])
        tl.store(partial + strip * channels + c, tl.sum(total, 0))
        tl.store(partial + (strips + strip) * channels + c, tl.sum(product, 0))

    @triton.jit
    def _backward(
        gradient, s, partial, statistics, weight, offset, slope, residual, dx, found, summed,
        rows, channels, each, strips,
        ADDS: tl.constexpr, SUMS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    ):  # fmt: skip
        """The gradient of s with the residual's, and the residual's sum; the first strip keeps the other gradients."""
        strip = tl.program_id(0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        i = tl.arange(0, STRIPS)
        there = (i < strips)[:, None]
        total = tl.sum(tl.load(partial + i[:, None] * channels + c[None, :], mask=there, other=0.0), 0)
        product = tl.sum(tl.load(partial + (strips + i)[:, None] * channels + c[None, :], mask=there, other=0.0), 0)
        if strip == 0:
            tl.store(found + c, total)
            tl.store(found + channels + c, product)
        mean, inverse = tl.load(statistics + c), tl.load(statistics + channels + c)
        gain = inverse * tl.load(weight + c)
        constant = tl.load(offset + c) - mean * gain
        mean_dz, mean_product = total / rows, product / rows
        more = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for first in range(0, each, BLOCK_M):
            m = strip * each + first + tl.arange(0, BLOCK_M)
            inside = (m < rows)[:, None]
            place = m[:, None] * channels + c[None, :]
            value = tl.load(s + place, mask=inside, other=0.0).to(tl.float32)
            dz = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
            dz = tl.where(value * gain[None, :] + constant[None, :] > 0, dz, dz * slope)
            normed = (value - mean[None, :]) * inverse[None, :]
            result = gain[None, :] * (dz - mean_dz[None, :] - normed * mean_product[None, :])
            if ADDS:
                other = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
                result += other
                more += other
            tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
        if SUMS:
            tl.store(summed + strip * channels + c, tl.sum(more, 0))
