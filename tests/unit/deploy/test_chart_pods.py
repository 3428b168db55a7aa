"""What the pods of the chart run, hold, may and are asked."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from distill.cli.main import cli
from distill.cli.run_file import read_run_file
from teacher_server.serve import _STOP_TIMEOUT_S
from tests.unit.deploy.chart import GPU, NEWEST, ROOT, RUN, Object, check, named, pods, render, rendered


def words_of(objects: list[Object]) -> tuple[list[str], list[str]]:
    """What `distill` is told by the teacher's job, and by the RayJob."""
    return named(objects, "Job")["spec"]["template"]["spec"]["containers"][0]["args"], named(objects, "RayJob")["spec"][
        "entrypoint"
    ].split()


@pytest.mark.parametrize(
    ("limits", "kind"),
    [({}, "gpu"), ({"nvidia.com/gpu": "2"}, "gpu"), ({"nvidia.com/gpu": None}, "cpu"), ({"nvidia.com/gpu": 0}, "cpu"),
     ({"nvidia.com/gpu": None, "nvidia.com/mig-1g.10gb": 1}, "gpu")],
)  # fmt: skip
def test_the_teacher_runs_on_the_gpu_that_triton_holds_and_job_and_trainer_agree(limits: Object, kind: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN["config"])
    for words in words_of(render({"run": RUN, "triton": {"resources": {"limits": limits}}})):
        file = read_run_file(tmp_path / "run.yaml", [word for word in words if re.match(r"[\w.]+=", word)])
        assert file.teacher.repository.instance_kind == kind


def test_an_override_has_the_last_word_on_where_the_teacher_runs(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN["config"])
    for words in words_of(render({"run": {**RUN, "overrides": ["teacher.repository.instance_kind=cpu"]}})):
        file = read_run_file(tmp_path / "run.yaml", [word for word in words if re.match(r"[\w.]+=", word)])
        assert file.teacher.repository.instance_kind == "cpu"


def test_nothing_is_said_of_how_a_teacher_from_elsewhere_runs() -> None:
    entrypoint = named(render({"run": RUN, "teacher": {"job": {"enabled": False}}}), "RayJob")["spec"]["entrypoint"]
    assert "instance_kind" not in entrypoint


def test_ray_is_told_to_look_at_the_disk_which_it_does_not_do_in_a_pod() -> None:
    cluster = named(rendered("gpu"), "RayJob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        env = group["template"]["spec"]["containers"][0]["env"]
        assert {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"} in env
    agent = next(Path(find_spec("ray").submodule_search_locations[0]).glob("dashboard/modules/reporter/reporter_agent.py"))  # type: ignore[union-attr,index]
    assert 'os.environ.get("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE") == "1"' in agent.read_text()


def test_a_full_pool_of_gpus_can_be_upgraded_by_ending_an_old_one_first() -> None:
    for given, expected in (({}, (1, 0)), ({"maxSurge": 0, "maxUnavailable": 1}, (0, 1))):
        spec = named(render({"run": RUN, "triton": {"rollingUpdate": given}}), "Deployment", "-triton")["spec"]
        rolling = spec["strategy"]["rollingUpdate"]
        assert (rolling["maxSurge"], rolling["maxUnavailable"]) == expected


def test_a_root_that_must_be_writable_for_the_gpu_is_so_in_pods_with_a_gpu_only() -> None:
    objects = render({**GPU, "gpuContainers": {"readOnlyRootFilesystem": False}})
    for name, template in pods(objects):
        containers = [*template["spec"]["containers"], *template["spec"].get("initContainers", ())]
        has_gpu = any("nvidia.com/gpu" in container["resources"].get("limits", {}) for container in containers)
        assert {container["securityContext"]["readOnlyRootFilesystem"] for container in containers} == {not has_gpu}, name
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, "spec": template["spec"]}, NEWEST)


def test_no_container_has_a_privilege_or_a_writable_root_or_takes_all_memory(objects: list[Object]) -> None:
    for name, template in pods(objects):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] >= 1000, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == expected, (name, container["name"])
            assert {"requests", "limits"} & container["resources"].keys(), (name, container["name"])
            assert "/tmp" in {mount["mountPath"] for mount in container.get("volumeMounts", ())} or container["name"].startswith("wait-for")


def test_every_volume_that_is_mounted_is_there_and_the_other_way_round(objects: list[Object]) -> None:
    for name, template in pods(objects):
        spec = template["spec"]
        containers = (*spec["containers"], *spec.get("initContainers", ()))
        mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in spec.get("volumes", ())}, name


def test_no_secret_is_in_the_chart_only_names_of_secrets(objects: list[Object]) -> None:
    assert "Secret" not in {found["kind"] for found in objects}
    for _, template in pods(objects):
        for container in template["spec"]["containers"]:
            assert all("value" in entry for entry in container.get("env", ()))
            assert not any(re.search("key|token|password", entry["name"], re.I) for entry in container.get("env", ()))


def test_every_selector_finds_pods_of_this_release(objects: list[Object]) -> None:
    labels = [template["metadata"]["labels"] for _, template in pods(objects)]

    def finds(selector: dict[str, str]) -> bool:
        return any(selector.items() <= of_pod.items() for of_pod in labels)

    for found in objects:
        if found["kind"] == "Service":
            assert finds(found["spec"]["selector"]), found["metadata"]["name"]
        if found["kind"] in ("Deployment", "PodDisruptionBudget", "NetworkPolicy"):
            selector = found["spec"].get("selector") or found["spec"]["podSelector"]
            assert finds(selector["matchLabels"]), found["metadata"]["name"]
        if found["kind"] == "ServiceMonitor":
            services = [o["metadata"]["labels"] for o in objects if o["kind"] == "Service"]
            assert any(found["spec"]["selector"]["matchLabels"].items() <= service.items() for service in services)


def test_probes_ask_for_the_model_and_for_a_label() -> None:
    objects = rendered("gpu")
    triton = named(objects, "Deployment", "-triton")["spec"]["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe"):
        assert triton[probe]["httpGet"] == {"path": "/v2/models/fashion-teacher/ready", "port": "http"}
    gateway = named(objects, "Deployment", "-gateway")["spec"]["template"]["spec"]["containers"][0]
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_a_ray_node_is_asked_without_wget_which_the_image_does_not_have() -> None:
    cluster = named(rendered("gpu"), "RayJob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/local_raylet_healthz", "port": 52365}


def test_a_pod_has_time_to_finish_what_it_does() -> None:
    for name in ("-triton", "-gateway"):
        spec = named(rendered("gpu"), "Deployment", name)["spec"]["template"]["spec"]
        sleep = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = {"-triton": 20, "-gateway": _STOP_TIMEOUT_S}[name]  # --exit-timeout-secs of the values
        assert spec["terminationGracePeriodSeconds"] > sleep + drain


def test_each_pool_of_workers_has_its_own_nodes() -> None:
    groups = named(rendered("gpu"), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [(g["groupName"], g["replicas"], g["template"]["spec"]["nodeSelector"]) for g in groups] == [
        ("a100", 2, {"pool": "a100"}),
        ("l4", 4, {"pool": "l4"}),
    ]
    for group in groups:
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_without_gpus_nobody_asks_for_one() -> None:
    objects = rendered("cpu")
    assert "nvidia" not in yaml.safe_dump(objects)
    args = named(objects, "Deployment", "-triton")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[0].startswith("--model-repository")


def test_the_policies_let_through_what_is_needed_and_nothing_else(everything: list[Object]) -> None:
    objects = everything
    deny = named(objects, "NetworkPolicy", "-deny")["spec"]
    assert "ingress" not in deny
    # Names are asked wherever the cluster has its DNS: in kube-system, in another namespace, at an address of the node.
    assert deny["egress"] == [{"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}]
    triton = named(objects, "NetworkPolicy", "-triton")["spec"]["ingress"]
    assert [(sorted(port["port"] for port in rule["ports"])) for rule in triton] == [["grpc", "http"], ["metrics"]]
    gateway = named(objects, "NetworkPolicy", "-gateway")["spec"]
    assert gateway["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "ingress-nginx"}
    assert gateway["egress"][0]["ports"] == [{"port": 8001}]


def test_alerts_and_dashboard_are_the_same_as_those_of_compose(everything: list[Object]) -> None:
    objects = everything
    assert named(objects, "PrometheusRule")["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    dashboard = named(objects, "ConfigMap", "-dashboard")["data"]["distill.json"]
    assert json.loads(dashboard) == json.loads((ROOT / "deploy/grafana/dashboards/distill.json").read_text())
    monitors = [o["spec"] for o in objects if o["kind"].endswith("Monitor")]
    endpoints = [e for spec in monitors for e in spec.get("endpoints") or spec["podMetricsEndpoints"]]
    jobs = {rule["replacement"] for endpoint in endpoints for rule in endpoint["relabelings"]}
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert jobs == {scrape["job_name"] for scrape in scraped} - {"prometheus"}


def test_the_teacher_is_scaled_by_its_queue_time_in_words_that_prometheus_understands(
    deploy: Any, tool: Callable[[str], str], tmp_path: Path
) -> None:
    objects = rendered("gpu")
    scaled = named(objects, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == named(objects, "Deployment", "-triton")["metadata"]["name"]
    assert "replicas" not in named(objects, "Deployment", "-triton")["spec"]
    assert scaled["triggers"][0]["metricType"] == "Value"  # a time does not grow with the pods
    known = deploy.names_in((deploy.samples / "triton.txt").read_text())
    query = scaled["triggers"][0]["metadata"]["query"]
    assert set() < deploy.names_of(query) <= known
    rule = {"groups": [{"name": "x", "rules": [{"record": "y", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule))
    subprocess.run([tool("promtool"), "check", "rules", "rules.yml"], cwd=tmp_path, check=True, capture_output=True, timeout=60)


def test_the_commands_are_commands_of_ours(everything: list[Object]) -> None:
    objects = everything
    gateway = named(objects, "Deployment", "-gateway")["spec"]["template"]["spec"]["containers"][0]
    entrypoint = shlex.split(named(objects, "RayJob")["spec"]["entrypoint"])
    job = next(template for name, template in pods(objects) if "-teacher-" in name)["spec"]["containers"][0]
    assert entrypoint[0] == job["command"][0] == "distill"
    for words in (gateway["args"], entrypoint[1:], job["command"][1:] + job["args"]):
        shown = CliRunner().invoke(cli, [words[0], "--help"])
        assert shown.exit_code == 0, words
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert all(option in shown.output for option in options), (words, shown.output)


def test_the_settings_in_the_commands_are_settings_of_ours(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN["config"])
    entrypoint = shlex.split(named(rendered("gpu"), "RayJob")["spec"]["entrypoint"])
    overrides = [word for word in entrypoint if re.match(r"[\w.]+=", word)]
    file = read_run_file(tmp_path / "run.yaml", overrides)
    assert (file.ray.num_workers, file.ray.use_gpu, file.monitor.prometheus_port, file.train.epochs) == (6, True, 9300, 300)
