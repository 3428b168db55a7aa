"""SIGTERM around a Ray cluster means what it meant before: each block closes what it opened, and the exit code is ours. Real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

DRIVER = """
import os, signal, sys
import ray
from distill.cli import main
from distill.cluster.session import ray_session
from distill.cluster.settings import RaySettings
from distill.errors import Terminated

signal.signal(signal.SIGTERM, main._terminate)
when, tell = sys.argv[1], os.getpid()

def caught():
    # what the system does at SIGTERM, which need not be what Python believes
    line = next(line for line in open("/proc/self/status") if line.startswith("SigCgt"))
    return int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1

if when == "starting":
    start = ray.init
    def init(*args, **kwargs):
        start(*args, **kwargs)
        os.kill(tell, signal.SIGTERM)  # Ray has set its handler by now
    ray.init = init
try:
    with ray_session(RaySettings()):
        if when == "inside":
            os.kill(tell, signal.SIGTERM)
    print("caught", caught(), flush=True)
    os.kill(tell, signal.SIGTERM)
except Terminated:
    print("closed", ray.is_initialized(), flush=True)
    sys.exit(143)
"""


@pytest.mark.parametrize(("when", "said"), [("starting", ""), ("inside", ""), ("after", "caught 1\n")])
def test_sigterm_is_ours_while_ray_starts_inside_and_after(when: str, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", DRIVER, when], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == f"{said}closed False\n", ended.stderr
    assert ended.returncode == 143
