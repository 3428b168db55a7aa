"""The way to a student's int8 file: plain quantisation, and where that loses too much, one remedy after the other.

    plain -> 7-bit weights (processors whose 8-bit multiply-add saturates) -> sensitive layers in float -> fine-tuned for int8

Every file on the way is measured in ONNX Runtime and kept in the account (`Int8Attempt`). The test crops say whether the gate likes it;
among those that it likes equally, the one nearest to fp32 on the calibration crops is the int8 file.
Unit of data: one attempt.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distill.errors import DistillError
from export.edge import Figures, Int8Attempt
from export.gate import int8_complaints, is_inaccurate
from export.graph import export_student_graph
from export.label_space import Crops
from export.latency import measure_latency
from export.measured import MadeFile, TestSet, answers_of, logits_of
from export.quantize import Quantizer, int8_weight_share
from export.sensitive import find_sensitive_layers
from export.settings import StudentExportSettings

SHORT_ROUNDS, SHORT_REPEATS = 3, 15
"""Of the latency of one attempt; the file that is chosen is measured in full."""


@dataclass(frozen=True)
class Trained:
    """What fine-tuning for int8 brought."""

    network: nn.Module | None
    """The student, in float, with weights that bear the rounding; None where it could not be trained."""
    steps: int
    """Updates that were made."""
    said: str
    """What became of it, in words."""


FineTune = Callable[[nn.Module, Crops, int], Trained]
"""(student, calibration crops, bits of a weight) -> `Trained`. The student that is given stays as it is."""


@dataclass
class _Tried:
    account: Int8Attempt
    made: MadeFile
    figures: Figures
    calibration_kl: float
    reduce_range: bool
    network: nn.Module


@dataclass(frozen=True)
class Int8Result:
    """The int8 file and how it came about."""

    file: MadeFile
    attempts: tuple[Int8Attempt, ...]
    notes: tuple[str, ...]
    """What the remedies said of themselves."""
    network: nn.Module
    """What was quantised: the student, or what fine-tuning made of it."""


def make_int8(
    network: nn.Module,
    fp32: Path,
    target: Path,
    calibration_crops: Crops,
    tests: TestSet,
    settings: StudentExportSettings,
    fine_tune: FineTune | None,
) -> Int8Result:
    """Write the int8 file of a student.

    Args:
        network: the student; what is fine-tuned.
        fp32: its ONNX fp32 file.
        target: the int8 file to write.
        calibration_crops: uint8 [N,H,W,3].
        fine_tune: None where no soft labels are at hand.

    Raises:
        DistillError: ONNX Runtime cannot quantise the student.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(network, fp32, calibration_crops, tests, settings, Path(folder))
        work.try_plain()
        if settings.sensitive_layers.max_layers and work.is_inaccurate:
            work.try_sensitive_layers()
        work.try_training(fine_tune)
        best = work.best()
        shutil.copyfile(best.made.path, target)
        attempts = tuple(tried.account.replace(chosen=tried is best) for tried in work.tried)
        made = MadeFile("int8", target, kept_in_float=best.account.kept_in_float, training_steps=best.account.training_steps)
        return Int8Result(made, attempts, tuple(work.notes), best.network)


class _Work:
    """The attempts on one student, each a file in `folder`."""

    def __init__(self, network: nn.Module, fp32: Path, crops: Crops, tests: TestSet, settings: StudentExportSettings, folder: Path) -> None:
        self._network, self._fp32, self._crops, self._tests, self._settings, self._folder = network, fp32, crops, tests, settings, folder
        self._fp32_file = MadeFile("fp32", fp32)
        self._reference = self._figures_of(self._fp32_file, self._tests.quality(tests.fp32_logits), 1.0)
        self._calibration = TestSet(crops, None, logits_of(self._fp32_file.open(num_threads=1), crops, fp32.name))
        self._quantizer = self._quantizer_of(fp32, "plain")
        self.tried: list[_Tried] = []
        self.notes: list[str] = []

    def _quantizer_of(self, fp32: Path, name: str) -> Quantizer:
        folder = self._folder / name
        folder.mkdir()
        return Quantizer(fp32, self._crops, folder)

    @property
    def is_inaccurate(self) -> bool:
        """Whether every file so far loses too much accuracy."""
        return all(self._is_inaccurate(tried) for tried in self.tried)

    def _is_inaccurate(self, tried: _Tried) -> bool:
        return is_inaccurate(tried.figures, self._reference, self._settings.gate)

    def best(self) -> _Tried:
        """With the fewest complaints; of those the nearest to fp32 on the calibration crops, the first of equals."""
        return min(self.tried, key=lambda tried: (len(tried.account.complaints), tried.calibration_kl))

    def try_plain(self) -> None:
        bits = 7 if self._settings.reduce_range else 8
        self._try(self._quantizer, f"plain, {bits}-bit weights", reduce_range=self._settings.reduce_range)
        if self.is_inaccurate and not self._settings.reduce_range:
            self._try(self._quantizer, "plain, 7-bit weights", reduce_range=True)

    def try_sensitive_layers(self) -> None:
        s, reduce_range = self._settings, self._better_range()
        try:
            found = find_sensitive_layers(
                self._quantizer, self._fp32, self._crops, s.sensitive_layers, s.gate, self._folder, reduce_range
            )  # fmt: skip
        except DistillError as error:
            self.notes.append(f"layers that hurt were not found: {error}")
            return
        self.notes.append(found.describe())
        if found.keep_in_float:
            self._try(self._quantizer, found.describe(), reduce_range=reduce_range, keep_in_float=found.keep_in_float)

    def try_training(self, fine_tune: FineTune | None) -> None:
        """Fine-tune the student and quantise what comes out, where that is wanted."""
        when = self._settings.quantised_training.when
        # A file that is too slow or too large is not helped by other weights; one with layers in float may be so because of them.
        plain = [tried for tried in self.tried if not tried.made.kept_in_float]
        needed = all(tried.account.complaints for tried in self.tried) and all(map(self._is_inaccurate, plain))
        if when == "never" or (when == "auto" and not needed):
            return
        if fine_tune is None:
            self.notes.append("not fine-tuned for int8: no soft labels were at hand")
            return
        reduce_range = self._better_range()
        trained = fine_tune(self._network, self._crops, 7 if reduce_range else 8)
        self.notes.append(trained.said)
        if trained.network is None:
            return
        fp32 = self._folder / "trained.fp32.onnx"
        export_student_graph(trained.network, self._crops.shape[1], fp32, opset=self._settings.opset)
        how = f"fine-tuned for int8, {trained.steps} steps"
        quantizer = self._quantizer_of(fp32, "trained")
        self._try(quantizer, how, reduce_range=reduce_range, training_steps=trained.steps, network=trained.network)

    def _better_range(self) -> bool:
        """Whether 7-bit weights are nearer to fp32 than 8-bit ones."""
        return min(self.tried, key=lambda tried: tried.calibration_kl).reduce_range

    def _try(
        self,
        quantizer: Quantizer,
        how: str,
        *,
        reduce_range: bool,
        keep_in_float: tuple[str, ...] = (),
        training_steps: int = 0,
        network: nn.Module | None = None,
    ) -> None:
        path = self._folder / f"attempt-{len(self.tried)}.onnx"
        quantizer.write(path, keep_in_float=keep_in_float, reduce_range=reduce_range)
        made = MadeFile("int8", path, kept_in_float=keep_in_float, training_steps=training_steps)
        predict = made.open(num_threads=1)
        quality = self._tests.quality(answers_of(predict, self._tests.crops))
        calibration_kl = float(self._calibration.quality(answers_of(predict, self._crops))["kl"] or 0.0)
        files = {"fp32": self._fp32_file.open(num_threads=1), "int8": predict}
        latency = measure_latency(files, self._tests.crops[:1], SHORT_ROUNDS, SHORT_REPEATS)
        figures = self._figures_of(made, quality, latency["int8"].ratio)
        account = Int8Attempt(
            how=how,
            kept_in_float=keep_in_float,
            training_steps=training_steps,
            complaints=int8_complaints(figures, self._reference, self._settings.gate),
            size_ratio=figures.size_ratio,
            latency_ratio=figures.latency_ratio,
            calibration_kl=calibration_kl,
            **{name: quality[name] for name in ("top1", "agreement", "kl")},
        )
        self.tried.append(_Tried(account, made, figures, calibration_kl, reduce_range, network or self._network))

    def _figures_of(self, file: MadeFile, quality: dict[str, Any], latency_ratio: float) -> Figures:
        return Figures(
            size_bytes=file.size_bytes,
            int8_weight_share=int8_weight_share(file.path),
            size_ratio=file.size_bytes / self._fp32_file.size_bytes,
            latency_ratio=latency_ratio,
            **quality,
        )
