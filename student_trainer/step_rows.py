"""The `step` row of the training loop: everything that a run shows of itself, a few times a second, as plain data.

docs/monitoring.md describes it field by field. Unit of data: one row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from distill.cluster.worker import Row
from student_trainer.stream import LabelledStream, Stream
from student_trainer.students import Student
from student_trainer.totals import Totals
from student_trainer.waits import Waits
from teacher_server.pool_member import HasPoolState

RECENT_S = 30.0
"""What `images_per_s` and `waits_recent` look back over, at most."""


@dataclass(frozen=True)
class _Moment:
    time: float
    step: int
    waits: Waits


class StepRows:
    """Makes the rows of one worker.

    Args:
        num_workers: of the group; what this worker counts is multiplied by it.
    """

    def __init__(self, students: Sequence[Student], stream: Stream, totals: Totals, num_workers: int) -> None:
        self._students, self._stream, self._totals, self._num_workers = students, stream, totals, num_workers
        self._recent: deque[_Moment] = deque()

    def row(self, step: int, num_steps: int, epoch: int) -> Row:
        """The row after `step` of `num_steps` steps, the last of them one of `epoch` (from 0)."""
        now = _Moment(time.monotonic(), step, self._stream.waits)
        self._recent.append(now)
        while now.time - self._recent[0].time > RECENT_S and len(self._recent) > 2:
            self._recent.popleft()
        before = self._recent[0]
        active = [student for student in self._students if not student.stopped]
        images, seconds = self._stream.loader.settings.global_batch, now.time - before.time
        waits = now.waits.since(before.waits) if seconds > 0 else now.waits
        rejections = self._stream.loader.rejections
        losses = {student.settings.name: _finite(student.loss) for student in active}
        agreement = {s.settings.name: value for s in active if (value := s.agreement.value()) is not None}
        return {
            "kind": "step",
            "time": time.time(),
            "step": step,
            "of": num_steps,
            "epoch": epoch,
            "images": images,
            "images_per_s": (step - before.step) * images / seconds if seconds > 0 else None,
            "losses": losses,
            "agreement": agreement,
            "learning_rate": {s.settings.name: max(group["lr"] for group in s.optimizer.param_groups) for s in active},
            "waits": self._stream.waits.model_dump(),
            "waits_recent": waits.model_dump(),
            "bottleneck": waits.bottleneck(),
            "totals": self._totals.estimate(self._num_workers),
            "seen": rejections.num_seen,
            "rejected": rejections.num_rejected,
            "rejected_limit": rejections.max_share,
            **self._store(),
            **self._pool(),
            "note": self._note(losses, agreement, waits),
        }

    def _note(self, losses: dict[str, float | None], agreement: dict[str, float], waits: Waits) -> str:
        said = ["loss " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)]
        if isinstance(self._stream, LabelledStream):
            said += [f"{self._totals.reuse():.0%} of labels from the store", waits.describe()]
        if agreement:
            said.append("agreement " + " to ".join(dict.fromkeys(f"{share(agreement.values()):.0%}" for share in (min, max))))
        return ", ".join(said)

    def _store(self) -> Row:
        """What is wrong with the label store, if there is one."""
        return {"store_errors": self._stream.path.store.num_damaged} if isinstance(self._stream, LabelledStream) else {}

    def _pool(self) -> Row:
        """The teachers, if there are several (`teacher_server.pool`)."""
        teacher = self._stream.path.teacher if isinstance(self._stream, LabelledStream) else None
        return {"pool": teacher.state().model_dump(mode="json")} if isinstance(teacher, HasPoolState) else {}


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if value - value == 0 else None
