"""Every failure leaves the gateway as the same body; problems.py says with which status.

Unit of data: one failed request.
"""

from __future__ import annotations

import logging
import math
import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from distill.errors import DistillError
from teacher_server.fair_queue import QueueFull
from teacher_server.metrics import GatewayMetrics
from teacher_server.problems import Problem, problem_of

_CODES = {404: "not_found", 405: "method_not_allowed"}
_SAME_LINE_S = 10.0

logger = logging.getLogger(__name__)


def answer_failures(app: FastAPI, metrics: GatewayMetrics) -> None:
    """Turn exceptions into answers, and count them. What is not listed here ends in security.py, with 500."""

    last_said: dict[str, float] = {}

    def log(line: str) -> None:
        now = time.monotonic()
        if now - last_said.get(line, -math.inf) >= _SAME_LINE_S:
            last_said.clear()  # one entry: a teacher that is away says the same to everybody
            last_said[line] = now
            logger.warning("%s", line)

    def answer(request: Request, problem: Problem) -> JSONResponse:
        tenant = request.scope.get("tenant")
        metrics.refused(problem.code, tenant.name if tenant else None)
        return problem.answer()

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(DistillError)
    async def ours(request: Request, error: DistillError) -> JSONResponse:
        failed = problem_of(error)
        if failed.status >= 500:
            log(f"{failed.status} {failed.code}: {error}")
        return answer(request, failed)

    @app.exception_handler(QueueFull)
    async def queue_full(request: Request, error: QueueFull) -> JSONResponse:
        return answer(request, Problem(429, "queue_full", str(error), retry_after_s=error.retry_after_s))

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return answer(request, Problem(422, "bad_query", f"{where[:200]}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "http")
        answered = answer(request, Problem(error.status_code, code, f"{request.method} {request.url.path[:100]}: {error.detail}"))
        answered.headers.update(error.headers or {})  # 405 has to say what is allowed
        return answered

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return answer(request, Problem(499, "client_gone", "the client hung up within its body"))
