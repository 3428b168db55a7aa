"""The manifest: which segments count. A segment that it does not name is the remains of a crash.

In a folder it is `manifest.jsonl`, one line a commit, appended to under a lock. On an object store, where nothing can be appended, it is
one small object a commit, `manifest/view-00003/shard-000012.000007.json`: the eighth commit of that shard in that view. A writer creates
the next number only where nobody has, so two writers can never both be the eighth; the later one looks what the earlier one wrote and
tries again. Both forms are read wherever they lie, so that a store can be copied from one kind of place to the other.

A commit is one segment or, where a compaction makes several, a list of them: they count together or not at all.

Unit of data: one `Segment`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from threading import Lock
from typing import Annotated

from pydantic import Field, TypeAdapter

from student_trainer.store_files import StoreFiles
from student_trainer.store_local_files import MANIFEST_LOG
from student_trainer.store_segments import Segment

logger = logging.getLogger(__name__)

COMMIT: TypeAdapter[Segment | list[Segment]] = TypeAdapter(Segment | Annotated[list[Segment], Field(min_length=1)])

FOLDER = "manifest"
FOLDED = f"{FOLDER}/folded.jsonl"
"""Copies of entries, so that whoever opens the store need not fetch each of them. The entries themselves stay: they are what counts."""
LATE_S = 60.0
"""How long a file is looked for that another machine has named: a network file system may show it seconds after its line."""
LATE_AT_MOST = 1000
"""Files looked for so; of more, the last."""


class Manifest:
    """The segments of one store, as far as they were read. One thread may commit while others read."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._refreshing = Lock()
        self._log_read_to = 0
        self._entries: dict[str, list[Segment]] = {}
        """Entry objects that were read, and what they name; nothing for a damaged one."""
        self._named: dict[str, Segment] = {}
        """file -> the segment, in the order of reading; those that are replaced or gone too."""
        self._units: dict[tuple[int, int], list[Segment]] = defaultdict(list)
        self._gone: set[str] = set()
        self._late: dict[str, float] = {}
        """Files of `_gone` that may still appear, and since when they are missed."""
        self._replaced_by: dict[str, set[str]] = defaultdict(set)

    def live(self) -> list[Segment]:
        """The segments that count."""
        return [segment for segment in list(self._named.values()) if self._counts(segment)]

    def of(self, view: int, shard: int) -> list[Segment]:
        """Those of one image shard in one view."""
        return [segment for segment in self.named_in(view, shard) if self._counts(segment)]

    def named_in(self, view: int, shard: int) -> list[Segment]:
        """All that were ever committed there, also those that are replaced or gone."""
        return list(self._units.get((view, shard), ()))

    def units(self) -> list[tuple[int, int]]:
        """(view, shard) of everything that was ever committed, in order."""
        return sorted(list(self._units))  # noqa: C414 - sorting takes its time, and another thread may add meanwhile

    def gone(self, unit: tuple[int, int] | None = None) -> list[Segment]:
        """Segments that are missing, cut off or in quarantine, and that no other one replaces; all, or those of one (view, shard)."""
        named = list(self._named.values()) if unit is None else self.named_in(*unit)
        return [segment for segment in named if segment.file in self._gone and not self._is_replaced(segment.file)]

    def is_late(self, segment: Segment) -> bool:
        """Whether it is one of `gone` that is still looked for: nothing may be done that it would not survive."""
        since = self._late.get(segment.file)
        return since is not None and time.monotonic() - since < LATE_S

    def replaced(self) -> list[Segment]:
        """Segments whose labels are in another one."""
        return [segment for file, segment in list(self._named.items()) if self._is_replaced(file)]

    def drop(self, segment: Segment) -> None:
        """Count it no more: its file is damaged or gone. What it had replaced counts again, where it is still there."""
        self._gone.add(segment.file)
        self._late.pop(segment.file, None)

    def refresh(self, view: int | None = None) -> list[Segment]:
        """Take in what was committed since, in one view or in all, and return what of it counts.

        A line cut off by a crash is none. One that lacks nothing but its line end counts: the next writer would end it, and its labels,
        asked for again meanwhile, would be there twice. Files that were missing a moment ago are looked for again.
        """
        with self._refreshing:
            read = (*self._new_lines(), *self._new_entries(view))
            unique = {segment.file: segment for segment in reversed(read)}  # an entry that somebody copied counts once
            found = [segment for segment in read if segment is unique[segment.file] and segment.file not in self._named]
            for segment in found:
                self._named[segment.file] = segment
                self._units[segment.view, segment.shard].append(segment)
                for file in segment.replaces:
                    self._replaced_by[file].add(segment.file)
            appeared = self._appeared()
            sizes = self._files.sizes(segment.file for segment in found)
            missing = [segment.file for segment in found if sizes.get(segment.file) != segment.size_bytes]
            self._gone.update(missing)
            self._late |= dict.fromkeys(missing[-LATE_AT_MOST:], time.monotonic()) if self._files.is_local else {}
            for segment in found:
                if segment.file in self._gone and not self._is_replaced(segment.file):
                    # In quarantine since an earlier run, or cut off; counting it would make its rows look labelled.
                    path = f"{self._files.where}/{segment.file}"
                    logger.warning("label segment %s is gone or cut off; its labels are asked for again", path)
            return [segment for segment in (*appeared, *found) if self._counts(segment)]

    def append(self, segments: Sequence[Segment]) -> bool:
        """Name segments of one shard and view, at least one, whose files are in their places, all at once. False: another writer committed
        there first; look at what it wrote (`refresh`) and try again. Call it with the files locked, right after `refresh`."""
        prefix = _stem(segments[0].view, segments[0].shard)
        # Whatever else lies there, such as a copy that somebody made, has no number.
        matches = (
            re.fullmatch(r"([0-9]+)(-[0-9a-f]+)?\.json", name.removeprefix(prefix)) for name in self._entries if name.startswith(prefix)
        )
        numbers = [int(match[1]) for match in matches if match]
        entry = self._files.entry_name(f"{prefix}{max(numbers, default=-1) + 1:06d}.json")
        return self._files.append(entry, COMMIT.dump_json(_unlisted(segments), exclude_defaults=True))

    def fold(self) -> int:
        """Write the copies that make opening fast; returns how many entries they cover."""
        kept = {name: segments for name, segments in self._entries.items() if segments}
        lines = [json.dumps({"entry": n, "segment": COMMIT.dump_python(_unlisted(s), mode="json")}) for n, s in kept.items()]
        if lines:
            self._files.replace(FOLDED, "\n".join(lines).encode())
        return len(lines)

    def _counts(self, segment: Segment) -> bool:
        return segment.file not in self._gone and not self._is_replaced(segment.file)

    def _is_replaced(self, file: str) -> bool:
        return any(by not in self._gone for by in tuple(self._replaced_by.get(file, ())))

    def _appeared(self) -> list[Segment]:
        """Segments that were missing, and are there now."""
        now = time.monotonic()
        late = {file: since for file, since in list(self._late.items()) if now - since < LATE_S and not self._is_replaced(file)}
        self._late = dict(late)  # another thread may `drop` one meanwhile
        sizes = self._files.sizes(late) if late else {}
        found = [self._named[file] for file in late if sizes.get(file) == self._named[file].size_bytes]
        for segment in found:
            logger.warning("label segment %s/%s is there now; its labels count", self._files.where, segment.file)
            self._gone.discard(segment.file)
            self._late.pop(segment.file, None)
        return found

    def _new_lines(self) -> list[Segment]:
        found: list[Segment] = []
        for line in self._files.log_after(self._log_read_to).splitlines(keepends=True):
            segments = segments_of(line)
            if not segments and not line.endswith(b"\n"):
                break
            self._log_read_to += len(line)
            found += segments
            if not segments and line.strip():  # two halves of lines, from a crash in the middle of a write: that was never committed
                path = f"{self._files.where}/{MANIFEST_LOG}"
                logger.warning("a damaged line in %s is passed over; its labels will be asked for again", path)
        return found

    def _new_entries(self, view: int | None) -> list[Segment]:
        names = self._files.names(FOLDER if view is None else f"{FOLDER}/view-{view:05d}")
        before = len(self._entries)
        if FOLDED in names and not self._entries:
            self._unfold()
        new = sorted(name for name in names.keys() - self._entries.keys() if name.endswith(".json"))
        for name, data in self._files.read_many(new).items():
            self._entries[name] = segments_of(data)
            if not self._entries[name]:
                path = f"{self._files.where}/{name}"
                logger.warning("the manifest entry %s is damaged and passed over; its labels will be asked for again", path)
        return [segment for segments in islice(self._entries.values(), before, None) for segment in segments]

    def _unfold(self) -> None:
        copies: dict[str, list[Segment]] = {}
        try:
            for line in self._files.read(FOLDED).splitlines():
                copy = json.loads(line)
                copies[str(copy["entry"])] = _listed(COMMIT.validate_python(copy["segment"]))
        except (ValueError, KeyError, TypeError) as error:
            path, said = f"{self._files.where}/{FOLDED}", str(error).splitlines()[0]
            logger.warning("%s is damaged (%s); the entries themselves are read, and `distill store compact` writes it anew", path, said)
            return
        self._entries.update(copies)


def segments_of(line: bytes) -> list[Segment]:
    """The segments that a line or an entry of the manifest names; none for anything else."""
    try:
        return _listed(COMMIT.validate_json(line))
    except ValueError:
        return []


def _listed(commit: Segment | list[Segment]) -> list[Segment]:
    return commit if isinstance(commit, list) else [commit]


def _unlisted(segments: Sequence[Segment]) -> Segment | list[Segment]:
    """One alone is written as itself, as it always was."""
    return segments[0] if len(segments) == 1 else list(segments)


def _stem(view: int, shard: int) -> str:
    return f"{FOLDER}/view-{view:05d}/shard-{shard:06d}."


def total(segments: Iterable[Segment], field: str) -> int:
    """Sum of one number over segments."""
    return sum(getattr(segment, field) for segment in segments)
