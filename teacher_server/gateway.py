"""The REST gateway: images in, soft labels out.

Flow of one request: (1) the query is checked; (2) the body is read, never more than the limit; (3) threads decode and centre-crop; (4) the
teacher is asked for the one tensor needed; (5) threads make the JSON. A deadline that passes cancels whichever step it finds, a client that
hangs up cancels the question to the teacher. Unit of data: one HTTP request. This process never imports torch.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from distill import __version__
from distill.errors import DistillError
from distill.teacher_info import TeacherInfo
from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE
from teacher_server.answers import ask_teacher, binary_body, check_query, json_body, make_message
from teacher_server.backend import TeacherBackend
from teacher_server.intake import IMAGE_MEDIA_TYPES, take_in
from teacher_server.metrics import GatewayMetrics, count_requests
from teacher_server.problems import Problem, problem_of
from teacher_server.schemas import ErrorBody, Health, ImagesRequest, ModelCard, ModelList, SoftLabelsAnswer, SoftLabelsQuery
from teacher_server.settings import ServerSettings

T = TypeVar("T")

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (404, 413, 415, 422, 502, 503, 504)}
_LABELS_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **dict.fromkeys((*IMAGE_MEDIA_TYPES, CROPS_MEDIA_TYPE), _BINARY),
            "application/json": {"schema": ImagesRequest.model_json_schema()},
        },
    }
}


def create_app(teacher: TeacherBackend, settings: ServerSettings) -> FastAPI:
    """The gateway before one teacher, which it closes at its end."""
    service = _Service(teacher, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.threads.shutdown(wait=False, cancel_futures=True)
        await teacher.close()

    app = FastAPI(title="distill teacher", version=__version__, lifespan=lifespan, description="Soft labels of a served image classifier.")
    _answer_errors(app)
    _add_routes(app, service)
    count_requests(app, service.metrics)
    return app


class _Service:
    """What the routes share."""

    def __init__(self, teacher: TeacherBackend, settings: ServerSettings) -> None:
        self.teacher = teacher
        self.settings = settings
        self.metrics = GatewayMetrics()
        self.threads = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="gateway-decode")

    async def model(self, name: str | None) -> TeacherInfo:
        """The teacher, if it has that name. Raises Problem 404."""
        info = await self.teacher.info()
        if name is not None and name != info.name:
            raise Problem(404, "not_found", f"there is no model {name[:100]!r}; this server has {info.name!r}")
        return info

    async def soft_labels(self, request: Request, query: SoftLabelsQuery) -> Response:
        """Answer one request for soft labels."""
        info = await self.model(query.model)
        binary = SOFT_LABELS_MEDIA_TYPE in request.headers.get("accept", "")
        check_query(query, info, binary=binary)
        intake = await take_in(request, info.preprocessing, self.settings, self.threads)
        temperature = query.temperature or info.default_temperature
        values_GK = await _unless_gone(request, ask_teacher(self.teacher, query, temperature, intake.crops_GHWC))
        self.metrics.images.labels("labelled").inc(len(intake.crops_GHWC))
        self.metrics.images.labels("rejected").inc(len(intake.errors))
        message = make_message(info, query, temperature, intake, values_GK)
        if binary:
            return Response(binary_body(message), media_type=SOFT_LABELS_MEDIA_TYPE)
        names = info.class_names if query.names else None
        body = await asyncio.get_running_loop().run_in_executor(self.threads, json_body, message, names)
        return Response(body, media_type="application/json")


def _add_routes(app: FastAPI, service: _Service) -> None:
    @app.post(
        "/v1/soft-labels",
        response_model=SoftLabelsAnswer,
        responses={200: {"content": {SOFT_LABELS_MEDIA_TYPE: _BINARY}}, **_ERRORS},
        openapi_extra=_LABELS_BODY,
    )
    async def soft_labels(request: Request, query: Annotated[SoftLabelsQuery, Query()]) -> Response:
        """Soft labels of one image (the file as the body), of several (JSON), or of ready crops (binary).

        One unusable image among several gets an error in its place; a request without any usable image is answered with 422.
        `Accept: application/x-distill-soft-labels` gives the binary form.
        """
        try:
            async with asyncio.timeout(service.settings.triton.request_timeout_s):
                return await service.soft_labels(request, query)
        except TimeoutError as error:
            limit = service.settings.triton.request_timeout_s
            raise Problem(504, "deadline", f"no answer within {limit:g} s (server.triton.request_timeout_s)") from error

    @app.get("/v1/models", responses={503: _ERRORS[503]})
    async def models() -> ModelList:
        """The served teachers."""
        return ModelList(models=[ModelCard.of(await service.model(None))])

    @app.get("/v1/models/{name}", responses={404: _ERRORS[404], 503: _ERRORS[503]})
    async def model(name: str) -> ModelCard:
        """One teacher: version, fingerprint, classes, preprocessing."""
        return ModelCard.of(await service.model(name))

    @app.get("/healthz")
    async def healthz() -> Health:
        """The gateway runs; says nothing of the teacher."""
        return Health(status="ok")

    @app.get("/readyz", responses={503: _ERRORS[503]})
    async def readyz() -> Health:
        """A label really comes out of the teacher now."""
        if not await service.teacher.ready():
            raise Problem(503, "teacher_unavailable", "the teacher gives no label now")
        return Health(status="ok")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics of the gateway."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _answer_errors(app: FastAPI) -> None:
    """Every failure leaves as the same body; problems.py says with which status."""

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return error.answer()

    @app.exception_handler(DistillError)
    async def ours(request: Request, error: DistillError) -> JSONResponse:
        return problem_of(error).answer()

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Problem(422, "bad_query", f"{where}: {first['msg']}").answer()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        return Problem(error.status_code, code, f"{request.method} {request.url.path[:100]}: {error.detail}").answer()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return Problem(499, "client_gone", "the client hung up within its body").answer()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        # The log has the traceback; a stranger gets no look inside.
        return Problem(500, "internal", "the gateway failed; its log says why").answer()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up first or the deadline passes."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "client_gone", "the client hung up")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    """Returns when the client is gone. The body has been read to its end, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
