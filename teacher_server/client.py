"""The client of a served teacher: numpy in, numpy out, plain or asynchronous, by REST or straight to Triton.

    from teacher_server.client import open_client

    with open_client("http://127.0.0.1:8080", api_key=KEY) as teacher:
        size = teacher.info().preprocessing.image_size
        probs_BK = teacher.soft_labels(crops_BHWC, temperature=4)             # uint8 [B,size,size,3] -> fp32 [B,K]
        ids_BR, probs_BR = teacher.soft_labels(crops_BHWC, temperature=4, top_k=5)
        for result in teacher.soft_labels_of([Path("cat.jpg"), jpeg_bytes]):  # FileLabels or FileRefused for each
            print(result)

    async with open_async_client("grpc+shm://127.0.0.1:8001/teacher") as teacher:
        logits_BK = await teacher.logits(crops_BHWC)

| URL | reaches | takes |
|---|---|---|
| `http://HOST:PORT`, `https://HOST` | our gateway; the API key is `api_key=` or $DISTILL_API_KEY | crops, image files |
| `grpc://HOST:PORT/MODEL` | Triton | crops |
| `grpc+shm://HOST:PORT/MODEL` | Triton on this host: crops and labels stay in shared memory; pays for large crops | crops |

`timeout_s` (default 30) is the budget of a whole call with all waits and retries. A message is asked again, as `retry` says, when the
connection broke, the teacher is away or busy (429 and 503 after Retry-After; Triton's UNAVAILABLE); never when the request was refused.
Large batches go in several messages at once (`max_in_flight`), and come back in order. Errors are those of distill/errors.py, nothing else.

Flow: this file only gathers the names; follow a call from async_client.py to rest.py, triton_patient.py or triton_shm.py.
Unit of data: one call.
"""

from __future__ import annotations

from teacher_server.async_client import API_KEY_VARIABLE, AsyncTeacherClient, TopLabels, open_async_client
from teacher_server.file_labels import FileLabels, FileRefused, FileResult
from teacher_server.retries import RetryPolicy
from teacher_server.sync_client import TeacherClient, open_client

__all__ = [
    "API_KEY_VARIABLE",
    "AsyncTeacherClient",
    "FileLabels",
    "FileRefused",
    "FileResult",
    "RetryPolicy",
    "TeacherClient",
    "TopLabels",
    "open_async_client",
    "open_client",
]
