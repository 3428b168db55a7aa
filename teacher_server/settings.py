"""Settings of the teacher server: which back end runs the teacher, and the REST gateway before it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill.config import Section


class TritonSettings(Section):
    """How Triton is found, started and asked."""

    url: str | None = None
    """host:port of the gRPC endpoint of a running Triton. Without it, one is started here."""
    home: str | None = None
    """Folder with the Triton server, made by `distill install-triton`. Default: $DISTILL_TRITON_HOME, else `.triton`."""
    start_timeout_s: float = Field(default=120, gt=0)
    """How long a started server may take until a label comes out."""
    request_timeout_s: float = Field(default=30, gt=0)
    """Deadline of one request."""


class ServerSettings(Section):
    """The served teacher and its REST gateway."""

    backend: Literal["auto", "triton", "embedded"] = "auto"
    """`triton` (the real server), `embedded` (ONNX Runtime in this process), or `auto`: Triton where it can run, said aloud if not."""
    embedded_threads: int = Field(default=0, ge=0)
    """Threads of an embedded teacher; 0 lets ONNX Runtime decide. (Triton's are teacher.repository.intra_op_threads.)"""
    triton: TritonSettings = TritonSettings()
    """How Triton is found, started and asked."""
    host: str = "127.0.0.1"
    """Address that the gateway listens on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port of the gateway; 0 takes a free one."""
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    """Largest request body, in bytes; over it the answer is 413."""
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    """Largest image, in pixels after decoding; over it the answer is 422."""
    max_batch: int = Field(default=1024, ge=1)
    """Most crops in one request."""
