"""pixels -> crop: the uint8 RGB square that teacher and student both see.

Unit of data: one crop, a pure function of (seed, view, image_id) and the recipe: the same key cuts the same pixels in every process and on
every machine, so a soft label can be kept under that key for ever ("a good teacher is patient and consistent", Beyer et al. 2022).
The random crop is the one of Inception (Szegedy et al. 2015, section 6) as ImageNet training uses it since.

Shapes: H, W the full frame, S the side of the crop, C = 3 channels in the order R, G, B.
"""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from distill.config import Section
from distill.decoding import MAX_PIXELS, decode_image
from distill.errors import ImageError
from distill.mixing import MixingRecipe

__all__ = [
    "MAX_PIXELS",
    "Box",
    "CropKey",
    "CropRecipe",
    "Interpolation",
    "center_box",
    "center_crop",
    "crop_image",
    "decode_image",
    "random_box",
    "random_generator",
]

Interpolation = Literal["bilinear", "bicubic"]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_NUM_TRIES = 10
_PURPOSE = b"distill.crop"


class CropRecipe(Section):
    """How crops are cut. It is part of a label's identity: labels of different recipes never mix."""

    kind: Literal["random_resized", "center", "as_is"] = "random_resized"
    """`random_resized` (Inception: random area, aspect and flip), `center` (evaluation), or `as_is` (images that already have the size)."""
    image_size: int = Field(ge=1, le=4096)
    """Height and width of a crop, in pixels."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of the image's area that a random crop shows."""
    max_area: float = Field(default=1.0, gt=0, le=1)
    """Largest share of the image's area that a random crop shows."""
    min_aspect: float = Field(default=3 / 4, ge=0.01, le=100)
    """Smallest width / height of a random crop before it is resized to a square."""
    max_aspect: float = Field(default=4 / 3, ge=0.01, le=100)
    """Largest width / height of a random crop before it is resized to a square."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability that a random crop is mirrored left to right."""
    crop_ratio: float = Field(default=1.0, gt=0, le=1)
    """Centre crop: the shorter side is resized to image_size / crop_ratio, then the centre is cut."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resize; both filters average over the source when they shrink."""
    mixing: MixingRecipe = MixingRecipe()
    """What is done to two crops before the teacher sees one."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Unmixed crops are the same as before there was mixing, and so is what names their labels: those kept since then are found."""
        fields: dict[str, Any] = write(self)
        if not self.mixing.mixes:
            fields.pop("mixing", None)
        return fields

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        for name, low, high in (("area", self.min_area, self.max_area), ("aspect", self.min_aspect, self.max_aspect)):
            if low > high:
                raise ValueError(f"min_{name} {low:g} is over max_{name} {high:g}; swap them")
        return self


@dataclass(frozen=True)
class CropKey:
    """What names a crop."""

    seed: int
    """Seed of the job."""
    view: int
    """Which crop of the image: epoch mod num_views."""
    image_id: str
    """The image's name in its source."""


@dataclass(frozen=True)
class Box:
    """A rectangle in an image, in pixels; `right` and `bottom` are exclusive."""

    left: float
    top: float
    right: float
    bottom: float


def random_generator(key: CropKey, purpose: bytes = _PURPOSE) -> np.random.Generator:
    """The random numbers of one crop: Philox, seeded by a 128-bit BLAKE2b of the key. Python's own hash() differs between processes.

    Args:
        purpose: at most 16 bytes; what one purpose draws never moves the numbers of another.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key, purpose), "little")))


def _digest(key: CropKey, purpose: bytes) -> bytes:
    text = f"{key.seed}\x00{key.view}\x00{key.image_id}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, person=purpose).digest()


class _Uniforms(threading.local):
    """`random_generator(key).random(count)` without a new generator, which is a fifth of the cost of a small image's crop: a Philox is no
    more than its key and counter."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._fresh = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def draw(self, key: CropKey, count: int) -> npt.NDArray[np.float64]:
        self._fresh["state"]["key"] = np.frombuffer(_digest(key, _PURPOSE), "<u8")
        self._philox.state = self._fresh
        return self._generator.random(count)


_uniforms = _Uniforms()


def crop_image(pixels_HWC: npt.NDArray[np.uint8], key: CropKey, recipe: CropRecipe) -> npt.NDArray[np.uint8]:
    """Cut the crop that `key` names: a pure function of its three arguments.

    Args:
        pixels_HWC: uint8 RGB [H,W,3], the full frame.
        key: names the crop; only `random_resized` needs it.
        recipe: how to cut.

    Returns:
        uint8 RGB [S,S,3], S = recipe.image_size, writable, of its own memory.

    Raises:
        ImageError: an `as_is` image of another size.
    """
    size = recipe.image_size
    if recipe.kind == "center":
        return center_crop(pixels_HWC, size, recipe.crop_ratio, recipe.interpolation)
    height, width = pixels_HWC.shape[:2]
    if recipe.kind == "as_is":
        if (height, width) != (size, size):
            raise ImageError(f"not {size}x{size} pixels, which crop kind as_is needs")
        return pixels_HWC.copy()
    uniforms = _uniforms.draw(key, 4 * _NUM_TRIES + 1)
    crop_SSC = _resize(pixels_HWC, random_box(height, width, recipe, uniforms), size, recipe.interpolation)
    if uniforms[-1] < recipe.flip_probability:
        return np.ascontiguousarray(crop_SSC[:, ::-1])
    return crop_SSC


def center_crop(
    pixels_HWC: npt.NDArray[np.uint8], image_size: int, crop_ratio: float = 1.0, interpolation: Interpolation = "bilinear"
) -> npt.NDArray[np.uint8]:
    """The evaluation crop: the shorter side resized to image_size / crop_ratio, then the centre cut.

    Returns:
        uint8 RGB [S,S,3], S = image_size, writable, of its own memory.
    """
    height, width = pixels_HWC.shape[:2]
    return _resize(pixels_HWC, center_box(height, width, image_size, crop_ratio), image_size, interpolation)


def center_box(height: int, width: int, image_size: int, crop_ratio: float) -> Box:
    """The part of the source that resize-then-cut would show. Only that part is ever resized, so a strip of 1 x 10^6 pixels costs nothing.

    Sizes and offsets are rounded in the resized frame, as Resize and CenterCrop of torchvision round them: published accuracies rest on it.
    """
    resized_short = max(image_size, round(image_size / crop_ratio))
    resized_long = resized_short * max(height, width) // min(height, width)
    resized_height, resized_width = (resized_short, resized_long) if height <= width else (resized_long, resized_short)
    top = round((resized_height - image_size) / 2) * height / resized_height
    left = round((resized_width - image_size) / 2) * width / resized_width
    return Box(
        left=left,
        top=top,
        right=min(width, left + image_size * width / resized_width),
        bottom=min(height, top + image_size * height / resized_height),
    )


def random_box(height: int, width: int, recipe: CropRecipe, uniforms: npt.NDArray[np.float64]) -> Box:
    """The rectangle of Inception's random crop, always at least 1 x 1 pixel and inside the image.

    Args:
        height: H of the image, in pixels.
        width: W of the image, in pixels.
        recipe: area and aspect limits.
        uniforms: float64 in [0,1), at least 40: area, aspect, left and top for each of ten tries, drawn at once, so that the number of
            failed tries never moves the numbers that follow.
    """
    log_min, log_max = math.log(recipe.min_aspect), math.log(recipe.max_aspect)
    for area_u, aspect_u, left_u, top_u in uniforms[: 4 * _NUM_TRIES].reshape(_NUM_TRIES, 4).tolist():
        area = height * width * (recipe.min_area + area_u * (recipe.max_area - recipe.min_area))
        aspect = math.exp(log_min + aspect_u * (log_max - log_min))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(left_u * (width - box_width + 1)), int(top_u * (height - box_height + 1))
            return Box(left, top, left + box_width, top + box_height)
    return _largest_central_box(height, width, recipe)


def _largest_central_box(height: int, width: int, recipe: CropRecipe) -> Box:
    """No try fitted, as in a long strip: the largest central rectangle whose aspect is allowed."""
    aspect = min(max(width / height, recipe.min_aspect), recipe.max_aspect)
    box_width = max(1, min(width, round(height * aspect)))
    box_height = max(1, min(height, round(width / aspect)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return Box(left, top, left + box_width, top + box_height)


def _resize(pixels_HWC: npt.NDArray[np.uint8], box: Box, size: int, interpolation: Interpolation) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(pixels_HWC)
    return np.array(image.resize((size, size), _RESAMPLING[interpolation], box=(box.left, box.top, box.right, box.bottom)))
