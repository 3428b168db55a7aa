"""What a failed REST request means for its client: the mirror of problems.py, and the one place where httpx's errors become ours.

    401 403 404 405 406 413 415 422, other 4xx   RequestRefused, never asked again
    408 504                                      TeacherUnavailable, asked again once
    429 503                                      TeacherUnavailable, asked again after Retry-After
    502                                          TeacherAnswerError (of a proxy before the gateway: TeacherUnavailable), asked again once
    3xx 500, other                               TeacherAnswerError
    no connection, or it broke                   TeacherUnavailable, asked again; a certificate that does not verify: RequestRefused

Unit of data: one HTTP answer, or the exception in its place.
"""

from __future__ import annotations

import email.utils
import json
import ssl
import time
from dataclasses import dataclass

import httpx
from pydantic import ValidationError

from distill.errors import DistillError, RequestRefused, TeacherAnswerError, TeacherUnavailable
from distill.wire import ItemError
from teacher_server.retries import Retriable


class RestRefused(RequestRefused):
    """The gateway refuses a request: `status` and its machine-readable `code`; `items` is what is wrong with each image, if it says so."""

    def __init__(self, message: str, status: int = 400, code: str = "refused", items: tuple[ItemError, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.items = items


@dataclass(frozen=True)
class _Said:
    """The body of an error. `ours`: it really is the gateway's, not that of a proxy on the way."""

    code: str
    message: str
    ours: bool
    retry_after_s: float | None = None
    items: tuple[ItemError, ...] = ()


def raise_failure(answer: httpx.Response, whom: str) -> None:
    """Nothing for 200 and 207 (some images have errors); else the error of the table above, `Retriable` where that can help."""
    if answer.status_code in (200, 207):
        return
    said = _read(answer)
    status, text = answer.status_code, f"{whom} answers {answer.status_code} {said.code}: {said.message}"
    if status in (429, 503):
        raise Retriable(TeacherUnavailable(text), after_s=_retry_after_s(answer, said))
    if status in (408, 504) or (status == 502 and not said.ours):
        raise Retriable(TeacherUnavailable(text), only_once=True)
    if status == 502:
        raise Retriable(TeacherAnswerError(text), only_once=True)
    if 400 <= status < 500:
        raise RestRefused(text, status, said.code, said.items)
    raise TeacherAnswerError(text)


def translated(error: httpx.HTTPError, whom: str) -> DistillError | Retriable:
    """Our error for one of httpx's."""
    text = f"{type(error).__name__} {error}".strip()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RequestRefused(f"the certificate of {whom} does not verify: {cause}")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return RequestRefused(f"{whom} cannot be asked: {text}")
    if isinstance(error, httpx.TransportError):
        return Retriable(TeacherUnavailable(f"{whom} does not answer: {text}"))
    return TeacherAnswerError(f"{whom} answers what is not HTTP: {text}")


def _read(answer: httpx.Response) -> _Said:
    try:
        error = json.loads(answer.content)["error"]
        code, message, after_s = str(error["code"]), str(error["message"]), error.get("retry_after_s")
        items = tuple(ItemError.model_validate(item) for item in error.get("items", ()))
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
        start = " ".join(answer.text[:200].split())
        return _Said(answer.reason_phrase.lower().replace(" ", "_") or "unknown", start or "an empty body", ours=False)
    return _Said(code, message, True, float(after_s) if isinstance(after_s, int | float) and after_s >= 0 else None, items)


def _retry_after_s(answer: httpx.Response, said: _Said) -> float:
    """Seconds until the server wants to be asked again; its body says it finer than the header, which has whole seconds or a date."""
    if said.retry_after_s is not None:
        return said.retry_after_s
    header = answer.headers.get("retry-after", "").strip()
    if header.isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
