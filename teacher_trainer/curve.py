"""The learning curve of pretraining: a few hundred rows, however long the run, each a mean over an interval of steps.

It lives in the checkpoint, with the sums of the interval that is not yet full, so a run that was cut off loses no row and doubles none.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from teacher_trainer.contrastive import ContrastiveOutcome

MAX_ROWS = 500
METRICS = ("loss", "accuracy", "entropy")

CurveRow: TypeAlias = dict[str, float]
"""`step` (the last of the interval, from 1), `epoch` (of that step, from 0), the means of `METRICS` and `learning_rate` (of that step)."""


class Curve:
    """Rows so far, and the sums over the interval that is running.

    Args:
        num_steps: of the whole run.
        device: where outcomes are computed; they are added up there, so that no step waits for the accelerator.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.rows: list[CurveRow] = []
        self.interval = max(1, math.ceil(num_steps / MAX_ROWS))
        self._num_steps = num_steps
        self._sums_3 = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        self._count = 0

    def add(self, outcome: ContrastiveOutcome) -> None:
        """One more step. What is added is this worker's part; the sum over the workers is the step's value."""
        self._sums_3 += torch.stack([outcome.loss.detach(), outcome.accuracy, outcome.entropy]).double()
        self._count += 1

    def is_due(self, done: int) -> bool:
        """Whether a row ends with step `done`; the same in every worker."""
        return self._count > 0 and (done % self.interval == 0 or done == self._num_steps)

    def end_row(self, done: int, epoch: int, learning_rate: float, sums_3: Tensor) -> CurveRow:
        """The row of the interval that ends here.

        Args:
            sums_3: `sums`, added up over the workers.
        """
        means = dict(zip(METRICS, (sums_3 / self._count).tolist(), strict=True))
        row: CurveRow = {"step": done, "epoch": epoch, **means, "learning_rate": learning_rate}
        self.rows.append(row)
        self._sums_3.zero_()
        self._count = 0
        return row

    @property
    def sums(self) -> Tensor:
        """float64 [3]: this worker's sums over the running interval."""
        return self._sums_3

    def state_dict(self, sums_3: Tensor) -> dict[str, Any]:
        """What goes on from here; the rows themselves are in the manifest. `sums_3` are the sums over all workers."""
        return {"sums": sums_3.cpu(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any], rows: list[CurveRow], rank: int) -> None:
        """Go on where `state_dict` was taken. Worker 0 takes over what all workers had."""
        self.rows = list(rows)
        self._count = int(state["count"])
        self._sums_3.copy_(state["sums"] if rank == 0 else torch.zeros_like(state["sums"]))
