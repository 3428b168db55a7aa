"""Which students go on: successive halving and early stop among students of one label stream.

Successive halving (Jamieson & Talwalkar 2016; the rungs of one bracket of Li et al. 2018): all N students begin; at each rung the best of
them go on, a share of 1 / eta, and the others stop. Decoding and labels are shared by all, so what a stopped student gives back is its own
part of each step, and the stream goes faster for the rest. A student's schedule is that of the whole run, whatever rung it reaches.

Early stop: a student whose score has not risen for some evaluations stops.

    held-out crops -> score of each student (worker 0) -> the same scores in all workers -> `Selection` says who stops -> the checkpoint

Held-out crops are crops of unlabelled images in a view that training never uses (the number `train.num_views`), labelled by the teacher
through the store: no human label is needed, and the test images stay unseen. Who stops is a function of the scores so far, all in the
checkpoint, so a run that was cut off decides as if it had not been.

Shapes: N held-out crops, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from distill.evaluation import EVAL_BATCH
from distill.label_metrics import FloatArray
from distill.loader import CropBatch, CropLoader
from student_trainer.loss import distillation_loss
from student_trainer.settings import HalvingSettings, Metric, TrainSettings
from student_trainer.stream import LabelledStream
from student_trainer.students import Stopped

Scores = dict[str, float]
"""Student -> score; the higher the better."""


class HeldOut:
    """Crops that no student trains on, with the teacher's logits. Made once, in worker 0.

    Raises:
        what asking the teacher raises (see `LabelledStream.label`).
    """

    def __init__(self, stream: LabelledStream, train: TrainSettings, epochs: int) -> None:
        batches = [stream.label(batch) for batch in _held_out_batches(stream.loader, train, epochs)]
        self._crops_NHWC = np.concatenate([batch.crops.crops_VBHWC[0] for batch in batches])
        self._teacher_NK = np.concatenate([batch.logits_BK for batch in batches if batch.logits_BK is not None])
        self._temperature = train.temperature

    def score(self, predict: Callable[[npt.NDArray[np.uint8]], FloatArray], metric: Metric) -> float:
        """Share of crops whose first class is the teacher's, or minus the distillation loss; minus infinity where that is no number.

        Args:
            predict: uint8 crops [B,H,W,3] -> logits float32 [B,K].
        """
        starts = range(0, len(self._crops_NHWC), EVAL_BATCH)
        student_NK = np.concatenate([predict(self._crops_NHWC[at : at + EVAL_BATCH]) for at in starts])
        if not np.isfinite(student_NK).all():
            return -math.inf
        if metric == "agreement":
            return float((student_NK.argmax(axis=1) == self._teacher_NK.argmax(axis=1)).mean())
        return -distillation_loss(torch.from_numpy(student_NK), torch.from_numpy(self._teacher_NK), self._temperature).item()


def _held_out_batches(loader: CropLoader, train: TrainSettings, epochs: int) -> Iterator[CropBatch]:
    """The first batches of the pass after the last one, in the view after the last one."""
    seen = 0
    for step, rows in loader.plan(epochs).batches():
        batch = loader.make(epochs, step, (train.num_views,), rows)
        yield batch
        seen += len(batch.image_ids)
        if seen >= train.held_out_images:
            return


def rung_steps(settings: HalvingSettings, num_students: int, num_steps: int) -> list[int]:
    """After how many steps each rung is, rising, all before the last step; none where there are fewer than eta students."""
    num_rungs = math.floor(math.log(num_students) / math.log(settings.eta) + 1e-9)
    shares = settings.rungs or [settings.eta**-left for left in range(num_rungs, 0, -1)]
    return sorted({max(1, round(share * num_steps)) for share in shares} - {num_steps})


class Selection:
    """Who stops when, from the scores. The same in all workers, and after a restart what it was before.

    Args:
        num_steps: of the whole run.
        before: what `state` gave.
    """

    def __init__(self, train: TrainSettings, num_steps: int, before: Mapping[str, Any] | None = None) -> None:
        self.halving, self.early_stop = train.halving, train.early_stop
        self.rungs: list[dict[str, Any]] = list((before or {}).get("rungs", ()))
        """One entry for each rung that is behind: `step`, `scores` (None where it was no number) and `kept`."""
        self.final: dict[str, float | None] = dict((before or {}).get("final", {}))
        """Scores of those that trained to the end."""
        self._best: dict[str, _Best] = {name: _Best.of(*best) for name, best in (before or {}).get("best", {}).items()}
        self._num_students = len(train.students)
        self._steps = rung_steps(train.halving, self._num_students, num_steps) if train.halving else []

    def state(self) -> dict[str, Any]:
        """Plain data, for the checkpoint."""
        best = {name: [_finite(best.score), best.waited] for name, best in self._best.items()}
        return {"rungs": self.rungs, "final": self.final, "best": best}

    def is_rung(self, done: int) -> bool:
        """Whether the next rung is after this many steps."""
        return len(self.rungs) < len(self._steps) and done >= self._steps[len(self.rungs)]

    def cut(self, scores: Scores, done: int) -> dict[str, Stopped]:
        """Pass a rung.

        Args:
            scores: of all students that still train.

        Returns:
            Those that stop here.
        """
        assert self.halving is not None
        number = len(self.rungs) + 1
        places = max(1, math.floor(self._num_students * self.halving.eta**-number + 1e-9))
        ranked = sorted(scores, key=lambda name: -scores[name])  # of equals those that are named first go on
        kept, cut = ranked[:places], ranked[places:]
        self.rungs.append({"step": done, "scores": {name: _finite(score) for name, score in scores.items()}, "kept": kept})
        stopped = {}
        for place, name in enumerate(cut, start=places + 1):
            said = f"number {place} of {len(ranked)} at rung {number}, where {places} go on ({_said(scores[name], self.halving.metric)})"
            stopped[name] = Stopped(why="halving", step=done, detail=said)
        return stopped

    def finish(self, scores: Scores) -> None:
        """The last step is behind."""
        self.final = {name: _finite(score) for name, score in scores.items()}

    def follow(self, scores: Scores, done: int) -> dict[str, Stopped]:
        """Take in the scores of an evaluation; the answer is who stops because its own have risen no more."""
        if self.early_stop is None:
            return {}
        stopped = {}
        for name, score in scores.items():
            best = self._best.get(name)
            risen = best is None or score > best.score + self.early_stop.min_delta
            self._best[name] = best = _Best(score, 0) if best is None or risen else _Best(best.score, best.waited + 1)
            if best.waited >= self.early_stop.patience:
                said = _said(best.score, self.early_stop.metric)
                stopped[name] = Stopped(why="early stop", step=done, detail=f"no better for {best.waited} evaluations than {said}")
        return stopped


class _Best(NamedTuple):
    """A student's best score, and how many evaluations ago that was."""

    score: float
    waited: int

    @classmethod
    def of(cls, score: float | None, waited: int) -> _Best:
        """From a checkpoint, where None stands for minus infinity: JSON knows none."""
        return cls(-math.inf if score is None else score, waited)


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _said(score: float, metric: Metric) -> str:
    return f"agreement {score:.1%}" if metric == "agreement" else f"loss {-score:.4f}"
