"""Kept memory: counted in page faults, which no other job on the machine changes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from distill.cluster.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    blocks = [torch.ones(10 * 2**20) for _ in range(3)]  # over 32 MiB each, which glibc would always give back
    del blocks
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_takes_the_memory_of_the_step_before() -> None:
    def faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", STEPS, mode], check=True, capture_output=True, text=True).stdout)

    assert faults("kept") * 10 < faults("as it is")
