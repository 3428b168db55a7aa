"""A teacher without a network, beside what it fakes, for tests of everything that asks one.

Unit of data: one batch of crops. Its logits are a plain function of the pixels, so a test can compute the right answer itself.
"""

from __future__ import annotations

import asyncio

import numpy as np

from distill.errors import TeacherUnavailable
from distill.teacher_info import Preprocessing, TeacherInfo
from distill.wire import LOGITS, SOFT_LABELS
from teacher_server.backend import CheckedTeacher, Crops, Floats


class FakeTeacher(CheckedTeacher):
    """Class k scores 8 * cos(mean pixel / 255 + k), the mean over H, W and C.

    `unavailable_calls` calls raise TeacherUnavailable first; `delay_s` makes each answer slow; `answer_nan` spoils the first row.
    `calls` lists the batch size of every question that reached it, `cancelled` counts those given up while it was thinking.
    """

    def __init__(
        self, num_classes: int = 10, image_size: int = 8, *, unavailable_calls: int = 0, delay_s: float = 0.0, answer_nan: bool = False
    ) -> None:
        super().__init__()
        self.unavailable_calls = unavailable_calls
        self.delay_s = delay_s
        self.answer_nan = answer_nan
        self.calls: list[int] = []
        self.cancelled = 0
        self.closed = False
        names = tuple(f"class {k}" for k in range(num_classes))
        self._served = TeacherInfo(name="fake", fingerprint="f" * 64, class_names=names, preprocessing=Preprocessing(image_size=image_size))

    async def _load_info(self) -> TeacherInfo:
        return self._served

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        self.calls.append(len(crops_BHWC))
        if self.unavailable_calls > 0:
            self.unavailable_calls -= 1
            raise TeacherUnavailable("the fake teacher was told to be away")
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        logits_BK = fake_logits(crops_BHWC, self._served.num_classes)
        scaled_BK = logits_BK / temperature_B1
        probs_BK = np.exp(scaled_BK - scaled_BK.max(axis=1, keepdims=True))
        probs_BK /= probs_BK.sum(axis=1, keepdims=True)
        tensors = {LOGITS: logits_BK, SOFT_LABELS: probs_BK.astype(np.float32)}
        if self.answer_nan:
            for tensor_BK in tensors.values():
                tensor_BK[0] = np.nan
        return {name: tensors[name] for name in names}

    async def close(self) -> None:
        """See TeacherBackend."""
        self.closed = True


def fake_logits(crops_BHWC: Crops, num_classes: int) -> Floats:
    """fp32 [B,K]: what the fake says of uint8 [B,H,W,3]."""
    means_B1 = crops_BHWC.reshape(len(crops_BHWC), -1).mean(axis=1, dtype=np.float64)[:, None]
    return (8 * np.cos(means_B1 / 255 + np.arange(num_classes))).astype(np.float32)
