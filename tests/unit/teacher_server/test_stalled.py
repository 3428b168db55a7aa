"""Clients that stand still, on real sockets of the real gateway; and slow ones that do not."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, encode_crops
from teacher_server import stalled
from teacher_server.fake import FakeTeacher
from teacher_server.serve import Gateway
from teacher_server.settings import ServerSettings

HEAD = b"POST /v1/soft-labels HTTP/1.1\r\nHost: x\r\n"
NUM_IMAGES = 1024
CROPS = encode_crops(np.zeros((NUM_IMAGES, 8, 8, 3), np.uint8))  # about 10 MB of JSON


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(stalled, "STALL_S", 0.3)
    with Gateway(lambda: FakeTeacher(num_classes=1000, delay_s=0.8), ServerSettings(auth="none", port=0)) as running:
        yield running


def connect(gateway: Gateway) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return client


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"X-Long: "])
def test_half_a_head_ends_the_connection(gateway: Gateway, sent: bytes) -> None:
    with connect(gateway) as client:
        client.sendall(sent)
        try:
            answer = client.recv(1)  # or the timeout of 20 s
        except ConnectionResetError:
            answer = b""
        assert answer == b""


def test_an_answer_that_is_not_taken_ends_the_connection(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()
    plain = stalled.ImpatientProtocol.connection_lost

    def noticed(self: stalled.ImpatientProtocol, exc: Exception | None) -> None:
        plain(self, exc)
        lost.set()

    monkeypatch.setattr(stalled.ImpatientProtocol, "connection_lost", noticed)
    length = f"Content-Type: {CROPS_MEDIA_TYPE}\r\nContent-Length: {len(CROPS)}\r\n\r\n".encode()
    with connect(gateway) as client:
        client.sendall(HEAD + length + CROPS)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert lost.wait(20), "the gateway holds 10 MB for a client that takes none of it"


def test_a_slow_teacher_is_no_stall_of_its_client(gateway: Gateway) -> None:
    headers = {"content-type": CROPS_MEDIA_TYPE, "accept": SOFT_LABELS_MEDIA_TYPE}  # the teacher takes more than twice the limit
    assert httpx.post(f"{gateway.url}/v1/soft-labels", content=CROPS, headers=headers).status_code == 200


def test_a_head_without_an_end_is_refused(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled, "STALL_S", 60.0)
    with connect(gateway) as client:
        client.sendall(HEAD + b"X-Long: ")
        with contextlib.suppress(ConnectionError):  # it hangs up while we go on
            for _ in range(1000):
                client.sendall(b"x" * 4096)
            pytest.fail("4 MB of a head were taken")


def test_many_small_requests_on_one_connection_are_no_long_head(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        assert {client.get("/healthz", headers={"x-long": "x" * 4000}).status_code for _ in range(40)} == {200}


def test_a_long_body_is_no_long_head(gateway: Gateway) -> None:
    with connect(gateway) as client:
        client.sendall(HEAD + b"Content-Type: text/plain\r\nContent-Length: 200000\r\n\r\n")
        for _ in range(100):
            client.sendall(b"x" * 2000)
        assert client.recv(1000).startswith(b"HTTP/1.1 415")
