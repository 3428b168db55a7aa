"""Environment of every process that is started from here: what OpenMP, the C library and gRPC read when such a process begins."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # Threads of torch that wait for each other sleep instead of spinning: on cores that somebody else needs too (a teacher, Ray) spinning
    # makes them several times slower. Read when torch is imported, so it holds in this process as well.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Memory that a training step gives back is kept for the next, in one arena. Otherwise glibc asks the system for every large block anew,
    # which clears it page by page.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    # gRPC would write a line to the terminal whenever Ray starts a process while Triton is being asked. Nothing here forks without exec.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "GRPC_VERBOSITY": "ERROR",
}


def set_environment() -> None:
    """Set what the user has not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
