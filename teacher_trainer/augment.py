"""SimCLR's colour distortion and blur, on a whole batch at once, on whatever device it lies (SimCLR, appendix A).

The geometric half of the augmentation (random resized crop and flip) is cut on the CPU by `distill.crops`. Here, in the official order:
colour jitter with probability 0.8 and strength s (brightness, contrast, saturation 0.8 s, hue 0.2 s, in random order, clipped after each;
brightness multiplies, as in SimCLRv2), greyscale with probability 0.2, Gaussian blur. Where the official blur pads with black, which
darkens the border, this one mirrors.

What is done to a view is a pure function of (seed, view, image_id), as its crop is: the numbers are drawn from the hash of that key, on
the CPU, and only applied on the device. So they are the same on one worker or eight, and after a resume.

Unit of data: one view, float [3,H,W] in 0..1. Shapes: B views, C = 3 channels, H W pixels, U uniform numbers of one view.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.crops import CropKey

JITTER_PROBABILITY = 0.8
GREY_PROBABILITY = 0.2
LUMA = (0.2989, 0.587, 0.114)  # TensorFlow's rgb_to_grayscale
BLUR_SIGMA = (0.1, 2.0)  # pixels

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
ORDERS = torch.tensor(list(itertools.permutations(range(len(OPERATIONS)))))
"""int64 [24,4]: every order in which the four operations can follow each other."""

NUM_UNIFORMS = 9  # whether jittered, grey, blurred; one for each operation; the order; sigma


@dataclass(frozen=True)
class Distortion:
    """What is done to each view of a batch. All tensors are on the CPU, so that choosing rows never waits for the device."""

    jittered_B: Tensor
    """bool: whether the colours are jittered."""
    grey_B: Tensor
    """bool: whether the view is made grey."""
    blurred_B: Tensor
    """bool: whether the view is blurred."""
    strength_B4: Tensor
    """float32, in the order of `OPERATIONS`: three factors, and the turn of the hue as a share of the full circle."""
    order_B4: Tensor
    """int64: which operation comes first, second, third, last."""
    sigma_B: Tensor
    """float32, of the blur, in pixels."""

    @classmethod
    def draw(cls, keys: Sequence[CropKey], jitter_strength: float, blur_probability: float) -> Self:
        """The distortion of each view that `keys` name."""
        jittered_B, grey_B, blurred_B, *strength_4B, order_B, sigma_B = draw_uniforms(keys).unbind(dim=1)
        reach = 0.8 * jitter_strength
        low, high = max(0.0, 1.0 - reach), 1.0 + reach
        factors = [low + (high - low) * uniform_B for uniform_B in strength_4B[:3]]
        turn_B = 0.2 * jitter_strength * (2 * strength_4B[3] - 1)
        sigma_low, sigma_high = BLUR_SIGMA
        return cls(
            jittered_B=(jittered_B < JITTER_PROBABILITY) & (jitter_strength > 0),
            grey_B=grey_B < GREY_PROBABILITY,
            blurred_B=blurred_B < blur_probability,
            strength_B4=torch.stack([*factors, turn_B], dim=1).float(),
            order_B4=ORDERS[(order_B * len(ORDERS)).long()],
            sigma_B=(sigma_low + (sigma_high - sigma_low) * sigma_B).float(),
        )


def draw_uniforms(keys: Sequence[CropKey]) -> Tensor:
    """float64 [B,U] in [0,1): 32 bits of a BLAKE2b of the key for each number."""
    digests = b"".join(
        hashlib.blake2b(
            f"{key.seed}\x00{key.view}\x00{key.image_id}".encode("utf-8", "surrogatepass"),
            digest_size=4 * NUM_UNIFORMS,
            person=b"distill.distort",
        ).digest()
        for key in keys
    )
    return torch.from_numpy(np.frombuffer(digests, "<u4").reshape(-1, NUM_UNIFORMS) * 2.0**-32)


def distort(images_BCHW: Tensor, distortion: Distortion) -> Tensor:
    """A distorted copy of float images [B,3,H,W] in 0..1, on the device of the images."""
    if images_BCHW.device.type != "cpu":
        return _distort(images_BCHW, distortion)
    # Hundreds of very short passes: waiting for each other costs two threads more than they bring, above all beside decoding threads.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _distort(images_BCHW, distortion)
    finally:
        torch.set_num_threads(num_threads)


def _distort(images_BCHW: Tensor, distortion: Distortion) -> Tensor:
    distorted = images_BCHW.clone(memory_format=torch.contiguous_format)
    _replace(distorted, distortion.jittered_B, lambda x, rows: jitter(x, distortion.strength_B4[rows], distortion.order_B4[rows]))
    _replace(distorted, distortion.grey_B, lambda x, rows: greyscale(x))
    _replace(distorted, distortion.blurred_B, lambda x, rows: blur(x, distortion.sigma_B[rows]))
    return distorted


def _replace(images_BCHW: Tensor, chosen_B: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Put `change(chosen images, their rows)` in the place of the chosen images."""
    rows = chosen_B.nonzero().flatten()
    if len(rows):
        at = rows.to(images_BCHW.device, non_blocking=True)
        images_BCHW.index_copy_(0, at, change(images_BCHW.index_select(0, at), rows))


def jitter(images_BCHW: Tensor, strength_B4: Tensor, order_B4: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in its own order and strength, clipped to 0..1 after each.

    Args:
        strength_B4: see `Distortion`.
        order_B4: see `Distortion`.
    """
    operations = (scale_brightness, scale_contrast, scale_saturation, turn_hue)
    changed = images_BCHW.clone()
    for index_B in order_B4.unbind(dim=1):
        for index, operation in enumerate(operations):

            def apply(x: Tensor, rows: Tensor, index: int = index, operation: Callable[[Tensor, Tensor], Tensor] = operation) -> Tensor:
                strength = strength_B4[rows, index].view(-1, 1, 1, 1).to(x.device, non_blocking=True)
                return operation(x, strength).clamp_(0, 1)

            _replace(changed, index_B == index, apply)
    return changed


def scale_brightness(images_BCHW: Tensor, factor_B111: Tensor) -> Tensor:
    """Every value times the factor."""
    return images_BCHW * factor_B111


def scale_contrast(images_BCHW: Tensor, factor_B111: Tensor) -> Tensor:
    """Every value's distance from its channel's mean times the factor."""
    return torch.lerp(images_BCHW.mean(dim=(2, 3), keepdim=True), images_BCHW, factor_B111)


def scale_saturation(images_BCHW: Tensor, factor_B111: Tensor) -> Tensor:
    """The saturation in HSV space times the factor, up to 1; hue and value stay."""
    value_B1HW, chroma_B1HW = _value_and_chroma(images_BCHW)
    # With hue and value fixed, every channel's distance from the value scales with the saturation.
    most = value_B1HW / chroma_B1HW.clamp(min=1e-8)
    return torch.lerp(value_B1HW, images_BCHW, torch.minimum(factor_B111, most))


def turn_hue(images_BCHW: Tensor, turn_B111: Tensor) -> Tensor:
    """The hue turned in HSV space by a share of the full circle; saturation and value stay."""
    red, green, blue = images_BCHW.split(1, dim=1)
    value, chroma = _value_and_chroma(images_BCHW)
    # The hue in sixths of the circle, times the chroma, counts from the channel that is largest. Blending by a sign, which is 0 for
    # that channel and 1 for the others, is thirty times as fast as torch.where on a CPU.
    not_red, not_green = (value - red).sign_(), (value - green).sign_()
    from_green_or_blue = torch.lerp(blue - red + 2 * chroma, red - green + 4 * chroma, not_green)
    hue = torch.lerp(green - blue, from_green_or_blue, not_red).div_(chroma.clamp(min=1e-8)).add_(6 * turn_B111)
    turned = torch.empty_like(images_BCHW)
    for channel, offset in enumerate((6, 4, 2)):
        # A channel lies `chroma` under the value where its hue is far: 3 - |distance on the circle of 6| runs from 0 to 3.
        ramp = hue + offset
        ramp.sub_(ramp.div(6).floor_().mul_(6)).sub_(3).abs_().neg_().add_(2).clamp_(0, 1)
        torch.sub(value, ramp.mul_(chroma), out=turned[:, channel : channel + 1])
    return turned


def _value_and_chroma(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Largest channel, and its distance from the smallest: [B,1,H,W] each."""
    red, green, blue = images_BCHW.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    return value, value - torch.minimum(torch.minimum(red, green), blue)


def greyscale(images_BCHW: Tensor) -> Tensor:
    """Luma in all three channels."""
    red, green, blue = images_BCHW.split(1, dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).expand_as(images_BCHW)


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
