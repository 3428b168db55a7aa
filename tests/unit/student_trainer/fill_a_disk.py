"""Run by test_store.py: commits until there is no room, says how that ended, makes room, and goes on.

    python fill_a_disk.py STORE IDENTITY_JSON LIMIT_BYTES

No file of this process may grow beyond the limit (RLIMIT_FSIZE), which the disk refuses as it does when it is full: in the middle of a
write. Prints "row N" for every label whose commit returned, and "refused MESSAGE".
"""

from __future__ import annotations

import os
import resource
import signal
import sys

import numpy as np

from distill.errors import StoreError
from distill.soft_labels import Encoding, Record
from student_trainer.store import SoftLabelStore, StoreIdentity


def main(folder: str, identity: str, limit: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = SoftLabelStore(folder, StoreIdentity.model_validate_json(identity))
    record = Record(Encoding.DENSE16, np.arange(10, dtype="<f2").tobytes(), 0.0, 0.0)

    def commit(row: int, copies: int) -> None:
        rows = range(row, row + copies)
        store.commit(0, 0, rows, [f"image-{r}" for r in rows], [record] * copies, (1.0,))
        for r in rows:
            os.write(1, f"row {r}\n".encode())

    commit(0, 10)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
    row = 10
    try:
        for row in range(10, 100_000, 10):
            commit(row, 10)
    except StoreError as error:
        os.write(1, f"refused {error}\n".encode())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    commit(row, 10)


if __name__ == "__main__":
    main(*sys.argv[1:])
