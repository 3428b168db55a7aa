"""Who labels what: claims on (view, shard) units, so that several labelling jobs on one store share the work instead of doing it twice.

    claims/view-00003/shard-000012.000000.json      owner, its machine and process, and a beat that goes up while it lives

A claim is a file that only one can create. Its owner rewrites it every few seconds; a claim that has not changed for `lease_s`, by the
watcher's own clock (no two machines need agree on the time), or whose process is known to be dead on this machine, is over, and whoever
creates the next number has taken it over. An owner that was only frozen leaves alone, when it wakes up, what is its own no more. Claims
save the teacher's time; that no label is kept twice is the manifest's doing.

Unit of data: one (view, shard).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from distill.config import Section
from distill.errors import StoreError
from student_trainer.store_files import StoreFiles

logger = logging.getLogger(__name__)

LEASE_S = 60.0
BEATS_A_LEASE = 6
FOLDER = "claims"


class Claim(Section):
    """What a claim says."""

    owner: str
    """Of this claimant alone."""
    machine: str
    """Host name and boot, so that the process number below is looked for where it means something."""
    process: int
    """Process number."""
    beat: int = 0
    """Goes up while the owner lives."""


class Claims:
    """The claims of one worker. Use as a context manager: leaving it gives them back.

    Args:
        lease_s: a claim that has not changed for so long is over. Every claimant of a store should have the same.
        over: what another claimant knows to be over (its `over`), so that it need not be watched anew.
    """

    def __init__(self, files: StoreFiles, lease_s: float = LEASE_S, over: Mapping[str, bytes] | None = None) -> None:
        self._files = files
        self._lease_s = lease_s
        self._own = Claim(owner=uuid.uuid4().hex, machine=_machine(), process=os.getpid())
        self._held: dict[tuple[int, int], str] = {}
        self._watched: dict[str, tuple[bytes, float]] = {}
        """Others' claims: what they said, and since when they say it."""
        self.over = dict(over or {})
        """Others' claims that were found over, and what they said; one that says something else by now is not."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._beater: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give all claims back."""
        self._closed.set()
        if self._beater is not None:
            self._beater.join()
        for unit in list(self._held):
            self.release(*unit)

    def take(self, view: int, shard: int) -> bool:
        """Claim a unit; False while another's claim stands. What was committed meanwhile must be looked at afterwards, not before.

        Raises:
            OSError: the store cannot be written.
        """
        name = self._next_name(view, shard)
        if name is None or not self._files.create(name, self._said(0)):
            return False
        with self._lock:
            self._held[view, shard] = name
        self._start_beating()
        return True

    def is_free(self, view: int, shard: int) -> bool:
        """Whether nobody's claim stands; the answer may be old when it comes.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            return self._next_name(view, shard) is not None
        except OSError as error:
            raise StoreError(f"the claims in {self._files.where} cannot be read: {error.strerror or error}") from error

    def release(self, view: int, shard: int) -> None:
        """Give a unit back, after what it brought is committed. A claim that cannot be taken away runs out by itself, which is said."""
        with self._lock:
            name = self._held.pop((view, shard), None)
        try:
            if name is None or not self._is_ours(name):
                return
            # The older ones first: while they stood alone they would look like claims that are over, of a unit that nobody has done.
            for older in sorted(self._names(view, shard)):
                if older <= name:
                    self._files.remove(older)
        except OSError as error:
            logger.warning("the claim %s could not be given back (%s); it is over in %g s", name, error, self._lease_s)

    def _next_name(self, view: int, shard: int) -> str | None:
        names = self._names(view, shard)
        if not names:
            return _name(view, shard, 0)
        latest = max(names)
        try:
            said = self._files.read(latest)
        except FileNotFoundError:  # given back in between
            return _name(view, shard, 0)
        return _name(view, shard, _number(latest) + 1) if self._is_over(latest, said) else None

    def _is_over(self, name: str, said: bytes) -> bool:
        if self.over.get(name) != said:
            if not self._is_found_over(name, said):
                return False
            self.over[name] = said
        return True

    def _is_found_over(self, name: str, said: bytes) -> bool:
        try:
            claim = Claim.model_validate_json(said)
        except ValueError:
            claim = None
        if claim is not None and claim.machine == self._own.machine and not _is_alive(claim.process):
            logger.info("claim %s: its process %d is dead; it is taken over", name, claim.process)
            return True
        before, since = self._watched.get(name, (None, 0.0))
        if before != said:
            self._watched[name] = (said, time.monotonic())
            return False
        return time.monotonic() - since > self._lease_s

    def _names(self, view: int, shard: int) -> list[str]:
        prefix = _name(view, shard, 0).rpartition("/")[2].split(".")[0] + "."
        return [name for name in self._files.names(f"{FOLDER}/view-{view:05d}") if name.rpartition("/")[2].startswith(prefix)]

    def _is_ours(self, name: str) -> bool:
        """Whether the claim of this name is still ours. Numbers begin at 0 again where all claims of a unit were given back."""
        try:
            return self._own.owner.encode() in self._files.read(name)
        except FileNotFoundError:
            return False

    def _said(self, beat: int) -> bytes:
        return self._own.replace(beat=beat).model_dump_json().encode()

    def _start_beating(self) -> None:
        if self._beater is None:
            self._beater = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._beater.start()

    def _beat(self) -> None:
        beat = 0
        while not self._closed.wait(self._lease_s / BEATS_A_LEASE):
            beat += 1
            with self._lock:
                for unit, name in list(self._held.items()):
                    try:
                        if self._is_ours(name):
                            self._files.replace(name, self._said(beat))
                        else:
                            del self._held[unit]
                            logger.warning("the claim %s was taken over: this process gave no sign of life for %g s", name, self._lease_s)
                    except OSError as error:  # the next beat may get through; if none does, the claim runs out and another does the work
                        logger.warning("the claim %s could not be renewed: %s", name, error)


def _name(view: int, shard: int, number: int) -> str:
    return f"{FOLDER}/view-{view:05d}/shard-{shard:06d}.{number:06d}.json"


def _number(name: str) -> int:
    return int(name.split(".")[-2])


def _machine() -> str:
    """This machine since its start and, in a container, this container: where our process numbers mean something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # there, asking would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
