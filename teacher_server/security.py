"""Around every answer: the key is asked for before anything else, headers that browsers obey, and no exception that reaches a log whole.

Unit of data: one HTTP exchange. Plain ASGI, because Starlette's BaseHTTPMiddleware hides a client's disconnect.
"""

from __future__ import annotations

import ipaddress
import logging
import traceback
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_server.access import Access
from teacher_server.metrics import GatewayMetrics
from teacher_server.problems import Problem
from teacher_server.settings import ServerSettings

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of HTML: nothing from anywhere else, no inline script."""

DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Content-Security-Policy of everything else: should a browser show it after all, it may do nothing."""

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_POLICY_NAME = b"content-security-policy"

_KEY_PATHS = ("/v1/", "/metrics")
"""Behind a key: all that costs something or tells something. The health endpoints, the page and the OpenAPI document are not."""

logger = logging.getLogger(__name__)


class GuardedAnswers:
    """The outermost layer: security headers on every answer, and one that tells nothing for an exception nobody foresaw.

    It also hangs up on bodies without an end that nobody has read: the web server would go on receiving them.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one exchange on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        unread = self._has_no_end(scope)

        async def noticed() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _add_headers(message)
                if unread and b"connection" not in dict(message["headers"]):
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, noticed if unread else receive, guarded)
        except Exception as error:  # noqa: BLE001 - the last resort, said in the log
            logger.error("%s %s failed: %s", scope["method"], _route(scope), without_values(error))
            problem = Problem(500, "internal", "the gateway failed; its log says why")
            self._metrics.refused(problem.code, scope["tenant"].name if "tenant" in scope else None)
            if not started:
                await problem.answer()(scope, receive, guarded)

    def _has_no_end(self, scope: Scope) -> bool:
        """Whether a body may be longer than any that is taken. A shorter one is received, so that its sender gets to read the answer."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        return b"transfer-encoding" in headers or not length.isdigit() or int(length[:19]) > self._max_body_bytes


class RequireKey:
    """Requests below `/v1/`, and for the metrics, need a key; whose it is stands in `scope["tenant"]`, a TenantUsage, from here on."""

    def __init__(self, app: ASGIApp, access: Access, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one exchange on, or answer 401."""
        if scope["type"] == "http" and needs_key(scope["path"]):
            try:
                scope["tenant"] = self._access.tenant(Headers(scope=scope))
            except Problem as problem:
                self._metrics.refused(problem.code)
                await problem.answer()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequireOwnHost:
    """Only requests to one of our own names, and from no other site's page: a name of a stranger's that leads to this machine (DNS
    rebinding), or a form on a page of his, would make a browser here ask for him."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one exchange on, or answer 403."""
        problem = self._problem(Headers(scope=scope)) if scope["type"] == "http" else None
        if problem is not None:
            self._metrics.refused(problem.code)
            await problem.answer()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> Problem | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            message = f"this gateway asks for no key, so it answers only to localhost and its own address, not to Host {host[:100]!r}"
            return Problem(403, "foreign_host", message + "; for other names use API keys (server.auth=keys)")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            message = f"this gateway asks for no key, so it answers only to its own pages, not to those of {origin[:100]!r}"
            return Problem(403, "foreign_origin", message)
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts or _is_loopback(name)


def own_hosts(settings: ServerSettings) -> frozenset[str] | None:
    """The names for `RequireOwnHost` besides loopback addresses; None, so any, where keys are asked for or other machines may ask."""
    if settings.auth == "keys" or not (settings.host == "localhost" or _is_loopback(settings.host)):
        return None
    return frozenset({"localhost", settings.host})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def needs_key(path: str) -> bool:
    """Whether whoever asks for this path has to show a key, where keys are asked for at all."""
    return path.startswith(_KEY_PATHS)


def guard(app: FastAPI, access: Access, metrics: GatewayMetrics, hosts: frozenset[str] | None = None) -> None:
    """Ask for keys, and for one of `hosts` if there are any. What is added later, such as the counting, sees the refusals too; what was
    added before, such as the tracing, does not."""
    app.add_middleware(RequireKey, access=access, metrics=metrics)
    if hosts is not None:
        app.add_middleware(RequireOwnHost, hosts=hosts, metrics=metrics)


def seal(app: FastAPI, max_body_bytes: int, metrics: GatewayMetrics) -> None:
    """Security headers and the last resort. Added last, so that it is outermost."""
    app.add_middleware(GuardedAnswers, max_body_bytes=max_body_bytes, metrics=metrics)


def without_values(error: BaseException) -> str:
    """Type and place of an exception and of those behind it. Their messages may quote what a client sent, so they are left out."""
    parts = []
    seen: BaseException | None = error
    while seen is not None:
        frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(seen.__traceback__)]
        parts.append(f"{type(seen).__name__} at {' > '.join(frames)}")
        if isinstance(seen, BaseExceptionGroup):
            parts.extend(without_values(inner) for inner in seen.exceptions)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "; from ".join(parts)


def _add_headers(message: Message) -> None:
    """Those that the answer does not set itself; on the raw list, because this happens to every answer."""
    headers = message["headers"] = list(message.get("headers", ()))
    present = dict(headers)
    headers.extend(pair for pair in _HEADERS if pair[0] not in present)
    if _POLICY_NAME not in present:
        policy = PAGE_POLICY if present.get(b"content-type", b"").startswith(b"text/html") else DATA_POLICY
        headers.append((_POLICY_NAME, policy.encode()))


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "other")
