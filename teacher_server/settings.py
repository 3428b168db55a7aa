"""Settings of the teacher server: which back end runs the teacher, and the REST gateway before it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, field_validator, model_validator

from distill.config import Section

EmbeddedDevice: TypeAlias = Literal["auto", "cpu", "cuda"]
"""Where an embedded teacher computes."""


class TritonSettings(Section):
    """How Triton is found, started and asked."""

    url: str | None = None
    """host:port of the gRPC endpoint of a running Triton. Without it, one is started here."""
    home: str | None = None
    """Folder with the Triton server, made by `distill install-triton`. Default: $DISTILL_TRITON_HOME, else `.triton`."""
    start_timeout_s: float = Field(default=120, gt=0)
    """How long a started server may take until a label comes out."""
    request_timeout_s: float = Field(default=30, gt=0)
    """Deadline of one request."""


class PoolSettings(Section):
    """Several running teachers asked as one: each request goes where it will be answered soonest, and elsewhere if it fails."""

    urls: list[str] = Field(default_factory=list)
    """Where they are: `host:port` (Triton, gRPC), or the URL of a gateway of ours (`https://...`; its key is in $DISTILL_API_KEY). All must
    serve the same teacher: one with another fingerprint is refused and named, the others go on."""
    max_in_flight: int = Field(default=64, ge=1)
    """Most requests (of about 1.2 MB at most) under way at one of them. How many there are really is found from its answers."""
    latency_tolerance: float = Field(default=2.5, gt=1)
    """More requests go to a teacher while its latency stays below so many times that of a request with nobody waiting."""
    latency_slack_ms: float = Field(default=20, ge=0)
    """Or while it stays below that by so many ms: teachers that answer very fast need more requests to make full batches of."""
    longest_pause_s: float = Field(default=5, gt=0)
    """One that gives no answer is asked for a label again and again, after pauses that grow to this."""

    @field_validator("urls")
    @classmethod
    def _no_url_twice(cls, urls: list[str]) -> list[str]:
        if len(set(urls)) < len(urls):
            raise ValueError("a url is named twice")
        return urls


class TracingSettings(Section):
    """Traces of requests for labels, from the gateway through its queue to Triton, for an OpenTelemetry collector."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """Where the collector takes OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces. None: no traces. Needs the extra `tracing`."""
    sampled_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced; one that comes with a `traceparent` is traced if its sender traces it."""


class TenantQuota(Section):
    """How much one tenant, one user of the gateway, may ask for. Over it the answer is 429 with Retry-After."""

    images_per_s: float | None = Field(default=None, gt=0)
    """Images a second in the long run. None: no limit."""
    requests_per_s: float | None = Field(default=None, gt=0)
    """Requests a second in the long run. None: no limit."""
    burst_s: float = Field(default=2.0, gt=0)
    """Images and requests of so many seconds may come at once after a silence."""
    max_concurrent: int = Field(default=128, ge=1)
    """Requests under way at once."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the teacher while several tenants wait for it, relative to the weights of the others."""


def _plain_none(value: Any) -> Any:
    return "none" if value is False or value == "off" else value  # a bare `off` is False in YAML 1.1


class ServerSettings(Section):
    """The served teacher and its REST gateway."""

    backend: Literal["auto", "triton", "embedded"] = "auto"
    """`triton` (the real server), `embedded` (ONNX Runtime in this process), or `auto`: Triton where it can run, said aloud if not."""
    embedded_threads: int = Field(default=0, ge=0)
    """Threads of an embedded teacher; 0 lets ONNX Runtime decide. (Triton's are teacher.repository.intra_op_threads.)"""
    embedded_device: EmbeddedDevice = "auto"
    """Where an embedded teacher computes: `cuda` (with the extra `gpu`; the first GPU that the process sees), `cpu`, or `auto`: on the GPU
    where ONNX Runtime has one. Every training worker has a copy of its own there. Triton's is teacher.repository.instance_kind."""
    triton: TritonSettings = TritonSettings()
    """How Triton is found, started and asked."""
    pool: PoolSettings = PoolSettings()
    """Several running teachers instead of one Triton; used where `pool.urls` names any."""
    host: str = "127.0.0.1"
    """Address that the gateway listens on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port of the gateway; 0 takes a free one."""
    auth: Annotated[Literal["keys", "none"], BeforeValidator(_plain_none)] = "keys"
    """`keys`: whoever asks shows an API key (`distill keys add`). `none` (or `off`): anybody who reaches the port may ask; on loopback only
    by the names of this machine (Host: localhost, 127.0.0.1, [::1], server.host), and from no other site's page."""
    keys_file: str | None = None
    """File with the hashed API keys and the tenants' quotas. Default: $DISTILL_API_KEYS_FILE. Hashed keys may also stand in
    $DISTILL_API_KEYS."""
    quota: TenantQuota = TenantQuota()
    """Quota of every tenant, but for what the file of keys says of it; and of everybody together with auth `none`."""
    tracing: TracingSettings = TracingSettings()
    """Traces of requests, for an OpenTelemetry collector."""
    max_images_in_flight: int = Field(default=256, ge=1)
    """Images that the teacher is asked for at once; more wait in the queue. A few of its batches keep it busy."""
    max_queued_images: int = Field(default=4096, ge=1)
    """Images of all tenants that wait; over it the answer is 429."""
    max_queued_images_per_tenant: int = Field(default=2048, ge=1)
    """Images of one tenant that wait; over it the answer is 429. Less than max_queued_images, so that no tenant fills the queue alone."""
    max_buffered_bytes: int = Field(default=2**30, ge=1024)
    """Bytes of all request bodies, and of the answers that are being sent, at once; over it the answer is 503 with Retry-After."""
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    """Largest request body, in bytes; over it the answer is 413."""
    max_image_bytes: int = Field(default=16 * 2**20, ge=64)
    """Largest encoded image, in bytes; over it this image is refused."""
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    """Largest image, in pixels after decoding; over it the answer is 422. All images that are decoded at once have together no more: at
    15 bytes a pixel and less, 750 MB by default."""
    max_batch: int = Field(default=1024, ge=1)
    """Most images in one request; over it the answer is 413."""

    @model_validator(mode="after")
    def _one_way_to_the_teacher(self) -> Self:
        if self.pool.urls and (self.triton.url or self.backend == "embedded"):
            other = "triton.url" if self.triton.url else "backend: embedded"
            raise ValueError(f"pool.urls and {other} both say where the teacher is; give one of them")
        return self

    @model_validator(mode="after")
    def _limits_fit_together(self) -> Self:
        if self.max_queued_images_per_tenant > self.max_queued_images:
            raise ValueError(
                f"max_queued_images_per_tenant {self.max_queued_images_per_tenant} is over max_queued_images {self.max_queued_images}"
            )
        return self
