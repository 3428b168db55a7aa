"""`distill gateway`: only REST, before a Triton that comes and goes by itself."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess
from tests.integration.conftest import DISTILL


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen([str(DISTILL), "gateway", *words], stdout=pipe, stderr=subprocess.STDOUT, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_gateway_outlives_its_teacher(
    home: TritonHome, tiny_teacher: Any, tmp_path: Path, started: Callable[..., subprocess.Popen[str]], wait_until: Callable[..., Any]
) -> None:
    triton = TritonProcess(home, tiny_teacher.repository, "tiny", tmp_path)  # its ports are known before it runs
    gateway = started("--model=tiny", f"--triton={triton.url}", "server.port=0", "server.auth=none")
    assert gateway.stdout is not None
    url = re.search(r"http://127\.0\.0\.1:\d+", gateway.stdout.readline())
    assert url is not None
    assert "waiting for the teacher" in gateway.stdout.readline()
    assert httpx.get(f"{url[0]}/healthz", timeout=10).status_code == 200
    assert httpx.get(f"{url[0]}/readyz", timeout=30).status_code == 503

    def ready() -> bool:
        return httpx.get(f"{url[0]}/readyz", timeout=30).status_code == 200

    try:
        triton.start()
        wait_until(ready, gateway)
        assert "ready: a label came out of tiny" in gateway.stdout.readline()
        size = httpx.get(f"{url[0]}/v1/models/tiny", timeout=30).json()["preprocessing"]["image_size"]
        assert size > 0
    finally:
        triton.stop()
    wait_until(lambda: not ready(), gateway)
    with triton:
        wait_until(ready, gateway)
    gateway.terminate()
    out, _ = gateway.communicate(timeout=60)
    assert gateway.returncode == 0, out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model=t"], "give --triton HOST:PORT"),
        (["--model=t", "--triton=localhost:1", "server.prt=1"], "did you mean 'port'?"),
        (["--model=t", "--triton=localhost:1", "train.epochs=1"], "train is no setting of the gateway"),
        (["--model=t", "--triton=localhost:1", "server.pool.urls=[localhost:2]", "server.auth=none"], "both say where the teacher is"),
        (["--model=t", "--triton=localhost:1", "server.host=0.0.0.0"], "distill keys add"),
    ],
)
def test_a_word_that_makes_no_sense_is_refused_in_one_line(words: list[str], says: str, started: Callable[..., Any]) -> None:
    gateway = started(*words)
    out, _ = gateway.communicate(timeout=60)
    assert gateway.returncode == 2, out
    assert says in out
    assert "Traceback" not in out
