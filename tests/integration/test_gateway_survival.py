"""The gateway before the real Triton while things go wrong: every answer is a right label or an error with its status, and it recovers.

Unit of data: one request for the labels of one crop, whose right answer is known.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import helper
from tritonclient.grpc import model_config_pb2

from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, decode_soft_labels, encode_crops
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.serve import Gateway
from teacher_server.settings import ServerSettings, TritonSettings
from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess
from teacher_server.triton_watch import TritonWatch

pytestmark = pytest.mark.integration

CROPS = np.random.default_rng(1).integers(1, 256, (64, 8, 8, 3), np.uint8)
LABELS = "/v1/soft-labels"
BINARY = {"Content-Type": CROPS_MEDIA_TYPE, "Accept": SOFT_LABELS_MEDIA_TYPE}


@dataclass
class Service:
    """A gateway, the Triton behind it, and the teacher that knows the right answers."""

    url: str
    triton: TritonProcess
    teacher: Any

    def ask(self, client: httpx.Client, number: int, **arguments: Any) -> httpx.Response:
        """The labels of crop `number`, at temperature 1."""
        crops = CROPS[number % len(CROPS)][None]
        return client.post(f"{self.url}{LABELS}", content=encode_crops(crops), headers=BINARY, params={"temperature": 1}, **arguments)

    def is_right(self, answer: httpx.Response, number: int) -> bool:
        expected = self.teacher.soft_labels(CROPS[number % len(CROPS)][None], np.ones((1, 1), np.float32))
        return np.allclose(decode_soft_labels(answer.content).values_BR, expected, atol=1e-5)


@contextmanager
def serving(
    home: TritonHome, teacher: Any, folder: Path, repository: Path | None = None, timeout_s: float = 5, **settings: Any
) -> Iterator[Service]:
    """The real thing, at another repository where one is given."""
    server = ServerSettings(port=0, auth="none", triton=TritonSettings(request_timeout_s=timeout_s), **settings)
    with TritonProcess(home, repository or teacher.repository, "tiny", folder) as triton, TritonWatch(triton, interval_s=0.5):
        address = TeacherAddress(model="tiny", triton_url=triton.url, request_timeout_s=timeout_s)
        with Gateway(lambda: open_teacher(address), server) as gateway:
            yield Service(gateway.url, triton, teacher)


@dataclass
class Load:
    """Threads that ask without end. Every answer is kept as what it was; a wrong label, or no Retry-After with a 503, is a complaint."""

    service: Service
    num_threads: int = 4
    seen: Counter[int] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.num_threads)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _ask(self, first: int) -> None:
        with httpx.Client(timeout=60) as client:
            number = first
            while not self._stop.is_set():
                try:
                    answer = self.service.ask(client, number)
                except httpx.HTTPError as error:
                    self._note(0, f"the gateway itself failed: {error!r}")
                    return
                self._note(answer.status_code, self._complaint(answer, number))
                number += 1
                if answer.status_code != 200:
                    self._stop.wait(0.05)

    def _complaint(self, answer: httpx.Response, number: int) -> str | None:
        if answer.status_code == 200:
            return None if self.service.is_right(answer, number) else f"a wrong label for {number}"
        if answer.status_code in (429, 503) and int(answer.headers["Retry-After"]) < 1:
            return "no time to come back"
        return None if answer.status_code in (429, 503, 504) else f"{answer.status_code}: {answer.text[:200]}"

    def _note(self, status: int, complaint: str | None) -> None:
        with self._lock:
            self.seen[status] += 1
            if complaint:
                self.complaints.append(complaint)

    def wait_for(self, status: int, more: int = 20, timeout_s: float = 90) -> None:
        """Return when that status was seen so many times more."""
        wanted, deadline = self.seen[status] + more, time.monotonic() + timeout_s
        while self.seen[status] < wanted:
            assert time.monotonic() < deadline, f"waited in vain for {status}: {self.seen}, {self.complaints[:3]}"
            time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    """Triton's stubs."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry.name))
        except (OSError, IndexError):  # no process, or not any more
            continue
    return found


@pytest.mark.parametrize("victim", ["server", "stub"])
def test_a_kill_under_load_costs_errors_but_no_label(home: TritonHome, tiny_teacher: Any, tmp_path: Path, victim: str) -> None:
    with serving(home, tiny_teacher, tmp_path) as service, Load(service) as load:
        load.wait_for(200)
        server = service.triton.server_pid
        assert server is not None
        os.kill(server if victim == "server" else children_of(server)[0], signal.SIGKILL)
        load.wait_for(503, more=1)
        load.wait_for(200)
    assert load.complaints == []


def test_a_hung_model_ends_at_the_deadline_and_goes_on_when_it_wakes(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    with serving(home, tiny_teacher, tmp_path, timeout_s=1) as service, httpx.Client(timeout=60) as client:
        assert service.triton.server_pid is not None
        (stub,) = children_of(service.triton.server_pid)
        os.kill(stub, signal.SIGSTOP)
        try:
            answer = service.ask(client, 0)
            assert answer.status_code in (503, 504)
            assert answer.json()["error"]["code"] in ("teacher_unavailable", "deadline")
            assert client.get(f"{service.url}/readyz").status_code == 503
            assert client.get(f"{service.url}/healthz").status_code == 200
        finally:
            os.kill(stub, signal.SIGCONT)
        with Load(service) as load:
            load.wait_for(200)
        assert load.complaints == []


def test_nan_from_the_model_is_refused_and_not_served(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    """Logarithms of the pixels: minus infinity for a black crop, finite for the others."""
    repository = tmp_path / "repository"
    shutil.copytree(tiny_teacher.repository, repository)
    path = repository / "tiny" / "1" / "model.onnx"
    model = onnx.load(path)
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    model.graph.node.insert(list(model.graph.node).index(product), helper.make_node("Log", ["scaled"], ["logarithm"]))
    product.input[0] = "logarithm"
    onnx.save(model, path)
    with serving(home, tiny_teacher, tmp_path, repository) as service, httpx.Client(timeout=60) as client:
        mixed = np.concatenate([CROPS[:1], np.zeros((1, 8, 8, 3), np.uint8)])
        answer = client.post(f"{service.url}{LABELS}", content=encode_crops(mixed), headers=BINARY)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "bad_teacher_answer"
        answer = service.ask(client, 0)
        assert answer.status_code == 200
        assert np.isfinite(decode_soft_labels(answer.content).values_BR).all()


def test_a_full_queue_answers_come_back_later_and_the_rest_is_right(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(tiny_teacher.repository, repository)
    path = repository / "tiny" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    config.dynamic_batching.ClearField("preferred_batch_size")
    config.dynamic_batching.max_queue_delay_microseconds = 200_000  # the queue stays full long enough to overflow
    config.dynamic_batching.default_queue_policy.max_queue_size = 2
    path.write_text(text_format.MessageToString(config))
    with serving(home, tiny_teacher, tmp_path, repository) as service, Load(service, num_threads=24) as load:
        load.wait_for(503, more=5)
        load.wait_for(200)
    assert load.complaints == []


def test_a_client_that_trickles_holds_nobody_up(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    with serving(home, tiny_teacher, tmp_path, timeout_s=2) as service:
        host, port = service.url.removeprefix("http://").split(":")
        slow = []
        for _ in range(50):
            connection = socket.create_connection((host, int(port)))
            connection.sendall(
                f"POST {LABELS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n1".encode()
            )
            slow.append(connection)
        try:
            with Load(service) as load:
                load.wait_for(200, more=50)
            assert load.complaints == []
            slow[0].settimeout(30)
            assert slow[0].recv(100).startswith(b"HTTP/1.1 408")
        finally:
            for connection in slow:
                connection.close()


def test_bodies_from_hell_are_all_refused_in_words(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    """1000 bodies: truncated, bit-flipped and random ones of every media type, each with some query."""
    random = np.random.default_rng(2)
    good = {CROPS_MEDIA_TYPE: encode_crops(CROPS[:4]), "image/png": _png(), "application/json": b'{"images": ["aGVsbG8="]}'}
    queries = ["", "temperature=0", "temperature=nan", "temperature=1e9", "top_k=0", "top_k=99999", "return=x", "nonsense=1", "crop=x"]
    statuses: Counter[int] = Counter()
    with serving(home, tiny_teacher, tmp_path, max_body_bytes=100_000) as service, httpx.Client(timeout=60) as client:
        for number in range(1000):
            media_type = str(random.choice([*good, "image/jpeg", "image/webp", "multipart/form-data; boundary=x", "text/html"]))
            body = _spoiled(good.get(media_type, random.bytes(int(random.integers(0, 300)))), random)
            answer = client.post(
                f"{service.url}{LABELS}?{queries[number % len(queries)]}", content=body, headers={"Content-Type": media_type}
            )
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (media_type, body[:80], answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) >= {"code", "message"}
        assert service.is_right(service.ask(client, 3), 3)
    assert set(statuses) >= {200, 415, 422}


def _png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(CROPS[0]).save(buffer, "PNG")
    return buffer.getvalue()


def _spoiled(body: bytes, random: np.random.Generator) -> bytes:
    """Whole, cut short, or with a few bytes changed."""
    kind = random.integers(0, 3)
    if kind == 0 or not body:
        return body
    if kind == 1:
        return body[: int(random.integers(0, len(body)))]
    changed = bytearray(body)
    for position in random.integers(0, len(body), 3):
        changed[position] ^= int(random.integers(1, 256))
    return bytes(changed)
