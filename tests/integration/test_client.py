"""The client with the real Triton and the real gateway: three ways, one answer, and nothing left behind."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import InferenceServerClient

from distill.errors import RequestRefused
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.client import FileLabels, FileRefused, open_async_client, open_client
from teacher_server.embedded import EmbeddedTeacher
from teacher_server.serve import Gateway
from teacher_server.settings import ServerSettings
from teacher_server.shared_memory import PREFIX, SHM_DIR
from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess

pytestmark = pytest.mark.integration

CROPS = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
TEMPERATURE = 3.3


@pytest.fixture(scope="module")
def triton(home: TritonHome, tiny_teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    with TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path_factory.mktemp("log")) as process:
        yield process


@pytest.fixture(scope="module")
def gateway(triton: TritonProcess) -> Iterator[Gateway]:
    address = TeacherAddress(model="tiny", triton_url=triton.url)
    with Gateway(lambda: open_teacher(address), ServerSettings(auth="none", port=0)) as running:
        yield running


@pytest.fixture(scope="module")
def truth(tiny_teacher: Any) -> tuple[Any, Any]:
    """(logits, soft labels) of the engine in this process."""

    async def ask() -> tuple[Any, Any]:
        embedded = EmbeddedTeacher.from_repository(tiny_teacher.repository, "tiny", num_threads=1)
        try:
            return await embedded.soft_labels(CROPS, np.full((100, 1), TEMPERATURE, np.float32), with_logits=True)
        finally:
            await embedded.close()

    return asyncio.run(ask())


def files(owner: int) -> set[str]:
    """Regions of process `owner` that are still files."""
    return {path.name for path in SHM_DIR.glob(f"{PREFIX}{owner}_*")}


def registered(triton: TritonProcess) -> set[str]:
    """Regions that Triton has mapped."""
    client = InferenceServerClient(triton.url)
    try:
        return set(client.get_system_shared_memory_status().regions)
    finally:
        client.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 30) -> bool:
    """Whether a condition comes true in time; other processes give no signal to wait for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.02)
    return True


@pytest.mark.parametrize("way", ["grpc", "grpc+shm", "http"])
def test_every_way_gives_the_labels_of_the_engine(
    way: str, triton: TritonProcess, gateway: Gateway, truth: tuple[Any, Any], tiny_teacher: Any
) -> None:
    url = gateway.url if way == "http" else f"{way}://{triton.url}/tiny"
    with open_client(url, timeout_s=20) as client:
        assert client.ready()
        assert client.info() == tiny_teacher.info
        # ONNX Runtime may add up in another order where the batches are of another size.
        np.testing.assert_allclose(client.logits(CROPS), truth[0], atol=1e-6)
        np.testing.assert_allclose(client.soft_labels(CROPS, TEMPERATURE), truth[1], atol=1e-6)
        ids_BR, probs_BR = client.soft_labels(CROPS, TEMPERATURE, top_k=4)
        np.testing.assert_allclose(probs_BR, np.sort(truth[1], axis=1)[:, :-5:-1], atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(truth[1], ids_BR.astype(np.intp), axis=1), probs_BR, atol=1e-6)
        mixed_B = np.linspace(0.5, 20, 100)
        np.testing.assert_allclose(client.soft_labels(CROPS, mixed_B), tiny_teacher.soft_labels(CROPS, mixed_B[:, None]), atol=1e-6)
        with ThreadPoolExecutor(8) as threads:
            singles = list(threads.map(lambda i: client.logits(CROPS[i : i + 1]), range(100)))
        np.testing.assert_allclose(np.concatenate(singles), truth[0], atol=1e-6)
        with pytest.raises(RequestRefused, match="tiny takes crops"):
            client.logits(CROPS[:, :4])
    assert files(os.getpid()) == set()
    assert registered(triton) == set()


def test_image_files_go_to_the_gateway_only(triton: TritonProcess, gateway: Gateway, truth: tuple[Any, Any], tmp_path: Path) -> None:
    images = []
    for crop in CROPS[:5]:
        buffer = io.BytesIO()
        Image.fromarray(crop).save(buffer, "PNG")
        images.append(buffer.getvalue())
    (tmp_path / "last.png").write_bytes(images.pop())
    with open_client(gateway.url) as client:
        *labels, last, refused = client.soft_labels_of([*images, tmp_path / "last.png", b"no image"], TEMPERATURE)
    assert isinstance(refused, FileRefused)
    for position, result in enumerate([*labels, last]):
        assert isinstance(result, FileLabels)
        np.testing.assert_allclose(result.probs_R, truth[1][position], atol=1e-6)
    for scheme in ("grpc", "grpc+shm"):
        with open_client(f"{scheme}://{triton.url}/tiny") as client, pytest.raises(RequestRefused, match="http://"):
            client.soft_labels_of(images)


def test_calls_outlive_a_killed_and_restarted_triton(home: TritonHome, tiny_teacher: Any, truth: tuple[Any, Any], tmp_path: Path) -> None:
    async def scenario(triton: TritonProcess) -> None:
        async with (
            open_async_client(f"grpc://{triton.url}/tiny", timeout_s=60) as plain,
            open_async_client(f"grpc+shm://{triton.url}/tiny", timeout_s=60) as shared,
        ):
            for client in (plain, shared):
                np.testing.assert_allclose(await client.logits(CROPS), truth[0], atol=1e-6)
            assert triton.server_pid is not None
            os.kill(triton.server_pid, signal.SIGKILL)
            calls = [asyncio.ensure_future(client.logits(CROPS)) for client in (plain, shared)]
            await asyncio.to_thread(triton.restart)
            for call in calls:
                np.testing.assert_allclose(await call, truth[0], atol=1e-6)
            np.testing.assert_allclose(await shared.soft_labels(CROPS, TEMPERATURE), truth[1], atol=1e-6)
            assert registered(triton) == files(os.getpid()) != set()

    with TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path) as triton:
        asyncio.run(scenario(triton))
        assert registered(triton) == set()
    assert files(os.getpid()) == set()


def test_cancelled_calls_spoil_no_others_and_leave_no_region(triton: TritonProcess, truth: tuple[Any, Any]) -> None:
    async def scenario() -> None:
        random = np.random.default_rng(0)
        num_right = num_cancelled = 0

        async def asker(client: Any) -> None:
            nonlocal num_right, num_cancelled
            for _ in range(25):
                start, size = int(random.integers(0, 60)), int(random.integers(1, 40))
                call = asyncio.ensure_future(client.logits(CROPS[start : start + size]))
                if random.random() < 0.5:
                    await asyncio.sleep(float(random.uniform(0, 0.01)))
                    call.cancel()
                try:
                    np.testing.assert_allclose(await call, truth[0][start : start + size], atol=1e-6)
                    num_right += 1
                except asyncio.CancelledError:
                    num_cancelled += 1

        async with open_async_client(f"grpc+shm://{triton.url}/tiny", max_in_flight=16) as client:
            await asyncio.gather(*[asker(client) for _ in range(16)])
            assert len(files(os.getpid())) <= 16
        assert num_right + num_cancelled == 400
        assert num_right > 100
        assert num_cancelled >= 1  # how many come too late is a matter of speed

    asyncio.run(scenario())
    assert files(os.getpid()) == set()
    assert eventually(lambda: registered(triton) == set())


def test_a_killed_client_leaves_no_file_and_the_next_one_frees_the_server(triton: TritonProcess, truth: tuple[Any, Any]) -> None:
    code = """
import signal, sys
import numpy as np
from teacher_server.client import open_client
client = open_client(sys.argv[1])
client.logits(np.zeros((5, 8, 8, 3), np.uint8))
print("asked", flush=True)
signal.pause()
"""
    url = f"grpc+shm://{triton.url}/tiny"
    command = [sys.executable, "-c", code, url]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "asked\n"
    left = files(killed.pid)
    assert left
    assert left == registered(triton)
    os.killpg(killed.pid, signal.SIGKILL)  # with its resource tracker, which else would remove the file by itself
    killed.wait()
    killed.stdout.close()
    with open_client(url) as client:
        np.testing.assert_allclose(client.logits(CROPS), truth[0], atol=1e-6)
        assert files(killed.pid) == set()
        assert not left & registered(triton)
    assert registered(triton) == set()


def test_a_server_that_is_slow_to_shake_hands_is_reached(triton: TritonProcess) -> None:
    """Three seconds: longer than any wait between two attempts, so an attempt that is given up after that wait never gets through."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # whoever hangs up first
            while data := await reader.read(2**16):
                writer.write(data)
            writer.close()
            await writer.wait_closed()

    async def overloaded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3)
        host, _, port = triton.url.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, back), pump(there, writer))
        ended.set()

    ended = asyncio.Event()

    async def scenario() -> None:
        async with await asyncio.start_server(overloaded, "127.0.0.1", 0) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            async with open_async_client(f"grpc://127.0.0.1:{port}/tiny", timeout_s=20) as client:
                assert (await client.info()).name == "tiny"
            await ended.wait()

    asyncio.run(scenario())


def test_a_server_that_stood_still_answers_the_same_client_again(triton: TritonProcess, truth: tuple[Any, Any]) -> None:
    async def scenario() -> None:
        async with open_async_client(f"grpc://{triton.url}/tiny", timeout_s=1) as impatient:
            assert await impatient.ready()
            assert triton.server_pid is not None
            os.kill(triton.server_pid, signal.SIGSTOP)
            try:
                assert not await impatient.ready()
            finally:
                os.kill(triton.server_pid, signal.SIGCONT)
            deadline = time.monotonic() + 30
            while not await impatient.ready():
                assert time.monotonic() < deadline
            np.testing.assert_allclose(await impatient.logits(CROPS), truth[0], atol=1e-6)

    asyncio.run(scenario())
