"""A label store's files on an object store, by its fsspec file system: a put appears whole and is kept when it returns; most stores create
a name only where there is none.

Unit of data: one file. What each method promises stands in `StoreFiles` (store_files.py).
"""

from __future__ import annotations

import errno
import math
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from student_trainer.store_local_files import MANIFEST_LOG

FEW_NAMES = 4


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

    def age_s(self, name: str) -> float:
        """See StoreFiles: a put appears whole."""
        return math.inf

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
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())}", self.where) from error
