"""`distill submit`: a verb as a job on a real Ray cluster that answers only to its token."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import DISTILL, ROOT, Line


@dataclass
class Cluster:
    """A Ray head on this machine."""

    url: str
    environment: dict[str, str]
    token: Path

    def submit(self, *words: str) -> subprocess.Popen[str]:
        command = [str(DISTILL), "submit", "--cluster", self.url, "--patience-s", "60", "--", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def jobs(self) -> list[dict[str, Any]]:
        """What Ray's job server says, asked by plain HTTP."""
        request = urllib.request.Request(f"{self.url}/api/jobs/", headers={"Authorization": f"Bearer {self.token.read_text()}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        dashboard, gcs, client = (one.getsockname()[1] for one in sockets)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": os.pathsep.join([str(DISTILL.parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    start = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    quiet = [
        "--disable-usage-stats",
        "--object-store-memory=100000000",
        f"--temp-dir=/tmp/ray-{os.getpid()}",
        f"--ray-client-server-port={client}",
    ]
    low = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    command = [str(Path(sys.executable).with_name("ray")), *start, *quiet, *low]
    log = folder / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 180
        while not _healthy(url):
            assert head.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Cluster(url, environment, token)
    finally:
        head.terminate()
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/gcs_healthz", timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def test_a_job_ends_as_its_verb_ends(cluster: Cluster) -> None:
    submitted = cluster.submit("report", "--config", "nowhere.yaml")
    out, _ = submitted.communicate(timeout=300)
    assert submitted.returncode == 2, out
    assert "run file nowhere.yaml does not exist" in out


def test_who_has_no_token_is_told_so(cluster: Cluster) -> None:
    kept = dict(cluster.environment)
    try:
        cluster.environment.update({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""})
        submitted = cluster.submit("report")
        out, _ = submitted.communicate(timeout=120)
    finally:
        cluster.environment.update(kept)
    assert submitted.returncode == 1
    assert "wants the token of its cluster" in out


def test_a_follower_that_died_finds_its_job_and_takes_it_along(
    cluster: Cluster, new_line: Callable[..., Line], tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    line = new_line(tmp_path / "run")
    words = ("pretrain", f"run_dir={line.folder}", *line.overrides, "pretrain.epochs=500")
    first = cluster.submit(*words)
    wait_until(lambda: any(line.folder.rglob("metrics.jsonl")), first)
    first.kill()
    first.communicate()

    second = cluster.submit(*words)
    assert second.stdout is not None
    said = ""
    while "it is followed" not in said:
        line_of_log = second.stdout.readline()
        assert line_of_log, said
        said += line_of_log
    running = [job for job in cluster.jobs() if job["status"] == "RUNNING"]
    assert len(running) == 1, "not submitted a second time"

    second.terminate()
    out, _ = second.communicate(timeout=300)
    assert second.returncode == 143, out
    assert "training writes a checkpoint first" in said + out
    ended = next(job for job in cluster.jobs() if job["submission_id"] == running[0]["submission_id"])
    assert ended["status"] == "STOPPED"
    assert any(line.folder.glob("pretrain/**/weights.safetensors")), sorted(line.folder.rglob("*"))
