"""Where the running `distill serve` of a run is to be found by other commands: `serving.json` in the run folder.

Flow: `distill serve` writes it when a label has come out and takes it away when it stops; `distill repository activate` and `distill tune`
read it. Unit of data: one service. A file whose process is gone, as after kill -9, counts as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from distill.config import Section

if TYPE_CHECKING:
    from teacher_server.serve import ServedTeacher

RECORD = "serving.json"


class ServingRecord(Section):
    """A service that runs on this machine."""

    pid: int = Field(ge=1)
    """Process id of `distill serve`."""
    process_start: str | None = None
    """When the kernel started that process, in its own units; tells it from a later process with the same id."""
    model: str
    """Name of the teacher."""
    repository: str
    """Folder of the model repository, absolute."""
    triton_url: str | None = None
    """host:port of the gRPC endpoint of the Triton that the service started itself."""
    gateway_url: str
    """Base URL of the REST gateway."""


@contextmanager
def announced(run_dir: Path, record: ServingRecord) -> Iterator[None]:
    """Write the record for as long as the block lasts."""
    path = run_dir / RECORD
    pending = path.with_name(f".{RECORD}.{os.getpid()}.pending")
    pending.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    pending.replace(path)
    try:
        yield
    finally:
        kept = read_record(run_dir)
        if kept is not None and kept.pid == os.getpid():  # else a second service of the run has written its own
            path.unlink(missing_ok=True)


def this_service(served: ServedTeacher, repository: Path, gateway_url: str) -> ServingRecord:
    """The record of a service in this process."""
    pid = os.getpid()
    started_here = served.log_path is not None  # a Triton elsewhere may read another repository
    return ServingRecord(
        pid=pid,
        process_start=_process_start(pid),
        model=served.address.model,
        repository=str(repository.absolute()),
        triton_url=served.triton_url if started_here else None,
        gateway_url=gateway_url,
    )


def running_service(repository: Path) -> ServingRecord | None:
    """The service that runs on this model repository, which lies in the run folder; None where none does."""
    record = read_record(repository.absolute().parent)
    if record is None or Path(record.repository) != repository.absolute():
        return None
    return record if _runs(record) else None


def read_record(run_dir: Path) -> ServingRecord | None:
    """What the file says, whether its process still runs or not; None without a readable one."""
    try:
        return ServingRecord.model_validate(json.loads((run_dir / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def _runs(record: ServingRecord) -> bool:
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process
    return record.process_start is None or record.process_start == _process_start(record.pid)


def _process_start(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat; None where there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
