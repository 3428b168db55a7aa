"""Clients that stand still, on real sockets of the real gateway; and slow ones that do not."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, encode_crops
from teacher_server import serve, stalled
from teacher_server.fake import FakeTeacher
from teacher_server.serve import Gateway
from teacher_server.settings import ServerSettings, TenantQuota

HEAD = b"POST /v1/soft-labels HTTP/1.1\r\nHost: localhost\r\n"
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


def test_half_a_body_at_the_end_is_one_line_in_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(serve, "_STOP_TIMEOUT_S", 1)
    with contextlib.ExitStack() as until_stopped:
        with Gateway(FakeTeacher, ServerSettings(auth="none", port=0)) as gateway:
            client = until_stopped.enter_context(connect(gateway))
            client.sendall(HEAD + b"Content-Type: image/png\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 100")  # the gateway reads the body
            client.sendall(b"half of it")
        assert client.recv(100).startswith(b"HTTP/1.1 500")
    assert [(record.message.partition(",")[0], record.exc_info) for record in caplog.records if record.name == "uvicorn.error"] == [
        ("Cancel 1 running task(s)", None)
    ]


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
            assert client.recv(1000)[:12] in (b"", b"HTTP/1.1 431")  # the buffers between may hold all of it; a timeout: it is taken


def test_many_small_requests_on_one_connection_are_no_long_head(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as client:
        assert {client.get("/healthz", headers={"x-long": "x" * 4000}).status_code for _ in range(40)} == {200}


def test_a_long_body_is_no_long_head(gateway: Gateway) -> None:
    with connect(gateway) as client:
        client.sendall(HEAD + b"Content-Type: text/plain\r\nContent-Length: 200000\r\n\r\n")
        for _ in range(100):
            client.sendall(b"x" * 2000)
        assert client.recv(1000).startswith(b"HTTP/1.1 415")


CROPS_HEAD = HEAD + f"Content-Type: {CROPS_MEDIA_TYPE}\r\nAccept: {SOFT_LABELS_MEDIA_TYPE}\r\n".encode()


def answer_of(client: socket.socket) -> tuple[bytes, bytes]:
    """Status line and body of what is answered with `Connection: close`."""
    text = b""
    while piece := client.recv(65536):
        text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0], body


def test_trailers_without_an_end_are_refused(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled, "STALL_S", 60.0)
    with connect(gateway) as client:
        client.sendall(CROPS_HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(b"x" * 4096)
            assert client.recv(1000)[:12] in (b"", b"HTTP/1.1 431")  # the buffers between may hold all of it; a timeout: it is taken


@pytest.mark.parametrize("status", [b"400", b"431"])
def test_what_is_no_request_is_answered_like_every_other_error_and_not_logged(
    gateway: Gateway, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    long = HEAD + b"X-Long: "
    sent = b"nonsense\r\n\r\n" if status == b"400" else long + b"x" * (stalled.MAX_HEAD_BYTES + 1 - len(long))
    with connect(gateway) as client:
        client.sendall(sent)
        line, body = answer_of(client)
    assert line.split()[1] == status
    error = json.loads(body)["error"]
    assert error["code"] == ("malformed_request" if status == b"400" else "head_too_large")
    assert "uvicorn" not in caplog.text


def test_a_body_that_goes_on_after_its_answer_ends_the_connection(gateway: Gateway) -> None:
    with connect(gateway) as client:
        client.sendall(HEAD + b"Content-Type: text/plain\r\nContent-Length: 9000000\r\n\r\nx")
        assert client.recv(1000).startswith(b"HTTP/1.1 415")
        client.settimeout(0.02)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):  # 20 s
                client.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    if client.recv(1000) == b"":
                        break
            else:
                pytest.fail("it goes on for as long as a byte comes now and then")


@pytest.mark.parametrize(("upgrade", "split", "chunked"), [(b"x", False, False), (b"websocket", True, False), (b"h2c", False, True)])
def test_a_request_for_another_protocol_is_answered_in_this_one_with_its_body(
    gateway: Gateway, upgrade: bytes, split: bool, chunked: bool
) -> None:
    crops = encode_crops(np.zeros((2, 8, 8, 3), np.uint8))
    length = b"Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(crops)}".encode()
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(crops), crops) if chunked else crops
    head = CROPS_HEAD + b"Connection: keep-alive, Upgrade\r\nUpgrade: " + upgrade + b"\r\n" + length + b"\r\n\r\n"
    with connect(gateway) as client:
        for part in (head, body) if split else (head + body,):
            client.sendall(part)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_an_answer_that_is_not_taken_counts_as_a_request_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled, "STALL_S", 60.0)
    settings = ServerSettings(auth="none", port=0, quota=TenantQuota(max_concurrent=1))
    length = f"Content-Type: {CROPS_MEDIA_TYPE}\r\nConnection: close\r\nContent-Length: {len(CROPS)}\r\n\r\n".encode()
    headers = {"content-type": CROPS_MEDIA_TYPE, "accept": SOFT_LABELS_MEDIA_TYPE}
    with Gateway(lambda: FakeTeacher(num_classes=1000), settings) as running:

        def ask() -> int:
            return httpx.post(f"{running.url}/v1/soft-labels", content=CROPS, headers=headers).status_code

        with connect(running) as client:
            client.sendall(HEAD + length + CROPS)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            assert ask() == 429
        # It hung up, which the gateway notices in its own time.
        assert next(status for status in (ask() for _ in range(1000)) if status != 429) == 200


def test_without_keys_a_strangers_name_for_this_machine_is_refused(gateway: Gateway) -> None:
    assert httpx.get(f"{gateway.url}/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(f"{gateway.url}/v1/models").status_code == 200
