"""Which trace the present work belongs to, for whoever sends a message on: the gateway sets it (tracing.py), the Triton client sends it.

Apart from tracing.py, because a client needs neither OpenTelemetry nor a web framework. Unit of data: the headers of one message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CARRIER: ContextVar[dict[str, str] | None] = ContextVar("trace_carrier", default=None)


def trace_arguments() -> dict[str, dict[str, str]]:
    """Arguments of a client's call: the `headers` (`traceparent`) by which its spans belong to the present one; none without tracing."""
    headers = _CARRIER.get()
    return {} if headers is None else {"headers": headers}


@contextmanager
def carrying(headers: dict[str, str]) -> Iterator[None]:
    """Messages that are sent inside the block, by it or by tasks that it starts, carry these headers."""
    token = _CARRIER.set(headers)
    try:
        yield
    finally:
        _CARRIER.reset(token)
