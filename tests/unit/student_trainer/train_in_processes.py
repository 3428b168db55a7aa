"""Run by test_worker.py: the training loop in two processes that gloo joins, with the fake teacher.

    python train_in_processes.py FOLDER JOB_JSON [STEPS]

FOLDER/checkpoint holds the students at the end, or where the workers agreed to stop: worker 0 wants that after STEPS steps.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from distill.cluster import stopping
from student_trainer import lessons
from student_trainer.worker import train_worker
from teacher_server.fake import FakeTeacher

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of the tests
from forked_workers import ForkedWorker, run_forked


def work(job: dict[str, Any], worker: ForkedWorker) -> None:
    """One worker, from start to end."""
    lessons.open_teacher = lambda address: FakeTeacher(len(job["class_names"]))
    train_worker(job, worker)


if __name__ == "__main__":
    stopping.ASK_EVERY_S = 0  # before every step
    asked, last = count(), int(sys.argv[3]) if len(sys.argv) > 3 else sys.maxsize
    sys.exit(run_forked(Path(sys.argv[1]), partial(work, json.loads(sys.argv[2])), wants_stop=lambda: next(asked) >= last))
