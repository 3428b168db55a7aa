"""Two real Triton processes asked as one teacher: kill -9 of one under load costs no question, and back again it gets its share."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import FingerprintMismatch, ServerStartError, TeacherUnavailable
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.pool import PooledTeacher
from teacher_server.pool_member import MemberState
from teacher_server.serve import Gateway, open_backend
from teacher_server.settings import PoolSettings, ServerSettings
from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess

pytestmark = pytest.mark.integration

CROPS = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
TIMEOUT_S = 60.0


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Until a condition comes true; other processes give no signal to wait for."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S:g} s in vain for: {what}"
        await asyncio.sleep(0.05)


def member(pool: PooledTeacher, number: int) -> MemberState:
    return pool.state().members[number]


def opened(address: TeacherAddress) -> PooledTeacher:
    pool = open_teacher(address)
    assert isinstance(pool, PooledTeacher)
    return pool


def test_killing_one_of_two_costs_no_question_and_back_again_it_gets_requests(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    truth_BK = tiny_teacher.logits(CROPS)

    async def scenario(first: TritonProcess, second: TritonProcess) -> None:
        address = TeacherAddress(model="tiny", pool=PoolSettings(urls=[first.url, second.url]), fingerprint=tiny_teacher.info.fingerprint)
        pool = opened(address)
        stop = asyncio.Event()
        answers: list[Any] = []

        async def ask() -> None:
            while not stop.is_set():
                answers.append(await pool.logits(CROPS))  # a question that fails ends the test

        def more_from(number: int) -> Callable[[], bool]:
            before = member(pool, number).requests
            return lambda: member(pool, number).requests >= before + 20

        load = asyncio.gather(*(ask() for _ in range(8)))
        try:
            await eventually(lambda: min(member(pool, 0).requests, member(pool, 1).requests) >= 20, "both are asked")
            assert first.server_pid is not None
            os.kill(first.server_pid, signal.SIGKILL)
            await eventually(lambda: member(pool, 0).standing == "away", "the dead one is found out")
            await eventually(more_from(1), "the other one goes on")
            await asyncio.to_thread(first.restart)
            await eventually(lambda: member(pool, 0).standing == "in", "the restarted one is found")
            await eventually(more_from(0), "it gets requests")
        finally:
            stop.set()
            await load
            await pool.close()
        assert member(pool, 0).failures > 0, "it was killed with requests under way"
        assert sum(state.images for state in pool.state().members) == len(CROPS) * len(answers)
        for logits_BK in answers:
            np.testing.assert_allclose(logits_BK, truth_BK, atol=1e-5)
        assert len({logits_BK.tobytes() for logits_BK in answers}) == 1, "the same labels, whoever gave them"

    with (
        TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path / "first") as first,
        TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path / "second") as second,
    ):
        asyncio.run(scenario(first, second))


def test_a_pool_of_a_triton_and_a_gateway_serves_a_run_and_a_gateway(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    """What `open_backend` does with `server.pool.urls`: found, pinned for workers, and served again by a gateway of its own."""

    async def ask_all(address: TeacherAddress) -> set[str]:
        pool = opened(TeacherAddress.model_validate_json(address.model_dump_json()))
        try:
            while min(state.requests for state in pool.state().members) == 0:
                np.testing.assert_allclose(await pool.logits(CROPS), tiny_teacher.logits(CROPS), atol=1e-5)
            return {state.standing for state in pool.state().members}
        finally:
            await pool.close()

    with TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path) as triton:
        alone = TeacherAddress(model="tiny", triton_url=triton.url)
        with Gateway(lambda: open_teacher(alone), ServerSettings(auth="none", port=0)) as inner:
            settings = ServerSettings(pool=PoolSettings(urls=[triton.url, inner.url]), auth="none", port=0)
            fingerprint = tiny_teacher.info.fingerprint
            with open_backend(settings, tiny_teacher.repository, "tiny", tmp_path, fingerprint=fingerprint) as served:
                assert served.backend_kind == "pool"
                assert served.address.fingerprint == fingerprint
                assert asyncio.run(ask_all(served.address)) == {"in"}
                with Gateway(served.connect, settings) as outer:
                    assert asyncio.run(ask_all(TeacherAddress(model="tiny", pool=PoolSettings(urls=[outer.url])))) == {"in"}
            with (
                pytest.raises(FingerprintMismatch, match="labels of cdcdcdcdcdcd are wanted"),
                open_backend(settings, tiny_teacher.repository, "tiny", tmp_path, fingerprint="cd" * 32),
            ):
                pass
    with (
        pytest.raises(ServerStartError, match=r"no teacher of server\.pool\.urls gives a label: none of 2"),
        open_backend(settings, tiny_teacher.repository, "tiny", tmp_path, fingerprint=fingerprint),
    ):
        pass


def test_a_server_whose_worker_is_dead_is_left_although_triton_calls_it_ready(home: TritonHome, tiny_teacher: Any, tmp_path: Path) -> None:
    """kill -9 of the process behind the model: Triton stays up and fails every request until somebody reloads it."""

    def stub_of(triton: TritonProcess) -> int:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                except OSError:
                    continue
                if int(parent) == triton.server_pid:
                    return int(entry.name)
        raise AssertionError("Triton has no stub")

    async def scenario(broken: TritonProcess, whole: TritonProcess) -> None:
        pool = opened(TeacherAddress(model="tiny", pool=PoolSettings(urls=[broken.url, whole.url]), request_timeout_s=10))
        await pool.info()
        os.kill(stub_of(broken), signal.SIGKILL)
        while member(pool, 0).standing == "in":
            for logits_BK in await asyncio.gather(*(pool.logits(CROPS) for _ in range(4))):
                np.testing.assert_allclose(logits_BK, tiny_teacher.logits(CROPS), atol=1e-5)
        os.kill(stub_of(whole), signal.SIGKILL)
        with pytest.raises(TeacherUnavailable, match="none of 2"):
            await ask_without_end(pool)
        await asyncio.to_thread(broken.restart)
        await eventually(lambda: member(pool, 0).standing == "in", "the restarted one is found")
        np.testing.assert_allclose(await pool.logits(CROPS), tiny_teacher.logits(CROPS), atol=1e-5)
        await pool.close()

    with (
        TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path / "first") as first,
        TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path / "second") as second,
    ):
        asyncio.run(scenario(first, second))


async def ask_without_end(pool: PooledTeacher) -> None:
    """Until it raises."""
    while True:
        await pool.logits(CROPS[:1])
