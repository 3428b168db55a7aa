"""An answer that gives back what its request holds (memory, a place among its tenant's requests) when it has been sent.

Flow: gateway.py -> `HeldResponse` -> pieces, each of which waits until the client has taken most of those before -> `release`.
Unit of data: one answer. A server that is handed 10 MB at once calls them sent and keeps them for as long as the client likes.
"""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import Response
from starlette.types import Receive, Scope, Send

_PIECE = 64 * 2**10


class HeldResponse(Response):
    """Owns `release`, which is closed in the end, whatever happens."""

    release: ExitStack | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            body = memoryview(self.body)
            for start in range(0, max(1, len(body)), _PIECE):
                piece, more = bytes(body[start : start + _PIECE]), start + _PIECE < len(body)
                await send({"type": "http.response.body", "body": piece, "more_body": more})
        finally:
            if self.release is not None:
                self.release.close()
