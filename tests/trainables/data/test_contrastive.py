"""KL-EBM's augmentation: each operation against torchvision's on single images, and the recipe's probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from trainables.data import contrastive as augment


def _images(count: int = 12, side: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, side // 4, side // 4, generator=g)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (fine + 0.3 * torch.rand(count, channels, side, side, generator=g)).clamp(0, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


JITTERS: list[tuple[str, tuple[float, float, float, float], Callable[[Tensor, float], Tensor]]] = [
    ("brightness", (0.8, 0, 0, 0), tv.adjust_brightness),
    ("contrast", (0, 0.8, 0, 0), tv.adjust_contrast),
    ("saturation", (0, 0, 0.8, 0), tv.adjust_saturation),
    ("hue", (0, 0, 0, 0.4), tv.adjust_hue),
]


@pytest.mark.parametrize(("name", "strengths", "reference"), JITTERS, ids=[j[0] for j in JITTERS])
def test_one_jitter_at_a_time(
    name: str, strengths: tuple[float, float, float, float], reference: Callable[[Tensor, float], Tensor]
) -> None:
    """With the other strengths 0 their operations do nothing, so the order does not matter."""
    x = _images()
    got = augment.colour_jitter(x, *strengths, torch.Generator().manual_seed(5))
    twin = torch.Generator().manual_seed(5)
    factors = [_uniform(len(x), max(0.0, 1 - s), 1 + s, twin) for s in strengths[:3]]
    factors.append(_uniform(len(x), -strengths[3], strengths[3], twin))
    mine = factors[[j[0] for j in JITTERS].index(name)]
    assert mine.max() - mine.min() > 0.3, "factors differ from image to image"
    for image, factor, result in zip(x, mine.tolist(), got, strict=True):
        torch.testing.assert_close(result, reference(image, factor), rtol=0, atol=2e-3)


def test_jitter_in_the_drawn_order() -> None:
    """All four operations on every image, in its own order, clamped after each."""
    x = _images(30)
    strengths = (0.8, 0.8, 0.8, 0.4)
    got = augment.colour_jitter(x, *strengths, torch.Generator().manual_seed(1))
    twin = torch.Generator().manual_seed(1)
    factors = [_uniform(len(x), 1 - s, 1 + s, twin) for s in strengths[:3]]
    factors.append(_uniform(len(x), -0.4, 0.4, twin))
    order = torch.rand(len(x), 4, generator=twin).argsort(1)
    assert len({tuple(row) for row in order.tolist()}) > 10
    for i, row in enumerate(order.tolist()):
        image = x[i]
        for which in row:
            image = JITTERS[which][2](image, factors[which][i].item()).clamp(0, 1)
        torch.testing.assert_close(got[i], image, rtol=0, atol=5e-3)


def test_hue_wraps_and_grey_pixels_keep_theirs() -> None:
    x = _images(4)
    turn = torch.tensor([0.5, -0.5, 1.0, 0.0]).view(4, 1, 1, 1)
    got = augment.shift_hue(x, turn)
    torch.testing.assert_close(got[2:], x[2:], rtol=0, atol=1e-5)
    for i in (0, 1):
        torch.testing.assert_close(got[i], tv.adjust_hue(x[i], 0.5), rtol=0, atol=1e-3)
    flat = torch.full((1, 3, 4, 4), 0.37)
    assert torch.equal(augment.shift_hue(flat, torch.full((1, 1, 1, 1), 0.3)), flat)
    pure = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    third = augment.shift_hue(pure, torch.full((1, 1, 1, 1), 1 / 3)).flatten()
    torch.testing.assert_close(third, torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-6)


def test_grey() -> None:
    x = _images(5)
    torch.testing.assert_close(augment.grey(x), tv.rgb_to_grayscale(x), rtol=0, atol=2e-4)
    single = _images(2, channels=1)
    assert torch.equal(augment.grey(single), single)


def _boxes(x: Tensor, generator: torch.Generator) -> list[tuple[int, int, int, int]]:
    """Top, left, height, width of the crops that a generator gives, by the definition of RandomResizedCrop."""
    n, side = len(x), x.shape[2]
    area = _uniform(n, 0.08, 1.0, generator) * side * side
    ratio = _uniform(n, math.log(3 / 4), math.log(4 / 3), generator).exp()
    lefts, tops = torch.rand(n, generator=generator), torch.rand(n, generator=generator)
    boxes = []
    for a, r, left, top in zip(area.tolist(), ratio.tolist(), lefts.tolist(), tops.tolist(), strict=True):
        w, h = min(side, round(math.sqrt(a * r))), min(side, round(math.sqrt(a / r)))
        boxes.append((int(top * (side - h + 1)), int(left * (side - w + 1)), h, w))
    return boxes


def test_crop_and_resize() -> None:
    """Cropped first, then scaled: nothing from outside the box may reach the result."""
    x = _images(40)
    got = augment.random_resized_crop(x, torch.Generator().manual_seed(2))
    boxes = _boxes(x, torch.Generator().manual_seed(2))
    assert len({box[2:] for box in boxes}) > 20
    for image, (top, left, h, w), result in zip(x, boxes, got, strict=True):
        wanted = tv.resized_crop(image, top, left, h, w, [16, 16], antialias=False)
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-4)


def test_boxes_cover_the_published_range() -> None:
    """Area 8 to 100%, aspect 3/4 to 4/3; measured on coordinates that the crop itself carries along."""
    n, side = 4000, 32
    ramp = (torch.arange(side) + 0.5) / side
    x = torch.stack([ramp.view(1, -1).expand(side, side), ramp.view(-1, 1).expand(side, side)]).expand(n, 2, side, side)
    crop = augment.random_resized_crop(x, torch.Generator().manual_seed(0))
    w = (crop[:, 0, 0].amax(1) - crop[:, 0, 0].amin(1)) * side + 1
    h = (crop[:, 1, :, 0].amax(1) - crop[:, 1, :, 0].amin(1)) * side + 1
    share, ratio = w * h / side**2, w / h
    assert 0.06 < share.min() < 0.1 and 0.98 < share.max() <= 1.001
    assert ratio.min() > 0.68 and ratio.max() < 1.47
    assert share.mean().item() == pytest.approx(0.54, abs=0.03)
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.02)
    assert crop.min() >= ramp[0] - 1e-5 and crop.max() <= ramp[-1] + 1e-5


def test_probabilities_of_the_recipe() -> None:
    """Flip 1/2, jitter 0.8, grey 0.2; crops and jitter never repeat a batch's draw."""
    n = 6000
    pixels = torch.tensor([[200, 40], [200, 40]], dtype=torch.uint8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    image = torch.stack([pixels, pixels // 2, pixels // 4]).expand(n, 3, 8, 8).contiguous()
    out = augment.contrastive(image, torch.Generator().manual_seed(0))
    assert out.dtype == torch.float32 and out.shape == image.shape and out.min() >= 0 and out.max() <= 255.001
    grey = (out.amax(1) - out.amin(1)).amax((1, 2)) < 0.01
    assert grey.double().mean().item() == pytest.approx(0.2, abs=0.03)
    # An unjittered, coloured image still has the two ratios between its channels.
    colour = out[~grey]
    kept = ((colour[:, 0] / 2 - colour[:, 1]).abs().amax((1, 2)) < 0.5) & (
        (colour[:, 1] / 2 - colour[:, 2]).abs().amax((1, 2)) < 0.5
    )
    assert kept.double().mean().item() == pytest.approx(0.2, abs=0.03)
    # The bright half is on the left unless flipped; crops that see both halves tell.
    step = colour[kept].mean((1, 2))[:, -1] - colour[kept].mean((1, 2))[:, 0]
    seen = step.abs() > 5
    assert (step[seen] > 0).double().mean().item() == pytest.approx(0.5, abs=0.06)


def test_strength_depends_on_the_side() -> None:
    """From 64 pixels up the jitter is half as strong and half of the images are blurred (CelebA)."""
    flat = torch.full((4000, 3, 8, 8), 100, dtype=torch.uint8)
    small = augment.contrastive(flat, torch.Generator().manual_seed(0)).amax((1, 2, 3))
    large_flat = torch.full((300, 3, 64, 64), 100, dtype=torch.uint8)
    large = augment.contrastive(large_flat, torch.Generator().manual_seed(0)).amax((1, 2, 3))
    assert small.min() < 30 and small.max() > 170
    assert large.min() > 58 and large.max() < 142


def test_blur() -> None:
    """The kernel is torchvision's for each image's sigma, uniform in 0.1 to 2; every second image is blurred."""
    x = _images(20, side=64)
    got = augment.gaussian_blur(x, torch.Generator().manual_seed(4))
    twin = torch.Generator().manual_seed(4)
    sigma = _uniform(len(x), 0.1, 2.0, twin).tolist()
    chosen = torch.rand(len(x), generator=twin) < 0.5
    assert 3 < int(chosen.sum()) < 17
    for image, s, blurred, result in zip(x, sigma, chosen.tolist(), got, strict=True):
        wanted = tv.gaussian_blur(image, [5, 5], [s, s]) if blurred else image
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_same_seed_same_images_and_the_global_generator_rests(channels: int) -> None:
    images = (_images(6, side=8, channels=channels) * 255).to(torch.uint8)
    kept = images.clone()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augment.contrastive(images, torch.Generator().manual_seed(9))
    again = augment.contrastive(images, torch.Generator().manual_seed(9))
    other = augment.contrastive(images, torch.Generator().manual_seed(10))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(images, kept) and torch.equal(torch.get_rng_state(), before)
    twice = augment.contrastive(images[:1].expand(6, -1, -1, -1), torch.Generator().manual_seed(9))
    assert len({tuple(t.flatten().tolist()) for t in twice}) == 6, "a draw per image, not per batch"
