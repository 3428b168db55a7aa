"""A folder of image files, cut into virtual shards.

    class folders  photos/cat/a.jpg, photos/dog/b.png    every image lies below a folder of the top level, whose name is its class
    flat           photos/a.jpg, photos/2024/b.png       as soon as one image lies at the top: no labels

Unit of data: one virtual shard of `records_per_shard` files, in the order of their sorted relative paths, which are the ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.sources.files import read_files
from distill.sources.records import IdsDigest, ImageRecord, ShardInfo, digest_of_shards, label_named


@dataclass(frozen=True)
class FolderSource:
    """Images in a folder, local or in an object store."""

    url: str
    paths: tuple[str, ...]
    records_per_shard: int
    has_labels: bool
    class_names: tuple[str, ...] | None
    shards: tuple[ShardInfo, ...]
    ids_digests: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Records in all shards."""
        return len(self.paths)

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
        paths = self.paths[index * self.records_per_shard : (index + 1) * self.records_per_shard]
        if not self.has_labels:
            return [(path, None) for path in paths]
        label_of = {name: label for label, name in enumerate(self.class_names or ())}
        return [(path, label_of[path.partition("/")[0]]) for path in paths]

    def digest(self) -> str:
        """sha256 (hex) over the paths and sizes of all files."""
        return digest_of_shards(self.shards, self.ids_digests)


def open_folder(url: str, images: list[tuple[str, int]], class_names: tuple[str, ...] | None, records_per_shard: int) -> FolderSource:
    """A source of the (relative path, size in bytes) pairs found below `url`.

    Raises:
        SourceError: a class folder that is not among the given class names.
    """
    has_labels = all("/" in path for path, _ in images)
    if has_labels:
        folders = sorted({path.partition("/")[0] for path, _ in images})
        class_names = class_names if class_names is not None else tuple(folders)
        for folder in folders:
            label_named(folder, class_names, f"{url}/{folder}")
    shards: list[ShardInfo] = []
    digests: list[str] = []
    for start in range(0, len(images), records_per_shard):
        members = images[start : start + records_per_shard]
        digest = IdsDigest()
        for path, size_bytes in members:
            digest.add(path, size_bytes)
        shards.append(ShardInfo(f"part-{len(shards):06d}", len(members)))
        digests.append(digest.hex())
    paths = tuple(path for path, _ in images)
    return FolderSource(url, paths, records_per_shard, has_labels, class_names, tuple(shards), tuple(digests))
