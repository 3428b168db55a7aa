"""Versions come, change over and go; a power cut at any step leaves a repository that serves the old version or the new one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import numpy_helper
from tritonclient.grpc.model_config_pb2 import ModelConfig

from distill.errors import BadInput, ConfigError, StageMissing
from distill.teacher_info import METADATA_KEY, TeacherInfo
from export import repository_versions, triton_repository
from export.fingerprint import load_model, read_teacher_info, stamp_teacher
from export.repository_versions import (
    activate_version,
    active_info,
    active_version,
    add_version,
    list_versions,
    remove_version,
    run_version_so,
)
from export.settings import RepositorySettings
from export.triton_repository import model_config, served_versions

SETTINGS = RepositorySettings(max_batch_size=64, instance_count=3, intra_op_threads=2, warmup_batch_sizes=(1, 8), max_queue_size=99)
OtherTeacher = Callable[[int], Path]


@pytest.fixture
def other(stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> OtherTeacher:
    """The same network with its first weights moved: another teacher of the same name."""

    def make(seed: int) -> Path:
        path, info = stamped
        model = load_model(path)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + seed, tensor.name))
        target = tmp_path / f"other_{seed}" / "model.onnx"
        target.parent.mkdir()
        onnx.save(model, target)
        stamp_teacher(target, name=info.name, class_names=info.class_names, preprocessing=info.preprocessing)
        return target

    return make


@pytest.fixture
def repository(stamped: tuple[Path, TeacherInfo], other: OtherTeacher, tmp_path: Path) -> Path:
    """Version 1 served, versions 2 and 3 beside it."""
    folder = tmp_path / "models"
    for source in (stamped[0], other(1), other(2)):
        add_version(folder, source, SETTINGS)
    return folder


def config_of(repository: Path) -> ModelConfig:
    return text_format.Parse((repository / "tiny" / "config.pbtxt").read_text(), ModelConfig())


def described(repository: Path) -> TeacherInfo:
    return TeacherInfo.model_validate_json(config_of(repository).parameters[METADATA_KEY].string_value)


def require_whole(repository: Path) -> None:
    """What Triton needs for its next start: the one version that the configuration names is there, whole, and is the one it describes."""
    (version,) = config_of(repository).version_policy.specific.versions
    assert read_teacher_info(repository / "tiny" / str(version) / "model.onnx") == described(repository)
    assert (repository / "tiny" / "warmup" / "temperature_one").read_bytes() == b"\x00\x00\x80\x3f"


def test_the_first_version_is_served_and_the_next_ones_wait(repository: Path) -> None:
    assert served_versions(repository, "tiny") == [1, 2, 3]
    assert active_version(repository, "tiny") == 1
    require_whole(repository)
    listed = list_versions(repository)
    assert [(row.version, row.served, row.problem) for row in listed] == [(1, True, None), (2, False, None), (3, False, None)]
    assert len({row.fingerprint for row in listed}) == 3
    for row in listed:
        path = repository / "tiny" / str(row.version) / "model.onnx"
        assert (row.fingerprint, row.size_bytes) == (read_teacher_info(path).fingerprint, path.stat().st_size)
        assert (row.model, row.num_classes, row.image_size, row.precision) == ("tiny", 5, 16, "fp32")


def test_activation_changes_who_is_served_and_keeps_how(repository: Path) -> None:
    before = config_of(repository)
    activate_version(repository, "tiny", 3)
    after = config_of(repository)
    assert list(after.version_policy.specific.versions) == [3]
    assert described(repository).version == 3
    require_whole(repository)
    for config in (before, after):
        config.ClearField("version_policy")
        del config.parameters[METADATA_KEY]
    assert after == before
    assert after.instance_group[0].count == 3
    activate_version(repository, "tiny", 1)
    assert active_version(repository, "tiny") == 1
    require_whole(repository)


def test_a_gpu_goes_on_being_used_but_every_teacher_has_its_own_engines(repository: Path) -> None:
    gpu = SETTINGS.replace(instance_kind="gpu", acceleration="tensorrt", tensorrt_cache="/engines", tensorrt_workspace_bytes=2**30)
    run_version_so(repository, "tiny", gpu)
    activate_version(repository, "tiny", 2)
    assert config_of(repository) == model_config(active_info(repository, "tiny"), gpu)
    (accelerator,) = config_of(repository).optimization.execution_accelerators.gpu_execution_accelerator
    assert active_info(repository, "tiny").fingerprint.startswith(accelerator.parameters["trt_engine_cache_prefix"])


def test_a_teacher_with_other_classes_gets_its_own_tensors(repository: Path, stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    model = load_model(stamped[0])
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "classes"
    onnx.save(model, tmp_path / "wide.onnx")
    names = tuple(f"class {number}" for number in range(7))
    stamp_teacher(tmp_path / "wide.onnx", name="tiny", class_names=names, preprocessing=stamped[1].preprocessing)
    info, _ = add_version(repository, tmp_path / "wide.onnx", SETTINGS)
    activate_version(repository, "tiny", info.version)
    assert [list(tensor.dims) for tensor in config_of(repository).output] == [[7], [7]]


def test_a_run_changes_how_the_served_version_runs_and_nothing_else(repository: Path) -> None:
    activate_version(repository, "tiny", 2)
    run_version_so(repository, "tiny", SETTINGS.replace(instance_count=1, preferred_batch_sizes=(16,)))
    config = config_of(repository)
    assert (config.instance_group[0].count, list(config.dynamic_batching.preferred_batch_size)) == (1, [16])
    assert active_info(repository, "tiny").version == active_version(repository, "tiny") == 2
    require_whole(repository)


def test_the_served_version_is_not_removed_and_a_number_never_comes_back(repository: Path, other: OtherTeacher) -> None:
    with pytest.raises(
        ConfigError, match=r"version 1 of tiny is the served one: activate another first \(`distill repository activate tiny 3`\)"
    ):
        remove_version(repository, "tiny", 1)
    remove_version(repository, "tiny", 3)
    assert served_versions(repository, "tiny") == [1, 2]
    assert add_version(repository, other(4), SETTINGS)[0].version == 4
    remove_version(repository, "tiny", 4)
    remove_version(repository, "tiny", 2)
    assert add_version(repository, other(5), SETTINGS)[0].version == 5
    remove_version(repository, "tiny", 5)
    with pytest.raises(ConfigError, match="add another version first"):
        remove_version(repository, "tiny", 1)


def test_names_and_versions_that_are_not_there(repository: Path, stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    for change in (activate_version, remove_version):
        with pytest.raises(StageMissing, match=r"has no model 'cat'; it has tiny"):
            change(repository, "cat", 1)
        with pytest.raises(StageMissing, match="tiny has no version 9; it has 1, 2, 3"):
            change(repository, "tiny", 9)
        with pytest.raises(StageMissing, match="it has none"):
            change(tmp_path / "nowhere", "tiny", 1)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StageMissing, match="there is no model repository at"):
        list_versions(tmp_path / "nowhere")
    for name in ("..", ".hidden", "a/b", "", "x" * 65):
        with pytest.raises(ConfigError, match="cannot name a model"):
            add_version(repository, stamped[0], SETTINGS, name=name or " ")
    with pytest.raises(ConfigError, match=r"tiny has teacher .* already, as version 1"):
        add_version(repository, stamped[0], SETTINGS)
    (repository / "tiny" / "config.pbtxt").write_text("no: config {")
    with pytest.raises(BadInput, match=r"config\.pbtxt is no Triton model configuration"):
        list_versions(repository)


def test_another_name_is_another_model(repository: Path, stamped: tuple[Path, TeacherInfo]) -> None:
    info, active = add_version(repository, stamped[0], SETTINGS, name="second")
    assert (info.name, info.version, active) == ("second", 1, True)
    assert [(row.model, row.version) for row in list_versions(repository)] == [("second", 1), ("tiny", 1), ("tiny", 2), ("tiny", 3)]


def test_the_parity_report_travels_with_its_graph(other: OtherTeacher, tmp_path: Path) -> None:
    source = other(1)
    fingerprint = read_teacher_info(source).fingerprint
    cases = [(fingerprint, [], True), ("f" * 64, [], False), (fingerprint, ["x"], False)]
    for number, (said, failures, taken) in enumerate(cases):
        report = json.dumps({"fingerprint": said, "failures": failures})
        source.with_name("parity.json").write_text(report)
        add_version(tmp_path / f"models-{number}", source.parent, SETTINGS)
        kept = tmp_path / f"models-{number}" / "tiny" / "1" / "parity.json"
        assert (kept.read_text() if kept.exists() else None) == (report if taken else None)


def test_a_teacher_without_a_label_is_not_served_at_once(stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    model = load_model(stamped[0])
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))
    path, info = tmp_path / "nan.onnx", stamped[1]
    onnx.save(model, path)
    stamp_teacher(path, name=info.name, class_names=info.class_names, preprocessing=info.preprocessing)
    with pytest.raises(BadInput, match=r"nan\.onnx gives no label: NaN"):
        add_version(tmp_path / "models", path, SETTINGS)
    assert served_versions(tmp_path / "models", "tiny") == []


def test_list_says_what_cannot_be_served(repository: Path) -> None:
    model = load_model(repository / "tiny" / "2" / "model.onnx")
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[::-1]
    onnx.save(model, repository / "tiny" / "2" / "model.onnx")
    (repository / "tiny" / "3" / "model.onnx").write_bytes(b"\x00")
    (repository / "tiny" / "1" / "model.onnx").write_bytes((repository / "tiny" / "1" / "model.onnx").read_bytes())
    problems = [row.problem for row in list_versions(repository)]
    assert problems == [None, "altered after its export", "no teacher of ours"]
    for version in (2, 3):
        with pytest.raises(BadInput):
            activate_version(repository, "tiny", version)
    assert active_version(repository, "tiny") == 1


class PowerCut(BaseException):
    """The process ends here. What `finally` still does afterwards does not count: the test looks at a copy made before."""


def steps_of(monkeypatch: pytest.MonkeyPatch, repository: Path, crash_at: int, snapshot: Path) -> list[str]:
    """Before the step number `crash_at` that changes the disk, keep a copy of the repository as a crash would leave it, and stop."""
    steps: list[str] = []

    def stop_before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if len(steps) == crash_at:
                if not snapshot.exists():
                    shutil.copytree(repository, snapshot)
                raise PowerCut
            steps.append(name)
            return real(*arguments, **options)

        return step

    monkeypatch.setattr(Path, "rename", stop_before("rename", Path.rename))
    monkeypatch.setattr(shutil, "rmtree", stop_before("rmtree", shutil.rmtree))
    for module in (triton_repository, repository_versions):
        monkeypatch.setattr(module, "write_atomically", stop_before("write", module.write_atomically))
    monkeypatch.setattr(triton_repository, "write_teacher_info", stop_before("model", triton_repository.write_teacher_info))
    return steps


@pytest.mark.parametrize("verb", ["add", "activate", "remove"])
def test_a_power_cut_at_any_step_leaves_what_was_or_what_is_to_be(
    verb: str, repository: Path, other: OtherTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = other(9)

    def change(where: Path) -> None:
        if verb == "add":
            add_version(where, new, SETTINGS)
        elif verb == "activate":
            activate_version(where, "tiny", 2)
        else:
            remove_version(where, "tiny", 3)

    after = {"add": ([1, 2, 3, 4], 1), "activate": ([1, 2, 3], 2), "remove": ([1, 2], 1)}[verb]
    states = []
    for crash_at in range(20):
        here, left = tmp_path / f"{crash_at}" / "models", tmp_path / f"{crash_at}" / "left"
        shutil.copytree(repository, here)
        with monkeypatch.context() as patched:
            steps_of(patched, here, crash_at, left)
            with contextlib.suppress(PowerCut):
                change(here)
        if not left.exists():
            break  # it has fewer steps
        require_whole(left)
        state = (served_versions(left, "tiny"), active_version(left, "tiny"))
        states.append(state)
        assert state in (([1, 2, 3], 1), after)
        if state != after:
            change(left)  # tried again after the crash
        assert (served_versions(left, "tiny"), active_version(left, "tiny")) == after
        require_whole(left)
        activate_version(left, "tiny", 1)
        assert list((left / "tiny").glob(".*")) == [], "the next change sweeps away what the crash left"
    assert len(states) >= 2, "there was a step to crash at"
    assert states[0] == ([1, 2, 3], 1)
