"""Decoding of every format and oddity, and the crop as a pure function of its key."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.config import validate
from distill.crops import CropKey, CropRecipe, center_crop, crop_image, decode_image, random_box, random_generator
from distill.decoding import num_pixels
from distill.errors import ConfigError, ImageError

Pixels = npt.NDArray[np.uint8]

ORIENTATION = 0x0112
ROOT = Path(__file__).parents[3]
GOLDEN = [0.299333450172078, 0.9944928329942987]


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def gradient(height: int = 40, width: int = 60) -> Pixels:
    """Red grows to the right, green downwards, blue is constant: an image whose parts all differ and which JPEG keeps well."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns * 255 / max(width - 1, 1), rows * 255 / max(height - 1, 1), np.full((height, width), 90)], axis=2).astype(
        np.uint8
    )


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def close(first: Pixels, second: Pixels, mean_error: float = 3) -> bool:
    return first.shape == second.shape and float(np.abs(first.astype(int) - second.astype(int)).mean()) < mean_error


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def without_adobe_marker(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


class TestDecode:
    @pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
    def test_lossless_formats_give_the_pixels_that_went_in(self, format_name: str) -> None:
        pixels = noise(31, 17)
        decoded = decode_image(encoded(Image.fromarray(pixels), format_name, lossless=True))
        assert decoded.dtype == np.uint8
        assert decoded.flags.writeable
        assert np.array_equal(decoded, pixels)

    @pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 95, "progressive": True}, {"quality": 95, "subsampling": 0}])
    def test_jpeg(self, options: dict[str, Any]) -> None:
        decoded = decode_image(encoded(Image.fromarray(gradient()), "JPEG", **options))
        assert decoded.flags.writeable
        assert close(decoded, gradient())

    @pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
    def test_grey_is_spread_over_three_channels(self, format_name: str) -> None:
        grey = gradient()[:, :, 0]
        decoded = decode_image(encoded(Image.fromarray(grey), format_name, quality=95))
        assert close(decoded, np.repeat(grey[:, :, None], 3, axis=2))

    def test_one_bit_is_black_and_white(self) -> None:
        bits = np.array([[0, 255], [255, 0]], dtype=np.uint8)
        assert np.array_equal(decode_image(encoded(Image.fromarray(bits).convert("1"), "PNG"))[:, :, 1], bits)

    def test_palette(self) -> None:
        image = Image.fromarray(gradient()).quantize(256)
        assert np.array_equal(decode_image(encoded(image, "PNG")), np.array(image.convert("RGB")))

    @pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
    def test_alpha_is_laid_on_white(self, format_name: str) -> None:
        rgba = np.zeros((8, 8, 4), dtype=np.uint8)
        rgba[:, 4:] = (200, 10, 10, 255)
        rgba[0, 4] = (0, 0, 0, 51)  # a fifth of black on white: 204
        decoded = decode_image(encoded(Image.fromarray(rgba), format_name, lossless=True, exact=True))
        assert decoded[0, 0].tolist() == [255, 255, 255]
        assert decoded[7, 7].tolist() == [200, 10, 10]
        assert decoded[0, 4].tolist() == [204, 204, 204]

    def test_transparent_palette_entry_is_white(self) -> None:
        image = Image.new("P", (4, 4), 0)
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((0, 0), 1)
        decoded = decode_image(encoded(image, "PNG", transparency=1))
        assert decoded[0, 0].tolist() == [255, 255, 255]
        assert decoded[1, 1].tolist() == [10, 20, 30]

    def test_16_bit_grey_is_scaled_not_clipped(self) -> None:
        values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
        decoded = decode_image(encoded(Image.fromarray(values), "PNG"))
        assert decoded[0, :, 0].tolist() == [0, 0, 1, 0x7F, 0x80, 0xFF]

    @pytest.mark.parametrize("mode", ["CMYK", "CMYK without the Adobe marker"])
    def test_cmyk(self, mode: str) -> None:
        image = Image.fromarray(gradient())
        if mode == "CMYK":  # Pillow writes as Adobe does: inverted, with the marker
            data = encoded(image.convert("CMYK"), "JPEG", quality=95)
        else:  # the file that libjpeg describes: ink as it is, no marker
            inverted = Image.merge("CMYK", [band.point(lambda value: 255 - value) for band in image.convert("CMYK").split()])
            data = without_adobe_marker(encoded(inverted, "JPEG", quality=95))
        assert close(decode_image(data), gradient())

    @pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, format_name: str, orientation: int) -> None:
        stored = gradient()
        upright = {
            1: stored,
            2: stored[:, ::-1],
            3: stored[::-1, ::-1],
            4: stored[::-1],
            5: stored.transpose(1, 0, 2),
            6: np.rot90(stored, -1),
            7: stored[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(stored, 1),
        }[orientation]
        data = encoded(Image.fromarray(stored), format_name, exif=with_orientation(orientation), quality=95)
        assert close(decode_image(data), upright)

    @pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
    def test_animation_gives_its_first_frame(self, format_name: str) -> None:
        first, second = Image.new("RGB", (9, 9), (250, 0, 0)), Image.new("RGB", (9, 9), (0, 250, 0))
        data = encoded(first, format_name, save_all=True, append_images=[second], lossless=True)
        assert np.array_equal(decode_image(data), np.array(first))

    def test_one_pixel(self) -> None:
        assert decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


class TestRefusals:
    @pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.999])
    @pytest.mark.parametrize(("format_name", "options"), [("JPEG", {}), ("JPEG", {"exif": with_orientation(6)}), ("PNG", {}), ("WEBP", {})])
    def test_truncated(self, format_name: str, options: dict[str, Any], kept: float) -> None:
        data = encoded(Image.fromarray(noise(64, 64)), format_name, **options)
        with pytest.raises(ImageError, match=r"^truncated$"):
            decode_image(data[: int(len(data) * kept) - 8])

    @pytest.mark.parametrize("format_name", ["GIF", "BMP", "TIFF"])
    def test_foreign_format_is_named(self, format_name: str) -> None:
        with pytest.raises(ImageError, match=f"^unsupported format {format_name}$"):
            decode_image(encoded(Image.fromarray(gradient()), format_name))

    @pytest.mark.parametrize(
        ("data", "reason"), [(b"", "empty file"), (b"hello world", "not an image"), (b"  <svg>", "unsupported format SVG")]
    )
    def test_not_an_image(self, data: bytes, reason: str) -> None:
        with pytest.raises(ImageError) as caught:
            decode_image(data)
        assert caught.value.reason == reason

    @pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("lossless", [True, False])
    def test_too_many_pixels(self, format_name: str, lossless: bool) -> None:
        data = encoded(Image.fromarray(gradient(40, 60)), format_name, lossless=lossless)
        assert decode_image(data, max_pixels=2400).shape == (40, 60, 3)
        with pytest.raises(ImageError, match=r"^more than 2399 pixels$"):
            decode_image(data, max_pixels=2399)

    def test_a_bomb_is_refused_by_its_header(self) -> None:
        """The header claims 60,000 x 60,000 pixels and nothing follows: had anything been decoded, the reason would be another."""
        header = bytearray(encoded(Image.new("L", (8, 8)), "PNG")[:33])
        header[16:24] = (60_000).to_bytes(4, "big") * 2
        with pytest.raises(ImageError, match=r"^more than 50000000 pixels$"):
            decode_image(bytes(header))

    def test_extended_webp_tells_its_canvas(self) -> None:
        data = encoded(Image.fromarray(gradient(40, 60)), "WEBP", exif=with_orientation(1))
        assert data[12:16] == b"VP8X"
        with pytest.raises(ImageError, match=r"^more than 2399 pixels$"):
            decode_image(data, max_pixels=2399)

    def test_damaged_exif_writes_nothing_to_stderr(self, tmp_path: Path) -> None:
        """In a process of its own: pytest has filters of its own. Each tag says that it is larger than the file."""
        tags = b"".join(struct.pack("<HHII", tag, 2, 2**30, 8) for tag in range(1000, 1500))
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 501) + struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + tags + bytes(4)
        for format_name in ("PNG", "JPEG", "WEBP"):
            (tmp_path / format_name).write_bytes(encoded(Image.fromarray(gradient(4, 6)), format_name, exif=exif))
        program = (
            "import sys; from pathlib import Path; from distill.crops import decode_image\n"
            "print([decode_image(path.read_bytes()).shape for path in Path(sys.argv[1]).iterdir()])"
        )
        done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == (f"{[(6, 4, 3)] * 3}\n", "")

    @pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged EXIF
    @settings(max_examples=300)
    @given(
        format_name=st.sampled_from(["JPEG", "PNG", "WEBP"]),
        changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
        data=st.data(),
    )
    def test_damaged_bytes_give_pixels_or_an_image_error(
        self, format_name: str, changes: list[tuple[float, int]], data: st.DataObject
    ) -> None:
        damaged = bytearray(encoded(Image.fromarray(noise(12, 9)), format_name, exif=with_orientation(6)))
        for position, value in changes:
            damaged[int(position * (len(damaged) - 1))] = value
        kept = data.draw(st.integers(0, len(damaged)))
        with contextlib.suppress(ImageError):
            pixels = decode_image(bytes(damaged[:kept]), max_pixels=100_000)
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3


class TestCrop:
    def test_same_key_in_another_process(self) -> None:
        """Another process, another hash seed, the same pixels."""
        program = (
            "import hashlib, numpy as np; from distill.crops import *\n"
            "pixels = (np.arange(50 * 70 * 3) % 251).astype(np.uint8).reshape(50, 70, 3)\n"
            "recipe = CropRecipe(image_size=24)\n"
            "crops = [crop_image(pixels, CropKey(3, view, f'shard/{view}'), recipe) for view in range(20)]\n"
            "print(hashlib.sha256(np.stack(crops).tobytes()).hexdigest())"
        )
        outputs = {
            subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
            ).stdout
            for seed in ("1", "2")
        }
        assert len(outputs) == 1

    def test_golden_random_numbers(self) -> None:
        """Stored labels are named by these numbers: they may never change."""
        values = random_generator(CropKey(seed=1, view=2, image_id="a/b.png")).random(2)
        assert values.tolist() == pytest.approx(GOLDEN, abs=1e-15)

    def test_a_crop_is_cut_by_its_own_numbers_whatever_was_cut_before(self) -> None:
        pixels, recipe = noise(50, 70), CropRecipe(image_size=24, flip_probability=0)

        def check(key: CropKey) -> None:
            box = random_box(50, 70, recipe, random_generator(key).random(41))
            part = (box.left, box.top, box.right, box.bottom)
            expected = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BILINEAR, box=part)
            np.testing.assert_array_equal(crop_image(pixels, key, recipe), np.asarray(expected))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(check, [CropKey(seed, view, f"image {seed}") for seed in range(200) for view in (0, 2, 1)]))

    def test_views_seeds_and_images_differ(self) -> None:
        pixels, recipe = noise(50, 70), CropRecipe(image_size=24)
        keys = [CropKey(seed, view, image_id) for seed in (0, 1) for view in (0, 1, 2, 12) for image_id in ("a", "b", "2a")]
        crops = {crop_image(pixels, key, recipe).tobytes() for key in keys}
        assert len(crops) == len(keys)

    def test_the_arguments_stay_as_they_are(self) -> None:
        pixels = noise(28, 28)
        before = pixels.copy()
        for kind in ("random_resized", "center", "as_is"):
            crop = crop_image(pixels, CropKey(0, 0, "a"), CropRecipe(kind=kind, image_size=28))
            assert crop.flags.writeable
            crop[:] = 0
        assert np.array_equal(pixels, before)

    def test_flip_probability(self) -> None:
        pixels = noise(10, 10)
        options = {"image_size": 10, "min_area": 1.0, "min_aspect": 1.0, "max_aspect": 1.0}
        crops = [crop_image(pixels, CropKey(0, view, "a"), CropRecipe(**options)) for view in range(400)]
        flipped = sum(np.array_equal(crop, pixels[:, ::-1]) for crop in crops)
        assert all(np.array_equal(crop, pixels) or np.array_equal(crop, pixels[:, ::-1]) for crop in crops)
        assert 150 < flipped < 250
        assert np.array_equal(crop_image(pixels, CropKey(0, 0, "a"), CropRecipe(**options, flip_probability=0)), pixels)
        assert np.array_equal(crop_image(pixels, CropKey(0, 0, "a"), CropRecipe(**options, flip_probability=1)), pixels[:, ::-1])

    @given(
        height=st.integers(1, 300),
        width=st.integers(1, 300),
        view=st.integers(0, 10**6),
        areas=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
        aspects=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)),
    )
    def test_random_box_is_inside_the_image(
        self, height: int, width: int, view: int, areas: tuple[float, float], aspects: tuple[float, float]
    ) -> None:
        recipe = CropRecipe(image_size=8, min_area=min(areas), max_area=max(areas), min_aspect=min(aspects), max_aspect=max(aspects))
        box = random_box(height, width, recipe, random_generator(CropKey(0, view, "a")).random(41))
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height

    def test_random_box_keeps_to_the_areas_and_covers_the_image(self) -> None:
        recipe = CropRecipe(image_size=8, min_area=0.25, max_area=0.5)
        covered = np.zeros((200, 200), dtype=bool)
        for view in range(300):
            box = random_box(200, 200, recipe, random_generator(CropKey(0, view, "a")).random(41))
            share = (box.right - box.left) * (box.bottom - box.top) / 200**2
            assert 0.245 < share < 0.505
            assert 0.73 < (box.right - box.left) / (box.bottom - box.top) < 1.36
            covered[int(box.top) : int(box.bottom), int(box.left) : int(box.right)] = True
        assert covered.mean() > 0.99

    @pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3), (3, 1000)])
    @pytest.mark.parametrize("kind", ["random_resized", "center"])
    def test_strips_give_crops_of_the_right_size(self, shape: tuple[int, int], kind: str) -> None:
        pixels = noise(*shape)
        for view in range(5):
            crop = crop_image(pixels, CropKey(0, view, "a"), CropRecipe(kind=kind, image_size=16, crop_ratio=0.875))
            assert crop.shape == (16, 16, 3)
            assert crop.dtype == np.uint8

    @settings(max_examples=200)
    @given(
        height=st.integers(1, 90),
        width=st.integers(1, 90),
        size=st.integers(1, 40),
        ratio=st.sampled_from([1.0, 0.95, 0.875, 0.5]),
    )
    def test_center_crop_equals_resize_then_cut(self, height: int, width: int, size: int, ratio: float) -> None:
        """To 2 levels of 255: Pillow rounds between its two passes, and which one comes first depends on the size of the box."""
        pixels = noise(height, width)
        short = round(size / ratio)
        new_width, new_height = (short, short * height // width) if width <= height else (short * width // height, short)
        resized = np.array(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR))
        top, left = round((new_height - size) / 2), round((new_width - size) / 2)
        expected = resized[top : top + size, left : left + size].astype(int)
        assert np.abs(center_crop(pixels, size, ratio).astype(int) - expected).max() <= 2

    def test_center_crop_of_the_right_size_is_the_image(self) -> None:
        pixels = noise(28, 28)
        assert np.array_equal(center_crop(pixels, 28, 1.0), pixels)

    def test_as_is(self) -> None:
        pixels, recipe = noise(28, 28), CropRecipe(kind="as_is", image_size=28)
        assert np.array_equal(crop_image(pixels, CropKey(0, 0, "a"), recipe), pixels)
        with pytest.raises(ImageError, match=r"^not 28x28 pixels, which crop kind as_is needs$"):
            crop_image(noise(28, 29), CropKey(0, 0, "a"), recipe)


class TestRecipe:
    def test_digest_tells_recipes_apart(self) -> None:
        assert CropRecipe(image_size=28).digest() == CropRecipe(image_size=28, min_area=0.08).digest()
        assert CropRecipe(image_size=28).digest() != CropRecipe(image_size=28, min_area=0.2).digest()

    @pytest.mark.parametrize(
        ("settings_tree", "complaint"),
        [
            ({"image_size": 0}, "image_size"),
            ({"image_size": 28, "min_area": 0.9, "max_area": 0.5}, r"min_area 0\.9 is over max_area 0\.5; swap them"),
            ({"image_size": 28, "min_aspect": 2, "max_aspect": 1}, "min_aspect 2 is over max_aspect 1; swap them"),
            ({"image_size": 28, "flip_probabilty": 0}, "did you mean 'flip_probability'"),
        ],
    )
    def test_impossible_recipes_are_refused(self, settings_tree: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ConfigError, match=complaint):
            validate(CropRecipe, settings_tree, "run.yaml")


class TestBombs:
    """Files that cost more than their header says."""

    @pytest.mark.parametrize("first", [b"", struct.pack(">I4s", 8, b"abcd") + struct.pack(">II", 8, 8) + b"\0" * 4])
    def test_a_second_header_of_a_png_is_not_believed(self, first: bytes) -> None:
        small, large = encoded(Image.new("RGB", (8, 8)), "PNG"), encoded(Image.new("RGB", (40, 40)), "PNG")
        bomb = small[:8] + (first or small[8:33]) + large[8:]  # 33: behind the signature and the first chunk
        with pytest.raises(ImageError, match="damaged PNG"):
            decode_image(bomb, max_pixels=64)

    def test_a_jpeg_of_many_scans_is_refused_and_one_that_only_looks_so_is_not(self) -> None:
        plain = encoded(Image.fromarray(gradient()), "JPEG", progressive=True)
        last_scan = plain[plain.rindex(b"\xff\xda") : -2]
        with pytest.raises(ImageError, match="more than 100 scans"):
            decode_image(plain[:-2] + last_scan * 150 + plain[-2:])
        starts = b"\xff\xda" * 200
        comment = b"\xff\xfe" + (len(starts) + 2).to_bytes(2, "big") + starts
        for harmless in (plain + starts, plain[:2] + comment + plain[2:]):
            assert (decode_image(harmless) == decode_image(plain)).all()

    def test_pixels_are_counted_from_the_header(self) -> None:
        for kind in ("JPEG", "PNG", "WEBP"):
            assert num_pixels(encoded(Image.new("RGB", (40, 30)), kind)) == 1200
        assert [num_pixels(data) for data in (b"", b"GIF8", b"\x89PNG\r\n\x1a\n")] == [0, 0, 0]
