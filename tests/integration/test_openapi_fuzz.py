"""A thousand and more requests that schemathesis makes up from the gateway's own OpenAPI document, right and wrong ones.

No answer may be a 5xx, or one that the document does not describe. The teacher is a fake: what is tried is the gateway.
"""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from teacher_server.fake import FakeTeacher
from teacher_server.gateway import create_app
from teacher_server.settings import ServerSettings

pytestmark = pytest.mark.integration

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LABELS = "POST /v1/soft-labels"
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
"""Requests as the document wants them, and requests that break it somewhere. A route without parameters has nothing to break."""


@pytest.mark.parametrize(
    ("route", "mode", "count", "must_see"),
    [
        (LABELS, RIGHT, 600, {200, 404, 422}),
        (LABELS, WRONG, 600, {422}),
        ("GET /v1/models/{name}", RIGHT, 50, {404}),
        ("GET /v1/models", RIGHT, 1, {200}),
        ("GET /v1/stats", RIGHT, 1, {200}),
        ("GET /healthz", RIGHT, 1, {200}),
        ("GET /readyz", RIGHT, 1, {200}),
        ("GET /metrics", RIGHT, 1, {200}),
    ],
)
def test_no_request_is_a_fault_of_ours(route: str, mode: GenerationMode, count: int, must_see: set[int]) -> None:
    app = create_app(FakeTeacher(), ServerSettings(auth="none", max_body_bytes=2**20))
    method, path = route.split(" ")
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]
    seen: Counter[int] = Counter()

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def requests(case: schemathesis.Case) -> None:
        seen[case.call_and_validate(checks=CHECKS).status_code] += 1

    requests()
    assert set(seen) >= must_see, seen
