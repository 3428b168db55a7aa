"""The soft-label store: what the teacher said about each crop, kept for ever, without the pixels.

    STORE/
      store.json            whose labels these are: teacher fingerprint, crop recipe, seed, image set
      manifest.jsonl        one line for each committed segment: view, shard, file, sha256, counts
      view-00003/shard-000012.SEGMENT.parquet      labels of rows of one image shard in one view
      quarantine/           segments whose bytes no longer fit their sha256; their labels are asked for again

A segment is written under a pending name, flushed to disk, renamed, and only then named in the manifest. What is in the manifest is
committed; anything else is the remains of a crash and is not read. Unit of data: one `Record` (distill/soft_labels.py).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distill.checkpoint import file_sha256, fsync_path
from distill.config import Section, digest_of, validate
from distill.crops import CropRecipe
from distill.errors import FingerprintMismatch, StoreError
from distill.soft_labels import FloatArray, Record, certified_tv, decode

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("image_id", pa.string()),
        ("encoding", pa.uint8()),
        ("record", pa.binary()),
        ("max_tv", pa.float32()),
        ("max_logit_error", pa.float32()),
    ]
)


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


class Segment(Section):
    """One line of the manifest."""

    view: int
    """View of the crops."""
    shard: int
    """Image shard."""
    file: str
    """Path inside the store."""
    sha256: str
    """Of the file."""
    num_labels: int
    """Labels in it."""
    size_bytes: int
    """Size of the file."""
    temperatures: tuple[float, ...]
    """Temperatures at which `max_tv` was computed."""


class StoreStats(Section):
    """What a store holds."""

    num_labels: int
    """Labels committed, a label stored twice counted twice."""
    num_segments: int
    """Files."""
    size_bytes: int
    """Bytes of all segments."""


@dataclass(frozen=True)
class ShardLabels:
    """The labels of one image shard in one view that can be read at the wanted temperature."""

    rows: dict[int, int]
    """row of the image shard -> position below."""
    image_ids: list[str]
    logits_NK: FloatArray


class SoftLabelStore:
    """Labels of one teacher on one image set; several processes may read and add at once.

    Raises:
        FingerprintMismatch: the folder holds labels of another teacher, crop recipe, seed or image set.
        StoreError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, identity: StoreIdentity) -> None:
        self.folder = folder
        self.identity = identity
        self.segments: list[Segment] = []
        self._read_to = 0
        self._check_identity()
        self.refresh()

    def _check_identity(self) -> None:
        path = self.folder / "store.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                pending = path.with_name(f".store.{uuid.uuid4().hex}")
                pending.write_text(self.identity.model_dump_json(indent=1), encoding="utf-8")
                fsync_path(pending)
                pending.replace(path)
            found = validate(StoreIdentity, json.loads(path.read_text(encoding="utf-8")), origin=str(path))
        except (OSError, json.JSONDecodeError) as error:
            raise StoreError(f"the label store {self.folder} cannot be used: {error}") from error
        names = [n for n in StoreIdentity.model_fields if getattr(found, n) != getattr(self.identity, n)]
        if names:
            kept, wanted = ({n: str(getattr(i, n))[:16] for n in names} for i in (found, self.identity))
            raise FingerprintMismatch(
                f"the label store {self.folder} belongs to another {' and '.join(names)} ({kept}, this run has {wanted});"
                " choose another store.path"
            )

    def refresh(self) -> list[Segment]:
        """Take in the segments that were committed since, by this or another process, and return them.

        A line cut off by a crash is none. One that lacks nothing but its line end counts: the next writer would end it, and its labels,
        asked for again meanwhile, would be there twice.
        """
        path = self.folder / "manifest.jsonl"
        before = len(self.segments)
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n") and _segment_of(line) is None:
                    break
                self._read_to += len(line)
                if line.strip():
                    self._take(line)
        return self.segments[before:]

    def _take(self, line: bytes) -> None:
        segment = _segment_of(line)
        if segment is None:  # two halves of lines, from a crash in the middle of a write: that segment was never committed
            logger.warning("a damaged line in %s is passed over; its labels will be asked for again", self.folder / "manifest.jsonl")
            return
        path = self.folder / segment.file
        if path.exists() and path.stat().st_size == segment.size_bytes:
            self.segments.append(segment)
        else:  # in quarantine since an earlier run, or cut off; counting it would make its rows look labelled
            logger.warning("label segment %s is gone or cut off; its labels are asked for again", path)

    def stats(self) -> StoreStats:
        """Counts over all segments."""
        return StoreStats(
            num_labels=sum(s.num_labels for s in self.segments),
            num_segments=len(self.segments),
            size_bytes=sum(s.size_bytes for s in self.segments),
        )

    def manifest_digest(self) -> str:
        """sha256 (hex) over the committed segments; goes into checkpoints."""
        return digest_of([s.sha256 for s in self.segments])

    def read(self, view: int, shard: int, temperature: float, max_tv: float) -> ShardLabels:
        """Labels of one image shard in one view whose error at `temperature` is known to be within `max_tv`.

        A segment whose bytes are not what was committed is put into quarantine, and its labels count as not there.
        """
        tables = [(s, self._load(s)) for s in list(self.segments) if s.view == view and s.shard == shard]
        columns: dict[int, tuple[str, int, bytes]] = {}
        for segment, table in tables:
            if table is not None:
                columns.update(_usable(segment, table, temperature, max_tv))
        kept = list(columns.values())
        return ShardLabels(
            rows={row: position for position, row in enumerate(columns)},
            image_ids=[image_id for image_id, _, _ in kept],
            logits_NK=decode([e for _, e, _ in kept], [r for _, _, r in kept], self.identity.num_classes),
        )

    def _load(self, segment: Segment) -> pa.Table | None:
        path = self.folder / segment.file
        try:
            if file_sha256(path) == segment.sha256:
                return pq.read_table(path, memory_map=True)
            reason = "its bytes are not what was committed"
            self._quarantine(path)
        except FileNotFoundError:
            reason = "the file is gone"
        except OSError as error:
            raise StoreError(f"label segment {path} cannot be read: {error.strerror or error}") from error
        logger.warning("label segment %s: %s; it is left out and its labels are asked for again", path, reason)
        self.segments.remove(segment)
        return None

    def _quarantine(self, path: Path) -> None:
        (self.folder / "quarantine").mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process found it damaged at the same time
            path.rename(self.folder / "quarantine" / path.name)

    def commit(
        self,
        view: int,
        shard: int,
        rows: Sequence[int],
        image_ids: Sequence[str],
        records: Sequence[Record],
        temperatures: Sequence[float],
    ) -> list[Segment]:
        """Keep labels of one image shard in one view; when this returns they survive a crash.

        Returns:
            What `refresh` took in: the new segment, and those that other processes committed meanwhile.

        Raises:
            StoreError: the disk is full or read-only; nothing half-written is left to be read.
        """
        folder = self.folder / f"view-{view:05d}"
        name = f"shard-{shard:06d}.{uuid.uuid4().hex[:12]}.parquet"
        pending = folder / f".{name}.pending"
        order = np.argsort(np.asarray(rows), kind="stable")
        table = pa.table(
            {
                "row": [int(rows[i]) for i in order],
                "image_id": [image_ids[i] for i in order],
                "encoding": [int(records[i].encoding) for i in order],
                "record": [records[i].data for i in order],
                "max_tv": [records[i].max_tv for i in order],
                "max_logit_error": [records[i].max_logit_error for i in order],
            },
            schema=SCHEMA,
        )
        try:
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                fsync_path(self.folder)
            pq.write_table(table, pending, compression="none", use_dictionary=False)
            fsync_path(pending)
            segment = Segment(
                view=view,
                shard=shard,
                file=f"{folder.name}/{name}",
                sha256=file_sha256(pending),
                num_labels=len(table),
                size_bytes=pending.stat().st_size,
                temperatures=tuple(temperatures),
            )
            pending.rename(folder / name)
            fsync_path(folder)
            self._append(segment.model_dump_json())
        except OSError as error:
            self._undo(pending, folder / name)
            raise StoreError(f"labels cannot be written to {folder}: {error.strerror or error}; committed labels are safe") from error
        return self.refresh()

    def _undo(self, pending: Path, final: Path) -> None:
        """Take away what a failed commit left, unless the manifest names it already (its last flush failed): readers count on that."""
        self.refresh()
        pending.unlink(missing_ok=True)
        if f"{final.parent.name}/{final.name}" not in {segment.file for segment in self.segments}:
            final.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        path = self.folder / "manifest.jsonl"
        # One write to a file opened for appending is not mixed with another process's. The leading newline ends a line cut off by a crash.
        text = f"\n{line}\n".encode()
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, text) != len(text):  # a full disk may take a part without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            fsync_path(self.folder)


def _segment_of(line: bytes) -> Segment | None:
    """The segment that a line of the manifest names, or None for anything else."""
    try:
        return Segment.model_validate_json(line)
    except ValueError:
        return None


def _usable(segment: Segment, table: pa.Table, temperature: float, max_tv: float) -> dict[int, tuple[str, int, bytes]]:
    """row -> (image_id, encoding, record) of the labels that keep `max_tv` at `temperature`."""
    fields: dict[str, Any] = table.to_pydict()
    if temperature in segment.temperatures:
        errors: npt.NDArray[Any] = np.asarray(fields["max_tv"])
    else:
        errors = certified_tv(np.asarray(fields["max_logit_error"]), temperature)
    # float32 columns: allow for the rounding of the number itself
    good = np.flatnonzero(errors <= max_tv * (1 + 1e-6))
    return {fields["row"][i]: (fields["image_id"][i], fields["encoding"][i], fields["record"][i]) for i in good}
