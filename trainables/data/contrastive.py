"""Augmentations of contrastive learning, of chain states in KL-EBM (yilundu/improved_contrastive_divergence
utils.py:190-222) and CLEL, on the device.

torchvision's transforms draw once per batch and from the global generator; here each image has its own draw.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Area of a crop as a share of the image, and its width over its height."""
JITTER_PROBABILITY, GREY_PROBABILITY = 0.8, 0.2
LARGE_SIDE = 64
"""From this side up the jitter is half as strong and images are blurred, as for CelebA."""
_LUMA = (0.299, 0.587, 0.114)


def contrastive(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment every image on its own: uint8 (N, 1 or 3, H, W) to float32 in 0..255; grey images stay grey."""
    x = images.to(torch.float32) / 255
    large = min(x.shape[2:]) >= LARGE_SIDE
    strength = 0.5 if large else 1.0
    x = views(x, generator, jitter=0.8 * strength, hue=0.4 * strength)
    if large:
        x = gaussian_blur(x, generator)
    return x * 255


def views(x: Tensor, generator: torch.Generator, *, jitter: float, hue: float) -> Tensor:
    """Crop, flip, jitter and grey every image on its own: float (N, 1 or 3, H, W) in [0, 1] to the same.

    Args:
        jitter: strength of brightness, contrast and saturation.
        hue: the most that it turns, as a share of a full turn.
    """
    x = random_resized_crop(x, generator)
    x = torch.where(_uniform(x, generator) < 0.5, x.flip(3), x)
    jittered = colour_jitter(x, jitter, jitter, jitter, hue, generator)
    x = torch.where(_uniform(x, generator) < JITTER_PROBABILITY, jittered, x)
    if x.shape[1] == 3:
        x = torch.where(_uniform(x, generator) < GREY_PROBABILITY, grey(x).expand_as(x), x)
    return x


def _uniform(x: Tensor, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """One number per image, float (N, 1, 1, 1)."""
    return torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) * (high - low) + low


def random_resized_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crops (N, C, H, W) of 8 to 100% of the area, aspect 3/4 to 4/3 (log-uniform), narrowed to fit, scaled back."""
    n, _, height, width = x.shape
    area = _uniform(x, generator, *CROP_SCALE).flatten() * (height * width)
    ratio = _uniform(x, generator, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])).flatten().exp()
    w = (area * ratio).sqrt().round().clamp(1, width)
    h = (area / ratio).sqrt().round().clamp(1, height)
    left = (_uniform(x, generator).flatten() * (width - w + 1)).floor()
    top = (_uniform(x, generator).flatten() * (height - h + 1)).floor()
    # An affine map from output to input coordinates, both in [-1, 1] across the whole image (pixel edges).
    theta = torch.zeros(n, 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = w / width, h / height
    theta[:, 0, 2] = (2 * left + w) / width - 1
    theta[:, 1, 2] = (2 * top + h) / height - 1
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Outermost pixels of the box, so that none beyond it is blended in: the image is cropped, then scaled.
    low = torch.stack([(2 * left + 1) / width, (2 * top + 1) / height], dim=1).view(n, 1, 1, 2) - 1
    high = torch.stack([(2 * (left + w) - 1) / width, (2 * (top + h) - 1) / height], dim=1).view(n, 1, 1, 2) - 1
    grid = torch.minimum(torch.maximum(grid, low), high)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def grey(x: Tensor) -> Tensor:
    """Luma: (N, 3, H, W) to (N, 1, H, W); a grey image is its own."""
    if x.shape[1] == 1:
        return x
    red, green, blue = (weight * part for weight, part in zip(_LUMA, x.split(1, dim=1), strict=True))
    luma: Tensor = red + green + blue
    return luma


def colour_jitter(
    x: Tensor, brightness: float, contrast: float, saturation: float, hue: float, generator: torch.Generator
) -> Tensor:
    """Brightness, contrast, saturation and hue in random order, each with a factor per image: (N, C, H, W) in [0, 1].

    Factors are uniform in [1 - s, 1 + s]; the hue moves by up to `hue` turns. A grey image keeps its hue.
    """
    factors = [_uniform(x, generator, max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    turn = _uniform(x, generator, -hue, hue)
    order = torch.rand(len(x), 4, generator=generator, device=x.device).argsort(1)
    # An image takes one operation at a time. The first three blend it with black, with its mean luma and with its luma.
    parameters = torch.cat([p.view(-1, 1) for p in (*factors, turn)], dim=1).gather(1, order)
    for place in range(4):
        operation, factor = (v[:, place].view(-1, 1, 1, 1) for v in (order, parameters))
        luma = grey(x)
        other = torch.where(operation == 1, luma.mean(dim=(2, 3), keepdim=True), torch.where(operation == 2, luma, 0))
        blended = factor * x + (1 - factor) * other
        x = torch.where(operation == 3, shift_hue(x, turn), blended).clamp(0, 1)
    return x


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB images, (N, 3, H, W) in [0, 1], by a share of a full turn, (N, 1, 1, 1)."""
    if x.shape[1] != 3:
        return x
    value, _ = x.max(1)
    low, _ = x.min(1)
    spread = value - low
    safe = torch.where(spread > 0, spread, 1)
    r, g, b = x.unbind(1)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = (hue / 6 + turn.squeeze(1)) % 1
    # Hue, chroma and value back to RGB: each channel falls by the chroma outside its third of the circle.
    shifts = torch.arange(5.0, 0.0, -2.0, device=x.device).view(1, 3, 1, 1)
    k = (shifts + hue.unsqueeze(1) * 6) % 6
    return value.unsqueeze(1) - spread.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, generator: torch.Generator, size: int = 5) -> Tensor:
    """Blur with sigma uniform in [0.1, 2] per image, for every second image (N, C, H, W)."""
    n, channels = x.shape[:2]
    sigma = _uniform(x, generator, 0.1, 2.0).view(n, 1)
    offsets = torch.arange(size, device=x.device) - size // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(x, [size // 2] * 4, mode="reflect").reshape(1, n * channels, x.shape[2] + size - 1, -1)
    flat = F.conv2d(flat, kernel.view(-1, 1, size, 1), groups=n * channels)
    flat = F.conv2d(flat, kernel.view(-1, 1, 1, size), groups=n * channels)
    return torch.where(_uniform(x, generator) < 0.5, flat.view_as(x), x)
