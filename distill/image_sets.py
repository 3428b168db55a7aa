"""From settings to sources: the image sets of a run, and the labelled subset that fine-tuning may look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.config import digest_of
from distill.data_settings import DataSettings, ImagesSettings
from distill.errors import SourceError
from distill.sources import ImageRecord, ShardInfo, Source, labelled_subset, listed_subset, open_source, scan_labels


def open_unlabelled(data: DataSettings) -> Source:
    """The unlabelled images. What their folders or files say of classes is not looked at.

    Raises:
        SourceError: see `open_source`.
    """
    return _open(data.unlabelled, None)


def open_labelled(images: ImagesSettings, data: DataSettings) -> Source:
    """A labelled set, its labels counted in `data.class_names`, so that a class that it lacks does not move the others.

    Raises:
        SourceError: see `open_source`.
    """
    return _open(images, tuple(data.class_names) if data.class_names else None)


def _open(images: ImagesSettings, class_names: tuple[str, ...] | None) -> Source:
    return open_source(
        images.path,
        class_names=class_names,
        records_per_shard=images.records_per_shard,
        image_column=images.image_column,
        label_column=images.label_column,
        id_column=images.id_column,
    )


def has_labels(source: Source, num_shards: int | None = None) -> bool:
    """Whether every image of the first so many shards, or of all, has a label."""
    return all(label is not None for shard in range(len(source.shards))[:num_shards] for _, label in source.read_labels(shard))


class ChosenImages:
    """Some of a source's images, held in memory as one shard."""

    def __init__(self, origin: Source, image_ids: Sequence[str]) -> None:
        wanted = set(image_ids)
        self._records = [r for shard in range(len(origin.shards)) for r in origin.read_shard(shard) if r.image_id in wanted]
        self.shards = (ShardInfo("chosen", len(self._records)),)
        self.class_names = origin.class_names
        self.num_images = len(self._records)
        self._digest = digest_of([origin.digest(), sorted(wanted)])

    def read_shard(self, index: int) -> list[ImageRecord]:
        """All records."""
        return self._records

    def read_labels(self, index: int) -> list[tuple[str, int | None]]:
        """(image_id, label) of all records."""
        return [(record.image_id, record.label) for record in self._records]

    def digest(self) -> str:
        """Names the origin and the choice."""
        return self._digest


def open_labelled_subset(data: DataSettings, seed: int) -> Source:
    """The labelled images that the run may use, the same ones for teacher, students and control: those that `data.labelled_ids` lists, or
    `data.label_fraction` of each class.

    Raises:
        SourceError: labels missing, one class only, or a class left without an image; ids listed that are not there.
    """
    source = open_labelled(data.labelled, data)
    return ChosenImages(source, choose_labelled(source, data, seed))


def choose_labelled(source: Source, data: DataSettings, seed: int, every_class: bool = False) -> list[str]:
    """Ids of the labelled images of `source` that the run may use.

    Args:
        every_class: refuse a set that lacks one of its class names.

    Raises:
        SourceError: see `open_labelled_subset`.
    """
    labels = scan_labels(source)
    names = source.class_names or ()
    present = set(labels.values())
    absent = [f"{k} ({name})" for k, name in enumerate(names) if k not in present]
    if every_class and absent:
        listed = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise SourceError(
            f"{data.labelled.path} has no image of {len(absent)} of {len(names)} classes: {listed};"
            " give at least one of each, or take them out of the class names"
        )
    if data.labelled_ids is not None:
        return listed_subset(labels, Path(data.labelled_ids), source.class_names)
    return labelled_subset(labels, data.label_fraction, seed, source.class_names)


def class_names_of(data: DataSettings) -> tuple[str, ...]:
    """Names of the K classes: from the settings, from the labelled source, else the numbers that its labels use.

    Raises:
        SourceError: see `scan_labels`.
    """
    source = open_labelled(data.labelled, data)
    if source.class_names is not None:
        if len(source.class_names) < 2:
            raise SourceError(f"{data.labelled.path} has one class only ({source.class_names[0]!r}); a classifier needs two or more")
        return source.class_names
    return tuple(str(label) for label in range(max(scan_labels(source).values()) + 1))
