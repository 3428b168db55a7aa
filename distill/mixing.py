"""Two crops -> one: Mixup and CutMix before the teacher, so that the teacher labels what the student sees.

Function matching (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent", section 3) needs no labels, so any
image may be shown to both networks; mixed images reach far outside the data. Mixup: Zhang et al. 2018. CutMix: Yun et al. 2019.

A mixed crop stays a pure function of (seed, view, image_id) and the images of its shard. Partners are successors on one cycle through the
shard, a new cycle for each view: nobody is its own partner, and every plain crop is needed exactly twice, once with a partner and once as
one, so that a cache as large as the window of shards saves the second decode. Weight and box come from the hash of the key.

Unit of data: one crop, uint8 [S,S,3]. N images of a shard.
"""

from __future__ import annotations

import math
from threading import Lock
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from distill.config import Section

Crop = npt.NDArray[np.uint8]


class MixingRecipe(Section):
    """How two crops become one, before the teacher sees it."""

    kind: Literal["none", "mixup", "cutmix", "both"] = "none"
    """`mixup` (a weighted mean of two crops), `cutmix` (a rectangle of one crop in the other), or `both` (each crop one of them)."""
    mixup_alpha: float = Field(default=1.0, gt=0, le=1)
    """Mixup's weight is drawn from Beta(alpha, alpha), alpha at most 1; 1 is uniform from 0 to 1, as in function matching."""
    cutmix_alpha: float = Field(default=1.0, gt=0, le=1)
    """CutMix's share of the area is drawn from Beta(alpha, alpha), alpha at most 1; 1 is uniform from 0 to 1."""
    cutmix_share: float = Field(default=0.5, ge=0, le=1)
    """`both`: probability that a crop gets CutMix; the others get Mixup."""

    @property
    def mixes(self) -> bool:
        """Whether there is anything to do."""
        return self.kind != "none"


def partner_cycle(num_images: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """int64 [N]: the row of each row's partner; following it visits all N rows before it comes back.

    Args:
        generator: keyed by (seed, view, shard). Only its uniform doubles are used, the part of a generator that never changes.
    """
    order = np.argsort(generator.random(num_images), kind="stable")
    partner_N = np.empty(num_images, dtype=np.int64)
    partner_N[order] = np.roll(order, -1)
    return partner_N


def mix(own: Crop, partner: Crop, recipe: MixingRecipe, generator: np.random.Generator) -> Crop:
    """The mixed crop.

    Args:
        own, partner: uint8 [S,S,3].
        generator: keyed by (seed, view, image_id of `own`).

    Returns:
        uint8 [S,S,3], of its own memory.
    """
    uniforms = generator.random(4)
    if recipe.kind == "cutmix" or (recipe.kind == "both" and uniforms[0] < recipe.cutmix_share):
        return cutmix(own, partner, _share(recipe.cutmix_alpha, uniforms[1], generator), uniforms[2], uniforms[3])
    return mixup(own, partner, _share(recipe.mixup_alpha, uniforms[1], generator))


def mixup(own: Crop, partner: Crop, share: float) -> Crop:
    """share * own + (1 - share) * partner, `share` rounded to 1/256, the sum rounded half up: whole numbers only, the same everywhere."""
    weight = int(share * 256 + 0.5)
    mixed = np.multiply(own, np.uint16(weight), dtype=np.uint16)
    mixed += np.multiply(partner, np.uint16(256 - weight), dtype=np.uint16)
    mixed += 128  # at most 255 * 256 + 128, which 16 bits hold
    mixed >>= 8
    return mixed.astype(np.uint8)


def cutmix(own: Crop, partner: Crop, share: float, center_x: float, center_y: float) -> Crop:
    """`own` with a rectangle of `partner` in it, 1 - share of the area before it is cut at the edges (Yun et al. 2019, appendix A).

    Args:
        share: of `own`, 0 to 1.
        center_x, center_y: of the rectangle, in [0,1).
    """
    height, width = own.shape[:2]
    side = (1.0 - share) ** 0.5
    half_width, half_height = int(width * side) // 2, int(height * side) // 2
    x, y = int(center_x * width), int(center_y * height)
    rows, columns = slice(max(0, y - half_height), y + half_height), slice(max(0, x - half_width), x + half_width)
    mixed = own.copy()
    mixed[rows, columns] = partner[rows, columns]
    return mixed


def _share(alpha: float, uniform: float, generator: np.random.Generator) -> float:
    return float(uniform) if alpha == 1 else beta_share(alpha, generator)


def beta_share(alpha: float, generator: np.random.Generator) -> float:
    """One number from Beta(alpha, alpha), 0 < alpha <= 1, of uniform doubles alone: numpy may change its `beta` from release to release.

    Joehnk 1964: with x = U^(1/alpha), y = V^(1/alpha), x / (x + y) given x + y <= 1. In logarithms, because both may be too small for a
    double. At alpha 1 every second pair is taken, below it more are.
    """
    while True:
        first, second = (math.log1p(-uniform) / alpha for uniform in generator.random(2))  # of 1 - U, which is never 0
        if np.logaddexp(first, second) <= 0:
            return 1.0 / (1.0 + math.exp(min(second - first, 700.0)))


class CropCache:
    """Plain crops that wait for the next of their uses, of the shards that are held. Safe to use from several threads.

    It changes no pixel, only whether an image is decoded once or twice. When it is full nothing more is put in.

    Args:
        max_bytes: of all crops together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = Lock()
        self._shards: dict[int, dict[tuple[int, int], tuple[Crop, int]]] = {}

    def has_room(self) -> bool:
        """Whether a crop would be taken in."""
        return self.num_bytes < self.max_bytes

    def hold(self, shard: int) -> None:
        """From now on crops of this shard are taken in."""
        with self._lock:
            self._shards.setdefault(shard, {})

    def drop(self, shard: int) -> None:
        """Forget the crops of a shard that is held no longer."""
        with self._lock:
            self.num_bytes -= sum(crop.nbytes for crop, _ in self._shards.pop(shard, {}).values())

    def clear(self) -> None:
        """Forget all crops; the shards stay held."""
        with self._lock:
            for crops in self._shards.values():
                crops.clear()
            self.num_bytes = 0

    def put(self, shard: int, row: int, view: int, crop: Crop, uses: int) -> None:
        """Keep a crop for so many uses more. Nobody may write to it."""
        with self._lock:
            crops = self._shards.get(shard)
            if crops is not None and (row, view) not in crops and self.has_room():
                crops[row, view] = (crop, uses)
                self.num_bytes += crop.nbytes

    def take(self, shard: int, row: int, view: int) -> Crop | None:
        """The crop, if it is there; after its last use it no longer is."""
        with self._lock:
            crops = self._shards.get(shard, {})
            found = crops.pop((row, view), None)
            if found is None:
                return None
            crop, uses = found
            if uses > 1:
                crops[row, view] = (crop, uses - 1)
            else:
                self.num_bytes -= crop.nbytes
            return crop
