"""Where a teacher is, in a form that travels: what remote workers get instead of an open connection.

Flow: `open_backend` (serve.py) -> TeacherAddress, as JSON -> another process or machine -> `open_teacher` -> TeacherBackend.
Unit of data: one address.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from distill.config import Section
from teacher_server.backend import CheckedTeacher, TeacherBackend
from teacher_server.settings import EmbeddedDevice, PoolSettings


class TeacherAddress(Section):
    """A running Triton, several running teachers, or a model repository that this process can read: one of the three."""

    model: str
    """Name of the teacher."""
    triton_url: str | None = None
    """host:port of Triton's gRPC endpoint."""
    repository: str | None = None
    """Folder of the model repository, for a teacher inside the asking process."""
    pool: PoolSettings | None = None
    """Several running teachers, asked as one."""
    fingerprint: str | None = None
    """Of a pool: the teacher that is wanted; members with another one are refused. None: that of the first member that answers."""
    request_timeout_s: float = Field(default=30, gt=0)
    """Deadline of one request."""
    max_in_flight: int = Field(default=8, ge=1)
    """Messages to Triton at once, of about 1.2 MB at most. Fewer than its batch keep batches of single images from growing full. A pool has
    a limit of its own for each member."""
    num_threads: int = Field(default=0, ge=0)
    """Threads of an embedded teacher; 0 lets ONNX Runtime decide."""
    device: EmbeddedDevice = "auto"
    """Where an embedded teacher computes."""

    @model_validator(mode="after")
    def _exactly_one_place(self) -> Self:
        if (self.triton_url is not None) + (self.repository is not None) + (self.pool is not None) != 1:
            raise ValueError("give either triton_url or repository or pool")
        if self.pool is not None and not self.pool.urls:
            raise ValueError("a pool names at least one url")
        return self


def open_teacher(address: TeacherAddress) -> TeacherBackend:
    """A teacher for the event loop that will first ask it; the caller closes it.

    Raises:
        StageMissing: the repository holds no such model.
        RequestRefused: the model there is no teacher, or a url of the pool makes no sense.
    """
    if address.pool is not None:
        from teacher_server.pool import PooledTeacher

        members = [(url, _open_url(url, address, address.pool.max_in_flight)) for url in address.pool.urls]
        return PooledTeacher(members, address.pool, fingerprint=address.fingerprint)
    if address.triton_url is not None:
        return _open_url(address.triton_url, address, address.max_in_flight)
    # Imported here, as below: a worker that asks Triton needs no ONNX Runtime, and the other way round.
    from teacher_server.embedded import EmbeddedTeacher

    assert address.repository is not None
    repository = Path(address.repository)
    return EmbeddedTeacher.from_repository(repository, address.model, device=address.device, num_threads=address.num_threads)


def _open_url(url: str, address: TeacherAddress, max_in_flight: int) -> CheckedTeacher:
    if "://" not in url:
        from teacher_server.triton import TritonTeacher

        return TritonTeacher(url, address.model, request_timeout_s=address.request_timeout_s, max_in_flight=max_in_flight)
    from teacher_server.async_client import open_async_client
    from teacher_server.retries import RetryPolicy

    once = RetryPolicy(max_attempts=1)  # a pool asks another one at once
    timeout_s = address.request_timeout_s
    return open_async_client(url, model=address.model, timeout_s=timeout_s, retry=once, max_in_flight=max_in_flight).backend
