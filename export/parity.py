"""The gate between a network and its exported graph, in label space: real crops go through both, and what comes out is compared.

Unit of data: one crop. No label is served, and no student shipped, from a graph that did not pass. The gate fails closed: nothing compared,
a value that is not finite, or a shape that is wrong count as failures. What is compared is any `Runner`: a graph in ONNX Runtime, or an
engine of TensorRT.

Shapes: B crops of a batch, N crops of the whole check, H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from distill.config import Section
from distill.errors import BadInput, ParityError
from export.files import write_atomically
from export.label_space import Crops, Logits, Reals, kl_divergence, softmax
from export.parity_files import FAILED_REPORT_FILE, REPORT_FILE
from export.runners import OnnxRunner, Runner
from export.settings import ParityLimits, Precision
from export.worst_images import save_worst

if TYPE_CHECKING:
    from torch import nn

NUM_WORST = 8
Reference = Callable[[Crops], Logits]
"""uint8 crops [B,H,W,3] -> logits [B,K]: the network that the graph was made from."""


class Offender(Section):
    """One of the crops that the graph and the network differ most on. Numbers that are not finite are left out (null)."""

    image_id: str
    """Which image."""
    row: int = 0
    """Which of the compared crops, from 0."""
    logit_error: float | None
    """Largest |difference of logits|."""
    kl: float | None
    """Largest KL(network || graph) over the temperatures, in nats."""
    reference_class: int
    """Most likely class according to the network."""
    graph_class: int
    """Most likely class according to the graph."""


class ParityReport(Section):
    """What the comparison found. `failures` is empty if and only if the graph may be used."""

    num_images: int
    """Crops compared."""
    num_not_finite: int
    """Crops with a NaN or an infinity in the logits of either side."""
    max_logit_error: float | None
    """Largest |logit of the graph - logit of the network|; null where nothing finite was compared."""
    max_kl: dict[str, float]
    """temperature -> largest KL(network || graph) of one crop, in nats."""
    top1_agreement: float
    """Share of crops with the same most likely class."""
    max_soft_label_error: float | None
    """Largest |soft label - softmax(logits / temperature)| with mixed temperatures in one batch; null for a graph without soft labels."""
    engine: str = ""
    """What the graph was run in."""
    fingerprint: str = ""
    """The teacher that was compared; empty for a student or an engine."""
    precision: Precision = "fp32"
    """What the graph computes in."""
    opset: int | None = None
    """ONNX operator set of the graph; null where it was not looked at."""
    kept_in_fp32: tuple[str, ...] = ()
    """Layers of an fp16 graph that stay in fp32, because they would overflow."""
    weight_bits: int | None = None
    """Of an int8 graph: 8, or 7 where the processor that measured it saturates with 8; null where it was not made here."""
    limits: ParityLimits
    """What was allowed."""
    failures: tuple[str, ...]
    """What was over its limit, in words."""
    worst: tuple[Offender, ...] = Field(max_length=NUM_WORST)
    """The crops with the largest errors, worst first."""

    @property
    def passed(self) -> bool:
        """Whether the graph may be used."""
        return not self.failures


@dataclass(frozen=True)
class _Answers:
    """Both sides on all crops, in float64."""

    reference_logits: Reals
    """[N,K], of the network."""
    graph_logits: Reals
    """[N,K], of the graph."""
    soft_labels: Reals | None
    """[N,K], of the graph; None for a student."""
    temperatures: Reals
    """[N,1], what the soft labels were asked at."""


def check_parity(
    reference: Reference,
    graph: Path | Runner,
    crops_NHWC: Crops,
    image_ids: Sequence[str],
    limits: ParityLimits,
    temperatures: Sequence[float] = (1.0, 4.0),
    batch_size: int = 64,
) -> ParityReport:
    """Compare a graph with the network that it was made from.

    Args:
        reference: uint8 crops [B,H,W,3] -> logits [B,K], by the network.
        graph: a teacher or student graph of ours, or whatever runs it.
        crops_NHWC: uint8 [N,H,W,3], real crops: noise hides a wrong mean or a swapped channel.
        image_ids: N names, to say which crops differ.
        limits: what is allowed.
        temperatures: where KL is measured, and what the soft labels are asked at, mixed within each batch.
        batch_size: crops that go through at once.

    Raises:
        BadInput: the graph does not load, or does not take these crops.
    """
    if len(image_ids) != len(crops_NHWC):
        raise BadInput(f"{len(crops_NHWC)} crops but {len(image_ids)} image ids: they must be equal")
    if len(crops_NHWC) == 0:
        return _nothing_compared(limits)
    runner = OnnxRunner.of_file(graph) if isinstance(graph, Path) else graph
    answers = _ask_both(reference, runner, crops_NHWC, temperatures, batch_size)
    if answers.reference_logits.shape != answers.graph_logits.shape:
        shapes = f"{answers.reference_logits.shape} and {answers.graph_logits.shape}"
        raise BadInput(f"logits of the network and of {runner.name} have shapes {shapes}: they are not of the same classes")
    return _compare(answers, image_ids, limits, temperatures).replace(engine=runner.engine)


def require_parity(report: ParityReport, folder: Path, name: str, crops_NHWC: Crops | None = None) -> None:
    """Write the report into `folder`, and the worst crops as pictures into `worst` beside it, then stop if the graph did not pass.

    A graph that passed has its report in `parity.json`, one that failed in `parity-failed.json`.

    Args:
        report: of the comparison.
        folder: made if it is not there.
        name: what an error calls the graph.
        crops_NHWC: uint8 [N,H,W,3], those that were compared; without them there are no pictures.

    Raises:
        ParityError: with every number that is over its limit, in one line.
    """
    path = folder / (REPORT_FILE if report.passed else FAILED_REPORT_FILE)
    if crops_NHWC is not None:
        save_worst(folder, crops_NHWC, [(offender.row, offender.image_id) for offender in report.worst])
    write_atomically(path, (report.model_dump_json(indent=2) + "\n").encode())
    if report.passed:
        (folder / FAILED_REPORT_FILE).unlink(missing_ok=True)
    else:
        raise ParityError(
            f"{name} does not say what the network says: {'; '.join(report.failures)} ({report.num_images} images; the worst are in {path})"
        )


def torch_reference(network: nn.Module) -> Reference:
    """A network as the gate wants it: uint8 crops [B,H,W,3] -> logits [B,K] in numpy, in evaluation mode."""
    import torch

    from export.graph import device_of, evaluating

    device = device_of(network)

    def reference(crops_BHWC: Crops) -> Logits:
        with evaluating(network), torch.inference_mode():
            logits_BK = network(torch.from_numpy(np.ascontiguousarray(crops_BHWC)).to(device))
        return np.asarray(logits_BK.float().cpu().numpy())

    return reference


def _ask_both(reference: Reference, runner: Runner, crops_NHWC: Crops, temperatures: Sequence[float], batch_size: int) -> _Answers:
    temperature_N1 = np.resize(np.asarray(temperatures, dtype=np.float32), (len(crops_NHWC), 1))  # one after the other, crop by crop
    references, graphs, soft_labels = [], [], []
    for start in range(0, len(crops_NHWC), batch_size):
        rows = slice(start, start + batch_size)
        logits_BK, soft_labels_BK = runner(crops_NHWC[rows], temperature_N1[rows])
        graphs.append(logits_BK)
        if soft_labels_BK is not None:
            soft_labels.append(soft_labels_BK)
        references.append(np.asarray(reference(crops_NHWC[rows]), dtype=np.float64))
    return _Answers(
        reference_logits=np.concatenate(references),
        graph_logits=np.concatenate(graphs).astype(np.float64),
        soft_labels=np.concatenate(soft_labels).astype(np.float64) if soft_labels else None,
        temperatures=temperature_N1.astype(np.float64),
    )


def _compare(answers: _Answers, image_ids: Sequence[str], limits: ParityLimits, temperatures: Sequence[float]) -> ParityReport:
    finite_N = np.isfinite(np.concatenate([answers.reference_logits, answers.graph_logits], axis=1)).all(axis=1)
    # Crops with a NaN are counted and listed; their errors are infinite, so that they sort first.
    error_N = np.where(finite_N, np.abs(_finite(answers.graph_logits) - _finite(answers.reference_logits)).max(axis=1), np.inf)
    kl_TN = np.stack(
        [kl_divergence(_finite(answers.reference_logits), _finite(answers.graph_logits), temperature) for temperature in temperatures]
    )
    kl_N = np.where(finite_N, kl_TN.max(axis=0), np.inf)
    reference_class_N, graph_class_N = _finite(answers.reference_logits).argmax(axis=1), _finite(answers.graph_logits).argmax(axis=1)
    report = ParityReport(
        num_images=len(image_ids),
        num_not_finite=int((~finite_N).sum()),
        max_logit_error=_largest(error_N[finite_N]),
        max_kl={f"{temperature:g}": float(kl[finite_N].max(initial=0.0)) for temperature, kl in zip(temperatures, kl_TN, strict=True)},
        top1_agreement=float(((reference_class_N == graph_class_N) & finite_N).mean()),
        max_soft_label_error=_soft_label_error(answers),
        limits=limits,
        failures=(),
        worst=tuple(
            Offender(
                image_id=image_ids[row],
                row=int(row),
                logit_error=float(error_N[row]) if finite_N[row] else None,
                kl=float(kl_N[row]) if finite_N[row] else None,
                reference_class=int(reference_class_N[row]),
                graph_class=int(graph_class_N[row]),
            )
            for row in np.lexsort((-error_N, -kl_N))[:NUM_WORST]
        ),
    )
    return report.replace(failures=_failures(report, answers))


def _failures(report: ParityReport, answers: _Answers) -> tuple[str, ...]:
    limits, failures = report.limits, []
    if report.num_not_finite:
        failures.append(f"NaN or infinite logits on {report.num_not_finite} of {report.num_images} images")
    if report.max_logit_error is None or report.max_logit_error > limits.max_logit_error:
        failures.append(f"logit error {_say(report.max_logit_error)} > {limits.max_logit_error:.3g}")
    for temperature, kl in report.max_kl.items():
        if not kl <= limits.max_kl:
            failures.append(f"KL at temperature {temperature} {kl:.3g} > {limits.max_kl:.3g}")
    if report.top1_agreement < limits.min_top1_agreement:
        failures.append(f"top-1 agreement {report.top1_agreement:.4f} < {limits.min_top1_agreement:.4f}")
    if answers.soft_labels is not None and (
        report.max_soft_label_error is None or report.max_soft_label_error > limits.max_soft_label_error
    ):
        failures.append(
            f"soft labels differ from softmax(logits / T) by {_say(report.max_soft_label_error)} > {limits.max_soft_label_error:.3g}"
        )
    return tuple(failures)


def _soft_label_error(answers: _Answers) -> float | None:
    if answers.soft_labels is None or not np.isfinite(answers.soft_labels).all() or not np.isfinite(answers.graph_logits).all():
        return None
    return float(np.abs(answers.soft_labels - softmax(answers.graph_logits / answers.temperatures)).max())


def _nothing_compared(limits: ParityLimits) -> ParityReport:
    return ParityReport(
        num_images=0,
        num_not_finite=0,
        max_logit_error=None,
        max_kl={},
        top1_agreement=0.0,
        max_soft_label_error=None,
        limits=limits,
        failures=("no image was compared; give at least one",),
        worst=(),
    )


def _finite(logits: Reals) -> Reals:
    return np.where(np.isfinite(logits), logits, 0.0)


def _largest(values: Reals) -> float | None:
    return float(values.max()) if len(values) and math.isfinite(values.max()) else None


def _say(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
