"""The bytes of a distillation: over the network, in the store, in memory; and what grows too large at so many images.

Unit of data: one quantity with its value and, where there is one, the value from which on it hurts.
"""

from __future__ import annotations

import math

from distill.config import Section
from student_trainer.capacity import StageRates, Work
from student_trainer.label_path import COMMIT_AT

ENTRY_BYTES = 2000
"""Memory of one manifest entry in every process that has the store open (measured: 50,000 entries, bench/stream_memory.py)."""
ENTRY_S = 70e-6
"""Seconds to take in one entry (measured: the same, on a local disk, where each file is looked at)."""
_UNWRITTEN_BYTES = 600
"""Memory of a label that waits to be written, beside its record."""
_GB = 1e9


class Quantity(Section):
    """Something that a run moves or holds."""

    what: str
    value: float
    unit: str
    """`bytes`, `bytes/s`, `s`, or nothing for a count."""
    most: float | None = None
    """Where it begins to hurt; None where only the machines at hand can say."""
    way_out: str = ""
    """What to change then."""

    @property
    def bites(self) -> bool:
        """Whether it is over that."""
        return self.most is not None and self.value > self.most


def traffic(rates: StageRates, work: Work, images_per_s: float) -> list[Quantity]:
    """What goes over the network while labels are asked for at this rate, and what the store holds at the end."""
    return [
        Quantity(what="crops to the teachers", value=images_per_s * rates.crop_bytes, unit="bytes/s"),
        Quantity(what="logits back", value=images_per_s * rates.answer_bytes, unit="bytes/s"),
        Quantity(what="image files from storage", value=images_per_s * rates.encoded_bytes, unit="bytes/s"),
        Quantity(what="labels to the store", value=images_per_s * rates.label_bytes, unit="bytes/s"),
        Quantity(what="crops to the teachers in all", value=work.asked * rates.crop_bytes, unit="bytes"),
        Quantity(what="store", value=work.asked * rates.label_bytes, unit="bytes"),
    ]


def memory(rates: StageRates, work: Work, workers: int) -> list[Quantity]:
    """What one student worker holds beside its networks."""
    batches = work.batches_ahead + 2 * work.in_flight + 2
    shards = 2 * work.window_shards * work.images_per_shard
    return [
        Quantity(what="image shards", value=shards * rates.encoded_bytes, unit="bytes", most=32 * _GB, way_out="smaller image shards"),
        Quantity(what="crops of batches ahead", value=batches * work.global_batch / workers * rates.crop_bytes, unit="bytes"),
        Quantity(
            what="labels of shards in use",
            value=work.views_held * work.images_per_shard * work.num_classes * 4,
            unit="bytes",
            most=8 * _GB,
            way_out="smaller image shards",
        ),
        Quantity(
            what="plain crops that wait for mixing",
            value=work.mixing_cache_bytes,
            unit="bytes",
            most=32 * _GB,
            way_out="a smaller train.mixing_cache_mib",
        ),
        Quantity(what="labels not yet written", value=2 * COMMIT_AT * (rates.label_bytes + _UNWRITTEN_BYTES), unit="bytes"),
    ]


def growth(rates: StageRates, work: Work) -> list[Quantity]:
    """What grows with the number of images. `distill label` makes one segment a (view, shard); a training may make some more."""
    shards = math.ceil(work.images / work.images_per_shard)
    segments = shards * min(work.epochs, work.views)
    larger = "pack the images into larger shards (a folder: data.unlabelled.records_per_shard)"
    fewer = f"{larger}, or take fewer train.num_views"
    window = work.window_shards * work.images_per_shard * 16
    return [
        Quantity(what="image shards", value=shards, unit="", most=1e6, way_out=larger),
        Quantity(what="segments (files) of the store", value=segments, unit="", most=1e6, way_out=fewer),
        Quantity(what="manifest on disk", value=segments * rates.manifest_bytes, unit="bytes", most=2 * _GB, way_out=fewer),
        Quantity(what="manifest in memory, each process", value=segments * ENTRY_BYTES, unit="bytes", most=4 * _GB, way_out=fewer),
        Quantity(what="opening the store, each process", value=segments * ENTRY_S, unit="s", most=120, way_out=fewer),
        Quantity(what="order of the shards in memory, each worker", value=shards * 16, unit="bytes", most=2 * _GB, way_out=larger),
        Quantity(
            what="rows of a window in memory, each worker", value=window, unit="bytes", most=2 * _GB, way_out="fewer data.window_shards"
        ),
    ]
