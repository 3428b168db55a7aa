"""The systems that are compared. Each is started, asked and stopped in the same way; none knows of another.

    engine      ONNX Runtime in the asking process: the most that the cores can give, and the 1.00 of every ratio
    decode      the same behind JPEG decoding and cropping in threads: the control of `jpeg`
    grpc, shm   our client to Triton over gRPC, and with shared memory
    client      our client to our gateway, binary
    rest, jpeg  our gateway, asked by the HTTP client that the peers are asked by: binary crops in and out; one JPEG file in, JSON out
    fastapi, litserve, ray_serve   peers, in an environment of their own (peers/requirements.txt)

Unit of data: one running system, which answers requests of `batch` crops.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import onnxruntime
import psutil
from PIL import Image

from bench.serving.load import Ask
from bench.serving.teachers import Teacher, model_file, synthetic_crops
from distill.crops import decode_image
from distill.teacher_info import Preprocessing
from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, decode_soft_labels, encode_crops
from teacher_server.client import open_async_client

START_TIMEOUT_S = 120
NUM_CROPS = 128
MAX_BATCH = 128
"""Largest batch that a peer may form: all that is in flight under any load."""
LARGEST_FORM = 2**20
"""LitServe's queue carries a form's file up to this size."""
MAX_IN_FLIGHT = 256
"""Of every client: more than any load has, so that the load alone decides."""
PEER_APPS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Bench:
    """What all systems share."""

    teacher: Teacher
    repository: Path
    threads: int
    peers_python: Path | None
    folder: Path
    """For logs."""

    def requests(self, batch: int) -> list[npt.NDArray[np.uint8]]:
        """Different crops for different requests: uint8 [batch,S,S,3] each."""
        crops = synthetic_crops(max(NUM_CROPS, batch), self.teacher.image_size)
        return [crops[start : start + batch] for start in range(0, len(crops) - batch + 1, batch)]


@dataclass(frozen=True)
class Running:
    """A system that answers now."""

    ask: Ask
    pids: Sequence[int] = ()
    read: Callable[[Any], npt.NDArray[np.float32]] = lambda answer: answer
    """What `ask` returned -> soft labels float32 [B,K]; to see that it is right, before anything is measured."""


Post = tuple[Any, dict[str, str]]
"""Body (bytes, or a function that makes a form) and headers of one request."""
Start = Callable[[Bench, int], AbstractAsyncContextManager[Running]]


def session_of(bench: Bench) -> onnxruntime.InferenceSession:
    """ONNX Runtime as it comes: its threads may spin, which alone on the machine is the fastest."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bench.threads
    return onnxruntime.InferenceSession(str(model_file(bench.teacher, bench.repository)), options, providers=["CPUExecutionProvider"])


def label(session: onnxruntime.InferenceSession, crops_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Soft labels at temperature 1: uint8 [B,S,S,3] -> float32 [B,K]."""
    temperature_B1 = np.ones((len(crops_BHWC), 1), np.float32)
    probs_BK: npt.NDArray[np.float32] = session.run(["soft_labels"], {"images": crops_BHWC, "temperature": temperature_B1})[0]
    return probs_BK


@asynccontextmanager
async def engine(bench: Bench, batch: int) -> AsyncIterator[Running]:
    """One call after the other, in the loop's own thread."""
    session, requests = session_of(bench), bench.requests(batch)

    async def ask(number: int) -> npt.NDArray[np.float32]:
        return label(session, requests[number % len(requests)])

    yield Running(ask)


@asynccontextmanager
async def decode(bench: Bench, batch: int) -> AsyncIterator[Running]:
    """Decoding and cropping in `threads` threads, then one call of the engine, over 32 files: what the gateway has to do as well."""
    session, files, preprocessing = session_of(bench), jpegs(bench), Preprocessing(image_size=bench.teacher.image_size)
    with ThreadPoolExecutor(bench.threads) as threads:

        def crop(number: int) -> npt.NDArray[np.uint8]:
            return preprocessing.evaluation_crop(decode_image(files[number % len(files)]))

        async def ask(number: int) -> npt.NDArray[np.float32]:
            return label(session, np.stack(list(threads.map(crop, range(number * batch, (number + 1) * batch)))))

        yield Running(ask)


def jpegs(bench: Bench) -> list[bytes]:
    """The crops as JPEG files."""
    files = []
    for crop_HWC in synthetic_crops(NUM_CROPS, bench.teacher.image_size):
        buffer = io.BytesIO()
        Image.fromarray(crop_HWC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def _start_ours(bench: Bench) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.serving.ours", str(bench.repository), bench.teacher.name, str(bench.folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@asynccontextmanager
async def ours(bench: Bench) -> AsyncIterator[tuple[dict[str, str], int]]:
    """Our server: its URLs, and the id of its process."""
    process = _start_ours(bench)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        if not line:
            raise RuntimeError(f"our server did not start; see {bench.folder}")
        yield json.loads(line), process.pid
    finally:
        process.stdin.close()
        process.wait(60)


def _client(kind: str) -> Start:
    @asynccontextmanager
    async def start(bench: Bench, batch: int) -> AsyncIterator[Running]:
        requests = bench.requests(batch)
        async with ours(bench) as (urls, pid):
            grpc = f"{urls['grpc']}/{bench.teacher.name}"
            url = {"grpc": f"grpc://{grpc}", "shm": f"grpc+shm://{grpc}", "rest": urls["rest"]}[kind]
            async with open_async_client(url, timeout_s=300, max_in_flight=MAX_IN_FLIGHT) as client:

                async def ask(number: int) -> Any:
                    return await client.soft_labels(requests[number % len(requests)], temperature=1.0)

                yield Running(ask, [pid])

    return start


def _rest(post: Callable[[Bench, int], list[Post]], read: Callable[[Any], npt.NDArray[np.float32]]) -> Start:
    """Our gateway, asked in the same way as the peers: by an HTTP client that is no part of this project."""

    @asynccontextmanager
    async def start(bench: Bench, batch: int) -> AsyncIterator[Running]:
        posts = post(bench, batch)
        async with ours(bench) as (urls, pid), _http() as client:
            yield Running(_asking(client, f"{urls['rest']}/v1/soft-labels?temperature=1", posts), [pid], read)

    return start


def _http() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=MAX_IN_FLIGHT), timeout=aiohttp.ClientTimeout(300))


def _asking(client: aiohttp.ClientSession, url: str, posts: Sequence[Post]) -> Ask:
    async def ask(number: int) -> bytes:
        body, headers = posts[number % len(posts)]
        async with client.post(url, data=body() if callable(body) else body, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.read()

    return ask


def _binary(bench: Bench, batch: int) -> list[Post]:
    headers = {"Content-Type": CROPS_MEDIA_TYPE, "Accept": SOFT_LABELS_MEDIA_TYPE}
    return [(encode_crops(crops), headers) for crops in bench.requests(batch)]


def _files(bench: Bench, batch: int) -> list[Post]:
    return [(file, {"Content-Type": "image/jpeg"}) for file in jpegs(bench)]


def _raw(bench: Bench, batch: int) -> list[Post]:
    return [(crops.tobytes(), {"Content-Type": "application/octet-stream"}) for crops in bench.requests(batch)]


def _form_or_json(bench: Bench, batch: int) -> list[Post]:
    def post(data: bytes) -> Post:
        if len(data) <= LARGEST_FORM:
            return partial(_form, data), {}
        return json.dumps({"crops": base64.b64encode(data).decode()}).encode(), {"Content-Type": "application/json"}

    return [post(crops.tobytes()) for crops in bench.requests(batch)]


def _form(data: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("crops", data, filename="crops", content_type="application/octet-stream")
    return form


def _read_binary(answer: bytes) -> npt.NDArray[np.float32]:
    return decode_soft_labels(answer).values_BR


def _read_json(answer: bytes) -> npt.NDArray[np.float32]:
    return np.array([item["values"] for item in json.loads(answer)["items"]], np.float32)


def _read_raw(answer: bytes) -> npt.NDArray[np.float32]:
    return np.frombuffer(answer, np.float32)


def _read_base64(answer: bytes) -> npt.NDArray[np.float32]:
    return _read_raw(base64.b64decode(json.loads(answer)["soft_labels"]))


def _start_peer(bench: Bench, batch: int, command: list[str], port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "BENCH_MODEL": str(model_file(bench.teacher, bench.repository).absolute()),
        "BENCH_IMAGE_SIZE": str(bench.teacher.image_size),
        "BENCH_THREADS": str(bench.threads),
        "BENCH_REQUEST_IMAGES": str(batch),
        "BENCH_MAX_BATCH": str(MAX_BATCH),
        "BENCH_PORT": str(port),
    }
    with (bench.folder / "peer.log").open("ab") as log:
        return subprocess.Popen(command, cwd=PEER_APPS, env=environment, stdout=log, stderr=log, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started, those too which left its process group."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _peer(
    command: Callable[[Bench, int], list[str]],
    post: Callable[[Bench, int], list[Post]],
    read: Callable[[Any], npt.NDArray[np.float32]],
) -> Start:
    @asynccontextmanager
    async def start(bench: Bench, batch: int) -> AsyncIterator[Running]:
        port = _free_port()
        process = _start_peer(bench, batch, command(bench, port), port)
        try:
            async with _http() as client:
                ask = _asking(client, f"http://127.0.0.1:{port}/predict", post(bench, batch))
                await _first_answer(ask)
                yield Running(ask, [process.pid], read)
        finally:
            _end(process)

    return start


async def _first_answer(ask: Ask) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            await ask(0)
            return
        except aiohttp.ClientError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def _python(bench: Bench) -> str:
    if bench.peers_python is None:
        raise RuntimeError("the peers need --peers PYTHON, the interpreter of an environment with bench/serving/peers/requirements.txt")
    return str(bench.peers_python)


def _uvicorn(bench: Bench, port: int) -> list[str]:
    return [_python(bench), "-m", "uvicorn", "fastapi_app:app", "--port", str(port), "--log-level", "warning", "--no-access-log"]


SYSTEMS: dict[str, Start] = {
    "engine": engine,
    "grpc": _client("grpc"),
    "shm": _client("shm"),
    "client": _client("rest"),
    "rest": _rest(_binary, _read_binary),
    "fastapi": _peer(_uvicorn, _raw, _read_raw),
    "litserve": _peer(lambda bench, port: [_python(bench), "litserve_app.py"], _form_or_json, _read_base64),
    "ray_serve": _peer(lambda bench, port: [_python(bench), "ray_serve_app.py"], _raw, _read_raw),
    "decode": decode,
    "jpeg": _rest(_files, _read_json),
}
"""Name -> how it is started."""


async def check(bench: Bench, running: Running, batch: int, files: bool) -> None:
    """Raise unless the first request gets the labels that the engine gives: a fast wrong answer is no result."""
    crops = np.stack([decode_image(file) for file in jpegs(bench)[:batch]]) if files else bench.requests(batch)[0]
    labels = running.read(await running.ask(0)).reshape(len(crops), -1)
    np.testing.assert_allclose(labels, label(session_of(bench), crops), atol=1e-4)


PEERS = ("fastapi", "litserve", "ray_serve")
ALONE = ("engine", "decode")
"""They run one call at a time, so concurrency means nothing to them."""
