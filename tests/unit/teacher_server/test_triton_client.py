"""The Triton client without a Triton: errors translated, batches split, nobody left waiting."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from distill.errors import DistillError, RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from teacher_server import backend, triton
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.fake import fake_logits
from teacher_server.serve import teacher_elsewhere
from teacher_server.settings import ServerSettings, TritonSettings
from teacher_server.triton import TritonTeacher, VersionGone, WorkerLost, translated


@pytest.mark.parametrize(
    ("status", "message", "kind", "words"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", TeacherUnavailable, "does not answer"),
        ("UNAVAILABLE", "Exceeds maximum queue size", TeacherUnavailable, "max_queue_size"),
        ("UNAVAILABLE", "Request timeout expired", TeacherUnavailable, "queue_timeout_us"),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", RequestRefused, "key"),
        ("NOT_FOUND", "Request for unknown model: 'm' is not found", VersionGone, "not loaded"),
        ("UNAVAILABLE", "Request for unknown model: 'm' version 1 is not at ready state", VersionGone, "does not serve this version"),
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


class ChangingChannel(FakeChannel):
    """A Triton on which another version takes the place of the one that the next `infer` asks for."""

    def __init__(self, served: int) -> None:
        super().__init__()
        self.served = served
        self.loading = False

    async def get_model_config(self, model: str, client_timeout: float) -> Any:
        if self.loading:
            raise InferenceServerException("Request for unknown model: 'm' is not found", status="StatusCode.NOT_FOUND")
        answer = await super().get_model_config(model, client_timeout)
        parameter = answer.config.parameters[METADATA_KEY]
        info = TeacherInfo.model_validate_json(parameter.string_value)
        parameter.string_value = info.replace(version=self.served, fingerprint=f"{self.served:064x}").model_dump_json()
        return answer

    async def infer(self, model: str, inputs: list[Any], model_version: str, outputs: list[Any], client_timeout: float) -> Any:
        if self.loading or model_version != str(self.served):
            message = f"Request for unknown model: 'm' version {model_version} is not at ready state"
            raise InferenceServerException(message, status="StatusCode.UNAVAILABLE")
        return await super().infer(model, inputs, model_version, outputs, client_timeout)


def test_a_version_that_was_replaced_is_said_and_the_next_question_sees_the_new_one() -> None:
    async def scenario() -> set[str]:
        channel = ChangingChannel(served=1)
        teacher = teacher_over(channel)
        before = await teacher.info()
        channel.served = 2
        with pytest.raises(TeacherChanged, match="serves version 2"):
            await teacher.logits(CROPS, fingerprint=before.fingerprint)
        assert (await teacher.info()).version == 2
        await teacher.logits(CROPS)
        with pytest.raises(TeacherChanged, match="not 000000000000 any more"):  # what the caller knows is old: nothing is asked
            await teacher.logits(CROPS, fingerprint=before.fingerprint)
        return channel.versions

    assert asyncio.run(scenario()) == {"2"}


def test_a_change_shows_also_where_nobody_asks_for_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(triton, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def scenario() -> list[int]:
        channel = ChangingChannel(served=1)
        teacher = teacher_over(channel)
        first = await teacher.info()
        clock.now += 10
        assert await teacher.info() is first, "the same teacher is the same object: a failing question forgets only what it knew"
        channel.served = 2
        seen = [(await teacher.info()).version]
        clock.now += 1.9
        seen.append((await teacher.info()).version)
        clock.now += 0.2
        seen.append((await teacher.info()).version)
        channel.loading = True
        clock.now += 10
        return [*seen, (await teacher.info()).version]  # a teacher that is away is found out by asking it for labels

    assert asyncio.run(scenario()) == [1, 1, 2, 2]


def test_a_canary_takes_a_label_of_any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "check_probs", lambda probs: None)  # the fake gives logits for soft labels, too

    async def scenario() -> None:
        channel = ChangingChannel(served=1)
        teacher = teacher_over(channel)
        await teacher.info()
        channel.served = 2
        assert await teacher.ready()

    asyncio.run(scenario())


def test_a_version_that_is_gone_with_its_server_is_no_change() -> None:
    async def scenario() -> None:
        channel = ChangingChannel(served=1)
        teacher = teacher_over(channel)
        await teacher.info()
        channel.loading = True
        with pytest.raises(TeacherUnavailable) as raised:
            await teacher.logits(CROPS)
        assert not isinstance(raised.value, TeacherChanged)

    asyncio.run(scenario())


def test_all_messages_of_a_batch_are_of_one_version_whatever_other_tasks_learn() -> None:
    """While the first message waits, another task finds out that the teacher has changed: the rest must not go to the new one."""

    async def scenario() -> set[str]:
        channel = ChangingChannel(served=1)
        teacher = teacher_over(channel)
        info = await teacher.info()
        asking = asyncio.create_task(teacher.logits(CROPS, fingerprint=info.fingerprint))
        await asyncio.sleep(0)  # it has read who the teacher is
        teacher._info = info.replace(version=2, fingerprint="2" * 64)
        await asking
        return channel.versions

    assert asyncio.run(scenario()) == {"1"}


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


def test_a_worker_has_few_messages_under_way_and_the_gateway_as_many_as_it_lets_images_through() -> None:
    """Triton can make a batch of single images only of those that have reached it."""

    class Holding(FakeChannel):
        async def infer(self, *args: Any, **options: Any) -> Any:
            self.batches.append(1)
            await asyncio.Event().wait()

    async def most(teacher: Any) -> int:
        channel = Holding()
        teacher._client = channel
        singles = [asyncio.ensure_future(teacher.logits(CROPS[:1])) for _ in range(40)]
        for _ in range(20):
            await asyncio.sleep(0)
        for single in singles:
            single.cancel()
        await asyncio.gather(*singles, return_exceptions=True)
        return len(channel.batches)

    settings = ServerSettings(triton=TritonSettings(url="h:1"), max_images_in_flight=20)
    served = teacher_elsewhere(settings, "m")
    assert asyncio.run(most(served.connect())) == 20
    address = TeacherAddress.model_validate_json(served.address.model_dump_json())
    assert asyncio.run(most(open_teacher(address))) == 8
    assert asyncio.run(most(open_teacher(address.replace(max_in_flight=3)))) == 3
