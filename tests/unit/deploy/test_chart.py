"""The chart, rendered by the real Helm, is what Kubernetes' own schemas and ours allow. It was never applied to a cluster.

`kubernetes-validate --strict` refuses unknown fields; kinds that it does not know must have a schema of ours in schemas/, or fail.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.deploy.chart import (
    CHART,
    COMBINATIONS,
    NEWEST,
    OLDEST,
    RUN,
    SELF_DISTILLING,
    SERVING_ONLY,
    Object,
    check,
    helm,
    jsonschema,
    kubernetes,
    named,
    render,
)


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
        ({"run": RUN, "data": {"existingClaim": ""}}, "data/fashion-mnist/train-*.tar.gz, and no claim is mounted at data/"),
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


@pytest.mark.parametrize(
    "values",
    [
        {"run": {"config": RUN["config"].replace('"data/', '"s3://bucket/')}},
        {"run": {**RUN, "overrides": [f"data.{name}.path=s3://bucket/x" for name in ("unlabelled", "labelled", "test")]}},
        {"run": {"existingConfigMap": "mine"}},
    ],
    ids=["in the run file", "in overrides", "nobody knows"],
)
def test_images_elsewhere_need_no_claim(values: Object) -> None:
    for found in render({**values, "data": {"existingClaim": ""}}):
        check(found, NEWEST)


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
        {"data": {"existingClaim": "others"}},
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
