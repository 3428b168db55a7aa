"""Where a store's files lie: a folder, or a prefix of an object store by its fsspec URL, behind one protocol.

Neither can do what the other can. A folder has rename, hard links, appending and locks, and keeps data only after fsync. An object store
has none of these, but a put appears whole and is kept when it returns, and most create a name only where there is none
(`If-None-Match: *`, `ifGenerationMatch=0`; fsspec calls it mode="create").

Unit of data: one file, named by its path below the store, such as `view-00003/shard-000012.1f0c.parquet`. What fails is an `OSError`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs

from distill.checkpoint import fsync_path
from distill.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: several writers of one folder may then keep a label twice, which `distill store compact` mends
    fcntl = None  # type: ignore[assignment]

MANIFEST_LOG = "manifest.jsonl"
FEW_NAMES = 4


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
        """What was appended to MANIFEST_LOG after this many bytes."""
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


class RemoteFiles:
    """A prefix of an object store, or of any other file system that fsspec knows."""

    is_local = False

    def __init__(self, url: str, file_system: Any, root: str) -> None:
        self.where = url
        self._fs = file_system
        self._root = root
        self._can_create: bool | None = None

    def names(self, folder: str) -> dict[str, int]:
        """See StoreFiles."""
        return {name: size for name, size in self._find(folder).items() if not name.rpartition("/")[2].startswith(".")}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """See StoreFiles. A few are asked for one by one, many by listing their folders."""
        wanted = list(names)
        if len(wanted) > FEW_NAMES:
            listed: dict[str, int] = {}
            for folder in {name.rpartition("/")[0] for name in wanted}:
                listed |= self._find(folder)
            return {name: listed[name] for name in wanted if name in listed}
        found = {}
        for name in wanted:
            with suppress(FileNotFoundError), self._errors():
                found[name] = int(self._fs.info(self._path(name), refresh=True)["size"] or 0)
        return found

    def read(self, name: str) -> bytes:
        """See StoreFiles."""
        with self._errors():
            return bytes(self._fs.cat_file(self._path(name)))

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """See StoreFiles."""
        if not names:
            return {}
        with self._errors():
            found = self._fs.cat([self._path(name) for name in names], on_error="return")
            # fsspec gives the bytes alone where one name was asked for.
            contents = found if isinstance(found, dict) else {self._path(names[0]): found}
            whole = {}
            for name in names:
                content = contents[self._path(name)]
                if isinstance(content, FileNotFoundError):
                    continue
                if isinstance(content, BaseException):
                    raise content
                whole[name] = bytes(content)
            return whole

    def put(self, name: str, data: bytes) -> None:
        """See StoreFiles."""
        with self._errors():
            self._fs.pipe_file(self._path(name), data)
        if self.read(name) != data:
            raise OSError(errno.EIO, "what was uploaded reads back as something else", name)

    def create(self, name: str, data: bytes) -> bool:
        """See StoreFiles. Where the file system cannot do it, it looks first: two writers at the same moment may then both succeed."""
        if not self._creates():
            if self.sizes([name]):
                return False
            self.replace(name, data)
            return True
        try:
            with self._errors():
                self._fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        """See StoreFiles."""
        with self._errors():
            self._fs.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        """See StoreFiles."""
        with suppress(FileNotFoundError), self._errors():
            self._fs.rm_file(self._path(name))

    def move(self, name: str, to: str) -> None:
        """See StoreFiles. A copy and a removal: a crash in between leaves both."""
        self.replace(to, self.read(name))
        self.remove(name)

    def log_after(self, offset: int) -> bytes:
        """See StoreFiles. Nobody appends here: there is one only where a folder was copied to the object store."""
        if offset:
            return b""
        try:
            return self.read(MANIFEST_LOG)
        except FileNotFoundError:
            return b""

    def append(self, entry: str, line: bytes) -> bool:
        """See StoreFiles: an object of its own."""
        return self.create(entry, line)

    def entry_name(self, stem: str) -> str:
        """See StoreFiles. Without conditional writes, two writers that take the same number must not overwrite each other."""
        base, dot, ending = stem.rpartition(".")
        return stem if self._creates() else f"{base}-{uuid.uuid4().hex[:8]}{dot}{ending}"

    def locked(self) -> AbstractContextManager[None]:
        """See StoreFiles: no lock."""
        return nullcontext()

    def _creates(self) -> bool:
        """Whether mode="create" refuses a name that is taken: tried once, because some stores ignore the condition."""
        if self._can_create is None:
            probe = self._path(f"probe/{uuid.uuid4().hex}")
            with self._errors():
                self._fs.pipe_file(probe, b"?")
                try:
                    self._fs.pipe_file(probe, b"?", mode="create")
                    self._can_create = False
                except FileExistsError:
                    self._can_create = True
                except (NotImplementedError, TypeError, ValueError):
                    self._can_create = False
                self._fs.rm_file(probe)
        return self._can_create

    def _find(self, folder: str) -> dict[str, int]:
        path = self._path(folder) if folder else self._root
        with self._errors():
            self._fs.invalidate_cache(path)
            try:
                found = self._fs.find(path, detail=True)
            except FileNotFoundError:
                return {}
        below = len(self._fs._strip_protocol(self._root)) + 1
        return {self._fs._strip_protocol(name)[below:]: int(info.get("size") or 0) for name, info in found.items()}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Each file system has errors of its own (no credentials, no route, a refused request); here they become `OSError`."""
        try:
            yield
        except OSError:
            raise
        except (NotImplementedError, TypeError, ValueError):
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())}", self.where) from error
