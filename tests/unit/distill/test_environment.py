"""What processes find in their environment; kept memory is counted in page faults, which no other job on the machine changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.cluster.environment import ENVIRONMENT, set_environment

ROOT = Path(__file__).parents[3]
STEPS = """
import resource, threading, torch
def step():
    blocks = [torch.ones(10 * 2**20) for _ in range(3)]  # over 32 MiB each, which glibc would always give back
    del blocks
def steps():
    for _ in range(25):  # fragments: until the heap has room for a whole step takes three to seven
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
thread = threading.Thread(target=steps)  # as in Ray's workers
thread.start()
thread.join()
"""


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    set_environment()
    assert {name: os.environ[name] for name in ENVIRONMENT} == {**ENVIRONMENT, "OMP_WAIT_POLICY": "ACTIVE"}


def test_the_trainers_image_has_the_same() -> None:
    words = (ROOT / "deploy/docker/trainer.Dockerfile").read_text().split()
    assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} <= set(words)


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc, which torch needs on Linux")
def test_a_step_takes_the_memory_of_the_step_before() -> None:
    def faults(environment: dict[str, str]) -> int:
        clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
        child = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True, env=clean | environment)
        return int(child.stdout)

    assert faults(ENVIRONMENT) * 10 < faults({})
