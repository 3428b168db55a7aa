"""What the OpenAPI document says beyond what FastAPI finds out by itself: the bodies of a request, every error, the keys.

Unit of data: one route.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE
from teacher_server.intake import FORM_MEDIA_TYPE, IMAGE_MEDIA_TYPES, JSON_MEDIA_TYPE
from teacher_server.schemas import ErrorBody, ImagesRequest, SoftLabelsAnswer
from teacher_server.security import needs_key

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILES = {
    "type": "object",
    "additionalProperties": {"type": "array", "items": {"type": "string", "format": "binary"}},
    "description": "JPEG, PNG or WebP files, each a part with a file name; the names of the parts do not matter, their order does.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds until it is worth asking again.", "schema": {"type": "integer", "minimum": 1}}}

_MEANINGS = {
    401: "No API key, or one that is not valid (`unauthorized`).",
    403: "Without API keys: not sent to a name of this machine, or by another site's page (`foreign_host`, `foreign_origin`).",
    404: "No such model, or no such path (`not_found`).",
    406: "Accept takes neither JSON nor the binary form (`not_acceptable`).",
    408: "The body did not arrive in time (`slow_body`).",
    413: "The body is too large, or holds too many images (`too_large`).",
    415: "The body is of a type that is not listed (`unsupported_media_type`).",
    422: "Malformed or impossible (`bad_query`, `refused`), or no usable image (`bad_image`, `wrong_size`, `refused` with `items`).",
    429: "Over a quota (`too_many_requests`, `too_many_images`, `too_many_at_once`), or too much waits (`queue_full`).",
    500: "A fault of the gateway (`internal`).",
    502: "The teacher answered something that is no label (`bad_teacher_answer`).",
    503: "The teacher is away (`teacher_unavailable`), or too many bodies are in memory (`overloaded`).",
    504: "No answer in time (`deadline`).",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The entry `responses` of a route that may end with these statuses."""
    return {
        status: {"model": ErrorBody, "description": _MEANINGS[status], **({"headers": _RETRY_AFTER} if status in (429, 503) else {})}
        for status in statuses
    }


LABELS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {SOFT_LABELS_MEDIA_TYPE: _BINARY}, "description": "Soft labels of every image."},
    207: {
        "model": SoftLabelsAnswer,
        "content": {SOFT_LABELS_MEDIA_TYPE: _BINARY},
        "description": "Soft labels of some images; the others have an `error` in their place. In the binary form their rows are NaN, and"
        " `errors` in the header names them.",
    },
    **errors(*_MEANINGS),
}
"""Everything that `POST /v1/soft-labels` may answer. 207 and not 200 for a part, so that whoever looks at the status alone notices."""

LABELS_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **dict.fromkeys((*IMAGE_MEDIA_TYPES, CROPS_MEDIA_TYPE), _BINARY),
            FORM_MEDIA_TYPE: {"schema": _FILES},
            JSON_MEDIA_TYPE: {"schema": ImagesRequest.model_json_schema()},
        },
    }
}
"""Every body that `POST /v1/soft-labels` takes."""


def document(app: FastAPI, *, keys: bool) -> None:
    """Add the API keys to the app's OpenAPI document, where keys are asked for."""
    if not keys:
        return
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            schema.setdefault("components", {})["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["security"] = [{"bearer": []}, {"header": []}, {}] if needs_key(path) else []
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = with_keys  # type: ignore[method-assign]
