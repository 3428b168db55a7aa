"""WebDataset shards: tar files in which `KEY.png`, `KEY.cls` and `KEY.json`, one after the other, are one sample.

Unit of data: one tar shard. Reading and grouping are the webdataset library's own, on a file that fsspec opened. Opening passes over the
headers once, grouped by the same library, to count records and to refuse a shard that is cut off: readers take a cut between two members
for the end.

Specifications: POSIX.1-2001 pax and ustar; the WebDataset format, https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from distill.errors import SourceError
from distill.sources.files import opened, read_lines, short_names
from distill.sources.records import IdsDigest, ImageRecord, ShardInfo, checked_label, digest_of_shards, label_named

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""In the order in which one is taken where a sample has several."""

_META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset leaves out."""

_BLOCK_BYTES = 512


@dataclass(frozen=True)
class TarShards:
    """Images in tar shards, local or in an object store."""

    urls: tuple[str, ...]
    class_names: tuple[str, ...] | None
    shards: tuple[ShardInfo, ...]
    ids_digests: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Records in all shards."""
        return sum(shard.num_records for shard in self.shards)

    def read_shard(self, index: int) -> list[ImageRecord]:
        """The records of one shard, in the order of the tar.

        Raises:
            SourceError: the shard is gone, damaged or changed since it was opened; a label that is not one.
        """
        from webdataset.tariterators import group_by_keys, tar_file_expander  # here, because webdataset imports torch

        url, shard = self.urls[index], self.shards[index]
        records: list[ImageRecord] = []
        with opened(url) as file, _tar_errors(url):
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": file}])):
                suffix = _image_suffix(sample)
                if suffix:
                    key = sample["__key__"]
                    records.append(ImageRecord(f"{shard.name}/{key}", sample[suffix], self._label(sample, f"{url}: {key}")))
        if len(records) != shard.num_records:
            raise SourceError(
                f"{url} has {len(records)} images and had {shard.num_records} when it was opened; start again with the new shard"
            )
        return records

    def read_labels(self, index: int) -> list[tuple[str, int | None]]:
        """(image_id, label) of one shard; a tar has to be read through for them."""
        return [(record.image_id, record.label) for record in self.read_shard(index)]

    def digest(self) -> str:
        """sha256 (hex) over the names of the shards and the keys and image sizes in them."""
        return digest_of_shards(self.shards, self.ids_digests)

    def _label(self, sample: dict[str, Any], where: str) -> int | None:
        """The class id in `.cls`, else under `label` or `cls` in `.json`; a class name stands for its id."""
        label: Any = None
        if "cls" in sample:
            text = sample["cls"].decode("utf-8", "replace").strip()
            label = int(text) if re.fullmatch(r"-?\d+", text) else text
        elif "json" in sample:
            try:
                fields = json.loads(sample["json"])
            except ValueError as error:
                raise SourceError(f"{where}.json is not JSON; make the shard again") from error
            if isinstance(fields, dict):
                label = fields.get("label", fields.get("cls"))
        if label is None:
            return None
        if isinstance(label, str):
            return label_named(label, self.class_names, where)
        if isinstance(label, bool) or not isinstance(label, int):
            raise SourceError(f"{where}: label {label!r} is neither a whole number nor a name; make the shard again")
        return checked_label(label, self.class_names, where)


def open_tar_shards(urls: list[str], class_names: tuple[str, ...] | None) -> TarShards:
    """Count the records of the shards.

    Raises:
        SourceError: a shard is truncated, damaged, holds a key twice; no shard holds an image.
    """
    if class_names is None:
        lines = read_lines(f"{posixpath.dirname(urls[0])}/class_names.txt")
        class_names = tuple(lines) if lines else None
    shards: list[ShardInfo] = []
    digests: list[str] = []
    for url, name in zip(urls, short_names(urls), strict=True):
        num_records, digest = _scan(url)
        shards.append(ShardInfo(name, num_records))
        digests.append(digest)
    if not any(shard.num_records for shard in shards):
        raise SourceError(f"{urls[0]} holds no images; members must be called KEY.{', KEY.'.join(_IMAGE_SUFFIXES)}")
    return TarShards(tuple(urls), class_names, tuple(shards), tuple(digests))


def _scan(url: str) -> tuple[int, str]:
    """(records, digest of their keys and sizes) of a shard, from its headers alone; memory does not grow with the images."""
    from webdataset.tariterators import group_by_keys  # the same grouping as in `read_shard`, on sizes instead of contents

    keys: set[str] = set()
    digest = IdsDigest()
    with opened(url) as file, _tar_errors(url):
        for sample in group_by_keys({"fname": name, "data": size, "__url__": url} for name, size in _members(file)):
            suffix = _image_suffix(sample)
            if not suffix:
                continue
            if sample["__key__"] in keys:
                raise SourceError(f"{url} holds key {sample['__key__']!r} twice; give each image its own key and make the shard again")
            keys.add(sample["__key__"])
            digest.add(sample["__key__"], sample[suffix])
    return len(keys), digest.hex()


def _members(file: IO[bytes]) -> Iterator[tuple[str, int]]:
    """(name, size in bytes) of each file in a tar, up to its end mark: two blocks of zeros, and nothing but zeros behind.

    Raises:
        tarfile.ReadError: the end mark is not where the members stop.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.isreg() and not _META.match(member.name):
                yield member.name, member.size
            tar.members.clear()  # type: ignore[attr-defined]  # else every header is kept
        rest = file.read(_BLOCK_BYTES)  # the first block of the end mark is read already
        if len(rest) < _BLOCK_BYTES:
            raise tarfile.ReadError("no end mark")
        while rest:  # to the end, so that the checksum of a compressed shard is compared too
            if any(rest):
                raise tarfile.ReadError("data behind the end mark")
            rest = file.read(2**20)


@contextmanager
def _tar_errors(url: str) -> Iterator[None]:
    """Turns what tarfile and webdataset raise into one line with the shard's URL."""
    try:
        yield
    except tarfile.TarError as error:
        raise SourceError(f"tar shard {url} is truncated or damaged ({error.args[0]}); make or copy it again") from error
    except ValueError as error:  # webdataset: two members of one name
        raise SourceError(f"tar shard {url} cannot be grouped ({error.args[0]}); make it again") from error


def _image_suffix(sample: dict[str, Any]) -> str | None:
    return next((suffix for suffix in _IMAGE_SUFFIXES if suffix in sample), None)
