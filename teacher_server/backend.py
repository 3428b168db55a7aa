"""What every way of running a teacher can do: crops in, logits or soft labels out.

Flow: gateway or student trainer -> TeacherBackend (Triton over gRPC, or ONNX Runtime in this process) -> soft labels.
Unit of data: one batch of crops. Shapes: B images, H W C uint8 pixels, K classes, R retained classes, fp32.

A back end only moves tensors (`_infer`). What is asked and what comes back is checked here, once, for all of them: a NaN, a wrong shape
or a row that does not sum to 1 never leaves this file as a label.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.config import validate
from distill.errors import ConfigError, DistillError, RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import METADATA_KEY, TeacherInfo
from distill.wire import LOGITS, SOFT_LABELS, TOP_IDS, TOP_LOGITS

Crops = NDArray[np.uint8]
Floats = NDArray[np.float32]
ClassIds = NDArray[np.int32]

HIGHEST_TEMPERATURE = 100.0
_SUM_TOLERANCE = 1e-3  # a teacher in fp16 sums 1000 classes to 1 within about 5e-4

_TOP = (TOP_IDS, TOP_LOGITS)

logger = logging.getLogger(__name__)


class TeacherBackend(Protocol):
    """A served teacher. All methods may be called concurrently, from the event loop that first used it.

    Every asking method raises RequestRefused (crops or temperature that this teacher cannot take), TeacherUnavailable (ask again later),
    TeacherAnswerError (an answer that must not be used).

    The served version may change at any time. All labels of one call are of one version; with `fingerprint` they are of exactly that
    teacher, or TeacherChanged is raised: without it a label could be another teacher's than the `info()` that was read before the call.
    """

    async def info(self) -> TeacherInfo:
        """Name, version, fingerprint, classes and preprocessing. Remembered until the teacher is found away."""
        ...

    async def logits(self, crops_BHWC: Crops, *, fingerprint: str | None = None) -> Floats:
        """uint8 [B,S,S,3] -> logits fp32 [B,K]."""
        ...

    async def soft_labels(
        self, crops_BHWC: Crops, temperature_B1: Floats, *, with_logits: bool = False, fingerprint: str | None = None
    ) -> tuple[Floats | None, Floats]:
        """uint8 [B,S,S,3] and fp32 [B,1] -> (logits fp32 [B,K] only if asked for, softmax(logits / temperature) fp32 [B,K])."""
        ...

    async def top_logits(self, crops_BHWC: Crops, *, fingerprint: str | None = None) -> tuple[ClassIds, Floats]:
        """uint8 [B,S,S,3] -> (class ids int32 [B,R], logits fp32 [B,R]), largest first; R is `info().top_outputs`.

        Raises RequestRefused where the teacher was exported without `teacher.top_outputs`.
        """
        ...

    async def ready(self) -> bool:
        """Whether a label really comes out now. Never raises for a teacher that is away."""
        ...

    async def close(self) -> None:
        """Let go of connections and threads. The object is of no use afterwards."""
        ...


class CheckedTeacher(ABC):
    """Base of the back ends: the protocol and all checks on top of two methods."""

    carries_top_outputs: ClassVar[bool] = False
    """Whether `_infer` takes TOP_IDS (int32 [B,R]) and TOP_LOGITS. Where it does not, all logits travel and the largest are picked here."""

    def __init__(self) -> None:
        self._info: TeacherInfo | None = None

    @abstractmethod
    async def _load_info(self) -> TeacherInfo:
        """Ask the engine what it serves."""

    @abstractmethod
    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        """The tensors `names`, each [B,K], of B >= 1 checked crops."""

    async def info(self) -> TeacherInfo:
        """See TeacherBackend."""
        if self._info is None:
            self._info = await self._load_info()
        return self._info

    async def logits(self, crops_BHWC: Crops, *, fingerprint: str | None = None) -> Floats:
        """See TeacherBackend."""
        # The graph wants a temperature even where it does not matter.
        tensors = await self._ask(crops_BHWC, np.ones((len(crops_BHWC), 1), np.float32), (LOGITS,), fingerprint)
        return tensors[LOGITS]

    async def soft_labels(
        self, crops_BHWC: Crops, temperature_B1: Floats, *, with_logits: bool = False, fingerprint: str | None = None
    ) -> tuple[Floats | None, Floats]:
        """See TeacherBackend."""
        names = (LOGITS, SOFT_LABELS) if with_logits else (SOFT_LABELS,)
        tensors = await self._ask(crops_BHWC, temperature_B1, names, fingerprint)
        probs_BK = tensors[SOFT_LABELS]
        check_probs(probs_BK)
        return tensors.get(LOGITS), probs_BK

    async def top_logits(self, crops_BHWC: Crops, *, fingerprint: str | None = None) -> tuple[ClassIds, Floats]:
        """See TeacherBackend."""
        info = await self.info()
        if info.top_outputs is None:
            raise RequestRefused(f"teacher {info.name} gives no top outputs: export it with teacher.top_outputs, or ask for its logits")
        temperature_B1 = np.ones((len(crops_BHWC), 1), np.float32)
        if not self.carries_top_outputs:
            logits_BK = (await self._ask(crops_BHWC, temperature_B1, (LOGITS,), fingerprint))[LOGITS]
            ids_BR = np.argsort(-logits_BK, axis=1, kind="stable")[:, : info.top_outputs]
            return ids_BR.astype(np.int32), np.take_along_axis(logits_BK, ids_BR, axis=1)
        tensors = await self._ask(crops_BHWC, temperature_B1, (TOP_IDS, TOP_LOGITS), fingerprint)
        return tensors[TOP_IDS].astype(np.int32, copy=False), tensors[TOP_LOGITS]

    async def ready(self) -> bool:
        """See TeacherBackend. Triton calls a model ready whose process is dead, so only a real label counts."""
        try:
            await self.ask_canary()
        except DistillError as error:
            logger.debug("teacher is not ready: %s", error)
            return False
        return True

    async def ask_canary(self) -> None:
        """One label for one grey crop, thrown away. Raises what asking raises, so that a caller can say why there is none."""
        try:
            await self._ask_grey_crop()
        except TeacherChanged:  # any version will do
            await self._ask_grey_crop()

    async def _ask_grey_crop(self) -> None:
        info = await self.info()
        size = info.preprocessing.image_size
        # Of this teacher: the next one may take crops of another size.
        await self.soft_labels(np.full((1, size, size, 3), 127, np.uint8), np.ones((1, 1), np.float32), fingerprint=info.fingerprint)

    async def close(self) -> None:
        """See TeacherBackend."""
        return None

    async def _ask(
        self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], fingerprint: str | None = None
    ) -> dict[str, Floats]:
        info = await self.info()
        if fingerprint is not None and fingerprint != info.fingerprint:
            raise TeacherChanged(f"the teacher that answers now is {info.fingerprint[:12]}, not {fingerprint[:12]} any more")
        check_crops(crops_BHWC, info)
        check_temperature(temperature_B1, len(crops_BHWC))
        if len(crops_BHWC) == 0:
            return {name: np.empty((0, info.num_classes if name not in _TOP else info.top_outputs or 0), np.float32) for name in names}
        try:
            tensors = await self._infer(crops_BHWC, temperature_B1, names)
        except TeacherUnavailable:
            if self._info is info:  # else another question has learnt already who it is now
                self._info = None  # whoever comes back says anew who it is
            raise
        if names == _TOP:
            check_top(tensors[TOP_IDS], tensors[TOP_LOGITS], len(crops_BHWC), info)
            return tensors
        for name in names:
            check_answer(tensors[name], name, len(crops_BHWC), info.num_classes)
        return tensors


def check_crops(crops_BHWC: Crops, info: TeacherInfo) -> None:
    """Raises RequestRefused unless the crops are uint8 [B,S,S,3] of the teacher's own size S."""
    size = info.preprocessing.image_size
    if crops_BHWC.dtype != np.uint8 or crops_BHWC.ndim != 4 or crops_BHWC.shape[1:] != (size, size, 3):
        given = f"{crops_BHWC.dtype} {list(crops_BHWC.shape)}"
        raise RequestRefused(f"teacher {info.name} takes crops of uint8 [B,{size},{size},3], got {given}")


def check_temperature(temperature_B1: Floats, num_images: int) -> None:
    """Raises RequestRefused unless there is one fp32 temperature per image, above 0 and at most 100."""
    if temperature_B1.dtype != np.float32 or temperature_B1.shape != (num_images, 1):
        raise RequestRefused(f"temperature must be float32 [{num_images},1], got {temperature_B1.dtype} {list(temperature_B1.shape)}")
    valid_B1 = (temperature_B1 > 0) & (temperature_B1 <= HIGHEST_TEMPERATURE)  # false for NaN, too
    if not valid_B1.all():
        raise RequestRefused(f"temperature must be above 0 and at most {HIGHEST_TEMPERATURE:g}, got {float(temperature_B1[~valid_B1][0])}")


def check_answer(values_BK: Floats, name: str, num_images: int, num_classes: int) -> None:
    """Raises TeacherAnswerError unless the tensor is finite fp32 [B,K]."""
    if values_BK.dtype != np.float32 or values_BK.shape != (num_images, num_classes):
        given = f"{values_BK.dtype} {list(values_BK.shape)}"
        raise TeacherAnswerError(f"the teacher answered {name} as {given} where float32 [{num_images},{num_classes}] was due")
    bad_B = ~np.isfinite(values_BK).all(axis=1)
    if bad_B.any():
        raise TeacherAnswerError(
            f"the teacher answered {name} with NaN or infinity for {int(bad_B.sum())} of {num_images} crops, first at {int(bad_B.argmax())}"
        )


def check_top(ids_BR: NDArray[Any], logits_BR: Floats, num_images: int, info: TeacherInfo) -> None:
    """Raises TeacherAnswerError unless the ids are int32 [B,R], of R different classes, and the logits finite fp32 [B,R], largest first."""
    num_top = info.top_outputs or 0
    check_answer(logits_BR, TOP_LOGITS, num_images, num_top)
    if ids_BR.dtype != np.int32 or ids_BR.shape != (num_images, num_top):
        given = f"{ids_BR.dtype} {list(ids_BR.shape)}"
        raise TeacherAnswerError(f"the teacher answered {TOP_IDS} as {given} where int32 [{num_images},{num_top}] was due")
    sorted_BR = np.sort(ids_BR, axis=1)
    if (sorted_BR[:, :1] < 0).any() or (sorted_BR[:, -1:] >= info.num_classes).any() or (np.diff(sorted_BR, axis=1) == 0).any():
        raise TeacherAnswerError(f"the teacher answered {TOP_IDS} that are not {num_top} different classes of {info.num_classes}")
    if (np.diff(logits_BR, axis=1) > 0).any():
        raise TeacherAnswerError(f"the teacher answered {TOP_LOGITS} that are not in order, largest first")


def check_probs(probs_BK: Floats) -> None:
    """Raises TeacherAnswerError unless every row is a distribution."""
    sums_B = probs_BK.sum(axis=1, dtype=np.float64)
    wrong_B = (np.abs(sums_B - 1) > _SUM_TOLERANCE) | (probs_BK < 0).any(axis=1)
    if wrong_B.any():
        raise TeacherAnswerError(f"soft labels of crop {int(wrong_B.argmax())} sum to {float(sums_B[wrong_B.argmax()]):.6g} instead of 1")


def parse_info(text: str, origin: str) -> TeacherInfo:
    """A TeacherInfo from its JSON. Raises RequestRefused, naming `origin`, for anything else."""
    try:
        return validate(TeacherInfo, json.loads(text), origin=origin)
    except (ValueError, ConfigError) as error:
        raise RequestRefused(f"{origin}: {METADATA_KEY} is not a teacher's description: {error}") from error
