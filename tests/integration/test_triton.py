"""The real Triton server with the tiny teacher: the same labels as in process, and no surprise when it dies."""

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
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from distill.errors import RequestRefused, ServerStartError, TeacherUnavailable
from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, decode_soft_labels, encode_crops
from teacher_server.activation import triton_control
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.embedded import EmbeddedTeacher
from teacher_server.serve import Gateway, open_backend
from teacher_server.settings import ServerSettings, TritonSettings
from teacher_server.triton import TritonTeacher
from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess, canary_label

pytestmark = pytest.mark.integration

RANDOM = np.random.default_rng(0)
CROPS = RANDOM.integers(0, 256, (100, 8, 8, 3), np.uint8)
TEMPERATURE = RANDOM.uniform(0.5, 20, (100, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def triton(home: TritonHome, tiny_teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    with TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path_factory.mktemp("log")) as process:
        yield process


def left_of(owner: int) -> list[str]:
    """Processes and shared memory of Tritons that process `owner` started; each carries a mark with its id."""
    mark = f"distill_triton_{owner}_"
    found = [entry.name for entry in Path("/dev/shm").iterdir() if mark in entry.name]
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:  # it ended while we looked
            continue
    return sorted(found)


def stub_of(triton: TritonProcess) -> int:
    """The process behind the model: Triton's child, seen by its parent's id."""
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except (OSError, IndexError):  # no process, or not any more
            continue
        if int(parent) == triton.server_pid:
            return int(entry.name)
    raise AssertionError("Triton has no stub")


def eventually(condition: Callable[[], bool], timeout_s: float = 30) -> bool:
    """Whether a condition comes true in time; other processes give no signal to wait for."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.05)
    return True


def test_triton_and_embedded_give_the_same_labels(triton: TritonProcess, tiny_teacher: Any) -> None:
    async def scenario() -> None:
        served = TritonTeacher(triton.url, "tiny")
        embedded = EmbeddedTeacher.from_repository(tiny_teacher.repository, "tiny", num_threads=1)
        try:
            assert await served.info() == await embedded.info() == tiny_teacher.info
            theirs = await served.soft_labels(CROPS, TEMPERATURE, with_logits=True)
            ours = await embedded.soft_labels(CROPS, TEMPERATURE, with_logits=True)
            for tensor, same in zip(theirs, ours, strict=True):
                np.testing.assert_allclose(tensor, same, atol=1e-6)
            np.testing.assert_allclose(theirs[1], tiny_teacher.soft_labels(CROPS, TEMPERATURE), atol=1e-6)
        finally:
            await served.close()
            await embedded.close()

    asyncio.run(scenario())


def test_concurrent_single_images_share_batches_and_keep_their_answers(triton: TritonProcess, tiny_teacher: Any) -> None:
    async def scenario() -> Any:
        teacher = TritonTeacher(triton.url, "tiny", max_in_flight=64)
        try:
            questions = [teacher.soft_labels(CROPS[i : i + 1], TEMPERATURE[i : i + 1]) for i in range(100)]
            return np.concatenate([probs_BK for _, probs_BK in await asyncio.gather(*questions)])
        finally:
            await teacher.close()

    before = statistics(triton)
    probs_BK = asyncio.run(scenario())
    np.testing.assert_allclose(probs_BK, tiny_teacher.soft_labels(CROPS, TEMPERATURE), atol=1e-6)
    after = statistics(triton)
    images, executions = (int(after[key]) - int(before[key]) for key in ("inference_count", "execution_count"))
    assert images == 100
    assert executions < 60, "the dynamic batcher put requests together"


def statistics(triton: TritonProcess) -> dict[str, Any]:
    return httpx.get(f"{triton.http_url}/v2/models/tiny/stats").json()["model_stats"][0]


def test_what_triton_refuses_is_refused_in_words(triton: TritonProcess) -> None:
    async def scenario() -> None:
        teacher = TritonTeacher(triton.url, "tiny")
        await teacher.info()
        with pytest.raises(RequestRefused, match="tiny"):
            await teacher._ask_one(CROPS[:1, :4, :4], TEMPERATURE[:1], ("logits",), 1)
        with pytest.raises(RequestRefused, match="above 0"):
            await teacher._ask_one(CROPS[:1], TEMPERATURE[:1] * 0, ("logits",), 1)
        await teacher.close()
        other = TritonTeacher(triton.url, "other")
        with pytest.raises(TeacherUnavailable, match="'other'"):
            await other.info()
        assert not await other.ready()
        await other.close()

    asyncio.run(scenario())


def test_triton_listens_on_loopback_only(triton: TritonProcess) -> None:
    addresses = {
        line.split()[1].split(":")[0]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if int(line.split()[1].split(":")[1], 16) in (triton.http_port, triton.grpc_port, triton.metrics_port) and line.split()[3] == "0A"
    }
    assert addresses == {"0100007F"}


def test_a_killed_server_is_unavailable_and_the_same_client_goes_on_after_a_restart(
    home: TritonHome, tiny_teacher: Any, tmp_path: Path
) -> None:
    async def scenario(triton: TritonProcess) -> None:
        teacher = TritonTeacher(triton.url, "tiny", request_timeout_s=10)
        truth_BK = tiny_teacher.logits(CROPS)
        np.testing.assert_allclose(await teacher.logits(CROPS), truth_BK, atol=1e-5)
        assert triton.server_pid is not None
        os.kill(triton.server_pid, signal.SIGKILL)
        with pytest.raises(TeacherUnavailable, match="does not answer"):
            await ask_without_end(teacher)
        assert not await teacher.ready()
        await asyncio.to_thread(triton.restart)
        np.testing.assert_allclose(await teacher.logits(CROPS), truth_BK, atol=1e-5)
        await teacher.close()

    before = left_of(os.getpid())
    with TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path) as triton:
        asyncio.run(scenario(triton))
        assert len(left_of(os.getpid())) > len(before)
    assert left_of(os.getpid()) == before


async def ask_without_end(teacher: TritonTeacher) -> None:
    """Until it raises: an answer may still be on its way when a server dies."""
    while True:
        await teacher.logits(CROPS[:1])


def test_a_dead_worker_is_noticed_and_brought_back(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    """Triton calls the model ready all the time: only the canary notices."""
    from teacher_server.triton_watch import TritonWatch

    before = left_of(os.getpid())
    with TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path) as triton, TritonWatch(triton, interval_s=0.2) as watch:
        os.kill(stub_of(triton), signal.SIGKILL)
        assert eventually(lambda: watch.num_restarts == 1)
        assert triton.ask_canary() == tiny_teacher.info
    assert left_of(os.getpid()) == before


def test_a_server_whose_owner_is_killed_goes_too(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from teacher_server.triton_home import find_triton; "
        "from teacher_server.triton_process import TritonProcess; home, repository, log = map(Path, sys.argv[1:]); "
        "TritonProcess(find_triton(home), repository, 'tiny', log).start(); print('up', flush=True); signal.pause()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(home.path), str(tiny_teacher.repository), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    assert len(left_of(owner.pid)) >= 3, "guard, server, shared memory"
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert eventually(lambda: not left_of(owner.pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_a_service_in_order(home: TritonHome, tiny_teacher: Any, tmp_path: Path, number: signal.Signals) -> None:
    code = """
import sys
from pathlib import Path
from teacher_server.serve import Gateway, open_backend
from teacher_server.settings import ServerSettings, TritonSettings
home, repository, log = sys.argv[1:]
settings = ServerSettings(backend="triton", port=0, auth="none", triton=TritonSettings(home=home))
with open_backend(settings, Path(repository), "tiny", Path(log)) as served, Gateway(served.connect, settings) as gateway:
    print(gateway.url, flush=True)
    gateway.serve_until_stopped()
print("in order", flush=True)
"""
    service = subprocess.Popen(
        [sys.executable, "-c", code, str(home.path), str(tiny_teacher.repository), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert service.stdout is not None
    url = service.stdout.readline().strip()
    assert httpx.get(f"{url}/readyz").status_code == 200
    os.killpg(service.pid, number)  # the whole group, as a terminal does
    assert service.wait(60) == 0
    assert service.stdout.read() == "in order\n"
    service.stdout.close()
    assert left_of(service.pid) == []


def test_a_model_that_does_not_load_is_an_error_with_its_reason(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    before = left_of(os.getpid())
    folder = tmp_path / "repository" / "tiny"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(b"not a graph")
    (folder / "config.pbtxt").write_text((tiny_teacher.repository / "tiny" / "config.pbtxt").read_text())
    with pytest.raises(ServerStartError, match=r"(?s)ended.*triton\.log.*model\.onnx"):
        TritonProcess(home, tmp_path / "repository", "tiny", tmp_path).start()
    assert left_of(os.getpid()) == before


def test_rest_over_a_real_socket_with_triton_behind(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    settings = ServerSettings(backend="triton", port=0, auth="none", triton=TritonSettings(home=str(home.path)))
    before, threads_before = left_of(os.getpid()), threading.active_count()
    png = io.BytesIO()
    Image.fromarray(CROPS[0]).save(png, "PNG")
    with (
        open_backend(settings, tiny_teacher.repository, "tiny", tmp_path) as served,
        Gateway(served.connect, settings) as gateway,
        httpx.Client(base_url=gateway.url) as client,
    ):
        assert served.backend_kind == "triton"
        assert served.reason is None
        assert client.get("/readyz").status_code == 200
        answer = client.post("/v1/soft-labels", params={"temperature": 4}, content=png.getvalue(), headers={"content-type": "image/png"})
        expected_K = tiny_teacher.soft_labels(CROPS[:1], np.array([[4]], np.float32))[0]
        np.testing.assert_allclose(answer.json()["items"][0]["values"], expected_K, atol=1e-6)
        headers = {"content-type": CROPS_MEDIA_TYPE, "accept": SOFT_LABELS_MEDIA_TYPE}
        body = client.post("/v1/soft-labels", params={"return": "logits"}, content=encode_crops(CROPS), headers=headers).content
        np.testing.assert_allclose(decode_soft_labels(body).values_BR, tiny_teacher.logits(CROPS), atol=1e-5)
        assert asyncio.run(labels_from_afar(served.address)).shape == (100, 10)
        with pytest.raises(ServerStartError, match=r"choose another server\.port"):
            Gateway(served.connect, settings.replace(port=gateway.port)).start()
    assert left_of(os.getpid()) == before
    assert eventually(lambda: threading.active_count() <= threads_before)


async def labels_from_afar(address: TeacherAddress) -> Any:
    """What a worker elsewhere does with an address that came as JSON."""
    teacher = open_teacher(TeacherAddress.model_validate_json(address.model_dump_json()))
    try:
        return await teacher.logits(CROPS)
    finally:
        await teacher.close()


def test_a_running_triton_is_told_to_load_the_teacher_that_is_wanted(
    triton: TritonProcess, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    """The students' teacher of a run that distils itself first is another model than the one that Triton was started for."""
    with triton_control(triton.url) as control:
        control.unload("tiny")
        wait_until(lambda: control.config("tiny") is None)
        settings = ServerSettings(triton=TritonSettings(url=triton.url))
        with open_backend(settings, tmp_path, "tiny", tmp_path) as served:
            assert served.triton_url == triton.url
            assert canary_label(triton.url, "tiny").name == "tiny"
        with pytest.raises(ServerStartError, match="nobody"), open_backend(settings, tmp_path, "nobody", tmp_path):
            pass
