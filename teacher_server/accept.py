"""Which form of answer a client takes: the `Accept` header -> JSON or the binary body.

Specification: RFC 9110, section 12.5.1. The most specific range that covers a form says its quality; the form of the highest quality wins,
JSON where both are as good. An element that is not well formed counts as not there.
Unit of data: one header.
"""

from __future__ import annotations

import re

from distill.wire import SOFT_LABELS_MEDIA_TYPE
from teacher_server.problems import Problem

JSON_MEDIA_TYPE = "application/json"

_FORMS = (JSON_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE)
_RANGE = re.compile(r"(\*/\*|[\w!#$&^.+-]+/(?:\*|[\w!#$&^.+-]+))", re.ASCII)
_QUALITY = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


def wants_binary(accept: str) -> bool:
    """Whether the answer is the binary body rather than JSON; a header without a well-formed element takes both.

    Raises:
        Problem: 406 it takes neither.
    """
    ranges = _ranges(accept)
    if not ranges:
        return False
    qualities = [_quality(form, ranges) for form in _FORMS]
    if max(qualities) == 0:
        raise Problem(406, "not_acceptable", f"answers are {' or '.join(_FORMS)}; Accept: {accept[:100]!r} takes neither")
    return qualities[1] > qualities[0]


def _ranges(accept: str) -> dict[str, float]:
    """Media range -> quality, of all elements that are well formed."""
    ranges = {}
    for element in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in element.split(";"))
        quality = next((text[2:].strip() for text in parameters if text.startswith("q=")), "1")
        if _RANGE.fullmatch(media_range) and _QUALITY.fullmatch(quality):
            ranges[media_range] = float(quality)
    return ranges


def _quality(form: str, ranges: dict[str, float]) -> float:
    return next((ranges[key] for key in (form, f"{form.partition('/')[0]}/*", "*/*") if key in ranges), 0.0)
