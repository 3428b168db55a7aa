"""Where a teacher is, in a form that travels: what remote workers get instead of an open connection.

Flow: `open_backend` (serve.py) -> TeacherAddress, as JSON -> another process or machine -> `open_teacher` -> TeacherBackend.
Unit of data: one address.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from distill.config import Section
from teacher_server.backend import TeacherBackend


class TeacherAddress(Section):
    """Either a running Triton or a model repository that this process can read; never both."""

    model: str
    """Name of the teacher."""
    triton_url: str | None = None
    """host:port of Triton's gRPC endpoint."""
    repository: str | None = None
    """Folder of the model repository, for a teacher inside the asking process."""
    request_timeout_s: float = Field(default=30, gt=0)
    """Deadline of one request to Triton."""
    max_in_flight: int = Field(default=8, ge=1)
    """Messages to Triton at once, of about 1.2 MB at most. Fewer than its batch keep batches of single images from growing full."""
    num_threads: int = Field(default=0, ge=0)
    """Threads of an embedded teacher; 0 lets ONNX Runtime decide."""

    @model_validator(mode="after")
    def _exactly_one_place(self) -> Self:
        if (self.triton_url is None) == (self.repository is None):
            raise ValueError("give either triton_url or repository")
        return self


def open_teacher(address: TeacherAddress) -> TeacherBackend:
    """A teacher for the event loop that will first ask it; the caller closes it.

    Raises:
        StageMissing: the repository holds no such model.
        RequestRefused: the model there is no teacher.
    """
    # Imported here: a worker that asks Triton needs no ONNX Runtime, and the other way round.
    if address.triton_url is not None:
        from teacher_server.triton import TritonTeacher

        return TritonTeacher(
            address.triton_url, address.model, request_timeout_s=address.request_timeout_s, max_in_flight=address.max_in_flight
        )
    from teacher_server.embedded import EmbeddedTeacher

    assert address.repository is not None
    return EmbeddedTeacher.from_repository(Path(address.repository), address.model, num_threads=address.num_threads)
