"""A label store's files in a folder: rename, hard links, an appended log under a lock; data is kept only after fsync.

Unit of data: one file. What each method promises stands in `StoreFiles` (store_files.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.checkpoint import fsync_path

try:
    import fcntl
except ImportError:  # Windows: several writers of one folder may then keep a label twice, which `distill store compact` mends
    fcntl = None  # type: ignore[assignment]

MANIFEST_LOG = "manifest.jsonl"


class LocalFiles:
    """A folder."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)

    def names(self, folder: str) -> dict[str, int]:
        """See StoreFiles. Pending files, whose names begin with a dot, are none."""
        found: dict[str, int] = {}
        for path, _, files in os.walk(self.folder / folder):
            for name in files:
                if not name.startswith("."):
                    with suppress(FileNotFoundError):
                        found[(Path(path) / name).relative_to(self.folder).as_posix()] = (Path(path) / name).stat().st_size
        return found

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """See StoreFiles."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                found[name] = (self.folder / name).stat().st_size
        return found

    def age_s(self, name: str) -> float:
        """See StoreFiles."""
        return time.time() - (self.folder / name).stat().st_mtime

    def read(self, name: str) -> bytes:
        """See StoreFiles."""
        return (self.folder / name).read_bytes()

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """See StoreFiles."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def put(self, name: str, data: bytes) -> None:
        """See StoreFiles: pending file, flush, comparison, rename, flush of the folder."""
        path = self.folder / name
        pending = self._pending(path, data)
        try:
            if hashlib.sha256(pending.read_bytes()).digest() != hashlib.sha256(data).digest():
                raise OSError(errno.EIO, "what was written reads back as something else", str(path))
            pending.rename(path)
        except OSError:
            pending.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)

    def create(self, name: str, data: bytes) -> bool:
        """See StoreFiles. A hard link appears with all its bytes, or fails where the name is taken."""
        path = self.folder / name
        pending = self._pending(path, data)
        try:
            os.link(pending, path)
        except FileExistsError:
            return False
        finally:
            pending.unlink(missing_ok=True)
        fsync_path(path.parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """See StoreFiles. Not flushed: what is replaced (a claim) means nothing after a crash of the machine."""
        path = self.folder / name
        pending = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.pending")
        try:
            pending.write_bytes(data)
            pending.rename(path)
        except OSError:
            with suppress(OSError):
                pending.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """See StoreFiles."""
        (self.folder / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        """See StoreFiles."""
        self._folder_for(self.folder / to)
        (self.folder / name).rename(self.folder / to)

    def log_after(self, offset: int) -> bytes:
        """See StoreFiles."""
        try:
            with (self.folder / MANIFEST_LOG).open("rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return b""

    def append(self, entry: str, line: bytes) -> bool:
        """See StoreFiles: one line more in MANIFEST_LOG; always True."""
        path = self.folder / MANIFEST_LOG
        # One write to a file opened for appending is not mixed with another process's. The leading newline ends a line cut off by a crash.
        text = b"\n" + line + b"\n"
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
        return True

    def entry_name(self, stem: str) -> str:
        """See StoreFiles."""
        return stem

    @contextmanager
    def locked(self) -> Iterator[None]:
        """See StoreFiles. The lock ends with the process that holds it, however that ends."""
        if fcntl is None:
            yield
            return
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _pending(self, path: Path, data: bytes) -> Path:
        self._folder_for(path)
        pending = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.pending")
        try:
            with pending.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            pending.unlink(missing_ok=True)
            raise
        return pending

    def _folder_for(self, path: Path) -> None:
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            fsync_path(folder.parent)
