"""A stand-in for a teacher on other hardware: answers Triton's gRPC protocol after a latency, with logits that were computed before.

It simulates, and says so: no network computes here, so that the CPU of this machine is the trainer's alone. Our client before it is the
product's. What it takes of the machine itself (receiving the crops, which another machine would do) is measured and stated beside.

    python -m bench.distill.stand_in ANSWERS INFO LATENCY_S IMAGES_PER_S        prints host:port, ends with its input

Unit of data: one request of crops.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import grpc
import numpy as np
import psutil
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from bench.distill.answers import Answers, key_of, load_answers
from distill.teacher_info import METADATA_KEY, TeacherInfo
from distill.wire import IMAGES, LOGITS
from teacher_server.address import TeacherAddress

MAX_BATCH = 256


class StandIn(service_pb2_grpc.GRPCInferenceServiceServicer):
    """One device that labels `images_per_s`, `latency_s` away.

    Args:
        info: of the teacher that it stands for.
    """

    def __init__(self, answers: Answers, info: TeacherInfo, latency_s: float, images_per_s: float) -> None:
        self._answers, self._info, self._latency_s, self._images_per_s = answers.by_crop, info, latency_s, images_per_s
        self._free_at = 0.0

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        """Always."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Who the teacher is."""
        config = model_config_pb2.ModelConfig(name=self._info.name, max_batch_size=MAX_BATCH)
        config.parameters[METADATA_KEY].string_value = self._info.model_dump_json()
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Logits, when the device would have them."""
        arrived = time.monotonic()
        position = [entry.name for entry in request.inputs].index(IMAGES)
        shape = list(request.inputs[position].shape)
        crops_BHWC = np.frombuffer(request.raw_input_contents[position], np.uint8).reshape(shape)
        found = [self._answers.get(key_of(crop)) for crop in crops_BHWC]
        if any(row is None for row in found):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stand-in was asked about a crop that it has no answer for")
        logits_BK = np.stack([row for row in found if row is not None])
        self._free_at = max(arrived, self._free_at) + len(crops_BHWC) / self._images_per_s
        await asyncio.sleep(max(0.0, self._free_at + self._latency_s - time.monotonic()))
        response = service_pb2.ModelInferResponse(model_name=self._info.name, model_version=request.model_version or "1", id=request.id)
        for entry in request.outputs:
            if entry.name != LOGITS:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the stand-in has {LOGITS} only, not {entry.name}")
        response.outputs.add(name=LOGITS, datatype="FP32", shape=logits_BK.shape)
        response.raw_output_contents.append(logits_BK.astype("<f4").tobytes())
        return response


@asynccontextmanager
async def _serving(stand_in: StandIn) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(stand_in, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def _serve(stand_in: StandIn) -> None:
    async with _serving(stand_in) as port:
        print(f"127.0.0.1:{port}", flush=True)
        await asyncio.to_thread(sys.stdin.read)


@dataclass(frozen=True)
class Running:
    """A stand-in in a process of its own."""

    address: TeacherAddress
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU seconds of it so far."""
        return sum(self.process.cpu_times()[:2])


@contextmanager
def stand_in(answers: Path, info: TeacherInfo, latency_s: float, images_per_s: float) -> Iterator[Running]:
    """Started, and ended with the block."""
    words = [str(answers), info.model_dump_json(), str(latency_s), str(images_per_s)]
    command = [sys.executable, "-m", "bench.distill.stand_in", *words]
    process = Popen(command, stdin=PIPE, stdout=PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the stand-in teacher did not start")
        yield Running(TeacherAddress(model=info.name, triton_url=url), psutil.Process(process.pid))
    finally:
        process.stdin.close()
        process.wait(30)


def main() -> None:
    """Serve until standard input is closed."""
    answers, info, latency_s, images_per_s = sys.argv[1:]
    asyncio.run(_serve(StandIn(load_answers(Path(answers)), TeacherInfo.model_validate_json(info), float(latency_s), float(images_per_s))))


if __name__ == "__main__":
    main()
