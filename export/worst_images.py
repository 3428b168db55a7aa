"""The crops that a graph and its network differ most on, as pictures: what they have in common is often seen at a glance.

Unit of data: one crop, one file `worst/RANK-IMAGEID.png`; rank 1 is the worst.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from export.label_space import Crops
from export.parity_files import WORST_FOLDER

_LONGEST_NAME = 80


def save_worst(folder: Path, crops_NHWC: Crops, worst: Iterable[tuple[int, str]]) -> None:
    """Write the pictures into `folder/worst`, in place of those of an earlier comparison.

    Args:
        folder: where the report lies.
        crops_NHWC: uint8 [N,H,W,3], all that were compared.
        worst: row among the crops, and image id, worst first.
    """
    target = folder / WORST_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    for rank, (row, image_id) in enumerate(worst, start=1):
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crops_NHWC[row]).save(target / picture_name(rank, image_id))


def picture_name(rank: int, image_id: str) -> str:
    """A name that every file system takes, whatever the image is called; the rank keeps two of them apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", image_id)
    return f"{rank}-{plain[-_LONGEST_NAME:]}.png"
