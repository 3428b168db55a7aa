"""Peer: plain FastAPI, as a person would write it in an hour. One ONNX Runtime session, no batching over requests.

Started by `uvicorn`, in the peers' environment: no module of this project is imported. Unit of data: one request, raw uint8 crops of one
batch as the body, float32 soft labels as the answer.
"""

import os

import numpy as np
import onnxruntime
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

SIZE = int(os.environ["BENCH_IMAGE_SIZE"])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would take the cores from HTTP
session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"])
app = FastAPI()


def answer(body: bytes) -> bytes:
    crops_BHWC = np.frombuffer(body, np.uint8).reshape(-1, SIZE, SIZE, 3)
    temperature_B1 = np.ones((len(crops_BHWC), 1), np.float32)
    return session.run(["soft_labels"], {"images": crops_BHWC, "temperature": temperature_B1})[0].tobytes()


@app.post("/predict")
async def predict(request: Request) -> Response:
    return Response(await run_in_threadpool(answer, await request.body()), media_type="application/octet-stream")
