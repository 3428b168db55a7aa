"""What a store holds, in numbers; and how two stores differ.

Unit of data: one (view, shard) at a time. Shapes: N labels, K classes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.compute as pc

from distill.config import Section
from distill.errors import StoreError
from distill.soft_labels import Encoding, FloatArray, softmax
from student_trainer.store import SoftLabelStore, StoreIdentity
from student_trainer.store_segments import Segment, ShardLabels

ANY_ERROR = 1.0
"""No total variation is larger."""


class Spread(Section):
    """A distribution in a few numbers; all 0 where there is nothing."""

    mean: float
    """Mean."""
    p50: float
    """Median."""
    p99: float
    """What 99 in 100 do not exceed."""
    largest: float
    """Maximum."""

    @classmethod
    def of(cls, values_N: np.ndarray) -> Spread:
        """Of an array of numbers."""
        if not len(values_N):
            return cls(mean=0, p50=0, p99=0, largest=0)
        p50, p99 = np.percentile(values_N, (50, 99), method="inverted_cdf")
        return cls(mean=float(np.mean(values_N, dtype=np.float64)), p50=float(p50), p99=float(p99), largest=float(values_N.max()))


class ViewSummary(Section):
    """One view."""

    view: int
    """Its number."""
    num_labels: int
    """Labels of it."""
    num_shards: int
    """Image shards that have any."""
    num_segments: int
    """Files."""
    size_bytes: int
    """Their bytes."""
    complete: float
    """Labels over images; where the number of images is not known, over those of the fullest view."""


class ErrorSummary(Section):
    """The errors of labels that were kept for the same temperatures."""

    temperatures: tuple[float, ...]
    """Where they were computed."""
    num_labels: int
    """Labels."""
    max_tv: Spread
    """Total-variation error."""
    max_logit_error: Spread
    """Error of the logits, which bounds the one at every other temperature."""


class StoreSummary(Section):
    """What a store holds."""

    where: str
    """Folder or URL."""
    identity: StoreIdentity
    """Whose labels."""
    num_labels: int
    """Labels."""
    num_segments: int
    """Files."""
    size_bytes: int
    """Bytes of all segments."""
    num_images: int | None
    """Images that there are, where that is known."""
    views: list[ViewSummary]
    """Each view that has a label."""
    num_read: int
    """Labels that the numbers below are of; 0 where only the manifest was read."""
    record_bytes: Spread
    """Bytes a label, of the records alone."""
    encodings: dict[str, int]
    """Encoding -> labels."""
    errors: list[ErrorSummary]
    """For each set of temperatures."""


def summarize(
    store: SoftLabelStore, num_images: int | None = None, quick: bool = False, on_segment: Callable[[Segment], None] = lambda segment: None
) -> StoreSummary:
    """Counts from the manifest and, unless `quick`, sizes and errors from every segment.

    Raises:
        StoreError: the store cannot be read.
    """
    by_view: dict[int, list[Segment]] = defaultdict(list)
    for segment in store.segments:
        by_view[segment.view].append(segment)
    counts = {view: sum(s.num_labels for s in segments) for view, segments in by_view.items()}
    full = num_images or max(counts.values(), default=0) or 1
    sizes, tvs, logit_errors, encodings = _contents([] if quick else store.segments, store, on_segment)
    return StoreSummary(
        where=store.files.where,
        identity=store.identity,
        **store.stats().model_dump(),
        num_images=num_images,
        views=[
            ViewSummary(
                view=view,
                num_labels=counts[view],
                num_shards=len({s.shard for s in segments}),
                num_segments=len(segments),
                size_bytes=sum(s.size_bytes for s in segments),
                complete=counts[view] / full,
            )
            for view, segments in sorted(by_view.items())
        ],
        num_read=len(sizes),
        record_bytes=Spread.of(sizes),
        encodings=dict(Counter(encodings).most_common()),
        errors=[
            ErrorSummary(temperatures=t, num_labels=len(tvs[t]), max_tv=Spread.of(tvs[t]), max_logit_error=Spread.of(logit_errors[t]))
            for t in sorted(tvs)
        ],
    )


ByTemperatures = dict[tuple[float, ...], np.ndarray]


def _contents(
    segments: Sequence[Segment], store: SoftLabelStore, on_segment: Callable[[Segment], None]
) -> tuple[np.ndarray, ByTemperatures, ByTemperatures, Counter[str]]:
    sizes, encodings = [np.empty(0, np.int64)], Counter[str]()
    tvs: dict[tuple[float, ...], list[np.ndarray]] = defaultdict(list)
    logit_errors: dict[tuple[float, ...], list[np.ndarray]] = defaultdict(list)
    for unit in sorted({(segment.view, segment.shard) for segment in segments}):
        for segment, table in store.tables(*unit):
            sizes.append(pc.binary_length(table["record"]).to_numpy().astype(np.int64))
            tvs[segment.temperatures].append(table["max_tv"].to_numpy())
            logit_errors[segment.temperatures].append(table["max_logit_error"].to_numpy())
            numbers, how_many = np.unique(table["encoding"].to_numpy(), return_counts=True)
            encodings.update({_name(int(n)): int(c) for n, c in zip(numbers, how_many, strict=True)})
            on_segment(segment)
    return np.concatenate(sizes), _joined(tvs), _joined(logit_errors), encodings


def _joined(parts: dict[tuple[float, ...], list[np.ndarray]]) -> ByTemperatures:
    return {temperatures: np.concatenate(arrays) for temperatures, arrays in parts.items()}


def _name(encoding: int) -> str:
    try:
        return Encoding(encoding).name.lower()
    except ValueError:
        return f"unknown {encoding}"


class StoreDifference(Section):
    """How two stores differ."""

    a: str
    """Folder or URL of one."""
    b: str
    """And of the other."""
    identity: dict[str, tuple[str, str]]
    """Field of the identity -> its two values, where they differ."""
    only_a: int
    """Labels, by (view, shard, row), that only A has."""
    only_b: int
    """That only B has."""
    both: int
    """That both have."""
    other_images: int
    """Of these, such that are of another image; they are not compared."""
    temperature: float
    """At which the labels were compared."""
    tv: Spread
    """Total variation between the two labels of the same crop."""
    same_top_class: float
    """Share of the compared labels whose likeliest class is the same."""


def difference(a: SoftLabelStore, b: SoftLabelStore, temperature: float, on_unit: Callable[[], None] = lambda: None) -> StoreDifference:
    """Compare two stores label by label.

    Raises:
        StoreError: one cannot be read, or they are of different numbers of classes.
    """
    if a.identity.num_classes != b.identity.num_classes:
        raise StoreError(
            f"labels of {a.identity.num_classes} and of {b.identity.num_classes} classes cannot be compared"
            f" ({a.files.where}, {b.files.where})"
        )
    names = a.identity.differences(b.identity)
    units = sorted({(s.view, s.shard) for store in (a, b) for s in store.segments})
    counts, tvs, same = np.zeros(4, dtype=np.int64), [np.empty(0)], [np.empty(0, bool)]
    for unit in units:
        labels = a.read(*unit, temperature, ANY_ERROR), b.read(*unit, temperature, ANY_ERROR)
        counted, tv_N, same_N = _compare(*labels, temperature)
        counts += counted
        tvs.append(tv_N)
        same.append(same_N)
        on_unit()
    tv_N, same_N = np.concatenate(tvs), np.concatenate(same)
    return StoreDifference(
        a=a.files.where,
        b=b.files.where,
        identity={name: (str(getattr(a.identity, name)), str(getattr(b.identity, name))) for name in names},
        only_a=counts[0],
        only_b=counts[1],
        both=counts[2],
        other_images=counts[3],
        temperature=temperature,
        tv=Spread.of(tv_N),
        same_top_class=float(same_N.mean()) if len(same_N) else 0.0,
    )


def _compare(a: ShardLabels, b: ShardLabels, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    common = sorted(a.rows.keys() & b.rows.keys())
    same_image = [row for row in common if a.image_ids[a.rows[row]] == b.image_ids[b.rows[row]]]
    counts = np.array([len(a.rows) - len(common), len(b.rows) - len(common), len(common), len(common) - len(same_image)])
    a_NK, b_NK = (labels.logits_NK[[labels.rows[row] for row in same_image]] for labels in (a, b))
    return counts, total_variation(a_NK, b_NK, temperature), a_NK.argmax(axis=1) == b_NK.argmax(axis=1)


def total_variation(a_NK: FloatArray, b_NK: FloatArray, temperature: float) -> np.ndarray:
    """float64 [N]: half the L1 distance of softmax(logits / temperature)."""
    return 0.5 * np.abs(softmax(a_NK, temperature).astype(np.float64) - softmax(b_NK, temperature)).sum(axis=1)
