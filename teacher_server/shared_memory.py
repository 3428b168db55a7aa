"""Memory that this process and a server on the same host both see: regions of /dev/shm, lent to one request at a time.

Flow: a request borrows a region -> writes its tensors -> the server reads them and writes the answer beside them -> the answer is copied
out -> the region goes back. Unit of data: one region.

Who cleans up, whatever happens:
  - a request that failed or was cancelled does not give its region back, because the server may still write into it: the file goes at
    once, the server is asked to let go of it as soon as it is out of use;
  - `close()`, or else the end of the interpreter, removes the files;
  - when this process is killed, Python's own resource tracker (a process beside it) removes them, and says so on standard error;
  - when that is killed too, or the server was not told, the next client on this host does it: a file whose owner is gone has no lock on it
    (`remove_orphans`), a region of a server whose file is gone has no owner (`RegionPool`).
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import logging
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.errors import DistillError, RequestRefused

N = TypeVar("N", bound=np.generic)

PREFIX = "distill_client_"
SHM_DIR = Path("/dev/shm")
_SMALLEST_BYTES = 64 * 1024
_CLOSE_TIMEOUT_S = 2.0
_FIRST_WAIT_S = 0.005
_LONGEST_WAIT_S = 1.0
_MOST_TRIES = 60
"""A server that works on a request for longer keeps its mapping of the region, until the next client starts."""

logger = logging.getLogger(__name__)


class Region:
    """One file in /dev/shm, mapped here. Its lock tells other processes that it has an owner."""

    def __init__(self, size_bytes: int) -> None:
        """Raises RequestRefused when /dev/shm has no room."""
        self.name = f"{PREFIX}{os.getpid()}_{uuid.uuid4().hex}"
        self.size_bytes = size_bytes
        self._memory: SharedMemory | None = SharedMemory(self.name, create=True, size=size_bytes)
        try:
            self._lock = (SHM_DIR / self.name).open("r+b", buffering=0)
        except OSError:
            self._remove()
            raise
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its pages now: where they are missing later, the process that writes gets SIGBUS instead of an error.
            os.posix_fallocate(self._lock.fileno(), 0, size_bytes)
        except OSError as error:
            self.close()
            raise RequestRefused(
                f"{SHM_DIR} has no room for {size_bytes} bytes ({error.strerror}): make it larger (docker: --shm-size), "
                "ask for fewer images at once, or use grpc:// instead of grpc+shm://"
            ) from error

    def write(self, offset: int, tensor: NDArray[Any]) -> None:
        """Copy a tensor to `offset`."""
        np.copyto(self._view(offset, tensor.shape, tensor.dtype), tensor)

    def read(self, offset: int, shape: tuple[int, ...], dtype: type[N]) -> NDArray[N]:
        """A copy of the tensor at `offset`."""
        return self._view(offset, shape, np.dtype(dtype)).copy()

    def _view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        assert self._memory is not None, "a region in use was closed"
        return np.ndarray(shape, dtype, buffer=self._memory.buf, offset=offset)

    def close(self) -> None:
        """Remove the file and the mapping of this process. A server that has mapped it keeps its own. Calling it twice does no harm."""
        self._remove()
        self._lock.close()

    def _remove(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            with suppress(FileNotFoundError):
                memory.unlink()
            memory.close()


class RegionServer(Protocol):
    """The three questions to a server that maps regions. All raise DistillError."""

    async def register(self, name: str, size_bytes: int) -> None:
        """Map the file `name` of /dev/shm, under the same name."""
        ...

    async def unregister(self, name: str) -> bool:
        """Let go of it; False while a request still uses it. A name that it does not know is let go of already."""
        ...

    async def registered(self) -> list[str]:
        """Names of all regions."""
        ...


class RegionPool:
    """Regions of one client, registered with one server, made when they are needed and used again. Belongs to one event loop."""

    def __init__(self, server: RegionServer) -> None:
        self._server = server
        self._regions: set[Region] = set()
        self._free: list[Region] = []
        self._farewells: set[asyncio.Task[None]] = set()
        self._owner = os.getpid()
        self._swept = False
        atexit.register(self._remove_files)

    @asynccontextmanager
    async def lend(self, size_bytes: int) -> AsyncIterator[Region]:
        """A registered region of at least this size, for the length of the block; whatever ends the block early takes it out of use."""
        region = await self._take(size_bytes)
        try:
            yield region
        except BaseException:
            self._discard(region)
            raise
        self._free.append(region)

    def start_anew(self) -> None:
        """The server has forgotten its regions (it is another one): use none of the present ones again."""
        while self._free:
            self._discard(self._free.pop())

    async def close(self) -> None:
        """Remove all files, and have the server let go of its mappings; not longer than two seconds."""
        atexit.unregister(self._remove_files)
        for region in list(self._regions):
            self._discard(region)
        self._free.clear()
        if self._farewells:
            _, late = await asyncio.wait(self._farewells, timeout=_CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _take(self, size_bytes: int) -> Region:
        fitting = [region for region in self._free if region.size_bytes >= size_bytes]
        if fitting:
            region = min(fitting, key=lambda region: region.size_bytes)
            self._free.remove(region)
            return region
        if self._free:  # a larger one takes the place of a smaller one: there are never more than requests at once
            self._discard(self._free.pop(0))
        first, self._swept = not self._swept, True
        if first:
            remove_orphans()
        region = Region(max(_SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length()))
        self._regions.add(region)
        try:
            await self._server.register(region.name, region.size_bytes)
            if first:
                await self._unregister_orphans()
        except BaseException:  # cancelled in the middle: the server may have it
            self._discard(region)
            raise
        return region

    async def _unregister_orphans(self) -> None:
        """Regions that dead clients left with the server. It has just mapped a file of ours, so its /dev/shm is ours, too."""
        with suppress(DistillError):
            for name in await self._server.registered():
                if name.startswith(PREFIX) and not (SHM_DIR / name).exists():
                    logger.info("the server lets go of %s, whose owner is gone", name)
                    await self._server.unregister(name)

    def _discard(self, region: Region) -> None:
        self._regions.discard(region)
        region.close()
        task = asyncio.get_running_loop().create_task(self._say_farewell(region.name))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _say_farewell(self, name: str) -> None:
        wait_s = _FIRST_WAIT_S
        for _ in range(_MOST_TRIES):
            try:
                if await self._server.unregister(name):
                    return
            except DistillError as error:
                logger.debug("%s stays with the server until it ends or the next client comes: %s", name, error)
                return
            await asyncio.sleep(wait_s)
            wait_s = min(_LONGEST_WAIT_S, wait_s * 2)

    def _remove_files(self) -> None:
        if os.getpid() == self._owner:  # a forked child inherits the list, not the regions
            for region in self._regions:
                region.close()


def remove_orphans() -> None:
    """Remove the files of clients that were killed together with their resource tracker."""
    for path in SHM_DIR.glob(f"{PREFIX}*"):
        with suppress(OSError):  # gone meanwhile, another user's, or locked: its owner lives
            if _alive(path.name.removeprefix(PREFIX).partition("_")[0]):
                continue
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                logger.info("removed %s, whose owner is gone", path)


def _alive(pid: str) -> bool:
    """Whether such a process exists here. In another container it may all the same: the lock decides."""
    return Path(f"/proc/{pid}").exists()
