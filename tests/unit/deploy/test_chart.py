"""The chart, rendered by the real Helm, is what Kubernetes' own schemas and ours allow. It was never applied to a cluster.

`kubernetes-validate --strict` refuses unknown fields; kinds that it does not know must have a schema of ours in schemas/, or fail.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (extra dev)", exc_type=ImportError)
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra dev)", exc_type=ImportError)

import jsonschema  # noqa: E402 - comes with kubernetes-validate

from distill.cli.main import cli  # noqa: E402
from distill.cli.run_file import read_run_file  # noqa: E402
from teacher_server.serve import _STOP_TIMEOUT_S  # noqa: E402

ROOT = Path(__file__).parents[3]
CHART = ROOT / "deploy/helm/distill"
SCHEMAS = Path(__file__).parent / "schemas"
OLDEST, NEWEST = "1.29", "1.34"
"""Versions of Kubernetes whose schemas are asked; the chart states the oldest."""

RUN = {"config": (ROOT / "recipes/quickstart.yaml").read_text()}
SELF_DISTILLING = {"config": (ROOT / "recipes/cifar10.yaml").read_text()}
CPU = {
    "run": RUN,
    "images": {"triton": "distill-triton-cpu:0.1.0", "trainer": "distill-trainer:0.1.0-cpu"},
    "triton": {"program": [], "args": ["--allow-gpu-metrics=false"], "resources": {"limits": {"nvidia.com/gpu": None}}, "tolerations": []},
    "trainer": {
        "useGpu": False,
        "workerGroups": [{"name": "cpu", "replicas": 2, "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "8Gi"}}}],
    },
}
GPU = {
    "run": {**RUN, "overrides": ["train.epochs=300"]},
    "triton": {"nodeSelector": {"pool": "teacher"}, "autoscaling": {"enabled": True}},
    "trainer": {
        "numWorkers": 6,
        "workerGroups": [
            {
                "name": name,
                "replicas": count,
                "resources": {"limits": {"nvidia.com/gpu": 1}},
                "nodeSelector": {"pool": name},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            }
            for name, count in (("a100", 2), ("l4", 4))
        ],
    },
}
EVERYTHING = {
    **GPU,
    "images": {"pullSecrets": ["registry"]},
    "data": {"existingClaim": "images"},
    "gateway": {
        "autoscaling": {"enabled": True},
        "ingress": {"enabled": True, "host": "labels.example.com", "className": "nginx", "tlsSecret": "tls", "annotations": {"a/b": "c"}},
        "tracing": {"endpoint": "http://collector:4318/v1/traces"},
        "overrides": ["server.max_batch=64"],
    },
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}, "dashboard": {"enabled": True}},
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}],
        "trainerEgress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}],
        "tracingEgress": [{"to": [{"namespaceSelector": {}}], "ports": [{"port": 4318}]}],
    },
}
SERVING_ONLY = {"trainer": {"enabled": False}, "teacher": {"job": {"enabled": False}}, "networkPolicy": {"enabled": False}}
CLAIM = {**SERVING_ONLY, "triton": {"modelRepository": {"existingClaim": "models", "path": "teachers/a"}}}
COMBINATIONS = {"cpu": CPU, "gpu": GPU, "everything": EVERYTHING, "serving only": SERVING_ONLY, "a claim with models": CLAIM}

Object = dict[str, Any]


def render(values: Object, chart: Path = CHART) -> list[Object]:
    """All objects of a release named `students` in the namespace `lab`."""
    texts = helm.Chart.load(chart).render(values, name="students", namespace="lab")
    manifests = [text for path, text in texts.items() if not path.endswith("NOTES.txt")]
    return [found for text in manifests for found in yaml.safe_load_all(text) if found]


@cache
def rendered(name: str) -> list[Object]:
    """One of the combinations."""
    return render(COMBINATIONS[name])


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(name, pod template) of everything that becomes pods."""
    for found in objects:
        name, spec = found["metadata"]["name"], found.get("spec", {})
        if found["kind"] in ("Deployment", "Job"):
            yield name, spec["template"]
        if found["kind"] == "RayJob":
            cluster = spec["rayClusterSpec"]
            yield f"{name} submitter", spec["submitterPodTemplate"]
            yield f"{name} head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{name} {group['groupName']}", group["template"]


def check(found: Object, version: str) -> None:
    """Raises where an object is not what its schema says, or there is no schema for its kind."""
    own = SCHEMAS / f"{found['kind'].lower()}.json"
    if own.exists():
        jsonschema.Draft202012Validator(json.loads(own.read_text())).validate(found)
        for _, template in pods([found]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, "spec": template["spec"]}
            kubernetes.validate(pod, version, strict=True)
        return
    kubernetes.validate(found, version, strict=True)


def named(objects: list[Object], kind: str, end: str = "") -> Object:
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(end)]
    assert len(found) == 1, (kind, end, [o["metadata"]["name"] for o in found])
    return found[0]


@pytest.fixture(params=COMBINATIONS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return rendered(request.param)


def test_every_object_is_what_its_schema_says(objects: list[Object]) -> None:
    for found in objects:
        check(found, NEWEST)


def test_the_oldest_kubernetes_that_the_chart_takes_knows_every_field(everything: list[Object]) -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == f">={OLDEST}.0-0"
    for found in everything:
        check(found, OLDEST)


def test_names_do_not_collide(objects: list[Object]) -> None:
    names = [(o["apiVersion"], o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("values", [*COMBINATIONS.values(), {"run": {"existingConfigMap": "mine"}}], ids=[*COMBINATIONS, "config map"])
def test_helm_lints_it(values: Object) -> None:
    found = helm.lint(CHART, values, strict=True)
    assert (found["errors"], [m for m in found["messages"] if m["severity"] > 1]) == ([], [])


@pytest.fixture
def everything() -> list[Object]:
    return rendered("everything")


def break_at(path: tuple[Any, ...], value: Any) -> Callable[[Object], None]:
    def do(found: Object) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return do


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("Deployment", break_at(("spec", "replicaz"), 2)),
        ("Deployment", break_at(("spec", "template", "spec", "containers", 0, "readinessProb"), {})),
        ("Service", break_at(("spec", "ports", 0, "port"), "eighty")),
        ("NetworkPolicy", break_at(("spec", "podSelector"), [])),
        ("RayJob", break_at(("spec", "rayClusterSpec", "headGroupSpecs"), {})),
        ("RayJob", break_at(("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "imagee"), "x")),
        ("RayJob", break_at(("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0)),
        ("ScaledObject", break_at(("spec", "triggers", 0, "metadata", "thresold"), "1")),
        ("ServiceMonitor", break_at(("spec", "endpoints", 0, "port"), 8002)),
        ("PodMonitor", break_at(("spec", "endpoints"), [])),
        ("PrometheusRule", break_at(("spec", "groups", 0, "rules", 0), {"alert": "x"})),
    ],
)
def test_a_broken_object_is_found(kind: str, spoil: Callable[[Object], None], everything: list[Object]) -> None:
    found = copy.deepcopy(next(o for o in everything if o["kind"] == kind))
    spoil(found)
    with pytest.raises((kubernetes.ValidationError, jsonschema.ValidationError)):
        check(found, NEWEST)


def test_a_kind_that_nobody_has_a_schema_for_fails() -> None:
    with pytest.raises(kubernetes.SchemaNotFoundError):
        check({"apiVersion": "example.com/v1", "kind": "Sandwich", "metadata": {"name": "x"}}, NEWEST)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"triton": {"replica": 2}}, "replica"),
        ({"images": {"triton": "tritonserver"}}, "images"),
        ({"gateway": {"keysSecret": {"name": ""}}}, "keysSecret"),
        ({"run": {"overrides": ["train.epochs=3; rm -rf /"]}}, "overrides"),
        ({"trainer": {"workerGroups": []}}, "workerGroups"),
        ({"runs": {"size": "much"}}, "size"),
        ({"gateway": {"drainSeconds": 60}}, "drainSeconds"),
        ({"gpuContainers": {"readOnlyRootFilesystem": "no"}}, "gpuContainers"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(values: Object, told: str) -> None:
    with pytest.raises(helm.HelmError, match=told):
        helm.Chart.load(CHART).validate_schema({"run": RUN, **values} if "run" not in values else values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "run.config"),
        ({**SERVING_ONLY, "gateway": {"ingress": {"enabled": True}}}, "gateway.ingress.host"),
        ({"run": RUN, "gateway": {"ingress": {"enabled": True, "host": "labels.example.com"}}}, "networkPolicy.gatewayFrom"),
        ({"run": RUN, "triton": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}}, "triton.rollingUpdate"),
        ({"run": SELF_DISTILLING, "model": "cifar10-teacher"}, "cifar10-teacher-self-distilled"),
    ],
)
def test_what_is_missing_is_said(values: Object, told: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(told)):
        render(values)


@pytest.mark.parametrize(
    "values",
    [
        {"trainer": {"verb": "self-distill"}, "model": "cifar10-teacher"},
        {"model": "cifar10-teacher-self-distilled"},
        {"trainer": {"enabled": False}, "model": "cifar10-teacher"},
    ],
)
def test_the_steps_of_a_run_with_self_distill_are_taken_one_by_one(values: Object) -> None:
    assert render({"run": SELF_DISTILLING, **values})


def test_an_ingress_without_policies_needs_no_name_of_its_controller() -> None:
    ingress = {"gateway": {"ingress": {"enabled": True, "host": "labels.example.com"}}}
    assert named(render({**SERVING_ONLY, **ingress}), "Ingress")


@pytest.mark.parametrize(
    "change",
    [
        {"images": {"trainer": "distill-trainer:0.1.1"}},
        {"images": {"pullSecrets": ["registry"]}},
        {"run": {"name": "other", **RUN}},
        {"run": {"config": RUN["config"] + "\n# changed\n"}},
        {"run": {**RUN, "overrides": ["train.epochs=3"]}},
        {"run": {"existingConfigMap": "mine"}},
        {"runs": {"existingClaim": "mine"}},
        {"data": {"existingClaim": "images"}},
        {"teacher": {"job": {"resources": {"limits": {"memory": "32Gi"}}}}},
        {"teacher": {"job": {"nodeSelector": {"pool": "cpu"}}}},
        {"trainer": {"secretEnv": ["s3"]}},
        {"trainer": {"sharedMemory": "8Gi"}},
        {"triton": {"resources": {"limits": {"nvidia.com/gpu": None}}}},
        {"podSecurityContext": {"runAsUser": 2000}},
    ],
    ids=json.dumps,
)
def test_another_pod_or_run_file_is_another_job_because_a_job_cannot_be_changed(change: Object) -> None:
    before, after = (named(render({"run": RUN, **values}), "Job")["metadata"]["name"] for values in ({}, change))
    assert before != after


def test_a_new_version_of_the_chart_is_another_job(tmp_path: Path) -> None:
    chart = tmp_path / "distill"
    shutil.copytree(CHART, chart)
    about = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(about.replace("version: 0.1.0", "version: 0.1.1", 1))
    assert about != (chart / "Chart.yaml").read_text()
    assert named(render({"run": RUN}, chart), "Job")["metadata"]["name"] != named(render({"run": RUN}), "Job")["metadata"]["name"]


def test_what_the_job_does_not_hold_leaves_it_alone() -> None:
    before = named(render({"run": RUN}), "Job")
    others = {"gateway": {"replicas": 5}, "trainer": {"numWorkers": 4}, "triton": {"replicas": 3}, "images": {"triton": "tritonserver:1"}}
    assert named(render({"run": RUN, **others}), "Job") == before
    patient = named(render({"run": RUN, "teacher": {"job": {"backoffLimit": 9}}}), "Job")  # Kubernetes lets that be changed
    assert patient == {**before, "spec": {**before["spec"], "backoffLimit": 9}}


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
    assert [rule["ports"] for rule in deny["egress"]] == [[{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]]
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
