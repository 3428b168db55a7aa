"""Which HTTP status each failure has: the one place where the project's errors become answers.

    400 malformed_request       no HTTP (stalled.py)            431 head_too_large (stalled.py)
    401 unauthorized            no key, or none that is known
    403 foreign_host, foreign_origin   without keys, on this machine only: a page of somebody else asks (security.py)
    404 not_found               405 method_not_allowed          406 not_acceptable
    408 slow_body               the body did not arrive in time; 504 is kept for what is not the client's doing
    413 too_large               the body, or more images than one request holds: a client may send fewer at once
    415 unsupported_media_type
    422 refused, bad_image, bad_query; of one image also wrong_size, in `items` bad_base64 (intake.py)
    429 too_many_requests, too_many_images, too_many_at_once (quotas), queue_full
    499 client_gone             only in metrics
    500 internal
    502 bad_teacher_answer      no label, or the teacher refuses what the gateway has checked: nothing that the client could mend
    503 teacher_unavailable, overloaded                         504 deadline

Unit of data: one failed request. The body is always {"error": {"code": ..., "message": ...}}; 429 and 503 add `retry_after_s` to it and
the header Retry-After, and a request without one usable image adds `items`, what is wrong with each.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from distill.errors import BadInput, DistillError, ImageError, TeacherAnswerError, TeacherUnavailable
from distill.wire import ItemError

RETRY_AFTER_S = 1.0


class Problem(Exception):
    """A request that ends with this status, code and message."""

    def __init__(
        self, status: int, code: str, message: str, *, retry_after_s: float | None = None, items: tuple[ItemError, ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = RETRY_AFTER_S if retry_after_s is None and status == 503 else retry_after_s
        self.items = items

    def answer(self) -> JSONResponse:
        """The HTTP answer. 429 and 503 say when to come back."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        headers = {}
        if self.retry_after_s is not None:
            error["retry_after_s"] = round(self.retry_after_s, 3)
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))  # whole seconds (RFC 9110, 10.2.3)
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="distill"'
        if self.status == 408:
            headers["Connection"] = "close"  # the rest of the body is not waited for
        if self.items:
            error["items"] = [item.model_dump() for item in self.items]
        return JSONResponse({"error": error}, self.status, headers)


def problem_of(error: DistillError) -> Problem:
    """The problem that one of the project's own errors is for a REST client. What the teacher said is for the log: it names hosts."""
    if isinstance(error, ImageError):
        return Problem(422, "bad_image", f"this image cannot be used: {error.reason}")
    if isinstance(error, BadInput):
        return Problem(422, "refused", str(error))
    if isinstance(error, TeacherUnavailable):
        return Problem(503, "teacher_unavailable", "the teacher gives no answer now; the gateway's log says why")
    if isinstance(error, TeacherAnswerError):
        return Problem(502, "bad_teacher_answer", "the teacher gave no usable answer; the gateway's log says why")
    return Problem(500, "internal", "the gateway failed; its log says why")
