"""Which HTTP status each failure has: the one place where the project's errors become answers.

    404 not_found   413 too_large   415 unsupported_media_type   422 refused, bad_image, bad_query
    499 client_gone (only in metrics)   500 internal   502 bad_teacher_answer   503 teacher_unavailable, with Retry-After   504 deadline

Unit of data: one failed request. The body is always {"error": {"code": ..., "message": ...}}.
"""

from __future__ import annotations

from fastapi.responses import JSONResponse

from distill.errors import BadInput, DistillError, ImageError, TeacherAnswerError, TeacherUnavailable

RETRY_AFTER_S = 1


class Problem(Exception):
    """A request that ends with this status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def answer(self) -> JSONResponse:
        """The HTTP answer. 503 says when to come back."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else None
        return JSONResponse({"error": {"code": self.code, "message": self.message}}, self.status, headers)


def problem_of(error: DistillError) -> Problem:
    """The problem that one of the project's own errors is for a REST client."""
    if isinstance(error, ImageError):
        return Problem(422, "bad_image", f"this image cannot be used: {error.reason}")
    if isinstance(error, BadInput):
        return Problem(422, "refused", str(error))
    if isinstance(error, TeacherUnavailable):
        return Problem(503, "teacher_unavailable", str(error))
    if isinstance(error, TeacherAnswerError):
        return Problem(502, "bad_teacher_answer", str(error))
    return Problem(500, "internal", str(error))
