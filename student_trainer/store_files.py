"""Where a store's files lie: a folder, or a prefix of an object store by its fsspec URL, behind one protocol.

Neither can do what the other can. A folder has rename, hard links, appending and locks, and keeps data only after fsync. An object store
has none of these, but a put appears whole and is kept when it returns, and most create a name only where there is none
(`If-None-Match: *`, `ifGenerationMatch=0`; fsspec calls it mode="create").

Unit of data: one file, named by its path below the store, such as `view-00003/shard-000012.1f0c.parquet`. What fails is an `OSError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from fsspec.core import url_to_fs

from distill.errors import StoreError
from student_trainer.store_local_files import LocalFiles
from student_trainer.store_remote_files import RemoteFiles


class StoreFiles(Protocol):
    """The files of one store."""

    where: str
    """The folder or URL, as the user knows it."""
    is_local: bool

    def names(self, folder: str) -> dict[str, int]:
        """Name -> size in bytes of every file below a folder; none where there is no such folder."""
        ...

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Name -> size in bytes of those that exist."""
        ...

    def age_s(self, name: str) -> float:
        """Seconds since a file that is there was written, where that matters; infinite where a file appears whole or not at all."""
        ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        ...

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """Those that exist, fetched together where that is faster."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """A new file. When this returns it survives a crash, and its bytes were read back and compared."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """A new file, whole, unless there is one of this name already: then nothing changes and the answer is False."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """A small file in place of the one there, if any. A reader sees the old one or the new one."""
        ...

    def remove(self, name: str) -> None:
        """Take a file away; none there is no error."""
        ...

    def move(self, name: str, to: str) -> None:
        """Raises FileNotFoundError where there is no such file."""
        ...

    def log_after(self, offset: int) -> bytes:
        """What was appended to the manifest's log after this many bytes."""
        ...

    def append(self, entry: str, line: bytes) -> bool:
        """Keep a line of the manifest; False if another writer took the name `entry` first. It survives a crash when this returns."""
        ...

    def entry_name(self, stem: str) -> str:
        """The name under which an entry is kept. Where names cannot be claimed it has something of its own behind the stem."""
        ...

    def locked(self) -> AbstractContextManager[None]:
        """One writer at a time, where the place can do that; elsewhere `append` tells who was first."""
        ...


def open_files(where: Path | str) -> StoreFiles:
    """The files at a path or URL.

    Raises:
        StoreError: a kind of URL that is unknown, or whose library is not installed.
    """
    text = str(where)
    if "://" not in text or text.startswith(("file://", "local://")):
        return LocalFiles(Path(text.partition("://")[2] or text))
    try:
        # A kept listing would hide what others committed.
        file_system, root = url_to_fs(text, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise StoreError(f"the label store {text} cannot be used: {' '.join(str(error).split())}") from error
    return RemoteFiles(text, file_system, root.rstrip("/"))
