"""The fingerprint follows what decides the labels, and nothing else; an altered file is found."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from distill.errors import BadInput, ConfigError, FingerprintMismatch, StageMissing
from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from export.fingerprint import canonical_bytes, load_model, read_teacher_info, stamp_teacher, teacher_fingerprint, write_teacher_info


def test_a_stamped_teacher_reads_back(stamped: tuple[Path, TeacherInfo]) -> None:
    path, info = stamped
    assert read_teacher_info(path) == info
    assert info.num_classes == 5
    onnx.checker.check_model(path, full_check=True)


def test_name_version_and_stamp_do_not_change_the_fingerprint(
    stamped: tuple[Path, TeacherInfo], preprocessing: Preprocessing, class_names
) -> None:
    path, info = stamped
    again = stamp_teacher(path, name="other", version=7, default_temperature=3.0, class_names=class_names, preprocessing=preprocessing)
    assert again.fingerprint == info.fingerprint
    write_teacher_info(path, info, path.with_name("copy.onnx"))
    assert read_teacher_info(path.with_name("copy.onnx")) == info


def test_preprocessing_classes_and_weights_change_the_fingerprint(
    stamped: tuple[Path, TeacherInfo], preprocessing: Preprocessing, class_names
) -> None:
    path, info = stamped
    model = load_model(path)
    fingerprints = {
        info.fingerprint,
        teacher_fingerprint(canonical_bytes(model), preprocessing.replace(crop_ratio=0.875), class_names),
        teacher_fingerprint(canonical_bytes(model), preprocessing.replace(interpolation="bicubic"), class_names),
        teacher_fingerprint(canonical_bytes(model), preprocessing, class_names[::-1]),
    }
    _nudge_a_weight(model)
    fingerprints.add(teacher_fingerprint(canonical_bytes(model), preprocessing, class_names))
    assert len(fingerprints) == 5


def test_the_fingerprint_is_what_it_was_before_there_was_a_choice_of_filter() -> None:
    seen = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_ratio=0.875)
    expected = "42582a11de02a6de23717734fd6834a7093bfb139ce4c364239055ee02bf032f"
    assert teacher_fingerprint(b"a graph", seen, ("ant", "bee")) == expected


def test_altered_weights_under_the_old_fingerprint_are_refused(stamped: tuple[Path, TeacherInfo]) -> None:
    path, info = stamped
    model = onnx.load(path)
    _nudge_a_weight(model)
    onnx.save(model, path)
    with pytest.raises(FingerprintMismatch, match=info.fingerprint[:12]):
        read_teacher_info(path)


def test_an_altered_class_list_is_refused(stamped: tuple[Path, TeacherInfo]) -> None:
    path, info = stamped
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {METADATA_KEY: info.replace(class_names=info.class_names[::-1]).model_dump_json()})
    onnx.save(model, path)
    with pytest.raises(FingerprintMismatch, match="altered after the export"):
        read_teacher_info(path)


def test_files_that_are_no_teacher_are_refused(teacher_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"carries no distill\.teacher metadata"):
        read_teacher_info(teacher_model)
    with pytest.raises(StageMissing, match="does not exist"):
        read_teacher_info(tmp_path / "nothing.onnx")
    for content in (b"", b"not a model", teacher_model.read_bytes()[:5000]):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(BadInput, match=r"broken\.onnx"):
            read_teacher_info(tmp_path / "broken.onnx")


def test_a_class_list_of_another_length_is_refused(teacher_model: Path, tmp_path: Path, preprocessing: Preprocessing, class_names) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(teacher_model.read_bytes())
    with pytest.raises(ConfigError, match="5 logits a crop, but 4 class names"):
        stamp_teacher(path, name="tiny", class_names=class_names[:4], preprocessing=preprocessing)
    with pytest.raises(ConfigError, match=r"name.*bad name"):
        stamp_teacher(path, name="bad name", class_names=class_names, preprocessing=preprocessing)
    assert path.read_bytes() == teacher_model.read_bytes()


def _nudge_a_weight(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weights = numpy_helper.to_array(tensor).copy()
    weights.flat[0] = np.nextafter(weights.flat[0], np.float32(9))
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
