"""Shared memory without a Triton: a server in this process that maps the same files, and everything that may go wrong between the two."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from distill.errors import RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from teacher_server.fake import fake_logits
from teacher_server.retries import Patience, RetryPolicy
from teacher_server.shared_memory import PREFIX, SHM_DIR, Region, RegionPool, remove_orphans
from teacher_server.triton_shm import SharedMemoryTriton

pytestmark = pytest.mark.skipif(not SHM_DIR.is_dir(), reason="no /dev/shm here: shared memory is for Triton's own host, Linux")

CROPS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
INFO = TeacherInfo(name="m", version=7, fingerprint="a" * 64, class_names=("a", "b", "c"), preprocessing=Preprocessing(image_size=8))


def files() -> set[str]:
    """Regions of this process that are still files."""
    return {path.name for path in SHM_DIR.glob(f"{PREFIX}{os.getpid()}_*")}


class FakeServer:
    """A Triton with shared memory, as its client sees it: maps files by name, reads crops from them and writes logits beside them.

    `hold` keeps answers back until it is set. `fate` of a question: None, or the error in place of an answer, or the shape that is claimed
    of an answer which is not written.
    """

    def __init__(self) -> None:
        self.regions: dict[str, Path] = {}
        self.in_use: list[str] = []
        self.refusals_in_use = 0
        self.num_asked = 0
        self.versions: list[str] = []
        self.max_at_once = 0
        self.hold: asyncio.Event | None = None
        self.fate: Callable[[int], Any] = lambda number: None
        self.info = INFO

    async def get_model_config(self, model: str, client_timeout: float) -> Any:
        parameter = SimpleNamespace(string_value=self.info.model_dump_json())
        return SimpleNamespace(config=SimpleNamespace(max_batch_size=4, parameters={METADATA_KEY: parameter}))

    async def register_system_shared_memory(self, name: str, key: str, byte_size: int, client_timeout: float) -> None:
        path = SHM_DIR / key.removeprefix("/")
        assert path.stat().st_size == byte_size
        assert name not in self.regions
        self.regions[name] = path

    async def unregister_system_shared_memory(self, name: str, client_timeout: float) -> None:
        assert name, "an empty name would be all regions of all clients"
        if name in self.in_use:
            self.refusals_in_use += 1
            raise InferenceServerException(
                f"Cannot unregister shared memory region '{name}', it is currently in use.", status="StatusCode.INTERNAL"
            )
        self.regions.pop(name, None)

    async def get_system_shared_memory_status(self, client_timeout: float) -> Any:
        return SimpleNamespace(regions=dict(self.regions))

    async def infer(self, model: str, inputs: list[Any], model_version: str, outputs: list[Any], client_timeout: float) -> Any:
        self.num_asked += 1
        self.versions.append(model_version)
        number = self.num_asked
        shape = inputs[0].shape()
        where = inputs[0]._get_tensor().parameters
        name = where["shared_memory_region"].string_param
        if name not in self.regions:
            raise InferenceServerException(f"Unable to find shared memory region: '{name}'", status="StatusCode.NOT_FOUND")
        memory = np.memmap(self.regions[name], np.uint8, "r+")
        self.in_use.append(name)
        self.max_at_once = max(self.max_at_once, len(self.in_use))
        work = asyncio.ensure_future(self._work(number, name, memory, shape, outputs))
        return await asyncio.shield(work)  # a client that hangs up does not stop the server's hand

    async def _work(self, number: int, name: str, memory: Any, shape: list[int], outputs: list[Any]) -> Any:
        try:
            if self.hold is not None:
                await self.hold.wait()
            else:
                await asyncio.sleep(0)
            crops = memory[: int(np.prod(shape))].reshape(shape)
            logits = fake_logits(crops, 3)
            entries = {}
            for output in outputs:
                place = output._get_tensor().parameters["shared_memory_offset"].int64_param
                broken = self.fate(number)
                if isinstance(broken, Exception):
                    raise broken
                if broken is None:
                    memory[place : place + logits.nbytes] = np.frombuffer(logits.tobytes(), np.uint8)
                entries[output.name()] = SimpleNamespace(shape=broken or list(logits.shape), datatype="FP32")
            return SimpleNamespace(get_output=entries.get)
        finally:
            self.in_use.remove(name)

    async def close(self) -> None:
        return None


def teacher_over(server: FakeServer, **options: Any) -> SharedMemoryTriton:
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0)

    patience = Patience(RetryPolicy(), 30, sleep=sleep)
    teacher = SharedMemoryTriton("h:1", "m", patience=patience, **options)
    teacher._client = server  # type: ignore[assignment]
    return teacher


def test_labels_come_through_shared_memory_and_regions_are_used_again() -> None:
    async def scenario() -> None:
        server = FakeServer()
        teacher = teacher_over(server, max_in_flight=2)
        for _ in range(3):
            np.testing.assert_array_equal(await teacher.logits(CROPS), fake_logits(CROPS, 3))
        assert server.num_asked == 9
        assert server.max_at_once == 2
        assert len(server.regions) == len(files()) == 2
        await teacher.close()
        assert server.regions == {}

    asyncio.run(scenario())
    assert files() == set()


def test_a_larger_message_gets_a_larger_region_in_the_place_of_a_smaller() -> None:
    async def scenario() -> None:
        server = FakeServer()
        teacher = teacher_over(server, max_in_flight=1)
        async with teacher._pool.lend(1000) as small:
            assert small.size_bytes == 64 * 1024
        async with teacher._pool.lend(64 * 1024 + 1) as large:
            assert large.size_bytes == 128 * 1024
        async with teacher._pool.lend(5) as again:
            assert again is large
        assert files() == {large.name}
        await teacher.close()

    asyncio.run(scenario())
    assert files() == set()


def test_a_cancelled_request_gives_its_region_to_nobody() -> None:
    async def scenario() -> None:
        server = FakeServer()
        teacher = teacher_over(server, max_in_flight=1)
        await teacher.info()
        server.hold = asyncio.Event()
        call = asyncio.ensure_future(teacher.logits(CROPS[:2]))
        while not server.in_use:  # noqa: ASYNC110 - the server has no event to wait for
            await asyncio.sleep(0)
        (abandoned,) = server.in_use
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert abandoned not in files()
        held, server.hold = server.hold, None
        np.testing.assert_array_equal(await teacher.logits(CROPS[2:5]), fake_logits(CROPS[2:5], 3))
        assert set(server.in_use) == {abandoned}, "the server still has it, nobody else"
        held.set()
        await teacher.close()
        assert server.refusals_in_use >= 1
        assert server.regions == {}, "let go of as soon as it was out of use"

    asyncio.run(scenario())
    assert files() == set()


def test_a_server_that_was_started_anew_gets_new_regions() -> None:
    async def scenario() -> None:
        server = FakeServer()
        teacher = teacher_over(server, max_in_flight=4)
        await teacher.logits(CROPS)
        before, asked = files(), server.num_asked
        assert len(before) == 3
        server.regions.clear()
        np.testing.assert_array_equal(await teacher.logits(CROPS[:4]), fake_logits(CROPS[:4], 3))
        assert server.num_asked == asked + 2
        assert not before & files(), "no second message must find out the same"
        assert set(server.regions) == files()
        await teacher.close()

    asyncio.run(scenario())


def test_whoever_was_started_anew_with_another_teacher_is_asked_for_the_whole_batch() -> None:
    async def scenario() -> None:
        server = FakeServer()
        teacher = teacher_over(server, max_in_flight=4)
        await teacher.logits(CROPS)
        server.regions.clear()
        server.info = INFO.replace(fingerprint="b" * 64)
        asked = server.num_asked
        np.testing.assert_array_equal(await teacher.logits(CROPS), fake_logits(CROPS, 3))
        assert (await teacher.info()).fingerprint == "b" * 64
        assert server.num_asked >= asked + 1 + 3
        server.regions.clear()
        server.info = INFO.replace(fingerprint="c" * 64)
        with pytest.raises(TeacherChanged):
            await teacher.logits(CROPS, fingerprint="b" * 64)
        await teacher.close()

    asyncio.run(scenario())


def test_a_version_that_is_gone_ends_in_the_labels_of_the_next_one() -> None:
    async def scenario() -> None:
        server = FakeServer()
        gone = InferenceServerException("Request for unknown model: 'm' version 7 is not found", status="StatusCode.NOT_FOUND")

        def swapped(number: int) -> Any:
            if number == 2:
                server.info = INFO.replace(version=8)
            return gone if number >= 2 and server.versions[-1] == "7" else None

        server.fate = swapped
        teacher = teacher_over(server, max_in_flight=1)
        np.testing.assert_array_equal(await teacher.logits(CROPS), fake_logits(CROPS, 3))
        assert server.versions[:2] == ["7", "7"]
        assert server.versions.index("8") == len(server.versions) - 3, "all three messages"
        await teacher.close()

    asyncio.run(scenario())


def test_an_answer_that_is_not_there_is_no_label() -> None:
    async def scenario(fate: Any, kind: type[Exception], words: str) -> None:
        server = FakeServer()
        teacher = teacher_over(server)
        await teacher.logits(CROPS[:4])  # leaves good labels in the region
        server.fate = lambda number: fate
        with pytest.raises(kind, match=words):
            await teacher.logits(CROPS[:4])
        await teacher.close()

    asyncio.run(scenario([4, 2], TeacherAnswerError, "no logits of float32"))
    asyncio.run(scenario([4, 3], TeacherAnswerError, "NaN"))  # it says that it has answered, and has written nothing
    asyncio.run(scenario(InferenceServerException("bad shape", status="StatusCode.INVALID_ARGUMENT"), RequestRefused, "bad shape"))
    assert files() == set()


def test_unavailable_is_asked_again_and_not_in_the_same_region() -> None:
    async def scenario() -> None:
        server = FakeServer()
        gone = InferenceServerException("Exceeds maximum queue size", status="StatusCode.UNAVAILABLE")
        server.fate = lambda number: gone if number in (1, 3) else None
        teacher = teacher_over(server, max_in_flight=1)
        np.testing.assert_array_equal(await teacher.logits(CROPS), fake_logits(CROPS, 3))
        assert server.num_asked == 5
        await teacher.close()

    asyncio.run(scenario())
    assert files() == set()


def test_a_server_elsewhere_is_told_apart_with_the_way_out() -> None:
    class Elsewhere(FakeServer):
        async def register_system_shared_memory(self, name: str, key: str, byte_size: int, client_timeout: float) -> None:
            raise InferenceServerException(f"Unable to open shared memory region: '{key}'", status="StatusCode.INTERNAL")

    async def scenario() -> None:
        teacher = teacher_over(Elsewhere())
        with pytest.raises(RequestRefused, match=r"another host.*use grpc://"):
            await teacher.logits(CROPS)
        await teacher.close()

    asyncio.run(scenario())
    assert files() == set()


def test_a_full_shared_memory_is_an_error_and_no_sigbus(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RequestRefused, match=r"no room for 70000 bytes.*--shm-size"):
        Region(70000)
    assert files() == set()


def test_close_does_not_wait_for_a_server_that_never_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.shared_memory._CLOSE_TIMEOUT_S", 0.01)

    class Stubborn(FakeServer):
        async def unregister_system_shared_memory(self, name: str, client_timeout: float) -> None:
            raise InferenceServerException("it is currently in use.", status="StatusCode.INTERNAL")

    async def scenario() -> None:
        teacher = teacher_over(Stubborn())
        await teacher.logits(CROPS)
        await teacher.close()

    asyncio.run(scenario())
    assert files() == set()


def test_what_dead_clients_left_with_the_server_is_let_go_of() -> None:
    async def scenario() -> None:
        server = FakeServer()
        dead, foreign = f"{PREFIX}1_{'0' * 32}", "somebody_elses"
        living = Region(70000)
        server.regions = {name: SHM_DIR / name for name in (dead, foreign, living.name)}
        teacher = teacher_over(server)
        await teacher.logits(CROPS[:1])
        assert dead not in server.regions
        assert {foreign, living.name} <= set(server.regions)
        await teacher.close()
        living.close()

    asyncio.run(scenario())


CHILD = """
import os, signal, sys
from teacher_server.shared_memory import Region
region = Region(70000)
print(region.name, flush=True)
signal.pause()
"""


def child() -> tuple[subprocess.Popen[str], str]:
    """A process with a region, in a group of its own with its resource tracker."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_files_of_the_living_stay_and_those_of_the_dead_go() -> None:
    process, name = child()
    own = Region(70000)
    try:
        remove_orphans()
        assert (SHM_DIR / name).exists()
        assert (SHM_DIR / own.name).exists()
        os.killpg(process.pid, signal.SIGKILL)  # the resource tracker, too
        process.wait()
        assert (SHM_DIR / name).exists()
        remove_orphans()
        assert not (SHM_DIR / name).exists()
        assert (SHM_DIR / own.name).exists()
    finally:
        own.close()
        assert process.stdout is not None
        process.stdout.close()


def test_a_file_with_a_lock_has_an_owner_although_no_such_process_is_here() -> None:
    """As in another container on the same /dev/shm."""
    own = Region(70000)
    elsewhere = SHM_DIR / f"{PREFIX}99999999_{'0' * 32}"
    (SHM_DIR / own.name).rename(elsewhere)
    try:
        remove_orphans()
        assert elsewhere.exists()
    finally:
        elsewhere.rename(SHM_DIR / own.name)
        own.close()


def test_a_file_of_a_living_process_stays_in_the_moment_before_its_lock() -> None:
    young = SHM_DIR / f"{PREFIX}{os.getpid()}_{'0' * 32}"
    young.touch()
    try:
        remove_orphans()
        assert young.exists()
    finally:
        young.unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_client_leaves_no_file(number: signal.Signals, wait_for: Callable[[Callable[[], bool]], bool]) -> None:
    process, name = child()
    os.kill(process.pid, number)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert wait_for(lambda: not (SHM_DIR / name).exists())


def test_a_client_that_is_never_closed_leaves_no_file() -> None:
    code = """
import asyncio
from teacher_server.shared_memory import RegionPool
class Server:
    async def register(self, name, size): print(name)
    async def registered(self): return []
async def main():
    global pool
    pool = RegionPool(Server())
    async with pool.lend(1): pass
asyncio.run(main())
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.startswith(PREFIX)
    assert not (SHM_DIR / made.stdout.strip()).exists()
    assert made.stderr == ""


def test_unavailable_while_registering_leaves_nothing() -> None:
    class Away:
        async def register(self, name: str, size_bytes: int) -> None:
            raise TeacherUnavailable("away")

        async def unregister(self, name: str) -> bool:
            raise TeacherUnavailable("away")

        async def registered(self) -> list[str]:
            raise TeacherUnavailable("away")

    async def scenario() -> None:
        pool = RegionPool(Away())
        with pytest.raises(TeacherUnavailable):
            async with pool.lend(5):
                pass
        assert files() == set()
        await pool.close()

    asyncio.run(scenario())


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], bool]:
    """Whether a condition comes true within some seconds; another process gives no signal to wait for."""

    def wait(condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 20
        while not condition():
            if time.monotonic() > deadline:
                return False
            threading.Event().wait(0.02)
        return True

    return wait
