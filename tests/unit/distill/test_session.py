"""SIGTERM around a Ray cluster means what it meant before: each block closes what it opened, nothing is left of the cluster, and the exit
code is ours. Real processes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

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


LEFT = """
import os, signal, subprocess, sys
import psutil, ray
from distill.cli import main
from distill.cluster.session import ray_session
from distill.cluster.settings import RaySettings
from distill.errors import Terminated

signal.signal(signal.SIGTERM, main._terminate)

@ray.remote(num_cpus=0)
class Starter:
    def start(self):
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        return os.getpid(), child.pid

try:
    with ray_session(RaySettings()):
        starter = Starter.options(lifetime="detached").remote()
        worker, child = map(psutil.Process, ray.get(starter.start.remote()))
        print(worker.pid, child.pid, flush=True)
        worker.suspend()  # it cannot end what it started
        raylet, stop = worker.parent(), ray.shutdown
        def shutdown():
            raylet.kill()  # before it ends its workers
            stop()
            if sys.argv[1] == "SIGTERM":
                signal.setitimer(signal.ITIMER_REAL, 1)  # while the child is waited for
        ray.shutdown = shutdown
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
except Terminated:
    sys.exit(143)
"""


@pytest.mark.parametrize(("meanwhile", "code"), [("nothing", 0), ("SIGTERM", 143)])
def test_what_does_not_end_with_its_cluster_is_ended(meanwhile: str, code: int) -> None:
    """It does not notice that its cluster is gone, minds no SIGTERM, and the raylet does not get round to ending it."""
    process = subprocess.Popen([sys.executable, "-c", LEFT, meanwhile], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        started = [psutil.Process(int(pid)) for pid in first.split()]
        _, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        assert len(started) == 2, err
        assert not any(map(_lives, started))
    finally:
        for left in (process, *started):
            with suppress(psutil.Error, ProcessLookupError):
                left.kill()
        process.communicate()


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE  # dead, but init has not noticed
    return False
