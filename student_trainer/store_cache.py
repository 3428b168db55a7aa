"""Segments of an object store, kept on this machine's disk: each is fetched once, whoever reads it here and however often.

A segment never changes and is named by its sha256, so a kept file is right or it is thrown away; several processes share one folder.
Unit of data: the bytes of one segment.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path

LOOK_EVERY = 64
"""Segments kept between two looks at how much the folder holds."""


class SegmentCache:
    """A bounded folder; what was not used for longest goes first.

    Args:
        folder: made when it is first needed. A disk that is full or read-only keeps nothing; the segments are then fetched again.
        max_bytes: soft limit of what it holds.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._until_look = 0

    def get(self, sha256: str) -> bytes | None:
        """The segment, if it is here and whole."""
        path = self._folder / sha256
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def keep(self, sha256: str, data: bytes) -> None:
        """Keep a segment whose sha256 was checked."""
        if len(data) > self._max_bytes:
            return
        pending = self._folder / f".{sha256}.{uuid.uuid4().hex[:8]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            pending.write_bytes(data)
            pending.rename(self._folder / sha256)
        except OSError:
            with suppress(OSError):
                pending.unlink(missing_ok=True)
        self._until_look -= 1
        if self._until_look < 0:
            self._until_look = LOOK_EVERY
            self._shrink()

    def _shrink(self) -> None:
        found = []
        with suppress(OSError):
            for entry in os.scandir(self._folder):
                with suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= self._max_bytes:
                return
            with suppress(OSError):
                os.unlink(path)
            held -= size
