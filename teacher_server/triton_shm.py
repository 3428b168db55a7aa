"""Triton on the same host: crops and labels stay in memory that both sides see, only their places travel over gRPC.

Flow: crops -> region of /dev/shm -> Triton reads them and writes the labels beside them -> a copy of the labels. Triton maps each region
once; started anew it knows none, which shows at the next message: that one is asked again in a new region, of the same teacher only.
Unit of data: one message of a batch. Shapes: B images, H W C pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from distill.errors import RequestRefused, TeacherAnswerError, TeacherUnavailable
from distill.wire import IMAGES, TEMPERATURE
from teacher_server.backend import Crops, Floats
from teacher_server.shared_memory import SHM_DIR, Region, RegionPool
from teacher_server.triton import translated
from teacher_server.triton_patient import PatientTriton, asked_of

_ALIGNMENT = 64
_REGION_TIMEOUT_S = 10.0


class SharedMemoryTriton(PatientTriton):
    """PatientTriton whose tensors stay in memory that both sides see. Triton must run on this host and see this /dev/shm."""

    carries_top_outputs = False  # every answer has room for float32 [B,K]; all logits cost nothing to carry here

    def __init__(self, url: str, model: str, **options: Any) -> None:
        """See PatientTriton. Raises RequestRefused where there is no such memory."""
        if not SHM_DIR.is_dir():
            raise RequestRefused(
                f"shared memory with Triton needs {SHM_DIR}, which this system has not; use grpc:// instead of grpc+shm://"
            )
        super().__init__(url, model, **options)
        self._pool = RegionPool(_TritonRegions(self._connected, url))

    async def close(self) -> None:
        """See TeacherBackend. Removes every region."""
        await self._pool.close()
        await super().close()

    async def _send(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], version: int) -> dict[str, Floats]:
        try:
            return await self._send_in_region(crops_BHWC, temperature_B1, names, version)
        except _RegionUnknown:
            # Triton was started anew since the last message. Nobody can say without asking whether it still serves the same teacher.
            self._pool.start_anew()
            raise

    async def _send_in_region(self, crops_BHWC: Crops, temperature_B1: Floats, names: tuple[str, ...], version: int) -> dict[str, Floats]:
        answer_shape = (len(crops_BHWC), asked_of.get().num_classes)
        answer_bytes = 4 * answer_shape[0] * answer_shape[1]
        sizes = [crops_BHWC.nbytes, temperature_B1.nbytes, *(answer_bytes for _ in names)]
        offsets = [0, *(int(end) for end in np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]))]
        async with self._slots, self._pool.lend(offsets[-1]) as region:
            region.write(offsets[0], crops_BHWC)
            region.write(offsets[1], temperature_B1)
            inputs = [
                aio.InferInput(IMAGES, list(crops_BHWC.shape), "UINT8"),
                aio.InferInput(TEMPERATURE, list(temperature_B1.shape), "FP32"),
            ]
            outputs = [aio.InferRequestedOutput(name) for name in names]
            for offset in offsets[2:-1]:
                region.write(offset, np.full(answer_shape, np.nan, np.float32))  # an older answer must not pass for this one
            for tensor, size, offset in zip([*inputs, *outputs], sizes, offsets, strict=False):
                tensor.set_shared_memory(region.name, size, offset)
            try:
                result = await self._connected().infer(
                    self.model, inputs, model_version=str(version), outputs=outputs, client_timeout=self._timeout_s
                )
            except InferenceServerException as error:
                if "Unable to find shared memory region" in (error.message() or ""):
                    raise _RegionUnknown(f"{self.whom} was started anew and knows none of our shared memory") from error
                self._translate(error)
            return {name: self._read(result, name, region, offset, answer_shape) for name, offset in zip(names, offsets[2:], strict=False)}

    def _read(self, result: aio.InferResult, name: str, region: Region, offset: int, shape: tuple[int, int]) -> Floats:
        """A copy of the tensor, if the answer says that it has this form."""
        entry = result.get_output(name)
        if entry is None or tuple(entry.shape) != shape or entry.datatype != "FP32":
            raise TeacherAnswerError(f"the answer of {self.whom} has no {name} of float32 {list(shape)}")
        return region.read(offset, shape, np.float32)


class _RegionUnknown(TeacherUnavailable):
    """Triton does not know the region: it was started anew."""


class _TritonRegions:
    """Triton as a RegionServer."""

    def __init__(self, connected: Callable[[], aio.InferenceServerClient], url: str) -> None:
        self._connected = connected
        self._url = url

    async def register(self, name: str, size_bytes: int) -> None:
        """See RegionServer. Raises RequestRefused where the server cannot map our memory."""
        try:
            await self._connected().register_system_shared_memory(name, f"/{name}", size_bytes, client_timeout=_REGION_TIMEOUT_S)
        except InferenceServerException as error:
            if "shared memory region" in (error.message() or "").lower():
                raise RequestRefused(
                    f"Triton at {self._url} cannot map shared memory of this process ({error.message()}): it runs on another host, in a "
                    "container without our /dev/shm (docker: --ipc=host), or as another user; use grpc:// instead of grpc+shm://"
                ) from error
            raise translated(error, f"Triton at {self._url}") from error

    async def unregister(self, name: str) -> bool:
        """See RegionServer."""
        try:
            await self._connected().unregister_system_shared_memory(name, client_timeout=_REGION_TIMEOUT_S)
        except InferenceServerException as error:
            if "in use" in (error.message() or ""):
                return False
            raise translated(error, f"Triton at {self._url}") from error
        return True

    async def registered(self) -> list[str]:
        """See RegionServer."""
        try:
            status = await self._connected().get_system_shared_memory_status(client_timeout=_REGION_TIMEOUT_S)
        except InferenceServerException as error:
            raise translated(error, f"Triton at {self._url}") from error
        return list(status.regions)
