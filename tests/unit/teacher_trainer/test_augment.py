"""The colour distortion against the standard library's colorsys, pixel by pixel; whose it is; and what must stay as it is."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.crops import CropKey
from teacher_trainer.augment import (
    LUMA,
    OPERATIONS,
    ORDERS,
    Distortion,
    blur,
    distort,
    draw_uniforms,
    greyscale,
    jitter,
    scale_brightness,
    scale_contrast,
    scale_saturation,
    turn_hue,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(batch: int = 4, height: int = 9, width: int = 7, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def keys(count: int, seed: int = 0, view: int = 0) -> list[CropKey]:
    return [CropKey(seed, view, f"image {number}") for number in range(count)]


def factors(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def special_pixels() -> Tensor:
    """Corners and edges of the colour cube, where two channels are equal and hue or saturation has a seam."""
    levels = (0.0, 0.25, 0.5, 1.0)
    pixels = [(r, g, b) for r in levels for g in levels for b in levels]
    return torch.tensor(pixels).T.reshape(1, 3, 8, 8)


def each_pixel(images: Tensor) -> list[tuple[float, float, float]]:
    return [(r, g, b) for r, g, b in images.double().permute(0, 2, 3, 1).reshape(-1, 3).tolist()]


class TestHSV:
    @pytest.mark.parametrize("images", [noise(), special_pixels()], ids=["noise", "corners"])
    @pytest.mark.parametrize("turn", [0.0, 0.2, -0.2, 0.5, -0.07])
    def test_hue(self, images: Tensor, turn: float) -> None:
        found = turn_hue(images, factors(*[turn] * len(images)))
        for before, after in zip(each_pixel(images), each_pixel(found), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value), abs=2e-6)

    @pytest.mark.parametrize("images", [noise(), special_pixels()], ids=["noise", "corners"])
    @pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.8])
    def test_saturation(self, images: Tensor, factor: float) -> None:
        found = scale_saturation(images, factors(*[factor] * len(images)))
        for before, after in zip(each_pixel(images), each_pixel(found), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value), abs=2e-6)

    def test_each_image_its_own(self) -> None:
        images, turns = noise(), factors(0.0, 0.1, -0.2, 0.5)
        together = turn_hue(images, turns)
        for b in range(4):
            torch.testing.assert_close(together[b : b + 1], turn_hue(images[b : b + 1], turns[b : b + 1]))


class TestGreyscale:
    def test_luma_in_every_channel(self) -> None:
        images = noise()
        found = greyscale(images)
        assert torch.equal(found[:, 0], found[:, 1])
        assert torch.equal(found[:, 0], found[:, 2])
        expected = np.tensordot(images.double().numpy(), LUMA, axes=(1, 0))
        np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-6)

    def test_grey_stays(self) -> None:
        """TensorFlow's weights sum to 0.9999."""
        grey = torch.full((1, 3, 2, 2), 0.6)
        torch.testing.assert_close(greyscale(grey), grey, atol=1e-4, rtol=0)


def blurred_by_hand(
    image_HW: np.ndarray[tuple[int, ...], np.dtype[np.float64]], sigma: float, radius: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    weights = np.array(
        [[math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in range(-radius, radius + 1)] for i in range(-radius, radius + 1)]
    )
    weights /= weights.sum()
    padded = np.pad(image_HW, radius, mode="reflect")
    size = 2 * radius + 1
    return np.array(
        [[(padded[i : i + size, j : j + size] * weights).sum() for j in range(image_HW.shape[1])] for i in range(image_HW.shape[0])]
    )


class TestBlur:
    def test_a_constant_image_stays(self) -> None:
        images = torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 40, 24)
        torch.testing.assert_close(blur(images, torch.tensor([0.1, 1.0, 2.0])), images.clone())

    @pytest.mark.parametrize(("height", "radius"), [(8, 1), (28, 1), (45, 2)])
    def test_against_a_loop(self, height: int, radius: int) -> None:
        """Each image and channel with its own sigma; the kernel spans a tenth of the height."""
        images, sigmas = noise(2, height, 11), torch.tensor([0.4, 1.7])
        found = blur(images, sigmas)
        for b in range(2):
            for c in range(3):
                expected = blurred_by_hand(images[b, c].double().numpy(), sigmas[b].item(), radius)
                np.testing.assert_allclose(found[b, c].numpy(), expected, atol=1e-6)

    def test_a_tiny_sigma_is_no_blur(self) -> None:
        images = noise()
        torch.testing.assert_close(blur(images, torch.full((4,), 0.1)), images)


class TestContrast:
    def test_about_the_mean_of_each_channel(self) -> None:
        images = noise(2)
        found = scale_contrast(images, factors(0.4, 1.7))
        for b, factor in enumerate((0.4, 1.7)):
            for c in range(3):
                channel = images[b, c].double().numpy()
                np.testing.assert_allclose(found[b, c].numpy(), (channel - channel.mean()) * factor + channel.mean(), atol=1e-6)


def jittered_one_by_one(image_CHW: Tensor, strength_4: Sequence[float], order: Sequence[int]) -> Tensor:
    """The official loop: four operations in the drawn order, each followed by a clip."""
    operations = {"brightness": scale_brightness, "contrast": scale_contrast, "saturation": scale_saturation, "hue": turn_hue}
    image = image_CHW[None]
    for index in order:
        image = operations[OPERATIONS[index]](image, factors(strength_4[index])).clamp(0, 1)
    return image[0]


class TestJitter:
    def test_every_order_against_one_image_at_a_time(self) -> None:
        images = noise(len(ORDERS))
        drawn = Distortion.draw(keys(len(ORDERS)), 1.0, 0.0)
        found = jitter(images, drawn.strength_B4, ORDERS)
        for image, changed, strength_4, order in zip(images, found, drawn.strength_B4.tolist(), ORDERS.tolist(), strict=True):
            torch.testing.assert_close(changed, jittered_one_by_one(image, strength_4, order), atol=1e-6, rtol=0)

    def test_the_order_matters(self) -> None:
        same = noise(1).expand(len(ORDERS), -1, -1, -1)
        found = jitter(same, torch.tensor([1.7, 0.4, 1.6, 0.15]).expand(len(ORDERS), -1), ORDERS)
        assert len({tuple(image.flatten().tolist()) for image in found}) == len(ORDERS)

    def test_orders(self) -> None:
        assert {tuple(order) for order in ORDERS.tolist()} == set(itertools.permutations(range(4)))


class TestDraw:
    def test_a_function_of_the_key(self) -> None:
        base = CropKey(1, 2, "tar/3.png")
        others = [base, CropKey(2, 2, "tar/3.png"), CropKey(1, 3, "tar/3.png"), CropKey(1, 2, "tar/4.png"), base]
        drawn = draw_uniforms(others)
        assert torch.equal(drawn[0], drawn[4])
        assert len(drawn[:4].flatten().unique()) == drawn[:4].numel()

    def test_the_same_for_ever(self) -> None:
        """A checkpoint resumed on another machine, or by a later version, must go on with the same numbers."""
        expected = [0.9780, 0.7294, 0.1191, 0.3359, 0.2742, 0.7893, 0.7066, 0.6470, 0.2056]
        assert draw_uniforms([CropKey(0, 1, "train/0001.png")])[0].tolist() == pytest.approx(expected, abs=1e-4)

    def test_uniform_and_independent(self) -> None:
        """9 numbers of 4000 views: means within five standard errors, no two columns correlated."""
        drawn = draw_uniforms(keys(4000)).numpy()
        assert drawn.min() >= 0
        assert drawn.max() < 1
        np.testing.assert_allclose(drawn.mean(axis=0), 0.5, atol=5 * 12**-0.5 / 4000**0.5)
        np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(drawn.shape[1]), atol=5 / 4000**0.5)

    def test_ranges_of_the_official_code(self) -> None:
        """Strength 0.5: factors in 1 +- 0.4, hue +- 0.1; sigma 0.1 to 2; jitter 80 %, grey 20 %, blur as asked; all orders alike."""
        drawn = Distortion.draw(keys(4000), 0.5, 0.3)
        reach = torch.tensor([0.4, 0.4, 0.4, 0.1])
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0])
        assert ((drawn.strength_B4 - middle).abs() <= reach + 1e-6).all()
        assert ((drawn.strength_B4 - middle).abs().amax(dim=0) > 0.98 * reach).all()
        assert 0.1 <= drawn.sigma_B.min() < 0.11
        assert 1.99 < drawn.sigma_B.max() <= 2
        shares = [flags.float().mean().item() for flags in (drawn.jittered_B, drawn.grey_B, drawn.blurred_B)]
        assert shares == pytest.approx([0.8, 0.2, 0.3], abs=0.036)
        counts = torch.unique(drawn.order_B4, dim=0, return_counts=True)[1]
        assert len(counts) == 24
        assert (counts - 4000 / 24).abs().max() < 5 * (4000 / 24) ** 0.5

    def test_strong_jitter_never_turns_values_negative(self) -> None:
        assert Distortion.draw(keys(500), 2.0, 0.0).strength_B4[:, :3].min() >= 0


class TestDistort:
    def test_nothing_drawn_nothing_done(self) -> None:
        drawn = Distortion.draw(keys(64), 0.0, 0.0)
        images = noise(64)
        assert torch.equal(distort(images, drawn)[~drawn.grey_B], images[~drawn.grey_B])

    def test_the_input_is_left_alone(self) -> None:
        images = noise(32)
        distort(images, Distortion.draw(keys(32), 1.0, 1.0))
        assert torch.equal(images, noise(32))

    def test_jitter_then_grey_then_blur(self) -> None:
        images, drawn = noise(64), Distortion.draw(keys(64), 1.0, 0.5)
        found = distort(images, drawn)
        for b in range(64):
            expected = images[b : b + 1]
            if drawn.jittered_B[b]:
                expected = jittered_one_by_one(expected[0], drawn.strength_B4[b].tolist(), drawn.order_B4[b].tolist())[None]
            expected = greyscale(expected) if drawn.grey_B[b] else expected
            expected = blur(expected, drawn.sigma_B[b : b + 1]) if drawn.blurred_B[b] else expected
            torch.testing.assert_close(found[b : b + 1], expected, atol=2e-6, rtol=0)
        for kind in (drawn.jittered_B, drawn.grey_B, drawn.blurred_B):
            assert 0 < kind.sum() < 64
        assert found.min() >= 0
        assert found.max() <= 1

    def test_a_view_does_not_depend_on_its_batch(self) -> None:
        """The same on one worker or several: each view distorted with others or alone."""
        images, all_keys = noise(24), keys(24)
        together = distort(images, Distortion.draw(all_keys, 1.0, 0.5))
        apart = torch.cat([distort(images[r::3], Distortion.draw(all_keys[r::3], 1.0, 0.5)) for r in range(3)])
        order = torch.cat([torch.arange(24)[r::3] for r in range(3)])
        torch.testing.assert_close(apart, together[order], atol=1e-6, rtol=0)

    def test_channels_last_images(self) -> None:
        images, drawn = noise(16), Distortion.draw(keys(16), 1.0, 0.5)
        torch.testing.assert_close(distort(images.contiguous(memory_format=torch.channels_last), drawn), distort(images, drawn))

    def test_a_view_that_is_only_blurred(self) -> None:
        drawn = dataclasses.replace(Distortion.draw(keys(4), 0.0, 1.0), grey_B=torch.zeros(4, dtype=torch.bool), sigma_B=torch.ones(4))
        torch.testing.assert_close(distort(noise(), drawn), blur(noise(), torch.ones(4)))
