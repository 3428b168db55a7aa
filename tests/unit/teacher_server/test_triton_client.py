"""The Triton client without a Triton: errors translated, batches split, nobody left waiting."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from distill.errors import DistillError, RequestRefused, TeacherAnswerError, TeacherUnavailable
from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from teacher_server.fake import fake_logits
from teacher_server.triton import TritonTeacher, WorkerLost, translated


@pytest.mark.parametrize(
    ("status", "message", "kind", "words"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", TeacherUnavailable, "does not answer"),
        ("UNAVAILABLE", "Exceeds maximum queue size", TeacherUnavailable, "max_queue_size"),
        ("UNAVAILABLE", "Request timeout expired", TeacherUnavailable, "queue_timeout_us"),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", RequestRefused, "key"),
        ("NOT_FOUND", "Request for unknown model: 'm' is not found", TeacherUnavailable, "not loaded"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", TeacherUnavailable, "request_timeout_s"),
        ("INTERNAL", "Stub process 'm_0' is not healthy.", WorkerLost, "needs a reload"),
        ("INTERNAL", "ONNX Runtime: bad graph", TeacherAnswerError, "bad graph"),
        ("INVALID_ARGUMENT", "unexpected shape for input", RequestRefused, "unexpected shape"),
        ("CANCELLED", "Locally cancelled", TeacherUnavailable, "gave the request up"),
    ],
)
def test_each_failure_is_what_it_means(status: str, message: str, kind: type[DistillError], words: str) -> None:
    error = translated(InferenceServerException(message, status=f"StatusCode.{status}"), "model 'm' at h:1")
    assert type(error) is kind
    assert words in str(error)
    assert "model 'm' at h:1" in str(error)


class FakeChannel:
    """Answers like a Triton with max_batch_size 4 of a 3-class model of 8 x 8 crops, and notes what it was asked."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.batches: list[int] = []
        self.cancelled = 0
        self.fail_at = fail_at
        self.versions: set[str] = set()

    async def get_model_config(self, model: str, client_timeout: float) -> Any:
        info = TeacherInfo(
            name="m", version=7, fingerprint="a" * 64, class_names=("a", "b", "c"), preprocessing=Preprocessing(image_size=8)
        )
        parameter = SimpleNamespace(string_value=info.model_dump_json())
        return SimpleNamespace(config=SimpleNamespace(max_batch_size=4, parameters={METADATA_KEY: parameter}))

    async def infer(self, model: str, inputs: list[Any], model_version: str, outputs: list[Any], client_timeout: float) -> Any:
        assert client_timeout > 0
        self.versions.add(model_version)
        number = len(self.batches)
        shape = inputs[0].shape()
        self.batches.append(shape[0])
        if number == self.fail_at:
            raise InferenceServerException("gone", status="StatusCode.UNAVAILABLE")
        try:
            # Later messages answer first: the order must come from the client.
            await asyncio.sleep(3600 if self.fail_at is not None else 0.01 / (number + 1))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        crops = np.frombuffer(inputs[0]._get_content(), np.uint8).reshape(shape)
        return SimpleNamespace(as_numpy=lambda name: fake_logits(crops, 3))

    async def close(self) -> None:
        return None


def teacher_over(channel: FakeChannel) -> TritonTeacher:
    teacher = TritonTeacher("h:1", "m")
    teacher._client = channel  # type: ignore[assignment]
    return teacher


CROPS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)


def test_a_large_batch_is_split_evenly_and_comes_back_in_order() -> None:
    channel = FakeChannel()
    logits_BK = asyncio.run(teacher_over(channel).logits(CROPS))
    np.testing.assert_array_equal(logits_BK, fake_logits(CROPS, 3))
    assert sorted(channel.batches) == [3, 3, 4]
    assert channel.versions == {"7"}, "the version that info() described"


def test_one_failed_message_cancels_the_others() -> None:
    channel = FakeChannel(fail_at=1)
    with pytest.raises(TeacherUnavailable, match="gone"):
        asyncio.run(teacher_over(channel).logits(CROPS))
    assert channel.cancelled == 2


def test_a_model_that_is_no_teacher_is_refused() -> None:
    class Foreign(FakeChannel):
        async def get_model_config(self, model: str, client_timeout: float) -> Any:
            return SimpleNamespace(config=SimpleNamespace(max_batch_size=0, parameters={}))

    with pytest.raises(RequestRefused, match=json.dumps(METADATA_KEY).strip('"')):
        asyncio.run(teacher_over(Foreign()).info())
