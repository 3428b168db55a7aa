"""A running Triton changes from one version of a teacher to another while it answers.

Flow: (1) the new version is loaded beside the old one and gives a canary label, which nobody else sees; (2) the repository on disk is told;
(3) Triton is told to serve the new version alone. Until (2) every failure leaves all as it was; a crash between (2) and (3) leaves a Triton
that serves the old version until its next start. A version with other tensors (classes, crop size, top outputs) cannot lie beside the old
one: it takes its place for as long as it is asked for that label, and gives it back if there is none. Unit of data: one model.

What clients see (measured with Triton 2.51): the configuration and the version change in the same moment; a request that Triton has taken
in is answered by the version that it was asked of; one that comes too late for the old version gets UNAVAILABLE, "not at ready state", out
of which `TritonTeacher` makes TeacherChanged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from google.protobuf.json_format import MessageToJson  # type: ignore[import-untyped]
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from distill.errors import ConfigError, DistillError, TeacherUnavailable
from distill.teacher_info import METADATA_KEY, TeacherInfo
from teacher_server.backend import parse_info
from teacher_server.triton import TritonTeacher, translated

_ASK_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class TritonControl:
    """Loads models into one running Triton that was started with `--model-control-mode=explicit`. For plain code, not for an event loop."""

    def __init__(self, url: str, *, load_timeout_s: float = 120.0) -> None:
        """`url` is host:port of the gRPC endpoint."""
        self.url = url
        self._load_timeout_s = load_timeout_s
        self._client = InferenceServerClient(url)

    def config(self, model: str) -> ModelConfig | None:
        """What Triton runs now; None when it does not serve the model.

        Raises:
            TeacherUnavailable: no Triton answers.
        """
        try:
            return self._client.get_model_config(model, client_timeout=_ASK_TIMEOUT_S).config
        except InferenceServerException as error:
            if "unknown model" in (error.message() or ""):
                return None
            raise translated(error, f"Triton at {self.url}") from error

    def load(self, model: str, config: ModelConfig | None = None) -> None:
        """Load what the repository says, or what `config` says in its place, and put it in the place of what is loaded.

        Raises:
            DistillError: Triton refuses; what it served before it goes on serving.
        """
        text = None if config is None else MessageToJson(config, preserving_proto_field_name=True)
        try:
            self._client.load_model(model, config=text, client_timeout=self._load_timeout_s)
        except InferenceServerException as error:
            message = " ".join((error.message() or "no message").split())
            if "polling" in message or "explicit model" in message:
                raise ConfigError(
                    f"Triton at {self.url} was not started with --model-control-mode=explicit, so it takes a version at its next start only"
                ) from error
            raise DistillError(f"Triton at {self.url} does not load {model!r}: {message[:500]}") from error

    def unload(self, model: str) -> None:
        """Serve the model no longer.

        Raises:
            TeacherUnavailable, DistillError: Triton does not answer, or refuses.
        """
        try:
            self._client.unload_model(model, client_timeout=_ASK_TIMEOUT_S)
        except InferenceServerException as error:
            raise translated(error, f"Triton at {self.url}") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


@contextmanager
def triton_control(url: str, *, load_timeout_s: float = 120.0) -> Iterator[TritonControl]:
    """A `TritonControl` for a block."""
    control = TritonControl(url, load_timeout_s=load_timeout_s)
    try:
        yield control
    finally:
        control.close()


def described(config: ModelConfig, origin: str) -> TeacherInfo:
    """The teacher that a configuration describes. Raises RequestRefused where it describes none."""
    return parse_info(config.parameters[METADATA_KEY].string_value, origin)


def swap_version(control: TritonControl, config: ModelConfig, put_on_disk: Callable[[], object]) -> Literal["swapped", "loaded", "served"]:
    """Make Triton serve the version that `config` describes.

    Args:
        control: the running Triton.
        config: as it will lie in the repository that this Triton reads.
        put_on_disk: writes it there; called once the new version has given a label.

    Returns:
        `swapped`: without a gap. `loaded`: nothing of the model was being served. `served`: it was the served version before.

    Raises:
        ConfigError: Triton serves another teacher under the same number, which clients could not tell apart; nothing is changed.
        DistillError: the new version does not load or gives no usable label; the old one goes on being served.
    """
    info = described(config, f"the new configuration of {config.name!r}")
    running = control.config(config.name)
    before = described(running, f"model {config.name!r} at {control.url}") if running is not None else None
    if running is not None and before is not None and before.version == info.version:
        if before.fingerprint != info.fingerprint:
            raise ConfigError(
                f"version {info.version} of {info.name} is being served as teacher {before.fingerprint[:12]}, its file is"
                f" {info.fingerprint[:12]}: clients could not tell them apart; add the file as the next version, or stop the server"
            )
        put_on_disk()
        if list(running.version_policy.specific.versions) != [info.version]:  # an activation that was cut off left another one beside it
            control.load(config.name)
        return "served"
    tried = config
    if running is not None and before is not None and _same_tensors(running, config):
        tried = _beside(running, before.version, info.version)
    control.load(config.name, tried)
    try:
        asyncio.run(_require_label(control.url, info))
        put_on_disk()
    except BaseException:  # Ctrl-C, too: what the disk does not say must not go on being served
        if running is None:
            control.unload(config.name)
        else:
            control.load(config.name, running)
        raise
    control.load(config.name)
    asyncio.run(_require_label(control.url, info))
    logger.info("Triton at %s serves version %d of %s", control.url, info.version, info.name)
    return "loaded" if running is None else "swapped"


def _same_tensors(running: ModelConfig, config: ModelConfig) -> bool:
    """Whether both versions fit one configuration; with other classes or another crop size they cannot be loaded side by side."""
    return _tensors(running) == _tensors(config)


def _tensors(config: ModelConfig) -> list[tuple[str, int, list[int]]]:
    return [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in [*config.input, *config.output]]


def _beside(running: ModelConfig, old: int, new: int) -> ModelConfig:
    """What runs now, with the new version loaded beside it. It goes on describing the old one: clients must not come over yet."""
    both = ModelConfig()
    both.CopyFrom(running)
    both.version_policy.specific.versions[:] = sorted({old, new})
    return both


class _OneVersion(TritonTeacher):
    """Asks the version that `info` names, whichever the server describes."""

    def __init__(self, url: str, info: TeacherInfo) -> None:
        super().__init__(url, info.name, request_timeout_s=_ASK_TIMEOUT_S)
        self._pinned = info

    async def info(self) -> TeacherInfo:
        """The version to ask, always."""
        self._info = self._pinned
        return self._pinned


async def _require_label(url: str, info: TeacherInfo) -> None:
    """One label of exactly this version, checked as every label is."""
    teacher = _OneVersion(url, info)
    try:
        await teacher.ask_canary()
    except DistillError as error:
        kind = TeacherUnavailable if isinstance(error, TeacherUnavailable) else DistillError
        raise kind(f"version {info.version} of {info.name} gives no label: {error}") from error
    finally:
        await teacher.close()
