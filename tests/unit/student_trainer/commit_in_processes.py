"""Run by test_store.py: processes that commit to one store, killed at random moments or racing each other.

    python commit_in_processes.py kill|race|same FOLDER IDENTITY_JSON

Every label whose commit returned is printed as a line "view shard row"; one program forks all of them, so that torch is imported once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute  # noqa: F401 - once here, not in every victim

from distill.soft_labels import encode
from student_trainer.store import SoftLabelStore, StoreIdentity

NUM_KILLS = 12
NUM_RACERS = 3
COMMITS_EACH = 25


def commit_one(store: SoftLabelStore, shard: int, row: int) -> None:
    """Labels `row` and `row + 1` of one shard, then say so."""
    records = encode(np.eye(10, dtype=np.float32)[[row % 10, (row + 1) % 10]], (1.0,), 0.02)
    store.commit(0, shard, [row, row + 1], [f"{shard}-{row}", f"{shard}-{row + 1}"], records, (1.0,))
    os.write(1, f"0 {shard} {row}\n0 {shard} {row + 1}\n".encode())


def kill_at_random(folder: Path, identity: StoreIdentity) -> None:
    """One process after another commits without end and is killed after a few commits, somewhere inside the next one."""
    chance = random.Random(0)
    for victim in range(NUM_KILLS):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            store = SoftLabelStore(folder, identity)
            for number in range(10_000):
                commit_one(store, victim, 2 * number)
                os.write(writer, b".")
        for _ in range(chance.randint(1, 4)):
            began = time.monotonic()
            os.read(reader, 1)  # one more commit has returned
        ended = time.monotonic()
        until = ended + chance.random() * (ended - began)  # a random moment of the next one, as long as they take on this machine
        while time.monotonic() < until:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def race(folder: Path, identity: StoreIdentity, same: bool = False) -> None:
    """Several processes commit to one store at once, each its own shard or all `same` labels."""
    children = []
    for racer in range(NUM_RACERS):
        child = os.fork()
        if child == 0:
            store = SoftLabelStore(folder, identity)
            for number in range(COMMITS_EACH):
                commit_one(store, 0 if same else racer, 2 * number)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes, key=abs))


if __name__ == "__main__":
    {"kill": kill_at_random, "race": race, "same": partial(race, same=True)}[sys.argv[1]](
        Path(sys.argv[2]), StoreIdentity.model_validate_json(sys.argv[3])
    )
