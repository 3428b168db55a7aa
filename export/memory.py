"""How much memory a file takes while it runs: the peak of a fresh process that loads nothing but the runtime and the file.

What is told is the high-water mark of resident memory (VmHWM of Linux) after five runs of one crop on one thread, less that of the same
process when it had loaded the runtime and not yet the file. Unit of data: one file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from distill.cluster.environment import ENVIRONMENT
from distill.errors import DistillError
from export.runtimes.runtime import RuntimeName

TIMEOUT_S = 300


def peak_memory_bytes(runtime: RuntimeName, path: Path, image_size: int) -> int | None:
    """Bytes beyond the runtime's own; None where the system does not tell (only Linux does).

    Raises:
        DistillError: the file does not run in a process of its own.
    """
    command = [sys.executable, "-m", "export.memory_probe", runtime, str(path.absolute()), str(image_size)]
    # As on the device: without what makes a training process keep its memory.
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, IndexError, ValueError) as error:
        said = (getattr(error, "stderr", "") or "").strip().splitlines()
        raise DistillError(f"{path.name} does not run in a process of its own: {said[-1] if said else error}") from error
