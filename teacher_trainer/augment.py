"""SimCLR's colour distortion and blur, on a whole batch at once, on whatever device it lies (SimCLR, appendix A).

The geometric half of the augmentation (random resized crop and flip) is cut on the CPU by `distill.crops`. Here: colour jitter with
probability 0.8 and strength s (brightness, contrast, saturation 0.8 s, hue 0.2 s, in random order, clipped after each; brightness
multiplies, as in SimCLRv2), greyscale with probability 0.2, Gaussian blur. Each image draws its own parameters from the generator.

Shapes: B images, C = 3 channels, H W pixels; values 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

JITTER_PROBABILITY = 0.8
GREY_PROBABILITY = 0.2
LUMA = (0.2989, 0.587, 0.114)  # TensorFlow's rgb_to_grayscale
BLUR_SIGMA = (0.1, 2.0)  # pixels


def distort(images_BCHW: Tensor, jitter_strength: float, blur_probability: float, generator: torch.Generator) -> Tensor:
    """A distorted copy of float images [B,3,H,W] in 0..1."""
    batch = len(images_BCHW)
    distorted = images_BCHW.clone()
    jittered = torch.nonzero(_uniform(batch, generator) < JITTER_PROBABILITY).flatten()
    if jitter_strength > 0 and len(jittered):
        distorted[jittered] = jitter(distorted[jittered], jitter_strength, generator)
    grey = torch.nonzero(_uniform(batch, generator) < GREY_PROBABILITY).flatten()
    distorted[grey] = greyscale(distorted[grey])
    blurred = torch.nonzero(_uniform(batch, generator) < blur_probability).flatten()
    if len(blurred):
        low, high = BLUR_SIGMA
        distorted[blurred] = blur(distorted[blurred], low + (high - low) * _uniform(len(blurred), generator))
    return distorted


def jitter(images_BCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in its own order and strength."""
    batch = len(images_BCHW)
    reach = 0.8 * strength
    low = max(0.0, 1.0 - reach)
    factors = {name: low + (1.0 + reach - low) * _uniform(batch, generator) for name in ("brightness", "contrast", "saturation")}
    factors["hue"] = 0.2 * strength * (2 * _uniform(batch, generator) - 1)
    operations: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "brightness": lambda x, f: x * f,
        "contrast": lambda x, f: (x - x.mean(dim=(2, 3), keepdim=True)) * f + x.mean(dim=(2, 3), keepdim=True),
        "saturation": lambda x, f: change_hsv(x, saturation_B111=f),
        "hue": lambda x, f: change_hsv(x, hue_B111=f),
    }
    order = torch.rand(batch, len(operations), generator=generator).argsort(dim=1)
    changed = images_BCHW.clone()
    for position in range(len(operations)):
        for index, (name, operation) in enumerate(operations.items()):
            rows = torch.nonzero(order[:, position] == index).flatten()
            if len(rows):
                strengths = factors[name][rows].view(-1, 1, 1, 1).to(changed.device)
                changed[rows] = operation(changed[rows], strengths).clamp(0, 1)
    return changed


def greyscale(images_BCHW: Tensor) -> Tensor:
    """Luma in all three channels."""
    weights = torch.tensor(LUMA, device=images_BCHW.device).view(1, 3, 1, 1)
    return (images_BCHW * weights).sum(dim=1, keepdim=True).expand_as(images_BCHW)


def change_hsv(images_BCHW: Tensor, saturation_B111: Tensor | None = None, hue_B111: Tensor | None = None) -> Tensor:
    """Scale the saturation, or turn the hue by a share of the full circle, in HSV space."""
    value, _ = images_BCHW.max(dim=1, keepdim=True)
    chroma = value - images_BCHW.min(dim=1, keepdim=True).values
    if saturation_B111 is not None:
        # With hue and value fixed, every channel's distance from the value scales with the saturation, which may not pass 1.
        most = value / chroma.clamp(min=1e-8)
        return value - (value - images_BCHW) * torch.minimum(saturation_B111, most)
    assert hue_B111 is not None
    red, green, blue = images_BCHW.unbind(dim=1)
    safe = chroma[:, 0].clamp(min=1e-8)
    sixth = torch.where(
        value[:, 0] == red,
        (green - blue) / safe % 6,
        torch.where(value[:, 0] == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    turned = sixth.unsqueeze(1) + 6 * hue_B111
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images_BCHW.device).view(1, 3, 1, 1)
    ramp = (offsets + turned) % 6
    return value - chroma * torch.minimum(ramp, 4 - ramp).clamp(0, 1)


def blur(images_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur, each image with its own sigma in pixels; the kernel is a tenth of the height, as in the official code, at least 3."""
    radius = max(images_BCHW.shape[2] // 20, 1)
    steps = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel_BS = torch.exp(-(steps**2) / (2 * sigma_B.view(-1, 1) ** 2))
    kernel_BS = (kernel_BS / kernel_BS.sum(dim=1, keepdim=True)).to(images_BCHW.device)
    batch, channels, height, width = images_BCHW.shape
    # One group per image and channel lets one convolution blur each with its own kernel.
    weights = kernel_BS.repeat_interleave(channels, dim=0)
    flat = images_BCHW.reshape(1, batch * channels, height, width)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="reflect"), weights[:, None, None, :], groups=batch * channels)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="reflect"), weights[:, None, :, None], groups=batch * channels)
    return flat.view(batch, channels, height, width)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator)
