"""Peer: Ray Serve with its batching over requests, raw bytes in and out.

Run in the peers' environment: no module of this project is imported. Unit of data: one request, raw uint8 crops as the body.
"""

import os
import time

import numpy as np
import onnxruntime
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

SIZE = int(os.environ["BENCH_IMAGE_SIZE"])
PER_REQUEST = int(os.environ["BENCH_REQUEST_IMAGES"])


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
class Teacher:
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would take the cores from HTTP
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"])

    @serve.batch(max_batch_size=max(1, int(os.environ["BENCH_MAX_BATCH"]) // PER_REQUEST), batch_wait_timeout_s=0.002)
    async def answer(self, bodies: list[bytes]) -> list[bytes]:
        crops_BHWC = np.frombuffer(b"".join(bodies), np.uint8).reshape(-1, SIZE, SIZE, 3)
        temperature_B1 = np.ones((len(crops_BHWC), 1), np.float32)
        probs_BK = self.session.run(["soft_labels"], {"images": crops_BHWC, "temperature": temperature_B1})[0]
        return [probs_BK[start : start + PER_REQUEST].tobytes() for start in range(0, len(probs_BK), PER_REQUEST)]

    async def __call__(self, request: Request) -> Response:
        return Response(await self.answer(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=256 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
    serve.run(Teacher.bind(), route_prefix="/predict")
    while True:
        time.sleep(3600)
