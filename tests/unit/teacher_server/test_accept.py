"""Which form of answer an Accept header asks for (RFC 9110, 12.5.1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.wire import SOFT_LABELS_MEDIA_TYPE as BINARY
from teacher_server.accept import wants_binary
from teacher_server.problems import Problem


@pytest.mark.parametrize(
    ("accept", "binary"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/*", False),
        (BINARY, True),
        (BINARY.upper(), True),
        (f"{BINARY}, */*", False),  # both at quality 1: JSON, as documented
        (f"{BINARY}, */*;q=0.5", True),
        (f"application/json;q=0.2, {BINARY};q=0.3", True),
        (f"application/json; q=0.3 , {BINARY}; q=0.2", False),
        ("application/json;q=0, */*", True),
        (f"application/*;q=0.5, {BINARY};q=0.4", False),  # the more specific range counts, also when it says less
        (f"*/*;q=1, application/json;q=0.9, {BINARY};q=0.95", True),
        ("text/html, application/xhtml+xml, */*;q=0.8", False),  # a browser
        (f"application/json;charset=utf-8;q=0.1, {BINARY};q=0.2", True),
        ("nonsense", False),  # not one element is well formed: as without the header
        ("*/json, ;;", False),
        (f"nonsense, {BINARY};q=2, ;;, application/json;q=0.001", False),  # what is not well formed does not count
    ],
)
def test_the_best_form_that_the_client_takes(accept: str, binary: bool) -> None:
    assert wants_binary(accept) is binary


@pytest.mark.parametrize("accept", ["text/html", "image/*", "*/*;q=0", f"application/json;q=0, {BINARY};q=0.0"])
def test_neither_form_is_406(accept: str) -> None:
    with pytest.raises(Problem) as caught:
        wants_binary(accept)
    assert (caught.value.status, caught.value.code) == (406, "not_acceptable")
    assert BINARY in caught.value.message


@given(st.text())
def test_any_header_gives_an_answer_or_406(accept: str) -> None:
    status = 200
    try:
        wants_binary(accept)
    except Problem as problem:
        status = problem.status
    assert status in (200, 406)
