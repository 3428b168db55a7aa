"""Is every label of a store what was committed? Reads all of it: checksums, records, rows, image ids.

Unit of data: one image shard in all its views. K classes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

from distill.config import Section
from distill.errors import StoreError
from distill.soft_labels import decode
from student_trainer.store import SoftLabelStore
from student_trainer.store_compact import compact_unit, leftovers
from student_trainer.store_manifest import LATE_S
from student_trainer.store_segments import Segment, image_ids_of, read_bytes

Kind: TypeAlias = Literal["gone", "altered", "undecodable", "kept twice", "other image"]
NAMED_AT_MOST = 5
LOOK_AGAIN_S = 1.0
"""Pause between two looks for files that may be late."""

logger = logging.getLogger(__name__)


class Problem(Section):
    """Something wrong with one segment."""

    kind: Kind
    """`gone`: no file, or one of another length. `altered`: not the bytes that were committed. `undecodable`: records that are none.
    `kept twice`: rows that another segment has too, in the same form, neither label the more exact in one way. `other image`: rows that
    are another image in another view."""
    file: str
    """The segment."""
    labels: int
    """Labels that it befell."""
    says: str
    """What exactly."""
    repaired: bool = False
    """Whether it was mended: damaged segments are in quarantine and their labels will be asked for again, double labels are merged."""


class Verification(Section):
    """What was looked at and found."""

    num_segments: int
    """Segments that count."""
    num_labels: int
    """Labels in them."""
    size_bytes: int
    """Their bytes."""
    problems: list[Problem]
    """What is wrong; empty is good."""
    leftovers: list[str]
    """Files that the manifest does not name: the remains of crashes. They are never read; `compact --remove-leftovers` takes them away."""

    @property
    def num_open(self) -> int:
        """Problems that are not mended."""
        return sum(not problem.repaired for problem in self.problems)


def verify(
    store: SoftLabelStore,
    repair: bool = False,
    on_segment: Callable[[Segment], None] = lambda segment: None,
    pause: Callable[[float], None] = time.sleep,
) -> Verification:
    """Look at every segment that counted at the start. Writers and compactions may go on.

    Args:
        repair: put damaged segments into quarantine, so that their labels are asked for again, and merge labels kept twice. Files that
            may only be late (`Manifest.is_late`) are waited for first.
        on_segment: called after each segment.

    Raises:
        StoreError: the store cannot be read or, to be repaired, written.
    """
    stats = store.stats()
    problems: list[Problem] = []
    by_shard: dict[int, list[Segment]] = defaultdict(list)
    for segment in sorted(store.segments, key=lambda s: (s.shard, s.view)):
        by_shard[segment.shard].append(segment)
    for segments in by_shard.values():
        problems += _Shard(store, on_segment).problems(segments)
    problems += [_problem("gone", s, s.num_labels, "no file there, or one of another length") for s in _gone(store, repair, pause)]
    if repair:
        problems = _repair(store, problems)
    return Verification(**stats.model_dump(), problems=problems, leftovers=leftovers(store))


def _gone(store: SoftLabelStore, for_good: bool, pause: Callable[[float], None]) -> list[Segment]:
    """The segments that are gone now, after everything was read.

    Args:
        for_good: wait until those that may be late have appeared or are gone for good, and leave out those missed since.
    """
    store.refresh()
    late = [segment for segment in store.manifest.gone() if for_good and store.manifest.is_late(segment)]
    if late:
        logger.warning("%d segments of %s are missing; they are looked for again for up to %g s", len(late), store.folder, LATE_S)
    while any(map(store.manifest.is_late, late)):
        pause(LOOK_AGAIN_S)
        store.refresh()
    gone = [segment for segment in store.manifest.gone() if not store.is_intact(segment)]
    return [segment for segment in gone if not (for_good and store.manifest.is_late(segment))]


def _problem(kind: Kind, segment: Segment, labels: int, says: str) -> Problem:
    return Problem(kind=kind, file=segment.file, labels=labels, says=says)


class _Shard:
    """One image shard: what its rows are called is the same in every view."""

    def __init__(self, store: SoftLabelStore, on_segment: Callable[[Segment], None]) -> None:
        self._store = store
        self._on_segment = on_segment
        self._image_ids: dict[int, str] = {}
        self._forms: dict[tuple[int, tuple[float, ...]], dict[tuple[int, int, int], list[tuple[float, float]]]] = defaultdict(dict)
        """(view, temperatures) -> (row, encoding, bytes) of the labels so far -> their errors."""

    def problems(self, segments: Sequence[Segment]) -> list[Problem]:
        found = []
        for segment in segments:
            found += self._of_segment(segment)
            self._on_segment(segment)
        return found

    def _of_segment(self, segment: Segment) -> list[Problem]:
        try:
            data = self._store.files.read(segment.file)
        except FileNotFoundError:  # gone, unless it is found merged into another one at the end
            self._store.manifest.drop(segment)
            return []
        except OSError as error:
            raise StoreError(f"label segment {self._store.files.where}/{segment.file} cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != segment.sha256:
            return [_problem("altered", segment, segment.num_labels, "its sha256 is not the manifest's")]
        try:
            table = read_bytes(data)
        except (pa.ArrowException, OSError) as error:
            return [_problem("undecodable", segment, segment.num_labels, str(error).splitlines()[0])]
        checks = (self._undecodable(table), self._kept_twice(segment, table), self._other_images(table))
        kinds: tuple[Kind, ...] = ("undecodable", "kept twice", "other image")
        return [_problem(kind, segment, len(wrong), _listed(wrong)) for kind, wrong in zip(kinds, checks, strict=True) if wrong]

    def _undecodable(self, table: pa.Table) -> list[str]:
        num_classes = self._store.identity.num_classes
        encodings, records = table["encoding"].to_pylist(), table["record"].to_pylist()
        stated = np.stack([table["max_tv"].to_numpy(), table["max_logit_error"].to_numpy()])
        wrong = {int(at): "no error stated" for at in np.flatnonzero(~(np.isfinite(stated) & (stated >= 0)).all(axis=0))}
        try:
            logits_NK = decode(encodings, records, num_classes)
            wrong |= {int(at): "logits not finite" for at in np.flatnonzero(~np.isfinite(logits_NK).all(axis=1))}
        except StoreError:
            for at, (encoding, record) in enumerate(zip(encodings, records, strict=True)):
                try:
                    decode([encoding], [record], num_classes)
                except StoreError as error:
                    wrong[at] = str(error)
        rows = table["row"].to_pylist()
        return [f"row {rows[at]}: {says}" for at, says in sorted(wrong.items())]

    def _kept_twice(self, segment: Segment, table: pa.Table) -> list[str]:
        seen = self._forms[segment.view, segment.temperatures]
        lengths = (len(record) for record in table["record"].to_pylist())
        forms = list(zip(table["row"].to_pylist(), table["encoding"].to_pylist(), lengths, strict=True))
        errors = zip(table["max_tv"].to_pylist(), table["max_logit_error"].to_pylist(), strict=True)
        wrong = []
        for form, (tv, logit_error) in zip(forms, errors, strict=True):
            others = seen.setdefault(form, [])
            # Two labels of which each is the more exact in one way serve different reads; `compact` keeps both.
            if any((tv <= a and logit_error <= b) or (a <= tv and b <= logit_error) for a, b in others):
                wrong.append(f"row {form[0]}")
            others.append((tv, logit_error))
        return wrong

    def _other_images(self, table: pa.Table) -> list[str]:
        named = zip(table["row"].to_pylist(), image_ids_of(table), strict=True)
        wrong = [(row, image_id) for row, image_id in named if self._image_ids.setdefault(row, image_id) != image_id]
        return [f"row {row} is {image_id!r} here and {self._image_ids[row]!r} elsewhere" for row, image_id in wrong]


def _listed(wrong: list[str]) -> str:
    return "; ".join(wrong[:NAMED_AT_MOST]) + (f"; and {len(wrong) - NAMED_AT_MOST} more" if len(wrong) > NAMED_AT_MOST else "")


def _repair(store: SoftLabelStore, problems: list[Problem]) -> list[Problem]:
    """Damaged segments go into quarantine, as a whole: whoever wrote a wrong record may have written others."""
    segments = {segment.file: segment for unit in store.manifest.units() for segment in store.manifest.named_in(*unit)}
    for problem in problems:
        if problem.kind != "kept twice":
            store.quarantine(segments[problem.file])
    for unit in {(segments[problem.file].view, segments[problem.file].shard) for problem in problems}:
        compact_unit(store, *unit)
    return [problem.replace(repaired=True) for problem in problems]
