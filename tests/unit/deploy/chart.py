"""The chart of deploy/helm, rendered by the real Helm with the values that the tests look at; and whether schemas allow an object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (extra checks)", exc_type=ImportError)
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra checks)", exc_type=ImportError)

import jsonschema  # noqa: E402 - comes with kubernetes-validate

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
    """All objects of a release named `students` in the namespace `lab`; a claim holds the images where the values do not say."""
    texts = helm.Chart.load(chart).render({"data": {"existingClaim": "images"}, **values}, name="students", namespace="lab")
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
