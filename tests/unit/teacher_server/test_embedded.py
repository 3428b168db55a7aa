"""ONNX Runtime in this process against the same network computed by hand."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from distill.config import validate
from distill.errors import ConfigError, RequestRefused, StageMissing, TeacherAnswerError, TeacherUnavailable
from teacher_server.address import TeacherAddress, open_teacher
from teacher_server.embedded import CUDA, EmbeddedTeacher, Engine
from teacher_server.model_repository import served_model
from teacher_server.serve import open_backend
from teacher_server.settings import ServerSettings

CROPS = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
TEMPERATURE = np.array([[0.5], [1], [2], [4], [1], [20], [100]], np.float32)


def test_labels_are_those_computed_by_hand(tiny_teacher: Any) -> None:
    async def scenario() -> tuple[Any, Any]:
        teacher = EmbeddedTeacher.from_repository(tiny_teacher.repository, "tiny")
        try:
            assert await teacher.ready()
            assert await teacher.info() == tiny_teacher.info
            return await teacher.soft_labels(CROPS, TEMPERATURE, with_logits=True)
        finally:
            await teacher.close()

    logits_BK, probs_BK = asyncio.run(scenario())
    np.testing.assert_allclose(logits_BK, tiny_teacher.logits(CROPS), atol=1e-5)
    np.testing.assert_allclose(probs_BK, tiny_teacher.soft_labels(CROPS, TEMPERATURE), atol=1e-6)


def test_large_batches_are_split_and_put_together_in_order(tiny_teacher: Any) -> None:
    engine = Engine(served_model(tiny_teacher.repository, "tiny"), max_batch_size=3)
    logits_BK = asyncio.run(EmbeddedTeacher(engine).logits(CROPS))
    engine.close()
    np.testing.assert_allclose(logits_BK, tiny_teacher.logits(CROPS), atol=1e-5)


def test_one_engine_call_at_a_time(tiny_teacher: Any) -> None:
    class Spy:
        """Counts the calls that run at the same time."""

        def __init__(self, session: Any) -> None:
            self.session, self.lock, self.running, self.most = session, threading.Lock(), 0, 0

        def run(self, names: list[str], feed: Any) -> Any:
            with self.lock:
                self.running += 1
                self.most = max(self.most, self.running)
            try:
                return self.session.run(names, feed)
            finally:
                with self.lock:
                    self.running -= 1

    async def scenario(teacher: EmbeddedTeacher) -> Any:
        return await asyncio.gather(*(teacher.logits(CROPS[i : i + 1]) for i in range(7) for _ in range(4)))

    engine = Engine(served_model(tiny_teacher.repository, "tiny"))
    spy = Spy(engine._session)
    engine._session = spy
    answers = asyncio.run(scenario(EmbeddedTeacher(engine)))
    engine.close()
    assert spy.most == 1
    np.testing.assert_allclose(np.concatenate(answers[::4]), tiny_teacher.logits(CROPS), atol=1e-5)


def test_a_closed_teacher_is_unavailable(tiny_teacher: Any) -> None:
    engine = Engine(served_model(tiny_teacher.repository, "tiny"))
    engine.close()
    with pytest.raises(TeacherUnavailable, match="closed"):
        asyncio.run(EmbeddedTeacher(engine).logits(CROPS))


def test_what_is_missing_is_named(tiny_teacher: Any, tmp_path: Path) -> None:
    with pytest.raises(StageMissing, match=r"no served version of 'other'.*distill export-teacher"):
        served_model(tiny_teacher.repository, "other")
    (tmp_path / "empty" / "1").mkdir(parents=True)
    with pytest.raises(StageMissing, match=r"model\.onnx"):
        EmbeddedTeacher.from_repository(tmp_path, "empty")


def test_the_highest_version_is_served_not_the_last_by_name(tmp_path: Path) -> None:
    for version in ("2", "10", "notes"):
        (tmp_path / "m" / version).mkdir(parents=True)
    assert served_model(tmp_path, "m") == tmp_path / "m" / "10" / "model.onnx"


def test_a_version_policy_is_obeyed(tmp_path: Path) -> None:
    for version in ("1", "2", "3"):
        (tmp_path / "m" / version).mkdir(parents=True)
    config = tmp_path / "m" / "config.pbtxt"
    config.write_text('name: "m" version_policy { specific { versions: [1, 2] } }')
    assert served_model(tmp_path, "m").parent.name == "2"
    config.write_text("version_policy { specific { versions: 7 } }")
    with pytest.raises(StageMissing, match="no served version"):
        served_model(tmp_path, "m")
    config.write_text("max_batchsize: 4")
    with pytest.raises(RequestRefused, match=r"config\.pbtxt is no Triton model configuration.*max_batchsize"):
        served_model(tmp_path, "m")


def test_files_that_are_no_teacher_are_refused(tmp_path: Path, tiny_teacher: Any) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(RequestRefused, match="cannot be loaded"):
        Engine(path)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(RequestRefused, match=r"no teacher graph: inputs \['x'\]"):
        Engine(path)
    nameless = onnx.load(served_model(tiny_teacher.repository, "tiny"))
    del nameless.metadata_props[:]
    onnx.save(nameless, path)
    with pytest.raises(RequestRefused, match="does not say which teacher"):
        Engine(path)


def test_a_failing_engine_says_so(tiny_teacher: Any) -> None:
    class Broken:
        def run(self, names: list[str], feed: Any) -> Any:
            raise RuntimeError("out of\nmemory")

    engine = Engine(served_model(tiny_teacher.repository, "tiny"))
    engine._session = Broken()
    with pytest.raises(TeacherAnswerError, match="7 crops: out of memory"):
        asyncio.run(EmbeddedTeacher(engine).logits(CROPS))
    engine.close()


def test_cuda_never_falls_back_in_silence(
    tiny_teacher: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    model = served_model(tiny_teacher.repository, "tiny")
    if CUDA not in onnxruntime.get_available_providers():
        with pytest.raises(RequestRefused, match=r"^this onnxruntime has no CUDAExecutionProvider"):
            Engine(model, device="cuda")
    real, asked = onnxruntime.InferenceSession, []

    def without_a_driver(*arguments: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
        asked.append([name for name, _ in providers])
        sys.stdout.write("*** EP Error ***")
        return real(*arguments, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_a_driver)
    with pytest.raises(RequestRefused, match="would run on CPUExecutionProvider"):
        Engine(model, device="cuda")
    caplog.clear()
    Engine(model).close()
    (warning,) = caplog.messages
    assert "would run on CPUExecutionProvider" in warning
    assert "server.embedded_device=cpu" in warning
    Engine(model, device="cpu").close()
    assert capsys.readouterr().out == ""
    assert asked == [[CUDA, "CPUExecutionProvider"], [CUDA, "CPUExecutionProvider"], ["CPUExecutionProvider"]]


def test_an_address_travels_as_json_and_opens(tiny_teacher: Any) -> None:
    address = TeacherAddress(model="tiny", repository=str(tiny_teacher.repository))
    travelled = TeacherAddress.model_validate_json(address.model_dump_json())

    async def scenario() -> Any:
        teacher = open_teacher(travelled)
        try:
            return await teacher.logits(CROPS)
        finally:
            await teacher.close()

    np.testing.assert_allclose(asyncio.run(scenario()), tiny_teacher.logits(CROPS), atol=1e-5)
    for wrong in ({"model": "m"}, {"model": "m", "triton_url": "h:1", "repository": "r"}):
        with pytest.raises(ConfigError, match="either triton_url or repository"):
            validate(TeacherAddress, wrong, "address")


def test_auto_says_why_it_is_embedded(tiny_teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_TRITON_HOME", str(tmp_path / "nothing"))
    with open_backend(ServerSettings(), tiny_teacher.repository, "tiny", tmp_path) as served:
        assert served.backend_kind == "embedded"
        assert served.triton_url is None
        assert served.reason
        assert asyncio.run(served.connect().ready())
        assert asyncio.run(served.connect().ready()), "a second client in another event loop shares the engine"
