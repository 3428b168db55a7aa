"""A real Prometheus, with our own configuration, asks a real gateway and a real run, and answers every question of the dashboard."""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from distill.wire import CROPS_MEDIA_TYPE, LABELS_PATH, encode_crops
from student_trainer.run_metrics import MetricsServer, RunMetrics
from teacher_server.fake import FakeTeacher
from teacher_server.key_file import KeyFile, new_key, write_keys
from teacher_server.serve import Gateway
from teacher_server.settings import ServerSettings

ROOT = Path(__file__).parents[3]
SAMPLES = Path(__file__).parent / "samples"
MAY_BE_EMPTY = re.compile(r'nv_gpu_|for="(decode|store)"')
"""No GPU here, and the run in this test waits for the teacher only."""


@contextmanager
def prometheus(program: str, config: dict[str, Any], folder: Path) -> Iterator[str]:
    """Its URL, once it answers."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *words], cwd=folder, stdout=log, stderr=log)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 20
        while time.monotonic() < deadline:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                if httpx.get(f"{url}/-/ready", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def growing(sample: str) -> Iterator[int]:
    """A port that serves a sample; what they count has been counted once more each second."""
    began = time.monotonic()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seconds = 1 + time.monotonic() - began
            lines = (SAMPLES / sample).read_text().splitlines()
            counters = {line.split()[2] for line in lines if line.startswith("# TYPE") and line.endswith(" counter")}

            def later(line: str) -> str:
                series, _, value = line.rpartition(" ")
                return f"{series} {float(value) * seconds}" if series.split("{")[0] in counters else line

            body = "".join(later(line) + "\n" for line in lines).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def config_for(folder: Path, ports: dict[str, int], key: str) -> dict[str, Any]:
    """Our own configuration, but for the addresses, where the key lies, and how often it looks."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "deploy/prometheus/alerts.yml")]
    config["scrape_configs"] = [scrape for scrape in config["scrape_configs"] if scrape["job_name"] != "prometheus"]
    (folder / "metrics_key").write_text(key)
    for scrape in config["scrape_configs"]:
        scrape.pop("dns_sd_configs", None)
        scrape["static_configs"] = [{"targets": [f"127.0.0.1:{ports[scrape['job_name']]}"]}]
        if "authorization" in scrape:
            scrape["authorization"]["credentials_file"] = str(folder / "metrics_key")
    return config


@contextmanager
def used(gateway: Gateway, key: str, run: MetricsServer, rows: Callable[[int, float], list[dict[str, Any]]]) -> Iterator[None]:
    """A gateway that is asked, and a run that goes on, each second for as long as the block lasts."""
    stop, failures = threading.Event(), list[BaseException]()
    crops = encode_crops(np.zeros((4, 8, 8, 3), np.uint8))

    def live() -> None:
        with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as client:
            for second in itertools.count():
                for row in rows(second, time.time()):
                    run.show(row)
                assert client.post(LABELS_PATH, content=crops, headers={"Content-Type": CROPS_MEDIA_TYPE}).status_code == 200
                assert client.post(LABELS_PATH, content=b"no image", headers={"Content-Type": "image/png"}).status_code == 422
                if stop.wait(1):
                    return

    def carried() -> None:
        try:
            live()
        except BaseException as error:  # noqa: BLE001 - raised where the block ends
            failures.append(error)

    thread = threading.Thread(target=carried)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def asked(url: str, expression: str) -> Any:
    """What Prometheus answers a minute from now: the steps of subqueries are on whole minutes, and one of them is then behind us."""
    for name, value in {"$__range": "5m", "$teacher_price": "2", "$trainer_price": "3"}.items():
        expression = expression.replace(name, value)
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression, "time": str(time.time() + 61)}, timeout=10)
    assert answer.status_code == 200, f"{expression}: {answer.text}"
    return answer.json()["data"]["result"]


def soon(what: Callable[[], Any], wanted: Any) -> Any:
    """What it says when that is what is wanted, or after half a minute. Prometheus begins up to 5 s after its start; a busy machine
    is slow to answer it."""
    deadline = time.monotonic() + 30
    while (said := what()) != wanted and time.monotonic() < deadline:
        time.sleep(0.3)
    return said


def test_every_question_of_the_dashboard_has_an_answer(deploy: Any, tool: Callable[[str], str], tmp_path: Path) -> None:
    program = tool("prometheus")
    key, entry = new_key("prometheus")
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=[entry]))
    settings = ServerSettings(port=0, keys_file=str(tmp_path / "keys.yaml"))
    run = MetricsServer(RunMetrics("runs/x", "distill"), port=0)
    try:
        with growing("triton.txt") as triton, growing("ray.txt") as ray, Gateway(FakeTeacher, settings) as gateway:
            ports = {"triton": triton, "gateway": gateway.port, "trainer": run.port, "ray": ray}
            config = config_for(tmp_path, ports, key)
            with used(gateway, key, run, deploy.rows), prometheus(program, config, tmp_path) as url:

                def up() -> dict[str, str]:
                    return {series["metric"]["job"]: series["value"][1] for series in asked(url, "up")}

                def unanswered() -> list[tuple[str, str]]:
                    return [(title, e) for title, e in deploy.expressions() if not MAY_BE_EMPTY.search(e) and not asked(url, e)]

                assert soon(up, dict.fromkeys(ports, "1")) == dict.fromkeys(ports, "1"), (tmp_path / "log").read_text()
                assert soon(unanswered, []) == []
                rules = httpx.get(f"{url}/api/v1/rules", timeout=20).json()["data"]["groups"]
                assert [rule["lastError"] for group in rules for rule in group["rules"] if rule["health"] != "ok"] == []
                alerts = httpx.get(f"{url}/api/v1/alerts", timeout=20).json()["data"]["alerts"]
                assert {"DistillStudentDiverged", "DistillStoreErrors"} <= {alert["labels"]["alertname"] for alert in alerts}
                cost = asked(url, dict(deploy.expressions())["Cost of an hour now"])
                assert float(cost[0]["value"][1]) == pytest.approx(1 * 2 + 1 * 3)
    finally:
        run.close(failed=False)
