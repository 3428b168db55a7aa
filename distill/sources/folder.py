"""A folder of image files, cut into virtual shards.

    class folders  photos/cat/a.jpg, photos/dog/b.png    every image lies below a folder of the top level, whose name is its class
    flat           photos/a.jpg, photos/2024/b.png       as soon as one image lies at the top: no labels

Unit of data: one virtual shard of `records_per_shard` files, in the order of their sorted relative paths, which are the ids. The paths of a
shard are held packed, a few bytes each: a list of them would be the one thing of a run that grows with its images.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from distill.sources.files import read_files
from distill.sources.records import IdsDigest, ImageRecord, ShardInfo, digest_of_shards, label_named


@dataclass(frozen=True)
class FolderSource:
    """Images in a folder, local or in an object store."""

    url: str
    packed_paths: tuple[bytes, ...]
    """Of each shard; see `_pack`."""
    has_labels: bool
    class_names: tuple[str, ...] | None
    shards: tuple[ShardInfo, ...]
    ids_digests: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Records in all shards."""
        return sum(shard.num_records for shard in self.shards)

    def read_shard(self, index: int) -> list[ImageRecord]:
        """The records of one virtual shard.

        Raises:
            SourceError: a file is gone or cannot be read.
        """
        labels = self.read_labels(index)
        contents = read_files(self.url, [path for path, _ in labels])
        return [ImageRecord(path, data, label) for (path, label), data in zip(labels, contents, strict=True)]

    def read_labels(self, index: int) -> list[tuple[str, int | None]]:
        """(image_id, label) of one virtual shard, from the paths alone."""
        paths = _unpack(self.packed_paths[index])
        if not self.has_labels:
            return [(path, None) for path in paths]
        label_of = {name: label for label, name in enumerate(self.class_names or ())}
        return [(path, label_of[path.partition("/")[0]]) for path in paths]

    def digest(self) -> str:
        """sha256 (hex) over the paths and sizes of all files."""
        return digest_of_shards(self.shards, self.ids_digests)


def open_folder(url: str, images: Iterable[tuple[str, int]], class_names: tuple[str, ...] | None, records_per_shard: int) -> FolderSource:
    """A source of the (relative path, size in bytes) pairs found below `url`, which come sorted and are passed over once.

    Raises:
        SourceError: a class folder that is not among the given class names.
    """
    has_labels, folders = True, set()
    shards: list[ShardInfo] = []
    digests: list[str] = []
    packed: list[bytes] = []
    for members in _in_groups(images, records_per_shard):
        digest = IdsDigest()
        for path, size_bytes in members:
            digest.add(path, size_bytes)
            folder, slash, _ = path.partition("/")
            has_labels = has_labels and bool(slash)
            folders.add(folder if has_labels else "")
        shards.append(ShardInfo(f"part-{len(shards):06d}", len(members)))
        digests.append(digest.hex())
        packed.append(_pack([path for path, _ in members]))
    if has_labels:
        class_names = class_names if class_names is not None else tuple(sorted(folders))
        for folder in sorted(folders):
            label_named(folder, class_names, f"{url}/{folder}")
    return FolderSource(url, tuple(packed), has_labels, class_names, tuple(shards), tuple(digests))


def _in_groups(images: Iterable[tuple[str, int]], size: int) -> Iterator[list[tuple[str, int]]]:
    left = iter(images)
    while group := list(islice(left, size)):
        yield group


def _pack(paths: list[str]) -> bytes:
    return zlib.compress("\0".join(paths).encode("utf-8", "surrogateescape"))


def _unpack(packed: bytes) -> list[str]:
    return zlib.decompress(packed).decode("utf-8", "surrogateescape").split("\0")
