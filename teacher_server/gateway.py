"""The REST gateway: images in, soft labels out.

Flow of one request: (1) its key is looked up; (2) the query is checked; (3) the body is read, never more than the limit; (4) its images are
charged to the tenant's quota; (5) threads decode and cut; (6) it waits for its tenant's turn; (7) the teacher is asked for the one tensor
needed; (8) threads make the JSON; (9) it is sent, and only then its memory and its place among the tenant's requests are free. A deadline
that passes cancels steps 2 to 8, and so does a client that hangs up; who does not take the answer meets stalled.py.
Unit of data: one HTTP request. This process never imports torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from distill import __version__
from distill.errors import TeacherChanged
from distill.teacher_info import TeacherInfo
from distill.wire import LABELS_PATH, SOFT_LABELS_MEDIA_TYPE
from teacher_server.accept import JSON_MEDIA_TYPE, wants_binary
from teacher_server.access import Access
from teacher_server.answers import ask_teacher, binary_body, check_query, json_body, make_message
from teacher_server.backend import Floats, TeacherBackend
from teacher_server.bodies import BodyMemory, HeldBody
from teacher_server.decoding_pool import DecodingPool
from teacher_server.docs_page import add_docs
from teacher_server.endings import refunded, teachers_fault, unless_gone, until
from teacher_server.failures import answer_failures
from teacher_server.fair_queue import FairQueue
from teacher_server.held_response import HeldResponse
from teacher_server.intake import Intake, NothingUsable, Submission, make_crops, receive
from teacher_server.live_stats import LiveStats, StatsAnswer
from teacher_server.metrics import GatewayMetrics, count_requests
from teacher_server.openapi import LABELS_BODY, LABELS_RESPONSES, document, errors
from teacher_server.page import add_page
from teacher_server.problems import Problem
from teacher_server.quotas import TenantUsage
from teacher_server.readiness import Readiness
from teacher_server.schemas import Health, ModelCard, ModelList, SoftLabelsAnswer, SoftLabelsQuery
from teacher_server.security import guard, seal
from teacher_server.settings import ServerSettings
from teacher_server.tracing import NoTracing, open_tracing, trace_requests

Parity = Mapping[str, dict[str, Any]]

_READY_TIMEOUT_S = 10.0
_MOST_CHANGES = 3  # so often may another version take the teacher's place while one request is answered


def create_app(
    teacher: TeacherBackend,
    settings: ServerSettings,
    parity: Parity | None = None,
    access: Access | None = None,
    hosts: frozenset[str] | None = None,
    tracing: NoTracing | None = None,
) -> FastAPI:
    """The gateway before one teacher, which it closes at its end.

    Args:
        teacher: asked from the event loop that runs the app.
        settings: limits, keys and quotas.
        parity: fingerprint -> what the parity gate measured of that teacher when it was exported, for its model card.
        access: who may ask; by default what the settings and the environment say.
        hosts: the only names that a request may be sent to; None takes any (see `security.own_hosts`).
        tracing: closed at the end as well; by default what the settings say.

    Raises:
        ConfigError: API keys are wanted and there are none; traces are wanted and OpenTelemetry is not installed.
    """
    service = _Service(teacher, settings, parity or {}, tracing or open_tracing(settings.tracing))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.pool.close()
        await teacher.close()
        await asyncio.to_thread(service.tracing.close)

    app = FastAPI(
        title="distill teacher",
        version=__version__,
        lifespan=lifespan,
        description="Soft labels of a served image classifier.",
        docs_url=None,  # FastAPI's own pages load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go wherever the request's Host header says
    )
    answer_failures(app, service.metrics)
    _add_labels(app, service)
    _add_models(app, service)
    _add_health(app, service)
    document(app, keys=settings.auth == "keys")
    add_docs(app)
    add_page(app)
    trace_requests(app, service.tracing, LABELS_PATH)  # inside the guard: strangers do not choose what is exported
    guard(app, access or Access(settings), service.metrics, hosts)
    count_requests(app, service.metrics, service.live, LABELS_PATH)
    seal(app, settings.max_body_bytes, service.metrics)
    return app


class _Service:
    """What the routes share."""

    def __init__(self, teacher: TeacherBackend, settings: ServerSettings, parity: Parity, tracing: NoTracing) -> None:
        self.teacher = teacher
        self.tracing = tracing
        self.settings = settings
        self.parity = parity
        self.queue = FairQueue(settings.max_images_in_flight, settings.max_queued_images_per_tenant, settings.max_queued_images)
        self.pool = DecodingPool(settings.max_image_pixels)
        self.bodies = BodyMemory(settings.max_buffered_bytes)
        self.readiness = Readiness(teacher, min(_READY_TIMEOUT_S, settings.triton.request_timeout_s))
        self.metrics = GatewayMetrics()
        self.metrics.watch_queue(self.queue)
        self.live = LiveStats(lambda: self.queue.waiting_requests)

    async def model(self, name: str | None) -> TeacherInfo:
        """The teacher, if it has that name. Raises Problem 404."""
        with teachers_fault():
            info = await self.teacher.info()
        if name is not None and name != info.name:
            raise Problem(404, "not_found", f"there is no model {name[:100]!r}; this server has {info.name!r}")
        return info

    async def card(self, name: str | None) -> ModelCard:
        """What is published of the teacher. Raises as `model`."""
        info = await self.model(name)
        return ModelCard.of(info, self.parity.get(info.fingerprint))

    async def soft_labels(self, request: Request, query: SoftLabelsQuery, tenant: TenantUsage) -> Response:
        """Answer one request for soft labels."""
        _check_given_once(request)
        binary = wants_binary(", ".join(request.headers.getlist("accept")))
        limit_s = self.settings.triton.request_timeout_s
        deadline = asyncio.get_running_loop().time() + limit_s
        too_late = Problem(504, "deadline", f"no answer within {limit_s:g} s (server.triton.request_timeout_s)")
        too_slow = Problem(408, "slow_body", f"the body did not arrive within {limit_s:g} s (server.triton.request_timeout_s)")
        with ExitStack() as until_sent:
            until_sent.enter_context(tenant.enter())
            held = until_sent.enter_context(self.bodies.hold())
            async with until(deadline, too_late):
                check_query(query, await self.model(query.model))
            async with until(deadline, too_slow):
                sent = await receive(request, held, self.settings, self.pool)
            self.queue.check_room(tenant.name, sent.num_images)  # before anything is decoded in vain
            tenant.charge(sent.num_images)
            with refunded(tenant, sent.num_images):
                async with until(deadline, too_late):
                    response = await unless_gone(request, self._answer(sent, query, tenant, binary, held))
            response.release = until_sent.pop_all()
            return response

    async def _answer(self, sent: Submission, query: SoftLabelsQuery, tenant: TenantUsage, binary: bool, held: HeldBody) -> HeldResponse:
        info, intake, values_GK = await self._label(sent, query, tenant)
        work = partial(_body, info, query, intake, values_GK, binary)
        # The usual answer for programs costs less than handing it to a thread.
        small = binary and query.top_k is None and query.kind != "log_probs" and not intake.errors
        body = work() if small else await self.pool.run(work)
        held.becomes(len(body))
        self._count(tenant, len(intake.crops_GHWC), len(intake.errors))
        return HeldResponse(body, 207 if intake.errors else 200, media_type=SOFT_LABELS_MEDIA_TYPE if binary else JSON_MEDIA_TYPE)

    async def _label(self, sent: Submission, query: SoftLabelsQuery, tenant: TenantUsage) -> tuple[TeacherInfo, Intake, Floats]:
        """All labels are those of the teacher returned with them; if another version takes its place meanwhile, all are asked for anew."""
        intake, cut_for = None, None
        for _ in range(_MOST_CHANGES):
            info = await self.model(query.model)
            check_query(query, info)
            if intake is None or cut_for != info.preprocessing:
                with self.metrics.decode.time(), self.tracing.span("decode"):
                    intake = await self._crops(sent, query, info, tenant)
                cut_for = info.preprocessing
            try:
                return info, intake, await self._ask_in_turn(info, intake, query, tenant)
            except TeacherChanged as error:
                changed = error
        raise changed

    async def _crops(self, sent: Submission, query: SoftLabelsQuery, info: TeacherInfo, tenant: TenantUsage) -> Intake:
        try:
            return await make_crops(sent, query.crop, info, self.settings, self.pool, tenant)
        except NothingUsable as problem:
            self._count(tenant, 0, problem.num_images)
            raise

    async def _ask_in_turn(self, info: TeacherInfo, intake: Intake, query: SoftLabelsQuery, tenant: TenantUsage) -> Floats:
        temperature = query.temperature or info.default_temperature
        came, num_images = time.perf_counter(), len(intake.crops_GHWC)
        async with AsyncExitStack() as turn:
            with self.tracing.span("queue"):
                await turn.enter_async_context(self.queue.turn(tenant.name, tenant.quota.weight, num_images))
            self.metrics.wait.observe(time.perf_counter() - came)
            with self.tracing.span("teacher", "client", {"distill.images": num_images}), self.metrics.teacher.time(), teachers_fault():
                return await ask_teacher(self.teacher, query, temperature, intake.crops_GHWC, info.fingerprint)

    def _count(self, tenant: TenantUsage, num_labelled: int, num_rejected: int) -> None:
        label = self.metrics.tenant_label(tenant.name)
        self.metrics.batch.observe(num_labelled + num_rejected)
        self.metrics.images.labels(label, "labelled").inc(num_labelled)
        self.metrics.images.labels(label, "rejected").inc(num_rejected)
        self.live.labelled(num_labelled)


def _add_labels(app: FastAPI, service: _Service) -> None:
    @app.post(LABELS_PATH, response_model=SoftLabelsAnswer, responses=LABELS_RESPONSES, openapi_extra=LABELS_BODY)
    async def soft_labels(request: Request, query: Annotated[SoftLabelsQuery, Query()]) -> Response:
        """Soft labels of one image (the file as the body), of several (a form with files, or JSON), or of ready crops (binary).

        One unusable image among several gets an error in its place, and the status is 207; a request without any usable image is
        answered with 422. `Accept: application/x-distill-soft-labels` gives the binary form.
        """
        return await service.soft_labels(request, query, request.scope["tenant"])

    @app.get("/v1/stats", responses=errors(401))
    async def stats() -> StatsAnswer:
        """The last 60 seconds: requests, images, latency and errors, second by second."""
        return service.live.report()


def _add_models(app: FastAPI, service: _Service) -> None:
    @app.get("/v1/models", responses=errors(401, 502, 503))
    async def models() -> ModelList:
        """The served teachers."""
        return ModelList(models=[await service.card(None)])

    @app.get("/v1/models/{name}", responses=errors(401, 404, 422, 502, 503))
    async def model(name: str) -> ModelCard:
        """One teacher: version, fingerprint, classes, preprocessing, and what its parity gate measured."""
        return await service.card(name)


def _add_health(app: FastAPI, service: _Service) -> None:
    @app.get("/healthz")
    async def healthz() -> Health:
        """The gateway runs; says nothing of the teacher."""
        return Health(status="ok")

    @app.get("/readyz", responses=errors(503))
    async def readyz() -> Health:
        """A label really comes out of the teacher, now or within the last second."""
        if not await service.readiness.ready():
            raise Problem(503, "teacher_unavailable", "the teacher gives no label now")
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses=errors(401))
    async def metrics() -> Response:
        """Prometheus metrics of the gateway."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _check_given_once(request: Request) -> None:
    """Raises Problem 422 for a parameter that is there twice: nobody knows which one was meant."""
    names = [name for name, _ in request.query_params.multi_items()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Problem(422, "bad_query", f"query.{twice[:100]}: given {names.count(twice)} times; once is what can be answered")


def _body(info: TeacherInfo, query: SoftLabelsQuery, intake: Intake, values_GK: Floats, binary: bool) -> bytes:
    message = make_message(info, query, query.temperature or info.default_temperature, intake, values_GK)
    return binary_body(message) if binary else json_body(message)
