"""The teacher behind the REST gateway, as a client sees it.

Flow: crops -> binary bodies of a few MB (distill/wire.py), several under way over kept connections -> gateway -> labels, in order again.
      image files -> multipart forms -> one result per file.
Unit of data: one batch of crops or files, whatever its size. Shapes: B images, H W C pixels, K classes, R retained classes.

Every answer names the teacher it comes from; one of another teacher than `info()` described ends the call with TeacherChanged.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from distill.errors import RequestRefused, TeacherAnswerError, TeacherChanged, TeacherUnavailable
from distill.teacher_info import TeacherInfo
from distill.wire import (
    CROPS_MEDIA_TYPE,
    LABELS_PATH,
    LOGITS,
    SOFT_LABELS,
    SOFT_LABELS_MEDIA_TYPE,
    CropPolicy,
    Kind,
    SoftLabelsMessage,
    decode_soft_labels,
    encode_crops,
)
from teacher_server.backend import Crops, Floats, check_temperature, parse_info
from teacher_server.file_labels import FileRefused, FileResult, parts_of, read_files, results_of
from teacher_server.rest_failures import RestRefused, raise_failure, translated
from teacher_server.retries import Patience, PatientTeacher, RetryPolicy, all_or_none
from teacher_server.trace_context import trace_arguments

MESSAGE_BYTES = 4_900_000
"""32 crops of 224 pixels: the body of a request, unless the gateway says that it is too large. Far below server.max_body_bytes."""
MESSAGE_IMAGES = 256
"""Most images in one request, unless the gateway says that they are too many (server.max_batch)."""
_REQUESTS_A_CLIENT = 8
_CONNECT_TIMEOUT_S = 5.0


class RestTeacher(PatientTeacher):
    """TeacherBackend over HTTP/1.1 with kept connections; belongs to one event loop.

    `model` None means the only one that the gateway serves. `transport` and `patience` are there for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        max_in_flight: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Connects at the first question. Raises RequestRefused for an API key that no HTTP header can carry."""
        super().__init__()
        self.url = url.rstrip("/")
        self.model = model
        self.whom = f"the gateway at {self.url}"
        self.patience = patience or Patience(retry or RetryPolicy(), timeout_s)
        self._slots = asyncio.Semaphore(max_in_flight)
        self._message_bytes = MESSAGE_BYTES
        self._message_images = MESSAGE_IMAGES
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise RequestRefused("the API key is empty or holds characters that no HTTP header can carry")
        try:
            # httpx looks through all connections of a client at every request: with 64 in one, that is most of the work (measured).
            verify = httpx.create_ssl_context()
            self._clients = [
                httpx.AsyncClient(
                    base_url=self.url,
                    headers={"Authorization": f"Bearer {api_key.strip()}"} if api_key is not None else {},
                    # The budget of the call ends every wait; only a host that swallows packets is left earlier, to be tried again.
                    timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
                    limits=httpx.Limits(max_connections=max_in_flight, max_keepalive_connections=max_in_flight),
                    transport=transport,
                    verify=verify,
                )
                for _ in range(-(-max_in_flight // _REQUESTS_A_CLIENT))
            ]
            self._next_client = itertools.cycle(self._clients)
        except httpx.InvalidURL as error:
            raise RequestRefused(f"{url!r} is not a URL: {error}") from error

    async def soft_labels_of(
        self,
        files: Sequence[bytes | Path],
        temperature: float | None = None,
        top_k: int | None = None,
        *,
        crop: CropPolicy = "teacher",
        fingerprint: str | None = None,
    ) -> list[FileResult]:
        """What the teacher says of encoded images (JPEG, PNG, WebP), in the order of the files.

        `temperature` None means the teacher's own. `crop`: `teacher` cuts the crop of its own evaluation, `as-is` takes images of exactly
        its size. A file that cannot be used gets a FileRefused in its place.

        Raises: see TeacherBackend; RequestRefused also for a temperature or top_k that the teacher cannot take.
        """
        read = await read_files(files)
        readable = [file for file in read if isinstance(file, bytes)]
        if temperature is not None:
            check_temperature(np.full((1, 1), temperature, np.float32), 1)
        params = _params({"return": "probs", "temperature": temperature, "top_k": top_k, "crop": crop})

        async def ask_all() -> list[list[FileResult]]:
            info = await self.known(fingerprint)
            parts = parts_of([len(file) for file in readable], self._message_bytes, self._message_images)
            try:
                return await all_or_none([self._ask_files([readable[i] for i in part], params, info) for part in parts])
            except RequestRefused as refusal:
                await self.look_again(info, refusal)
                raise
            except TeacherUnavailable:
                if self._info is info:
                    self._info = None  # as CheckedTeacher does: whoever comes back says anew who it is
                raise

        answers = iter([result for part in await self.of_one_teacher(ask_all, fingerprint) for result in part])
        return [next(answers) if isinstance(file, bytes) else file for file in read]

    async def look_again(self, info: TeacherInfo, refusal: RequestRefused) -> None:
        """See PatientTeacher. A wrong key or a body that is too large says nothing of the teacher."""
        if not isinstance(refusal, RestRefused) or refusal.status == 422:
            await super().look_again(info, refusal)

    async def close(self) -> None:
        """See TeacherBackend."""
        for client in self._clients:
            await client.aclose()

    async def _load_info(self) -> TeacherInfo:
        path = "/v1/models" if self.model is None else f"/v1/models/{quote(self.model, safe='')}"
        answer = await self.patience.ask(lambda: self._send("GET", path))
        try:
            cards = answer.json()["models"] if self.model is None else [answer.json()]
            # Only what we know: a later gateway may say more.
            texts = [json.dumps({name: card[name] for name in TeacherInfo.model_fields if name in card}) for card in cards]
        except (ValueError, KeyError, TypeError) as error:
            raise TeacherAnswerError(f"{self.whom} does not answer {path} like a gateway of ours") from error
        if len(texts) != 1:
            names = ", ".join(str(card.get("name")) for card in cards)
            raise RequestRefused(f"{self.whom} serves {len(texts)} models ({names or 'none'}): say which one (model=)")
        return parse_info(texts[0], origin=f"{path} of {self.whom}")

    async def _infer(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...]) -> dict[str, Floats]:
        info = await self.info()
        one_temperature = bool((temperature_B1 == temperature_B1[0]).all())
        if names == (SOFT_LABELS,) and one_temperature:
            return {SOFT_LABELS: await self._in_messages(crops_BHWC, "probs", float(temperature_B1[0, 0]), info)}
        # A request has one temperature and gives one tensor; the logits give the soft labels of any.
        logits_BK = await self._in_messages(crops_BHWC, "logits", None, info)
        tensors = {LOGITS: logits_BK}
        if SOFT_LABELS in names:
            tensors[SOFT_LABELS] = _softmax(logits_BK, temperature_B1)
        return tensors

    async def _in_messages(self, crops_BHWC: Crops, kind: Kind, temperature: float | None, info: TeacherInfo) -> Floats:
        size = min(self._message_images, max(1, self._message_bytes // crops_BHWC[0].nbytes))
        messages = np.array_split(crops_BHWC, -(-len(crops_BHWC) // size))
        params = _params({"return": kind, "temperature": temperature})
        parts = await all_or_none([self._ask_crops(crops, params, info) for crops in messages])
        return np.concatenate(parts)  # a copy that the caller may write into, also of a single part

    async def _ask_crops(self, crops_BHWC: Crops, params: dict[str, str], info: TeacherInfo) -> Floats:
        try:
            headers = {"Content-Type": CROPS_MEDIA_TYPE}
            message = await self._post(params, len(crops_BHWC), info, content=encode_crops(crops_BHWC), headers=headers)
        except RestRefused as error:
            if error.status != 413 or len(crops_BHWC) == 1:
                raise
            self._send_less(error, len(crops_BHWC), crops_BHWC.nbytes)
            return np.concatenate([await self._ask_crops(half, params, info) for half in np.array_split(crops_BHWC, 2)])
        if message.header.errors:
            raise TeacherAnswerError(f"{self.whom} has no label for a crop: {message.header.errors[0].message}")
        return message.values_BR

    async def _ask_files(self, files: list[bytes], params: dict[str, str], info: TeacherInfo) -> list[FileResult]:
        try:
            form = [("images", (f"{number}", file, "application/octet-stream")) for number, file in enumerate(files)]
            message = await self._post(params, len(files), info, files=form)
        except RestRefused as error:
            if len(error.items) == len(files):  # not one usable image: the refusal says what is wrong with each
                if any(item.code == "wrong_size" for item in error.items):
                    await self.look_again(info, error)
                return [FileRefused(item.code, item.message) for item in sorted(error.items, key=lambda item: item.index)]
            if error.status != 413:
                raise
            if len(files) == 1:
                return [FileRefused(error.code, str(error))]
            self._send_less(error, len(files), sum(map(len, files)))
            middle = len(files) // 2
            return [*await self._ask_files(files[:middle], params, info), *await self._ask_files(files[middle:], params, info)]
        return results_of(message)

    def _send_less(self, error: RestRefused, num_images: int, size_bytes: int) -> None:
        """This gateway, or a proxy before it, takes less than we thought: this request goes as two, and later ones are smaller, too."""
        if "server.max_batch" in str(error):
            self._message_images = max(1, min(self._message_images, num_images // 2))
        else:
            self._message_bytes = max(1, min(self._message_bytes, size_bytes // 2))

    async def _post(self, params: dict[str, str], num_images: int, info: TeacherInfo, **body: Any) -> SoftLabelsMessage:
        """One request for labels, asked again where that can help. Raises TeacherChanged for an answer of another teacher than `info`."""
        body["headers"] = {"Accept": SOFT_LABELS_MEDIA_TYPE, **body.get("headers", {}), **trace_arguments().get("headers", {})}
        if self.model is not None:
            params = {**params, "model": self.model}
        async with self._slots:  # also while it waits: a server in trouble is not asked more at once than one in health
            answer = await self.patience.ask(lambda: self._send("POST", LABELS_PATH, params=params, **body))
        message = decode_soft_labels(answer.content)
        header = message.header
        if (header.fingerprint, header.version) != (info.fingerprint, info.version):
            raise TeacherChanged(
                f"{self.whom} serves version {header.version} ({header.fingerprint[:12]}) now, not {info.version} any more"
            )
        given = (header.kind, header.num_images, header.num_classes, str(header.top_k))
        wanted = (params["return"], num_images, info.num_classes, params.get("top_k", "None"))
        if given != wanted:
            raise TeacherAnswerError(f"{self.whom} answered (kind, images, classes, top_k) {given} where {wanted} was due")
        return message

    async def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            answer = await next(self._next_client).request(method, path, **request)
        except httpx.HTTPError as error:
            raise translated(error, self.whom) from error
        raise_failure(answer, self.whom)
        return answer


def _params(wanted: dict[str, object]) -> dict[str, str]:
    """Query parameters; what is None is left to the gateway."""
    return {name: str(value) for name, value in wanted.items() if value is not None}


def _softmax(logits_BK: Floats, temperature_B1: Floats) -> Floats:
    """fp32 [B,K], computed in float64."""
    scaled_BK = logits_BK.astype(np.float64) / temperature_B1
    exp_BK = np.exp(scaled_BK - scaled_BK.max(axis=1, keepdims=True))
    return (exp_BK / exp_BK.sum(axis=1, keepdims=True)).astype(np.float32)
