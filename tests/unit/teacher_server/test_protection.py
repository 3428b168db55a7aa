"""What stands between strangers and the teacher, over in-process ASGI: keys, quotas, turns, deadlines, clients that hang up."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from distill.errors import ConfigError, TeacherAnswerError
from distill.wire import CROPS_MEDIA_TYPE, encode_crops
from teacher_server import decoding_pool
from teacher_server.access import ANYBODY, Access
from teacher_server.fair_queue import FairQueue, QueueFull
from teacher_server.fake import FakeTeacher
from teacher_server.gateway import create_app
from teacher_server.key_file import KeyFile, new_key, write_keys
from teacher_server.quotas import TenantUsage
from teacher_server.settings import ServerSettings, TenantQuota, TritonSettings

LABELS = "/v1/soft-labels"
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
CROPS = {"content": encode_crops(PIXELS), "headers": {"content-type": CROPS_MEDIA_TYPE}}


class GatedTeacher(FakeTeacher):
    """Answers when the test opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.under_way = 0

    async def _infer(self, crops_BHWC: Any, temperature_B1: Any, names: tuple[str, ...]) -> Any:
        self.under_way += len(crops_BHWC)
        try:
            await self.gate.wait()
            return await super()._infer(crops_BHWC, temperature_B1, names)
        finally:
            self.under_way -= len(crops_BHWC)


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def gateway(teacher: FakeTeacher | None = None, access: Access | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(teacher or FakeTeacher(), ServerSettings(**{"auth": "none", **settings}), access=access)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


def run(scenario: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 30))


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing signals it
        await asyncio.sleep(0)


async def until_number(client: httpx.AsyncClient, name: str, value: float) -> None:
    """Returns when a metric has reached a value."""
    while (await numbers(client))[name] < value:  # noqa: ASYNC110 - nothing signals it
        await asyncio.sleep(0)


async def numbers(client: httpx.AsyncClient, **headers: str) -> dict[str, float]:
    """The metrics, by name and labels."""
    lines = (await client.get("/metrics", headers=headers)).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """Writes a file of keys, one for each tenant; gives the path and the keys."""

    def make(*tenants: str, **quotas: TenantQuota) -> tuple[Path, list[str]]:
        made = [new_key(tenant) for tenant in tenants]
        path = tmp_path / "keys.yaml"
        write_keys(path, KeyFile(keys=tuple(entry for _, entry in made), tenants=quotas))
        return path, [key for key, _ in made]

    return make


def test_with_keys_all_of_v1_and_the_metrics_need_one(keys: Any) -> None:
    path, (key,) = keys("alice")

    async def scenario() -> None:
        async with gateway(auth="keys", keys_file=str(path)) as client:
            for method, where in (
                ("GET", "/v1/models"), ("GET", "/v1/models/fake"), ("GET", "/v1/stats"), ("GET", "/v1/nothing"), ("POST", LABELS),
                ("PUT", LABELS), ("GET", "/metrics"),
            ):  # fmt: skip
                answer = await client.request(method, where)
                assert error_of(answer) == (401, "unauthorized"), where
                assert answer.headers["www-authenticate"].startswith("Bearer")
                allowed = await client.request(method, where, headers={"X-API-Key": key})
                assert allowed.status_code != 401, where
            for where in ("/healthz", "/readyz", "/", "/docs", "/openapi.json"):
                assert (await client.get(where)).status_code == 200, where
            answer = await client.post(LABELS, content=CROPS["content"], headers={**CROPS["headers"], "Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
            metrics = (await client.get("/metrics", headers={"X-API-Key": key})).text
            assert 'distill_gateway_refusals_total{code="unauthorized",tenant="-"} 7.0' in metrics

    run(scenario)


def test_a_body_without_a_key_is_not_read(keys: Any) -> None:
    path, _ = keys("alice")

    async def unread() -> Any:
        raise AssertionError("read")
        yield b""

    async def scenario() -> None:
        async with gateway(auth="keys", keys_file=str(path)) as client:
            assert error_of(await client.post(LABELS, content=unread())) == (401, "unauthorized")

    run(scenario)


def test_a_body_without_an_end_that_nobody_reads_ends_the_connection(keys: Any) -> None:
    path, (key,) = keys("alice")

    async def endless() -> Any:
        while True:
            yield b"x" * 1000

    async def scenario() -> None:
        async with gateway(auth="keys", keys_file=str(path), max_body_bytes=5000) as client:
            png_with = {"X-API-Key": key, "content-type": "image/png"}
            for headers, status in (({}, 401), ({**png_with, "content-type": "text/plain"}, 415), (png_with, 413)):
                answer = await client.post(LABELS, content=endless(), headers=headers)
                assert (answer.status_code, answer.headers.get("connection")) == (status, "close")
            announced = await client.post(LABELS, content=b"x" * 5001)
            assert (announced.status_code, announced.headers.get("connection")) == (401, "close")
            short = await client.post(LABELS, content=b"x" * 5000)
            assert (short.status_code, short.headers.get("connection")) == (401, None), "its sender must get to read the answer"

            async def whole() -> Any:
                yield CROPS["content"]

            read = await client.post(LABELS, content=whole(), headers={**CROPS["headers"], "X-API-Key": key})
            assert (read.status_code, read.headers.get("connection")) == (200, None)

    run(scenario)


def test_a_revoked_key_stops_working_without_a_restart(keys: Any) -> None:
    path, (key, _) = keys("alice", "bob")
    clock = Clock()
    settings = ServerSettings(keys_file=str(path))

    async def scenario() -> None:
        async with gateway(access=Access(settings, {}, clock)) as client:
            headers = {"X-API-Key": key}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
            write_keys(path, KeyFile())
            clock.now += 1
            assert error_of(await client.get("/v1/models", headers=headers)) == (401, "unauthorized")

    run(scenario)


def test_a_gateway_without_keys_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTILL_API_KEYS", raising=False)
    monkeypatch.delenv("DISTILL_API_KEYS_FILE", raising=False)
    with pytest.raises(ConfigError, match=r"distill keys add .* server\.auth=none"):
        create_app(FakeTeacher(), ServerSettings())


def test_quotas_are_each_tenants_own(keys: Any) -> None:
    path, (alice, bob) = keys("alice", "bob", alice=TenantQuota(images_per_s=2, burst_s=3))
    clock = Clock()

    async def scenario() -> None:
        async with gateway(access=Access(ServerSettings(keys_file=str(path)), {}, clock)) as client:

            async def ask(key: str) -> httpx.Response:
                return await client.post(LABELS, content=CROPS["content"], headers={**CROPS["headers"], "X-API-Key": key})

            assert (await ask(alice)).status_code == 200
            refused = await ask(alice)  # 4 of 6 are used, 4 more are 2 too many: 1 s
            assert error_of(refused) == (429, "too_many_images")
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["retry_after_s"] == 1
            assert (await ask(bob)).status_code == 200
            clock.now += 1
            assert (await ask(alice)).status_code == 200
            counted = await numbers(client, **{"X-API-Key": bob})
            assert counted['distill_gateway_images_total{outcome="labelled",tenant="alice"}'] == 8
            assert counted['distill_gateway_images_total{outcome="labelled",tenant="bob"}'] == 4
            assert counted['distill_gateway_refusals_total{code="too_many_images",tenant="alice"}'] == 1

    run(scenario)


def test_requests_over_a_quota_are_refused_before_their_body_is_read() -> None:
    async def unread() -> Any:
        raise AssertionError("read")
        yield b""

    async def scenario() -> None:
        async with gateway(quota=TenantQuota(requests_per_s=0.001, burst_s=1)) as client:
            assert (await client.post(LABELS, **CROPS)).status_code == 200
            answer = await client.post(LABELS, content=unread(), headers=CROPS["headers"])
            assert error_of(answer) == (429, "too_many_requests")
            assert 900 <= int(answer.headers["retry-after"]) <= 1000

    run(scenario)


def test_too_many_requests_at_once() -> None:
    async def scenario() -> None:
        teacher = GatedTeacher()
        async with gateway(teacher, quota=TenantQuota(max_concurrent=1)) as client:
            first = asyncio.create_task(client.post(LABELS, **CROPS))
            await until(lambda: teacher.under_way > 0)
            assert error_of(await client.post(LABELS, **CROPS)) == (429, "too_many_at_once")
            teacher.gate.set()
            assert (await first).status_code == 200
            assert (await client.post(LABELS, **CROPS)).status_code == 200

    run(scenario)


def test_the_teacher_is_asked_for_a_bounded_number_of_images_and_a_full_queue_is_429() -> None:
    async def scenario() -> None:
        teacher = GatedTeacher()
        limits = {"max_images_in_flight": 8, "max_queued_images_per_tenant": 8, "max_queued_images": 12}
        async with gateway(teacher, **limits) as client:
            tasks = [asyncio.create_task(client.post(LABELS, **CROPS)) for _ in range(5)]
            refused = (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0].pop().result()
            assert error_of(refused) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            assert teacher.under_way == 8
            counted = await numbers(client)
            assert counted["distill_gateway_queue_images"] == 8
            assert counted["distill_gateway_queue_requests"] == 2
            assert counted["distill_gateway_teacher_images"] == 8
            assert (await client.get("/v1/stats")).json()["queued"] == 2
            assert (await client.get("/healthz")).status_code == 200
            teacher.gate.set()
            answers = await asyncio.gather(*tasks)
            assert Counter(answer.status_code for answer in answers) == {200: 4, 429: 1}
            assert (await numbers(client))["distill_gateway_queue_images"] == 0

    run(scenario)


class OrderedTeacher(GatedTeacher):
    """Notes the temperature of each question, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[float] = []

    async def _infer(self, crops_BHWC: Any, temperature_B1: Any, names: tuple[str, ...]) -> Any:
        self.order.append(float(temperature_B1[0, 0]))
        return await super()._infer(crops_BHWC, temperature_B1, names)


def test_tenants_of_weight_3_and_1_share_the_teacher_3_to_1(keys: Any) -> None:
    path, (light, heavy) = keys("light", "heavy", heavy=TenantQuota(weight=3), light=TenantQuota(weight=1))

    async def scenario() -> None:
        teacher = OrderedTeacher()
        async with gateway(teacher, auth="keys", keys_file=str(path), max_images_in_flight=4) as client:
            tasks = []
            for key, temperature in ((light, 1.0), (heavy, 3.0)):
                for _ in range(24):
                    request = {"content": CROPS["content"], "headers": {**CROPS["headers"], "X-API-Key": key}}
                    tasks.append(asyncio.create_task(client.post(LABELS, params={"temperature": temperature}, **request)))
            while (await client.get("/v1/stats", headers={"X-API-Key": light})).json()["queued"] < 47:  # noqa: ASYNC110
                await asyncio.sleep(0)
            teacher.gate.set()
            answers = await asyncio.gather(*tasks)
            assert {answer.status_code for answer in answers} == {200}
        served = Counter(teacher.order[1:25])
        assert abs(served[3.0] - 18) <= 1, served

    run(scenario)


async def raw_request(
    app: Any, body: list[bytes], gone: asyncio.Event, path: str = LABELS, media_type: bytes = b"image/png", send: Any = None
) -> list[Any]:
    """One request by hand: the chunks of `body`, then the client hangs up when `gone` is set. Gives what was sent."""
    chunks = [{"type": "http.request", "body": chunk, "more_body": i < len(body) - 1} for i, chunk in enumerate(body)]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if chunks:
            return chunks.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def kept(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", media_type)], "query_string": b""}
    await app(scope, receive, send or kept)
    return sent


def test_a_client_that_hangs_up_in_the_queue_leaves_it() -> None:
    async def scenario() -> None:
        teacher = GatedTeacher()
        app = create_app(teacher, ServerSettings(auth="none", max_images_in_flight=1))
        stays, goes = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(raw_request(app, [png(PIXELS[0])], stays))
        await until(lambda: teacher.under_way == 1)
        second = asyncio.create_task(raw_request(app, [png(PIXELS[1])], goes))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            await until_number(client, "distill_gateway_queue_requests", 1)
            goes.set()
            await second
            counted = await numbers(client)
            assert counted["distill_gateway_queue_requests"] == 0
            assert counted['distill_gateway_requests_total{route="/v1/soft-labels",status="499"}'] == 1
        teacher.gate.set()
        await first
        assert teacher.calls == [1], "the teacher never heard of the second request"

    run(scenario)


def test_a_client_that_hangs_up_while_its_images_are_decoded_stops_the_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    decoded: list[int] = []

    def slow_decode(data: bytes, max_pixels: int) -> Any:
        decoded.append(1)
        begun.set()
        go_on.wait(20)
        return PIXELS[0]

    monkeypatch.setattr("teacher_server.intake.decode_image", slow_decode)
    teacher = FakeTeacher()

    async def scenario() -> None:
        app = create_app(teacher, ServerSettings(auth="none"))
        goes = asyncio.Event()
        part = b'--b\r\nContent-Disposition: form-data; name="x"; filename="y"\r\n\r\nx\r\n'
        request = asyncio.create_task(raw_request(app, [part * 400 + b"--b--\r\n"], goes, media_type=b"multipart/form-data; boundary=b"))
        await asyncio.to_thread(begun.wait, 20)
        goes.set()
        await request
        go_on.set()

    run(scenario)
    assert teacher.calls == []
    # The chunks that threads had begun are finished, the others are never taken up.
    assert len(decoded) <= 2 * decoding_pool._CHUNK * (decoding_pool.os.cpu_count() or 1) < 400


def test_a_body_that_trickles_is_ended_and_holds_no_place_in_the_queue() -> None:
    async def scenario() -> None:
        teacher = FakeTeacher()
        app = create_app(teacher, ServerSettings(auth="none", max_images_in_flight=1, triton=TritonSettings(request_timeout_s=0.05)))
        never = asyncio.Event()

        async def trickle() -> Any:
            yield b"\x89PNG"
            await never.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            slow = asyncio.create_task(client.post(LABELS, content=trickle(), headers={"content-type": "image/png"}))
            assert (await client.post(LABELS, **CROPS)).status_code == 200
            answer = await slow
        assert error_of(answer) == (408, "slow_body")
        assert answer.headers["connection"] == "close"
        assert teacher.calls == [4]

    run(scenario)


class ReplacedTeacher(FakeTeacher):
    """Another version takes its place when the first question is on its way."""

    async def _ask(self, *arguments: Any, **more: Any) -> Any:
        if self._served.version == 1:
            self._served = self._info = self._served.replace(version=2, fingerprint="e" * 64)
        return await super()._ask(*arguments, **more)


def test_a_teacher_that_is_replaced_meanwhile_costs_no_request_and_mixes_no_labels() -> None:
    async def scenario() -> None:
        teacher = ReplacedTeacher()
        async with gateway(teacher) as client:
            answer = await client.post(LABELS, **CROPS)
        assert answer.status_code == 200
        assert (answer.json()["version"], answer.json()["fingerprint"]) == (2, "e" * 64)
        assert teacher.calls == [4]

    run(scenario)


def test_a_failure_while_asking_gives_the_turn_back() -> None:
    class Failing(FakeTeacher):
        async def _infer(self, *arguments: Any) -> Any:
            raise TeacherAnswerError("spoilt")

    async def scenario() -> None:
        async with gateway(Failing(), max_images_in_flight=4) as client:
            for _ in range(3):
                assert error_of(await client.post(LABELS, **CROPS)) == (502, "bad_teacher_answer")
            assert (await numbers(client))["distill_gateway_teacher_images"] == 0

    run(scenario)


def test_a_full_queue_refuses_before_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        teacher = GatedTeacher()
        async with gateway(teacher, max_images_in_flight=4, max_queued_images_per_tenant=4) as client:
            tasks = [asyncio.create_task(client.post(LABELS, **CROPS)) for _ in range(2)]
            await until_number(client, "distill_gateway_queue_images", 4)
            decoded: list[bytes] = []
            monkeypatch.setattr("teacher_server.intake.decode_image", lambda data, max_pixels: decoded.append(data))
            answer = await client.post(LABELS, content=png(PIXELS[0]), headers={"content-type": "image/png"})
            assert error_of(answer) == (429, "queue_full")
            assert decoded == []
            teacher.gate.set()
            await asyncio.gather(*tasks)

    run(scenario)


@pytest.mark.parametrize("name", ["one", "many"])
def test_one_image_is_decoded_in_the_midst_of_a_large_batch_of_another_tenant_or_its_own(name: str) -> None:
    go_on = threading.Event()
    order: list[str] = []

    def work(position: int, item: str) -> None:
        go_on.wait(20)
        order.append(item)

    async def scenario() -> None:
        pool = decoding_pool.DecodingPool(10**6)
        many = TenantUsage("many", TenantQuota())
        one = many if name == "many" else TenantUsage(name, TenantQuota())
        batch = asyncio.create_task(pool.map(many, work, ["many"] * 400))
        for _ in range(300):
            await asyncio.sleep(0)  # all of the batch is in line
        single = asyncio.create_task(pool.map(one, work, ["one"]))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(batch, single)
        pool.close()

    run(scenario)
    assert len(order) == 401
    assert order.index("one") < 200, "behind what has begun, not behind the whole batch"


def test_results_of_many_chunks_are_in_order() -> None:
    async def scenario() -> list[tuple[int, int]]:
        pool = decoding_pool.DecodingPool(10**6)
        try:
            return await pool.map(TenantUsage("one", TenantQuota()), lambda position, item: (position, item), list(range(1001)))
        finally:
            pool.close()

    assert run(scenario) == [(number, number) for number in range(1001)]


def test_answers_do_not_wait_for_threads_that_decode() -> None:
    go_on = threading.Event()

    async def scenario() -> None:
        pool = decoding_pool.DecodingPool(10**6)
        stuck = asyncio.create_task(pool.map(TenantUsage("one", TenantQuota()), lambda position, item: go_on.wait(20), [0] * 400))
        for _ in range(300):
            await asyncio.sleep(0)
        assert await pool.run(lambda: 7) == 7
        assert not stuck.done()
        go_on.set()
        await stuck
        pool.close()

    run(scenario)


def test_a_request_is_under_way_until_its_answer_is_sent() -> None:
    async def scenario() -> None:
        app = create_app(FakeTeacher(), ServerSettings(auth="none", quota=TenantQuota(max_concurrent=1), max_buffered_bytes=1024))
        taking, takes = asyncio.Event(), asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                taking.set()
                await takes.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            for end in ("taken", "cancelled"):
                taking.clear()
                takes.clear()
                request = asyncio.create_task(raw_request(app, [png(PIXELS[0])], asyncio.Event(), send=send))
                await taking.wait()
                assert error_of(await client.post(LABELS, **CROPS)) == (429, "too_many_at_once"), end
                takes.set() if end == "taken" else request.cancel()
                await asyncio.gather(request, return_exceptions=True)
                assert (await client.post(LABELS, **CROPS)).status_code == 200, end

    run(scenario)


def test_answers_that_are_being_sent_count_as_memory() -> None:
    async def scenario() -> None:
        app = create_app(FakeTeacher(num_classes=1000), ServerSettings(auth="none", max_buffered_bytes=4096))
        taking, takes = asyncio.Event(), asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                taking.set()
                await takes.wait()

        request = asyncio.create_task(raw_request(app, [png(PIXELS[0])], asyncio.Event(), send=send))
        await taking.wait()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            assert error_of(await client.post(LABELS, **CROPS)) == (503, "overloaded")
            takes.set()
            await request
            assert (await client.post(LABELS, **CROPS)).status_code == 200

    run(scenario)


def test_images_without_a_label_are_given_back_unless_that_was_the_clients_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = TenantQuota(images_per_s=0.001, burst_s=4000)  # 4 images, once

    async def statuses(teacher: FakeTeacher, *bodies: dict[str, Any], **settings: Any) -> list[int]:
        async with gateway(teacher, quota=quota, **settings) as client:
            return [(await client.post(LABELS, **body)).status_code for body in bodies]

    class Spoilt(FakeTeacher):
        async def _infer(self, *arguments: Any) -> Any:
            if self.calls:
                return await super()._infer(*arguments)
            self.calls.append(0)
            raise TeacherAnswerError("spoilt")

    class Slow(FakeTeacher):
        async def _infer(self, *arguments: Any) -> Any:
            if not self.calls:
                self.calls.append(0)
                await asyncio.Event().wait()
            return await super()._infer(*arguments)

    too_small = {"content": encode_crops(PIXELS[:, :4]), "headers": {"content-type": CROPS_MEDIA_TYPE}}

    async def scenario() -> None:
        assert await statuses(FakeTeacher(unavailable_calls=1), CROPS, CROPS, CROPS) == [503, 200, 429]
        assert await statuses(Spoilt(), CROPS, CROPS, CROPS) == [502, 200, 429]
        assert await statuses(Slow(), CROPS, CROPS, CROPS, triton=TritonSettings(request_timeout_s=0.2)) == [504, 200, 429]
        assert await statuses(FakeTeacher(), too_small, CROPS) == [422, 429]
        plain, full = FairQueue.turn, [True]

        def turn(self: FairQueue, tenant: str, weight: float, num_images: int) -> Any:
            if full and tenant == ANYBODY:
                full.clear()
                raise QueueFull("full by now", 1.0)
            return plain(self, tenant, weight, num_images)

        monkeypatch.setattr(FairQueue, "turn", turn)
        assert await statuses(FakeTeacher(), CROPS, CROPS, CROPS) == [429, 200, 429]

    run(scenario)
