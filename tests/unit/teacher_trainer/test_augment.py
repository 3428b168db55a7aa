"""The colour distortion against the standard library's colorsys, pixel by pixel, and what must stay as it is."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher_trainer import augment
from teacher_trainer.augment import LUMA, blur, change_hsv, distort, greyscale, jitter


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int = 4, height: int = 9, width: int = 7, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=seeded(seed))


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
        found = change_hsv(images, hue_B111=torch.full((len(images), 1, 1, 1), turn))
        for before, after in zip(each_pixel(images), each_pixel(found), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value), abs=2e-6)

    @pytest.mark.parametrize("images", [noise(), special_pixels()], ids=["noise", "corners"])
    @pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.8])
    def test_saturation(self, images: Tensor, factor: float) -> None:
        found = change_hsv(images, saturation_B111=torch.full((len(images), 1, 1, 1), factor))
        for before, after in zip(each_pixel(images), each_pixel(found), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value), abs=2e-6)

    def test_each_image_its_own(self) -> None:
        images, turns = noise(), torch.tensor([0.0, 0.1, -0.2, 0.5]).view(4, 1, 1, 1)
        together = change_hsv(images, hue_B111=turns)
        for b in range(4):
            torch.testing.assert_close(together[b : b + 1], change_hsv(images[b : b + 1], hue_B111=turns[b : b + 1]))


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


class TestJitter:
    def test_strength_zero_is_the_identity(self) -> None:
        torch.testing.assert_close(jitter(noise(), 0.0, seeded()), noise(), atol=1e-6, rtol=0)

    def test_stays_in_range(self) -> None:
        found = jitter(noise(64), 1.0, seeded())
        assert found.min() >= 0
        assert found.max() <= 1
        assert not torch.equal(found, noise(64))

    def test_brightness_multiplies_within_its_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a grey constant image contrast, saturation and hue change nothing; what is left is brightness: 1 - 0.8 s to 1 + 0.8 s."""
        images = torch.full((400, 3, 4, 4), 0.3)
        found = jitter(images, 0.5, seeded())
        factors = found[:, 0, 0, 0] / 0.3
        torch.testing.assert_close(found, factors.view(-1, 1, 1, 1).expand_as(found) * 0.3)
        assert 0.6 <= factors.min() < 0.65
        assert 1.35 < factors.max() <= 1.4

    def test_images_get_different_orders_and_strengths(self) -> None:
        same = noise(1).expand(16, -1, -1, -1)
        found = jitter(same, 1.0, seeded())
        assert len({tuple(image.flatten().tolist()) for image in found}) == 16


class TestDistort:
    def test_nothing_asked_nothing_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(augment, "GREY_PROBABILITY", 0.0)
        assert torch.equal(distort(noise(64), 0.0, 0.0, seeded()), noise(64))

    def test_the_input_is_left_alone(self) -> None:
        images = noise(32)
        distort(images, 1.0, 1.0, seeded())
        assert torch.equal(images, noise(32))

    def test_same_seed_same_result(self) -> None:
        one, other, third = (distort(noise(16), 1.0, 0.5, seeded(seed)) for seed in (5, 5, 6))
        assert torch.equal(one, other)
        assert not torch.equal(one, third)

    def test_shares_of_the_batch(self) -> None:
        """Grey in 20 % of 2000 images, jitter in 80 %, blur in 50 %, each within four standard errors."""
        images = noise(2000, 4, 4)
        grey = distort(images, 0.0, 0.0, seeded())
        share = (grey[:, 0] == grey[:, 1]).flatten(1).all(dim=1).float().mean().item()
        assert share == pytest.approx(0.2, abs=0.036)
        for strength, probability, expected in ((0.5, 0.0, 1 - 0.2 * 0.8), (0.0, 0.5, 1 - 0.5 * 0.8)):
            changed = (distort(images, strength, probability, seeded(3)) - images).abs().flatten(1).amax(dim=1) > 1e-6
            assert changed.float().mean().item() == pytest.approx(expected, abs=0.045)

    def test_a_probability_of_one_blurs_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(augment, "GREY_PROBABILITY", 0.0)
        monkeypatch.setattr(augment, "BLUR_SIGMA", (1.0, 1.0))
        torch.testing.assert_close(distort(noise(), 0.0, 1.0, seeded()), blur(noise(), torch.ones(4)))
