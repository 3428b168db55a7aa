"""A name that leads to several Tritons is all of them in turn, and goes on when one of them goes; over real gRPC on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from grpc import aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from teacher_server.triton import TritonTeacher

CROPS = np.zeros((64, 8, 8, 3), np.uint8)
INFO = TeacherInfo(name="m", fingerprint="a" * 64, class_names=("a", "b"), preprocessing=Preprocessing(image_size=8))


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Serves a teacher of two classes, at most four images a message."""

    def __init__(self, name: str, asked: Counter[str]) -> None:
        self.name, self.asked = name, asked

    async def ModelConfig(self, request: object, context: object) -> object:  # noqa: N802 - the name is KServe's
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = 4
        answer.config.parameters[METADATA_KEY].string_value = INFO.model_dump_json()
        return answer

    async def ModelInfer(self, request: service_pb2.ModelInferRequest, context: object) -> object:  # noqa: N802
        self.asked[self.name] += 1
        size = request.inputs[0].shape[0]
        answer = service_pb2.ModelInferResponse(model_name="m", model_version="1")
        for output in request.outputs:
            answer.outputs.add(name=output.name, datatype="FP32", shape=[size, 2])
            answer.raw_output_contents.append(np.full((size, 2), 0.5, np.float32).tobytes())
        return answer


async def start(name: str, asked: Counter[str]) -> tuple[aio.Server, int]:
    server = aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(FakeTriton(name, asked), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def test_messages_go_to_all_of_them_and_to_the_others_when_one_ends() -> None:
    async def scenario() -> tuple[Counter[str], Counter[str]]:
        asked: Counter[str] = Counter()
        (first, first_port), (second, second_port) = await start("first", asked), await start("second", asked)
        teacher = TritonTeacher(f"ipv4:127.0.0.1:{first_port},127.0.0.1:{second_port}", "m")
        for _ in range(4):  # by then both are connected
            await teacher.logits(CROPS)
        asked.clear()
        await teacher.logits(CROPS)
        both = Counter(asked)
        await first.stop(0)
        asked.clear()
        await teacher.logits(CROPS)
        await teacher.close()
        await second.stop(0)
        return both, asked

    both, then = asyncio.run(scenario())
    assert both == {"first": 8, "second": 8}
    assert then == {"second": 16}


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_name_that_leads_to_one_is_that_one(name: str) -> None:
    async def scenario() -> Counter[str]:
        asked: Counter[str] = Counter()
        server, port = await start("only", asked)
        teacher = TritonTeacher(f"{name}:{port}", "m")
        await teacher.logits(CROPS)
        await teacher.close()
        await server.stop(0)
        return asked

    assert asyncio.run(scenario()) == {"only": 16}
