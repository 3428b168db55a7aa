"""The vocabulary of sources: a record, a shard, and what every source can do.

Unit of data: one `ImageRecord`: an encoded image under an id that is unique in its source and the same every time the source is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from distill.errors import SourceError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
"""Lower case, without the dot. A file with another ending is no image of ours."""


@dataclass(frozen=True)
class ImageRecord:
    """One image as its source keeps it."""

    image_id: str
    """Unique in the source, stable; part of every crop's key."""
    data: bytes
    """The encoded file, untouched."""
    label: int | None
    """Class id, or None where the source gives none."""


@dataclass(frozen=True)
class ShardInfo:
    """What is known of a shard without reading its images."""

    name: str
    num_records: int


class Source(Protocol):
    """A set of images in shards. Plain data that can be pickled: every worker opens files for itself."""

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards, in a stable order."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the K classes in the order of the labels, or None where nothing names them."""
        ...

    @property
    def num_images(self) -> int:
        """Records in all shards."""
        ...

    def read_shard(self, index: int) -> list[ImageRecord]:
        """The records of one shard in the shard's own order, with encoded bytes.

        Raises:
            SourceError: the shard is gone, damaged, or no longer what it was when the source was opened.
        """
        ...

    def read_labels(self, index: int) -> list[tuple[str, int | None]]:
        """(image_id, label) of the records of one shard, in the order of `read_shard`, keeping no image bytes."""
        ...

    def digest(self) -> str:
        """sha256 (hex) over the names, counts, ids and sizes of all shards: names this set of images."""
        ...


class IdsDigest:
    """sha256 over a stream of (id, size in bytes), so that a shard is named without its ids being kept."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, image_id: str, size_bytes: int) -> None:
        """Take in one record."""
        self._sha.update(f"{image_id}\x00{size_bytes}\n".encode("utf-8", "surrogateescape"))

    def hex(self) -> str:
        """The digest so far."""
        return self._sha.hexdigest()


def digest_of_shards(shards: Sequence[ShardInfo], ids_digests: Iterable[str]) -> str:
    """The name of an image set, from what names each of its shards: `digest_of` the list of [name, number of records, digest of the ids],
    which is not made, for there may be millions."""
    sha, separator = hashlib.sha256(b"["), ""
    for shard, ids in zip(shards, ids_digests, strict=True):
        sha.update((separator + json.dumps([shard.name, shard.num_records, ids], separators=(",", ":"))).encode())
        separator = ","
    sha.update(b"]")
    return sha.hexdigest()


def checked_label(label: int, class_names: tuple[str, ...] | None, where: str) -> int:
    """`label` if it can be a class id.

    Raises:
        SourceError: negative, or not below the number of classes.
    """
    if label < 0 or (class_names is not None and label >= len(class_names)):
        limit = f"the {len(class_names)} classes there are names for" if class_names else "0 and above"
        raise SourceError(f"{where}: label {label} is not one of {limit}; mend the labels or the class names")
    return label


def label_named(name: str, class_names: tuple[str, ...] | None, where: str) -> int:
    """The class id of a class name.

    Raises:
        SourceError: no class names are known, or this is not one of them.
    """
    if class_names is None:
        raise SourceError(f"{where}: label {name!r} is a name and no class names are known; give class_names, or a class_names.txt beside")
    if name not in class_names:
        raise SourceError(f"{where}: label {name!r} is not one of the {len(class_names)} class names; mend the labels or the class names")
    return class_names.index(name)
