"""How the settings of stage 2 and of its control are found: the same number of candidates each, scored on the same validation images.

`python -m bench.science search` trains every candidate with one seed and writes results/search/DATASET.json; the best of each row goes
into `SETTINGS` of arms.py by hand. The test images are never looked at here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.science.arms import SETTINGS, STUDENT, TEACHER, sgd
from bench.science.stages import Result, Stages
from distill.models.settings import NetworkSettings
from teacher_trainer.settings import FinetuneSettings


@dataclass(frozen=True)
class Candidate:
    """One way to train a classifier on few labels."""

    epochs: int
    rate: float
    decay: float
    head: int = 0
    """Layers of the projection head that the classifier stands on; pretrained networks only."""

    def settings(self, min_area: float) -> FinetuneSettings:
        return FinetuneSettings(
            num_head_layers=self.head, epochs=self.epochs, global_batch=64, min_area=min_area, optimizer=sgd(self.rate, self.decay)
        )


SUPERVISED = {
    0.01: [
        Candidate(300, 0.1, 5e-4),
        Candidate(300, 0.03, 5e-4),
        Candidate(300, 0.3, 5e-4),
        Candidate(300, 0.1, 5e-3),
        Candidate(100, 0.1, 5e-4),
    ],
    0.1: [
        Candidate(60, 0.1, 5e-4),
        Candidate(60, 0.03, 5e-4),
        Candidate(60, 0.3, 5e-4),
        Candidate(60, 0.1, 5e-3),
        Candidate(120, 0.1, 5e-4),
    ],
}
"""Label fraction -> from random weights, teacher and student alike."""

FINETUNED = {
    0.01: [
        Candidate(100, 0.02, 1e-4, head=1),
        Candidate(100, 0.02, 1e-4, head=0),
        Candidate(100, 0.1, 5e-4, head=1),
        Candidate(100, 0.005, 1e-4, head=1),
        Candidate(300, 0.02, 5e-3, head=1),
    ],
    0.1: [
        Candidate(60, 0.1, 5e-4, head=1),
        Candidate(60, 0.1, 5e-4, head=0),
        Candidate(60, 0.02, 1e-4, head=1),
        Candidate(60, 0.1, 5e-3, head=1),
        Candidate(120, 0.1, 5e-4, head=1),
    ],
}
"""Label fraction -> from the pretrained teacher."""

ROWS: dict[str, tuple[NetworkSettings, dict[float, list[Candidate]]]] = {
    "supervised-teacher": (TEACHER, SUPERVISED),
    "supervised-student": (STUDENT, SUPERVISED),
    "finetuned": (TEACHER, FINETUNED),
}


def score_candidates(dataset: str, tests: Stages, validations: Stages, rows: Sequence[str]) -> Iterator[Result]:
    """Train each candidate of the `rows` named; yields its settings and its scores on the validation images.

    Args:
        tests: holds the pretrained network.
        validations: whose labelled test images are the validation images.
        rows: of `ROWS`.
    """
    setting = SETTINGS[dataset]
    for row in rows:
        network, candidates = ROWS[row]
        pretrained = tests.pretrain(setting.pretrain) if row == "finetuned" else None
        for fraction, tried in candidates.items():
            for candidate in tried:
                made = validations.classify(network, candidate.settings(setting.min_area), fraction, pretrained)
                yield {"row": row, "fraction": fraction, **vars(candidate), "top1": made.result["scores"]["top1"]}
