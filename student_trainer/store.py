"""The soft-label store: what the teacher said about each crop, kept for ever, without the pixels. In a folder or on an object store.

    STORE/
      store.json            whose labels these are: teacher fingerprint, crop recipe, seed, image set
      manifest.jsonl        in a folder: one line for each commit, of a segment: view, shard, file, sha256, counts; or of several
      manifest/             on an object store: the same, one object for each commit
      view-00003/shard-000012.SEGMENT.parquet      labels of rows of one image shard in one view
      claims/               which labelling job is at which (view, shard) just now
      quarantine/           segments whose bytes no longer fit their sha256; their labels are asked for again

A segment is written whole (in a folder: pending name, flush, rename), read back and compared, and only then named in the manifest. What is
in the manifest is committed; anything else is the remains of a crash and is not read. Unit of data: one `Record`
(distill/soft_labels.py). The parts: `store_files` (places), `store_segments` (one file), `store_manifest` (which files count),
`store_claims` (who labels what), `store_cache` (segments of an object store on this machine's disk).
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from distill.config import Section, digest_of, validate
from distill.crops import CropRecipe
from distill.errors import FingerprintMismatch, StoreError
from distill.soft_labels import Record
from student_trainer.store_cache import SegmentCache
from student_trainer.store_files import StoreFiles, open_files
from student_trainer.store_manifest import LATE_S, Manifest, total
from student_trainer.store_segments import ROUNDING, Segment, ShardLabels, make_table, read_bytes, read_labels, table_bytes

__all__ = ["Segment", "ShardLabels", "SoftLabelStore", "StoreIdentity", "StoreStats", "read_identity"]

logger = logging.getLogger(__name__)

IDENTITY = "store.json"
QUARANTINE = "quarantine"
MOST_TRIES = 50


class StoreIdentity(Section):
    """Whose labels a store holds. Any difference means other labels."""

    fingerprint: str
    """The teacher's."""
    num_classes: int
    """K."""
    recipe: CropRecipe
    """How crops are cut."""
    seed: int
    """Seed of the crops."""
    images: str
    """Digest of the image set."""

    def differences(self, other: StoreIdentity) -> list[str]:
        """Names of the fields that differ."""
        return [name for name in StoreIdentity.model_fields if getattr(self, name) != getattr(other, name)]


class StoreStats(Section):
    """What a store holds."""

    num_labels: int
    """Labels committed, a label stored twice counted twice."""
    num_segments: int
    """Files."""
    size_bytes: int
    """Bytes of all segments."""


class SoftLabelStore:
    """Labels of one teacher on one image set; several processes may read and add at once.

    Args:
        where: a folder, or an fsspec URL such as `s3://bucket/labels`.
        cache: where segments of an object store are kept on this machine; None fetches them at every read.

    Raises:
        FingerprintMismatch: there are labels of another teacher, crop recipe, seed or image set.
        StoreError: it cannot be read or written.
    """

    def __init__(self, where: Path | str, identity: StoreIdentity, cache: SegmentCache | None = None) -> None:
        self.files = open_files(where)
        self.folder: Path | str = where
        self.identity = identity
        self.manifest = Manifest(self.files)
        self.num_damaged = 0
        """Segments that were found damaged or gone, which is said in the log each time."""
        self._cache = None if self.files.is_local else cache
        self._check_identity()
        self.refresh()

    @property
    def segments(self) -> list[Segment]:
        """The segments that count, as far as they were read."""
        return self.manifest.live()

    def _check_identity(self) -> None:
        try:
            if not self.files.sizes([IDENTITY]):
                self.files.create(IDENTITY, self.identity.model_dump_json(indent=1).encode())
            found = _parsed(self.files)
        except (OSError, ValueError) as error:
            raise StoreError(f"the label store {self.folder} cannot be used: {_said(error)}") from error
        names = found.differences(self.identity)
        if names:
            kept, wanted = ({n: str(getattr(i, n))[:16] for n in names} for i in (found, self.identity))
            raise FingerprintMismatch(
                f"the label store {self.folder} belongs to another {' and '.join(names)} ({kept}, this run has {wanted});"
                " choose another store.path"
            )

    def refresh(self, view: int | None = None) -> list[Segment]:
        """Take in the segments that were committed since, by this or another process, in one view or in all, and return them.

        Raises:
            StoreError: the manifest cannot be read.
        """
        try:
            return self.manifest.refresh(view)
        except OSError as error:
            raise StoreError(f"the manifest of the label store {self.folder} cannot be read: {_said(error)}") from error

    def stats(self) -> StoreStats:
        """Counts over all segments."""
        segments = self.segments
        return StoreStats(num_labels=total(segments, "num_labels"), num_segments=len(segments), size_bytes=total(segments, "size_bytes"))

    def manifest_digest(self) -> str:
        """sha256 (hex) over the committed segments. A record in checkpoints for people who compare two runs; nothing reads it back."""
        return digest_of([segment.sha256 for segment in self.segments])

    def read(self, view: int, shard: int, temperature: float, max_tv: float) -> ShardLabels:
        """Labels of one image shard in one view whose error at `temperature` is known to be within `max_tv`.

        A segment whose bytes are not what was committed is put into quarantine, and its labels count as not there.

        Raises:
            StoreError: the store cannot be read, or holds a record that this version cannot decode.
        """
        return read_labels(self.tables(view, shard), temperature, max_tv, self.identity.num_classes)

    def tables(self, view: int, shard: int, columns: Sequence[str] | None = None) -> list[tuple[Segment, pa.Table]]:
        """The segments of one image shard in one view with their labels; only some columns of them, if those are named.

        Raises:
            StoreError: the store cannot be read.
        """
        seen: dict[str, pa.Table | None] = {}
        # A segment that another process merged into a new one while we read is gone; then the new one is read.
        segments = self.manifest.of(view, shard)
        while missing := [segment for segment in segments if segment.file not in seen]:
            for segment in missing:
                data = self.load(segment)
                seen[segment.file] = None if data is None else read_bytes(data, columns)
            segments = self.manifest.of(view, shard)
        return [(segment, table) for segment in segments if (table := seen[segment.file]) is not None]

    def load(self, segment: Segment) -> bytes | None:
        """The bytes of a segment. None: it is damaged or gone, which has been said, and its labels count no more."""
        if self._cache is not None and (kept := self._cache.get(segment.sha256)) is not None:
            return kept
        path = f"{self.files.where}/{segment.file}"
        try:
            data = self.files.read(segment.file)
            if hashlib.sha256(data).hexdigest() == segment.sha256:
                if self._cache is not None:
                    self._cache.keep(segment.sha256, data)
                return data
            reason = "its bytes are not what was committed"
            self.quarantine(segment)
        except FileNotFoundError:
            self.refresh(segment.view)
            if segment not in self.manifest.of(segment.view, segment.shard):
                return None
            reason = "the file is gone"
        except OSError as error:
            raise StoreError(f"label segment {path} cannot be read: {_said(error)}") from error
        self.num_damaged += 1
        logger.warning("label segment %s: %s; it is left out and its labels are asked for again", path, reason)
        self.manifest.drop(segment)
        return None

    def quarantine(self, segment: Segment) -> None:
        """Move a damaged segment out of the way, where that can be done, and count it no more."""
        # Not found: another process found it damaged at the same time. Others: a store that may only be read is read all the same.
        with suppress(OSError):
            self.files.move(segment.file, f"{QUARANTINE}/{segment.file.rpartition('/')[2]}")
        self.manifest.drop(segment)

    def commit(
        self,
        view: int,
        shard: int,
        rows: Sequence[int],
        image_ids: Sequence[str],
        records: Sequence[Record],
        temperatures: Sequence[float],
        max_tv: float | None = None,
    ) -> list[Segment]:
        """Keep labels of one image shard in one view; when this returns they survive a crash.

        Labels that another writer committed meanwhile, as exact and for the same temperatures, are not kept a second time.

        Args:
            rows: rows of the image shard, [N], each once.
            image_ids: of these rows.
            records: their labels.
            temperatures: those at which the records' `max_tv` was computed.
            max_tv: the limit that the records had to keep. Default: the largest error among them, which is at most that.

        Returns:
            What `refresh` of this view took in: the new segment, and those that other processes committed meanwhile.

        Raises:
            StoreError: the disk is full or read-only; nothing half-written is left to be read.
        """
        table = make_table(rows, image_ids, records)
        limit = max((record.max_tv for record in records), default=0.0) if max_tv is None else max_tv
        fresh: list[Segment] = []
        for _ in range(MOST_TRIES):
            if not len(table):
                return fresh
            left, found = self._add(self._segment(view, shard, tuple(temperatures), table), table, limit)
            fresh += found
            if left is None:
                return fresh
            table = left
        raise self._others_first(view, shard)

    def _others_first(self, view: int, shard: int) -> StoreError:
        return StoreError(
            f"labels cannot be written to {self.folder}: {MOST_TRIES} times in a row others committed first to shard {shard} in view"
            f" {view}; committed labels are safe, run it again"
        )

    def _add(self, segment: Segment, table: pa.Table, limit: float) -> tuple[pa.Table | None, list[Segment]]:
        """Try to commit a segment: (None, what is new), or what of the table is still to be committed, after another writer was there."""
        fresh: list[Segment] = []
        try:
            self.files.put(segment.file, table_bytes(table))
            with self.files.locked():
                fresh += self.manifest.refresh(segment.view)
                new = self._without_kept(segment, table, limit)
                left = None if len(new) == len(table) and self.manifest.append([segment]) else new
                fresh += self.manifest.refresh(segment.view)
                # Also where the answer to `append` was lost, and the client library tried again and was refused.
                if self._is_named(segment):
                    left = None
        except OSError as error:
            self._undo(segment)
            raise StoreError(f"labels cannot be written to {self.folder}: {_said(error)}; committed labels are safe") from error
        if left is not None:
            self.files.remove(segment.file)
        else:
            self._quarantine_cut_off(segment)
        return left, fresh

    def _quarantine_cut_off(self, new: Segment) -> None:
        """Move away what lies where `new` was committed, is not as long as it was, and has had the time to become so."""
        with suppress(OSError):  # `new` is committed, whatever happens here
            gone = {segment.file: segment for segment in self.manifest.gone((new.view, new.shard))}
            for file, size in self.files.sizes(gone).items() if gone else ():
                if size != gone[file].size_bytes and self.files.age_s(file) > LATE_S:
                    self.quarantine(gone[file])

    def _segment(self, view: int, shard: int, temperatures: tuple[float, ...], table: pa.Table, replaces: tuple[str, ...] = ()) -> Segment:
        data = table_bytes(table)
        worst_tv = float(np.max(table["max_tv"].to_numpy())) if len(table) else None
        return Segment(
            view=view,
            shard=shard,
            file=f"view-{view:05d}/shard-{shard:06d}.{uuid.uuid4().hex[:12]}.parquet",
            sha256=hashlib.sha256(data).hexdigest(),
            num_labels=len(table),
            size_bytes=len(data),
            temperatures=temperatures,
            replaces=replaces,
            worst_tv=worst_tv,
        )

    def _without_kept(self, segment: Segment, table: pa.Table, limit: float) -> pa.Table:
        """The rows that the store does not hold yet, as exact and for these temperatures."""
        rows = table["row"].to_numpy()
        is_new = np.ones(len(rows), dtype=bool)
        for kept, labels in self.tables(segment.view, segment.shard, ("row", "max_tv")):
            if set(segment.temperatures) <= set(kept.temperatures):
                exact = labels["max_tv"].to_numpy() <= limit * ROUNDING
                is_new &= ~np.isin(rows, labels["row"].to_numpy()[exact])
        return table if is_new.all() else table.filter(pa.array(is_new))

    def is_intact(self, segment: Segment) -> bool:
        """Whether its file has the bytes that were committed.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            return hashlib.sha256(self.files.read(segment.file)).hexdigest() == segment.sha256
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"label segment {self.files.where}/{segment.file} cannot be read: {_said(error)}") from error

    def replace(
        self,
        view: int,
        shard: int,
        tables: Sequence[tuple[tuple[float, ...], pa.Table]],
        merged: Sequence[Segment],
        gone: Sequence[Segment] = (),
    ) -> bool:
        """Put merged segments in the place of others, and take those away. False: another process has replaced some of them, or one of
        `gone` is there again; nothing is changed. A crash leaves either the old ones or the new ones to be read.

        Args:
            tables: temperatures and labels of each new segment; at least one, which may be empty.
            merged: the segments whose labels they hold.
            gone: segments that are counted out with them, their labels lost.

        Raises:
            StoreError: the store cannot be written; or on an object store others committed to this shard and view first, MOST_TRIES times
                in a row. The labels that were there still count.
        """
        names = tuple(segment.file for segment in (*merged, *gone))
        # The last one names what is replaced: a thread that reads while they are taken in finds the old ones until all new ones are there.
        made = [
            self._segment(view, shard, temperatures, table, names if number == len(tables) else ())
            for number, (temperatures, table) in enumerate(tables, start=1)
        ]
        tries, is_named, is_others = 0, False, False
        try:
            for segment, (_, table) in zip(made, tables, strict=True):
                self.files.put(segment.file, table_bytes(table))
            while not (is_named or is_others) and tries < MOST_TRIES:
                tries += 1
                with self.files.locked():
                    self.manifest.refresh(view)
                    replaced = {segment.file for segment in self.manifest.replaced()}
                    is_others = bool(replaced & set(names)) or any(map(self.is_intact, gone))
                    if not is_others:
                        is_named = self.manifest.append(made)
                        self.manifest.refresh(view)
                        is_named |= self._is_named(made[0])
            for file in names if is_named else [segment.file for segment in made]:
                self.files.remove(file)
        except OSError as error:
            raise StoreError(f"labels cannot be written to {self.folder}: {_said(error)}; committed labels are safe") from error
        if not (is_named or is_others):
            raise self._others_first(view, shard)
        return is_named

    def _undo(self, segment: Segment) -> None:
        """Take away what a failed commit left, unless the manifest names it already (its last flush failed): readers count on that."""
        with suppress(OSError):
            self.manifest.refresh(segment.view)
            if not self._is_named(segment):
                self.files.remove(segment.file)

    def _is_named(self, segment: Segment) -> bool:
        return segment in self.manifest.named_in(segment.view, segment.shard)


def read_identity(where: Path | str) -> StoreIdentity:
    """Whose labels the store there holds.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    try:
        return _parsed(open_files(where))
    except FileNotFoundError as error:
        raise StoreError(f"no label store in {where}: {IDENTITY} is missing") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"the label store {where} cannot be used: {_said(error)}") from error


def _parsed(files: StoreFiles) -> StoreIdentity:
    return validate(StoreIdentity, json.loads(files.read(IDENTITY)), origin=f"{files.where}/{IDENTITY}")


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
