"""Images as the user names them -> the crops that a wrapped teacher and its original are compared on.

Unit of data: one image, through the evaluation crop. A photograph shows a wrong mean or swapped channels; noise would hide them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distill.crops import decode_image
from distill.errors import ImageError, SourceError
from distill.sources import open_source
from distill.sources.files import expand, is_folder, opened, short_names
from distill.sources.records import IMAGE_EXTENSIONS
from distill.teacher_info import Preprocessing
from export.label_space import Crops


def parity_crops(images: str, preprocessing: Preprocessing, count: int) -> tuple[Crops, list[str]]:
    """The evaluation crops of the first `count` images, uint8 [N,S,S,3], and their names.

    Args:
        images: a glob such as `photos/*.jpg`, or anything that `open_source` opens: a folder, tar shards, Parquet.
        preprocessing: gives the size S and the crop ratio.

    Raises:
        SourceError: nothing there, or an image that cannot be decoded.
    """
    crops, names = [], list[str]()
    for name, data in _encoded(images):
        try:
            crops.append(preprocessing.evaluation_crop(decode_image(data)))
        except ImageError as error:
            raise SourceError(f"{images}: {name} cannot be used ({error.reason}); leave it out of the images") from error
        names.append(name)
        if len(names) == count:
            break
    return np.stack(crops), names


def _encoded(images: str) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of every image, in order."""
    urls = expand(images)
    if all(url.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not is_folder(url) for url in urls):
        for name, url in zip(short_names(urls), urls, strict=True):
            with opened(url) as file:
                yield name, file.read()
        return
    source = open_source(images)
    for index in range(len(source.shards)):
        for record in source.read_shard(index):
            yield record.image_id, record.data
