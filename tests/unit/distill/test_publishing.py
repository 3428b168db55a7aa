"""An exported teacher becomes the served one, unless somebody activated another one or a service of the run answers as another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from distill.cli.publishing import publish_exported
from distill.cli.serving_record import ServingRecord, announced
from export.fingerprint import read_teacher_info, stamp_teacher
from export.repository_versions import activate_version, active_info, active_version, add_version
from export.settings import RepositorySettings, TeacherExportSettings
from export.triton_repository import served_versions

Teacher = Callable[[int], Path]
SETTINGS = TeacherExportSettings(name="tiny")


@pytest.fixture
def teacher(tiny_teacher: Any, tmp_path: Path) -> Teacher:
    """Teacher folder number n; every number has other weights, and says that it is version 1, as every export does."""

    def make(number: int) -> Path:
        model = onnx.load(tiny_teacher.repository / "tiny" / "1" / "model.onnx")
        for tensor in model.graph.initializer:
            if tensor.name == "weight":
                tensor.CopyFrom(numpy_helper.from_array(np.full((3, 10), number, np.float32), "weight"))
        path = tmp_path / f"teacher-{number}" / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        onnx.save(model, path)
        stamp_teacher(path, name="tiny", class_names=tiny_teacher.info.class_names, preprocessing=tiny_teacher.info.preprocessing)
        return path.parent

    return make


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "run" / "model_repository"


def state(repository: Path) -> tuple[list[int], int | None]:
    return served_versions(repository, "tiny"), active_version(repository, "tiny")


def test_a_run_that_is_exported_again_serves_what_it_made_last(teacher: Teacher, repository: Path) -> None:
    for number in (1, 1, 2):
        folder = teacher(number)
        assert publish_exported(folder, repository, SETTINGS) == f"in {repository}"
        assert state(repository) == ([1], 1)
        assert active_info(repository, "tiny") == read_teacher_info(folder / "model.onnx")


def test_what_was_activated_stays_and_the_way_out_is_said(teacher: Teacher, repository: Path) -> None:
    publish_exported(teacher(1), repository, SETTINGS)
    add_version(repository, teacher(2), RepositorySettings())
    activate_version(repository, "tiny", 2)
    chosen = active_info(repository, "tiny")
    said = publish_exported(teacher(3), repository, SETTINGS)
    assert said.endswith("as version 3, which is not served because version 2 was activated: distill repository activate tiny 3")
    assert state(repository) == ([1, 2, 3], 2)
    assert active_info(repository, "tiny") == chosen
    # The first one comes again: it is there, so that it is only named.
    said = publish_exported(teacher(1), repository, SETTINGS)
    assert said.endswith("distill repository activate tiny 1")
    assert state(repository) == ([1, 2, 3], 2)


def test_the_activated_one_comes_again_with_other_settings(teacher: Teacher, repository: Path) -> None:
    publish_exported(teacher(1), repository, SETTINGS)
    add_version(repository, teacher(2), RepositorySettings())
    activate_version(repository, "tiny", 2)
    more = SETTINGS.replace(repository=RepositorySettings(instance_count=2))
    assert publish_exported(teacher(2), repository, more) == f"in {repository}"
    assert state(repository) == ([1, 2], 2)
    assert "count: 2" in (repository / "tiny" / "config.pbtxt").read_text()


@pytest.mark.parametrize("model", ["tiny", "another"])
def test_a_running_service_keeps_its_teacher(teacher: Teacher, repository: Path, model: str) -> None:
    publish_exported(teacher(1), repository, SETTINGS)
    served = active_info(repository, "tiny")
    record = ServingRecord(pid=os.getpid(), model=model, repository=str(repository), gateway_url="http://h:1")
    with announced(repository.parent, record):
        assert publish_exported(teacher(1), repository, SETTINGS) == f"in {repository}"
        said = publish_exported(teacher(2), repository, SETTINGS)
    if model == "another":
        assert state(repository) == ([1], 1)
        assert active_info(repository, "tiny") != served
        return
    assert f"the running service (process {os.getpid()}) answers as another teacher: distill repository activate tiny 2" in said
    assert state(repository) == ([1, 2], 1)
    assert active_info(repository, "tiny") == served
