"""The page at `/`, where a person tries an image on the teacher: a fixed list of files, read once, and the headers that browsers obey.

Flow: browser -> `/` and `/static/NAME` -> files of teacher_server/static -> the page asks `/v1/...` like any other client.
Unit of data: one file. A request names a key of the list, never a path, so nothing else of the disk can be reached.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from teacher_server.security import PAGE_POLICY

FOLDER = Path(__file__).with_name("static")

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

FILES = (
    "index.html",
    "style.css",
    "icon.svg",
    "app.js",
    "bars.js",
    "clipboard.js",
    "distribution.js",
    "gateway.js",
    "key.js",
    "live.js",
    "model.js",
    "poll.js",
    "readiness.js",
    "result.js",
    "results.js",
    "sparkline.js",
    "temperature.js",
)
"""Everything that is served, and in the wheel."""

_HEADERS = {
    # On a 304, too: a browser keeps the headers of the latest answer, so another policy there would break the page at its second visit.
    "Content-Security-Policy": PAGE_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    # Kept by the browser, but asked for each time: after an upgrade no file of the old version meets one of the new.
    "Cache-Control": "no-cache",
}
"""What a file of the page has beyond what teacher_server/security.py puts on every answer."""


@dataclass(frozen=True)
class PageFile:
    """One file, ready to be sent."""

    body: bytes
    headers: dict[str, str]

    @classmethod
    def read(cls, name: str) -> PageFile:
        """The file `name` of the list. Raises OSError if the installation lacks it."""
        body = (FOLDER / name).read_bytes()
        headers = {
            "Content-Type": _MEDIA_TYPES[Path(name).suffix],
            "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
            **_HEADERS,
        }
        return cls(body, headers)

    def answer(self, request: Request) -> Response:
        """200 with the file, or 304 if the browser has this very version."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.headers["ETag"] in known or known == ["*"]:
            return Response(status_code=304, headers={name: value for name, value in self.headers.items() if name != "Content-Type"})
        return Response(self.body, headers=self.headers)


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files below `/static/`. Raises OSError if the installation lacks one of them."""
    files = {name: PageFile.read(name) for name in FILES}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return files["index.html"].answer(request)

    @app.api_route("/static/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        return files[name].answer(request)
