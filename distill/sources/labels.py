"""Labelled images: all labels of a source, and the small part of them that fine-tuning may see.

Unit of data: a mapping of image_id to class id.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.errors import SourceError
from distill.sources.records import Source


def scan_labels(source: Source) -> dict[str, int]:
    """image_id -> class id of every image, in the source's order. Folders and Parquet answer without reading an image.

    Raises:
        SourceError: an image has no label, or all have the same one.
    """
    labels: dict[str, int] = {}
    num_missing = 0
    for index in range(len(source.shards)):
        for image_id, label in source.read_labels(index):
            if label is None:
                num_missing += 1
            else:
                labels[image_id] = label
    if num_missing:
        raise SourceError(
            f"{num_missing} of {source.num_images} images have no label, and this stage needs labels: "
            "give class folders, .cls members or a label column"
        )
    present = set(labels.values())
    if len(present) < 2:
        only = present.pop()
        name = f" ({source.class_names[only]})" if source.class_names else ""
        raise SourceError(f"all {len(labels)} images have the label {only}{name}; a classifier needs at least two classes")
    return labels


def labelled_subset(labels: Mapping[str, int], fraction: float, seed: int, class_names: Sequence[str] | None = None) -> list[str]:
    """The ids of a share of every class: a pure function of its arguments, the same in every process and for every order of the mapping.

    Each class gives `fraction` of its own images, rounded, so the classes keep their proportions: a set with equally many images of each
    class gives equally many labels of each (SimCLR's 1 % and 10 % of ImageNet are drawn so). A smaller fraction is contained in a larger
    one of the same seed.

    Args:
        labels: image_id -> class id.
        fraction: share of each class, in (0, 1].
        seed: another seed chooses other images.
        class_names: for the error message.

    Returns:
        Sorted image_ids.

    Raises:
        SourceError: a fraction out of range, or so small that a class gets no image.
    """
    if not 0 < fraction <= 1:
        raise SourceError(f"fraction {fraction:g} of the labels is out of range; give more than 0 and at most 1")
    chosen: list[str] = []
    for label, ids in sorted(_ids_of_class(labels).items()):
        num_chosen = math.floor(fraction * len(ids) + 0.5)
        if num_chosen == 0:
            name = _name(label, class_names)
            raise SourceError(f"fraction {fraction:g} of the {len(ids)} images of {name} is none; give at least {0.5 / len(ids):.2g}")
        chosen += sorted(ids, key=lambda image_id: _draw(seed, image_id))[:num_chosen]
    return sorted(chosen)


def listed_subset(labels: Mapping[str, int], path: Path, class_names: Sequence[str] | None = None) -> list[str]:
    """The ids that a text file lists, each once; see `read_ids`. A file name alone stands for the one image that is called so.

    Args:
        labels: image_id -> class id of the whole set.
        path: the list, UTF-8.
        class_names: for the error message.

    Returns:
        Sorted image_ids.

    Raises:
        SourceError: no such file, ids that are not in the set (the first few are named), or a class of the set left without an image.
    """
    listed = _with_folders(read_ids(path), labels)
    unknown = sorted(listed - labels.keys())
    if unknown:
        first, more = ", ".join(map(repr, unknown[:3])), ", ..." if len(unknown) > 3 else ""
        example = f"; ids look like {next(iter(labels))!r}" if labels else ""
        raise SourceError(
            f"{len(unknown)} of the {len(listed)} ids listed in {path} are not among the labelled images: {first}{more}{example}"
        )
    empty = sorted(set(labels.values()) - {labels[image_id] for image_id in listed})
    if empty:
        names = ", ".join(_name(label, class_names) for label in empty[:3]) + (", ..." if len(empty) > 3 else "")
        raise SourceError(f"{path} lists no image of {names}; list at least one of every class")
    return sorted(listed)


def _with_folders(listed: set[str], labels: Mapping[str, int]) -> set[str]:
    """Bare file names, as the authors' own lists have them, become the ids of the images that are called so.

    Raises:
        SourceError: several are called so.
    """
    bare = {name for name in listed if name not in labels and "/" not in name}
    if not bare:
        return listed
    found: dict[str, list[str]] = {}
    for image_id in labels:
        name = image_id.rpartition("/")[2]
        if name in bare:
            found.setdefault(name, []).append(image_id)
    several = sorted(name for name, ids in found.items() if len(ids) > 1)
    if several:
        raise SourceError(
            f"{several[0]!r} in the list of labelled images stands for {len(found[several[0]])} images; say its folder as well"
        )
    return {found.get(name, [name])[0] for name in listed}


def read_ids(path: Path) -> set[str]:
    """The ids that a text file lists, one a line; empty lines and those that begin with `#` say nothing.

    Raises:
        SourceError: no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise SourceError(f"the list of labelled images {path} cannot be read: {error.strerror}") from error
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def _ids_of_class(labels: Mapping[str, int]) -> dict[int, list[str]]:
    ids_of_class: dict[int, list[str]] = defaultdict(list)
    for image_id, label in labels.items():
        ids_of_class[label].append(image_id)
    return ids_of_class


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return f"class {label}" + (f" ({class_names[label]})" if class_names else "")


def _draw(seed: int, image_id: str) -> bytes:
    """A number in the hat for each image; hashing keeps it independent of the other images."""
    return hashlib.blake2b(f"{seed}\x00{image_id}".encode("utf-8", "surrogateescape"), digest_size=16, person=b"distill.subset").digest()
