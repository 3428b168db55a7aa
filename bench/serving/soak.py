"""A long run of mixed requests, good and bad: does memory stay flat, does every request get its answer, is every label right?

Unit of data: one sample a second interval: resident memory of the gateway's process and of Triton's, and the answers so far by status.
"""

from __future__ import annotations

import base64
import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from bench.serving.systems import Bench, jpegs, label, session_of
from distill.decoding import decode_image
from distill.wire import CROPS_MEDIA_TYPE, SOFT_LABELS_MEDIA_TYPE, decode_soft_labels, encode_crops

SAMPLE_EVERY_S = 5.0
SETTLED_SHARE = 0.2
"""Of the run: memory grows while caches and pools fill; the slope is taken after that."""

Asked = Callable[[httpx.Client, int], tuple[int, bool]]
"""Sends one request; the answer is its status, and whether it is right."""


def soak(bench: Bench, url: str, pid: int, minutes: float, show: Callable[[str], None]) -> dict[str, Any]:
    """Ask for `minutes`; returns statuses, wrong answers, memory samples and the slope of each process's memory in MB an hour."""
    stop, lock = threading.Event(), threading.Lock()
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    kinds = _requests(bench, url)

    def ask(order: Iterator[str]) -> None:
        with httpx.Client(timeout=60) as client:
            for number, name in enumerate(order):
                if stop.is_set():
                    return
                try:
                    status, right = kinds[name](client, number)
                except httpx.HTTPError as error:
                    status, right = 0, False
                    show(f"{name}: {error!r}")
                with lock:
                    seen[f"{name} {status}"] += 1
                    if not right:
                        wrong.append(f"{name} {status}")

    threads = [threading.Thread(target=ask, args=(itertools.cycle(_rotated(list(kinds), n)),)) for n in range(len(kinds))]
    for thread in threads:
        thread.start()
    began, samples = time.monotonic(), []
    while (elapsed := time.monotonic() - began) < 60 * minutes:
        samples.append({"seconds": round(elapsed, 1), **_memory_mb(pid)})
        show(f"{elapsed:5.0f} s: {samples[-1]}, {sum(seen.values())} answers, {len(wrong)} wrong")
        stop.wait(SAMPLE_EVERY_S)
    stop.set()
    for thread in threads:
        thread.join(120)
    hung = sum(thread.is_alive() for thread in threads)
    return {
        "minutes": minutes,
        "answers": dict(sorted(seen.items())),
        "num_wrong": len(wrong),
        "wrong": wrong[:20],
        "hung": hung,
        "mb_per_hour": _slopes(samples),
    }


def _rotated(names: list[str], by: int) -> list[str]:
    return names[by:] + names[:by]


def _requests(bench: Bench, url: str) -> dict[str, Asked]:
    """Name -> one kind of request, with the status and, where there are any, the labels that it must get."""
    labels, session = f"{url}/v1/soft-labels", session_of(bench)
    crops = bench.requests(8)[0]
    expected_BK, files = label(session, crops), jpegs(bench)[:8]
    of_files_BK = label(session, np.stack([decode_image(file) for file in files]))
    small = io.BytesIO()
    Image.new("RGB", (bench.teacher.image_size, bench.teacher.image_size)).save(small, "PNG")
    bomb = _bomb()

    def binary(client: httpx.Client, number: int) -> tuple[int, bool]:
        headers = {"Content-Type": CROPS_MEDIA_TYPE, "Accept": SOFT_LABELS_MEDIA_TYPE}
        answer = client.post(labels, content=encode_crops(crops), headers=headers, params={"temperature": 1})
        right = answer.status_code == 200 and np.allclose(decode_soft_labels(answer.content).values_BR, expected_BK, atol=1e-5)
        return answer.status_code, bool(right)

    def status_of(wanted: int, content: bytes, media_type: str) -> Asked:
        def send(client: httpx.Client, number: int) -> tuple[int, bool]:
            answer = client.post(labels, content=content, headers={"Content-Type": media_type})
            return answer.status_code, answer.status_code == wanted

        return send

    def jpeg(client: httpx.Client, number: int) -> tuple[int, bool]:
        answer = client.post(labels, content=files[0], headers={"Content-Type": "image/jpeg"}, params={"temperature": 1})
        right = answer.status_code == 200 and np.allclose(answer.json()["items"][0]["values"], of_files_BK[0], atol=1e-5)
        return answer.status_code, bool(right)

    def in_json(client: httpx.Client, number: int) -> tuple[int, bool]:
        texts = [base64.b64encode(file).decode() for file in (*files, b"not an image")]
        answer = client.post(labels, json={"images": texts}, params={"temperature": 1})
        if answer.status_code != 207:
            return answer.status_code, False
        *good, bad = answer.json()["items"]
        return 207, "error" in bad and np.allclose([item["values"] for item in good], of_files_BK, atol=1e-5)

    return {
        "binary": binary,
        "jpeg": jpeg,
        "json with one bad": in_json,
        "truncated": status_of(422, small.getvalue()[:-20], "image/png"),
        "bomb": status_of(422, bomb, "image/png"),
        "text": status_of(415, b"hello", "text/plain"),
    }


def _bomb() -> bytes:
    """A PNG of 900 million pixels in a megabyte."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        buffer = io.BytesIO()
        Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
        return buffer.getvalue()
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _memory_mb(pid: int) -> dict[str, int]:
    """Resident memory of the gateway's process and, summed, of all below it (Triton and its stubs), in MB."""
    root = psutil.Process(pid)
    below = 0
    for process in root.children(recursive=True):
        try:
            below += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return {"gateway": root.memory_info().rss >> 20, "triton": below >> 20}


def _slopes(samples: list[dict[str, Any]]) -> dict[str, float]:
    settled = samples[int(SETTLED_SHARE * len(samples)) :]
    hours = [sample["seconds"] / 3600 for sample in settled]
    return {who: round(float(np.polyfit(hours, [sample[who] for sample in settled], 1)[0]), 1) for who in ("gateway", "triton")}
