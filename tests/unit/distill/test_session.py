"""SIGTERM around a Ray cluster means what it meant before: each block closes what it opened, nothing is left of the cluster, and the exit
code is ours. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

DRIVER = """
import os, signal, sys, time
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
    if when == "starting":
        time.sleep(4)  # Ray's own handler would abort a process that takes 3 s to end
    sys.exit(143)
"""


@pytest.mark.parametrize(("when", "said"), [("starting", ""), ("inside", ""), ("after", "caught 1\n")])
def test_sigterm_is_ours_while_ray_starts_inside_and_after(when: str, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", DRIVER, when], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == f"{said}closed False\n", ended.stderr
    assert ended.returncode == 143


DETACHED = """
import os, signal, subprocess
import psutil, ray
from distill.cluster.session import ray_session
from distill.cluster.settings import RaySettings

@ray.remote(num_cpus=0)
class Starter:
    def start(self):
        return os.getpid(), subprocess.Popen(["sleep", "600"], start_new_session=True).pid

with ray_session(RaySettings()):
    starter = Starter.options(lifetime="detached").remote()
    worker, sleeper = map(psutil.Process, ray.get(starter.start.remote()))
    print(sleeper.pid, flush=True)
    worker.suspend()  # it cannot end what it started
    raylet, stop = worker.parent(), ray.shutdown
    def shutdown():
        raylet.kill()  # before it ends its workers
        stop()
    ray.shutdown = shutdown
"""


def test_a_process_that_does_not_end_with_its_cluster_is_ended() -> None:
    """It does not notice that its cluster is gone, and the raylet does not get round to ending it."""
    ended = subprocess.run([sys.executable, "-c", DETACHED], capture_output=True, text=True, timeout=120, check=True)
    pid = int(ended.stdout.split()[0])  # behind it Ray may say that a raylet died
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return
    os.kill(pid, signal.SIGKILL)
    assert state == psutil.STATUS_ZOMBIE, state  # dead, but init has not noticed
