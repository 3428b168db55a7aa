"""What is written is what was asked, Triton's own parser reads it, and no moment shows half a model."""

from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from distill.errors import ConfigError, FingerprintMismatch
from distill.teacher_info import METADATA_KEY, TeacherInfo
from export import triton_repository
from export.fingerprint import load_model, read_teacher_info, stamp_teacher
from export.settings import RepositorySettings
from export.triton_repository import model_config, served_versions, write_repository

SETTINGS = RepositorySettings(
    max_batch_size=64,
    preferred_batch_sizes=(32, 128, 8),
    max_queue_delay_us=500,
    max_queue_size=99,
    queue_timeout_us=7_000_000,
    instance_count=3,
    intra_op_threads=2,
    warmup_batch_sizes=(1, 8),
)


def read_config(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(), ModelConfig())


def test_the_configuration_reads_back_as_asked(stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    path, info = stamped
    served = write_repository(tmp_path / "models", path, info, SETTINGS)
    config = read_config(served.config)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 64)
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [("images", [16, 16, 3]), ("temperature", [1])]
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [("logits", [5]), ("soft_labels", [5])]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (99, 7_000_000)
    assert policy.timeout_action == ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    assert [(group.kind, group.count) for group in config.instance_group] == [(ModelInstanceGroup.KIND_CPU, 3)]
    assert list(config.version_policy.specific.versions) == [1]
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert TeacherInfo.model_validate_json(config.parameters[METADATA_KEY].string_value) == info
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 8]
    for warmup in config.model_warmup:
        assert set(warmup.inputs) == {"images", "temperature"}
        assert (served.folder / "warmup" / warmup.inputs["temperature"].input_data_file).read_bytes() == b"\x00\x00\x80\x3f"


def test_gpu_and_defaults(stamped: tuple[Path, TeacherInfo]) -> None:
    config = model_config(stamped[1], RepositorySettings(instance_kind="gpu"))
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    assert "intra_op_thread_count" not in config.parameters
    assert not config.dynamic_batching.HasField("default_queue_policy")  # with one copy it makes Triton wait half a second now and then


def test_tensors_of_the_configuration_are_those_of_the_graph(stamped: tuple[Path, TeacherInfo]) -> None:
    path, info = stamped
    graph, config = onnx.load(path).graph, model_config(info, RepositorySettings())
    kinds = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    for value, tensor in zip([*graph.input, *graph.output], [*config.input, *config.output], strict=True):
        assert value.name == tensor.name
        assert [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] == list(tensor.dims)
        assert (
            type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[tensor.data_type].name
            == kinds[value.type.tensor_type.elem_type]
        )


def test_the_layout_is_whole_and_writing_again_changes_nothing(stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    path, info = stamped
    served = write_repository(tmp_path / "models", path, info, SETTINGS)
    files = {str(file.relative_to(tmp_path / "models")) for file in (tmp_path / "models").rglob("*") if file.is_file()}
    assert files == {"tiny/config.pbtxt", "tiny/1/model.onnx", "tiny/warmup/temperature_one"}
    before = served.model.stat().st_mtime_ns
    assert write_repository(tmp_path / "models", path, info, SETTINGS) == served
    assert served.model.stat().st_mtime_ns == before


def test_the_next_version_is_served_and_the_old_one_stays(stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    path, info = stamped
    repository = tmp_path / "models"
    write_repository(repository, path, info, SETTINGS)
    served = write_repository(repository, path, info.replace(version=12), SETTINGS)
    assert served_versions(repository, "tiny") == [1, 12]
    assert served_versions(repository, "nobody") == []
    assert list(read_config(served.config).version_policy.specific.versions) == [12]
    assert read_teacher_info(served.model).version == 12


def test_another_teacher_under_the_same_version_needs_a_word(stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    path, info = stamped
    write_repository(tmp_path / "models", path, info, SETTINGS)
    other = stamp_teacher(path, name="tiny", class_names=info.class_names[::-1], preprocessing=info.preprocessing)
    with pytest.raises(ConfigError, match="version 1 of tiny is there with teacher"):
        write_repository(tmp_path / "models", path, other, SETTINGS)
    served = write_repository(tmp_path / "models", path, other, SETTINGS, replace=True)
    assert read_teacher_info(served.model) == other
    assert sorted(entry.name for entry in served.folder.iterdir()) == ["1", "config.pbtxt", "warmup"]


def test_a_file_that_is_not_this_teacher_is_refused(stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> None:
    path, info = stamped
    with pytest.raises(FingerprintMismatch, match="give the file that belongs to it"):
        write_repository(tmp_path / "models", path, info.replace(fingerprint="0" * 64), SETTINGS)
    model = load_model(path)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[::-1]
    onnx.save(model, path)
    with pytest.raises(FingerprintMismatch, match="altered after the export"):
        write_repository(tmp_path / "models", path, info, SETTINGS)
    assert not (tmp_path / "models").exists()


def test_a_crash_while_the_next_version_is_written_leaves_the_old_one_served(
    stamped: tuple[Path, TeacherInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, info = stamped
    served = write_repository(tmp_path / "models", path, info, SETTINGS)
    before = served.config.read_bytes()

    def power_cut(model: Path, info: TeacherInfo, target: Path) -> None:
        target.parent.mkdir(parents=True)
        target.write_bytes(model.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(triton_repository, "write_teacher_info", power_cut)
    with pytest.raises(KeyboardInterrupt):
        write_repository(tmp_path / "models", path, info.replace(version=2), SETTINGS)
    assert served.config.read_bytes() == before
    assert served_versions(tmp_path / "models", "tiny") == [1]
