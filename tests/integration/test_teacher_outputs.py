"""The real Triton with a teacher in fp16 that gives top outputs: what it says over gRPC and shared memory is what the file says here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.fingerprint import load_model, stamp_teacher
from export.graph import save_model
from export.settings import RepositorySettings, TeacherExportSettings
from export.teacher_precision import set_precision
from export.top_outputs import add_top_outputs
from export.triton_repository import write_repository
from teacher_server.embedded import EmbeddedTeacher
from teacher_server.model_repository import served_model
from teacher_server.triton import TritonTeacher
from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess
from teacher_server.triton_shm import SharedMemoryTriton

pytestmark = pytest.mark.integration

CROPS = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), np.uint8)


@pytest.fixture
def repository(tiny_teacher: Any, tmp_path: Path) -> Path:
    """The tiny teacher in fp16, with its 4 largest logits, in a model repository."""
    model, path = load_model(served_model(tiny_teacher.repository, "tiny")), tmp_path / "teacher.onnx"
    add_top_outputs(model, 4)
    save_model(model, path)
    set_precision(path, CROPS, TeacherExportSettings(precision="fp16"))
    said = tiny_teacher.info
    info = stamp_teacher(
        path, name="tiny", class_names=said.class_names, preprocessing=said.preprocessing, precision="fp16", top_outputs=4
    )  # fmt: skip
    write_repository(tmp_path / "models", path, info, RepositorySettings(max_batch_size=32))
    return tmp_path / "models"


def test_triton_gives_what_the_file_gives(home: TritonHome, tiny_teacher: Any, repository: Path, tmp_path: Path) -> None:

    async def scenario(url: str) -> None:
        embedded = EmbeddedTeacher.from_repository(repository, "tiny", num_threads=1)
        expected = tiny_teacher.logits(CROPS)
        try:
            for served in (TritonTeacher(url, "tiny"), SharedMemoryTriton(url, "tiny")):
                try:
                    info = await served.info()
                    assert (info.precision, info.top_outputs) == ("fp16", 4)
                    np.testing.assert_allclose(await served.logits(CROPS), await embedded.logits(CROPS), atol=1e-5)
                    ids_BR, logits_BR = await served.top_logits(CROPS)
                    same_BR, values_BR = await embedded.top_logits(CROPS)
                    np.testing.assert_array_equal(ids_BR, same_BR)
                    np.testing.assert_allclose(logits_BR, values_BR, atol=1e-5)
                    np.testing.assert_allclose(logits_BR, np.take_along_axis(expected, ids_BR.astype(int), axis=1), atol=0.05)
                finally:
                    await served.close()
        finally:
            await embedded.close()

    with TritonProcess(home, repository, "tiny", tmp_path / "log") as triton:
        asyncio.run(scenario(triton.url))
