"""The synchronous client: from many threads, inside a running event loop, and at its end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from distill.errors import DistillError, TeacherUnavailable
from teacher_server.async_client import AsyncTeacherClient
from teacher_server.fake import FakeTeacher, fake_logits
from teacher_server.gateway import create_app
from teacher_server.rest import RestTeacher
from teacher_server.settings import ServerSettings
from teacher_server.sync_client import TeacherClient, open_client

CROPS = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)


def client_of(teacher: FakeTeacher) -> TeacherClient:
    """A client of the real gateway, inside this process."""
    transport = httpx.ASGITransport(create_app(teacher, ServerSettings(auth="none")), raise_app_exceptions=False)
    return TeacherClient(AsyncTeacherClient(RestTeacher("http://gateway", transport=transport)))


def test_many_threads_share_a_client_and_get_their_own_labels() -> None:
    truth_BK = fake_logits(CROPS, 10)
    with client_of(FakeTeacher(delay_s=0.001)) as client, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda i: client.logits(CROPS[i : i + 1]), range(64)))
        np.testing.assert_array_equal(np.concatenate(answers), truth_BK)
        assert client.info().name == "fake"
        assert client.ready()


def test_it_works_where_an_event_loop_runs_already() -> None:
    async def cell_of_a_notebook() -> np.ndarray:
        with client_of(FakeTeacher()) as client:
            ids_BR, _ = client.soft_labels(CROPS, top_k=3)
            np.testing.assert_array_equal(ids_BR[:, 0], fake_logits(CROPS, 10).argmax(axis=1))
            return client.logits(CROPS)

    np.testing.assert_array_equal(asyncio.run(cell_of_a_notebook()), fake_logits(CROPS, 10))


def test_closing_ends_calls_under_way_and_the_thread() -> None:
    teacher = FakeTeacher(delay_s=3600)
    client = client_of(teacher)
    failures: list[Exception] = []

    def call() -> None:
        try:
            client.logits(CROPS)
        except TeacherUnavailable as error:
            failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    while len(teacher.calls) < 3:
        threading.Event().wait(0.001)
    closers = [threading.Thread(target=client.close) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in (*callers, *closers):
        thread.join(30)
        assert not thread.is_alive()
    client.close()
    assert len(failures) == 3
    assert "closed" in str(failures[0])
    assert teacher.cancelled == 3, "nobody works for a caller that has gone"
    assert not client._thread.is_alive()
    with pytest.raises(DistillError, match="closed"):
        client.logits(CROPS)


def test_opening_connects_nowhere_and_closing_an_unused_client_is_quick() -> None:
    for url in ("http://127.0.0.1:9", "grpc://127.0.0.1:9/m", "grpc+shm://127.0.0.1:9/m"):
        open_client(url).close()


def test_ctrl_c_ends_the_waiting_and_the_work() -> None:
    teacher = FakeTeacher(delay_s=3600)

    def press() -> None:
        while not teacher.calls:
            threading.Event().wait(0.001)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with client_of(teacher) as client:
        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            client.logits(CROPS)
        presser.join()
    assert teacher.cancelled == 1


def test_a_forked_child_is_told_to_open_its_own() -> None:
    client = client_of(FakeTeacher())
    owner, client._owner = client._owner, -1
    with pytest.raises(DistillError, match="fork"):
        client.info()
    client._owner = owner
    assert client.info().name == "fake"
    client.close()


def test_errors_keep_their_types_across_the_thread() -> None:
    with client_of(FakeTeacher()) as client, pytest.raises(DistillError, match=r"\[B,8,8,3\]"):
        client.logits(CROPS[:, :4])


def test_who_asks_a_gateway_loads_no_server_no_network_library_and_no_grpc() -> None:
    heavy = {"torch", "fastapi", "grpc", "tritonclient", "onnxruntime", "ray"}
    code = f"import sys, teacher_server.client; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
