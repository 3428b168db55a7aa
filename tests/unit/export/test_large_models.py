"""A teacher whose weights need a second file: exported, published, replaced and served like any other. The limit is played small."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from distill.errors import BadInput, ConfigError, FingerprintMismatch, ParityError, StageMissing
from export import large_models, teacher
from export.fingerprint import read_teacher_info
from export.graph import save_model
from export.imports import adopt_teacher, import_onnx
from export.large_models import model_bytes
from export.settings import TeacherExportSettings
from export.teacher import export_teacher, publish_teacher
from teacher_server.embedded import EmbeddedTeacher

SETTINGS = TeacherExportSettings(name="tiny", num_parity_images=32)


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_models, "MAX_FILE_BYTES", 8000)


def weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.weights"))


def logits_of(repository: Path, crops: Any) -> Any:
    async def ask() -> Any:
        served = EmbeddedTeacher.from_repository(repository, "tiny")
        try:
            return await served.logits(crops)
        finally:
            await served.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("change", [{}, {"precision": "fp16"}, {"top_outputs": 3}, {"input_size": 24}], ids=str)
def test_it_is_exported_and_served_like_any_other(
    network: Any, preprocessing: Any, class_names: Any, crops: Any, image_ids: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings, size = SETTINGS.replace(**change), change.get("input_size", 16)
    given = crops.repeat(2, axis=1).repeat(2, axis=2)[:, :size, :size] if size != 16 else crops
    folder = tmp_path / "teacher"
    info = export_teacher(network, preprocessing, class_names, given, image_ids, folder, settings)
    assert len(weights_in(folder)) == 1, "what the steps on the way wrote is gone"
    assert (folder / "model.onnx").stat().st_size < (folder / weights_in(folder)[0]).stat().st_size
    assert read_teacher_info(folder / "model.onnx") == info
    repository = tmp_path / "models"
    served = publish_teacher(folder, repository, settings)
    assert len(weights_in(served.model.parent)) == 1
    np.testing.assert_allclose(
        logits_of(repository, given[:4]), _run(folder / "model.onnx", given[:4]), rtol=0, atol=1e-5, err_msg="the repository's copy"
    )


def _run(path: Path, crops: Any) -> Any:
    import onnxruntime as ort

    feed = {"images": crops, "temperature": np.ones((len(crops), 1), np.float32)}
    return ort.InferenceSession(path).run(["logits"], feed)[0]


def test_another_teacher_in_its_place_takes_its_weights_along(
    network: Any, preprocessing: Any, class_names: Any, crops: Any, image_ids: Any, tmp_path: Path
) -> None:
    folder, repository = tmp_path / "teacher", tmp_path / "models"
    first = export_teacher(network, preprocessing, class_names, crops, image_ids, folder, SETTINGS)
    served = publish_teacher(folder, repository, SETTINGS)
    before, said = weights_in(served.model.parent), logits_of(repository, crops[:4])
    network.body[0].weight.data *= 1.5
    second = export_teacher(network, preprocessing, class_names, crops, image_ids, folder, SETTINGS)
    assert second.fingerprint != first.fingerprint
    publish_teacher(folder, repository, SETTINGS, replace=True)
    assert len(weights_in(folder)) == len(weights_in(served.model.parent)) == 1
    assert weights_in(served.model.parent) != before
    assert not np.allclose(logits_of(repository, crops[:4]), said)


def test_an_older_teacher_keeps_its_weights_until_another_has_passed(
    network: Any, preprocessing: Any, class_names: Any, crops: Any, image_ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that refuses, a crash between weights and model, and a smaller teacher at last."""
    info = export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path, SETTINGS)
    kept = weights_in(tmp_path)
    network.body[0].weight.data *= 1.5
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "torch_reference", lambda network: lambda crops_BHWC: np.zeros((len(crops_BHWC), 5)))
        with pytest.raises(ParityError):
            export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path, SETTINGS)
    assert (weights_in(tmp_path), read_teacher_info(tmp_path / "model.onnx")) == (kept, info)
    with monkeypatch.context() as patched:
        patched.setattr("export.graph.write_atomically", _killed)
        with pytest.raises(KeyboardInterrupt):
            save_model(onnx.load(tmp_path / "model.onnx"), tmp_path / "unchecked.onnx")
        (tmp_path / "0123456789abcdef.weights").write_bytes(b"of a process that died")
        (tmp_path / "somebody's.weights").write_bytes(b"not ours")
    large_models.sweep_weights(tmp_path)
    assert (weights_in(tmp_path), read_teacher_info(tmp_path / "model.onnx")) == (sorted([*kept, "somebody's.weights"]), info)
    assert model_bytes(tmp_path / "model.onnx") == sum((tmp_path / name).stat().st_size for name in ("model.onnx", *kept))
    monkeypatch.setattr(large_models, "MAX_FILE_BYTES", 2**30)
    export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path, SETTINGS)
    assert weights_in(tmp_path) == ["somebody's.weights"]


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_altered_or_missing_weights_are_found(
    network: Any, preprocessing: Any, class_names: Any, crops: Any, image_ids: Any, tmp_path: Path
) -> None:
    export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path, SETTINGS)
    weights = tmp_path / weights_in(tmp_path)[0]
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FingerprintMismatch, match="was altered after the export"):
        read_teacher_info(tmp_path / "model.onnx")
    weights.unlink()
    with pytest.raises((BadInput, StageMissing), match=r"\.weights"):
        read_teacher_info(tmp_path / "model.onnx")


def test_a_finished_one_is_taken_over(
    network: Any, preprocessing: Any, class_names: Any, crops: Any, image_ids: Any, tmp_path: Path
) -> None:
    info = export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path / "a", SETTINGS)
    taken = adopt_teacher(tmp_path / "a", tmp_path / "b", class_names, 16, SETTINGS.replace(name="other"))
    assert (taken.fingerprint, taken.name) == (info.fingerprint, "other")
    np.testing.assert_array_equal(_run(tmp_path / "b" / "model.onnx", crops[:4]), _run(tmp_path / "a" / "model.onnx", crops[:4]))


def test_int8_and_foreign_graphs_are_refused_with_a_way_out(
    network: Any, preprocessing: Any, class_names: Any, crops: Any, image_ids: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"int8 is for graphs of up to 2 GB in fp32.*set fp16 or fp32"):
        export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path / "a", SETTINGS.replace(precision="int8"))
    assert list((tmp_path / "a").iterdir()) == []
    export_teacher(network, preprocessing, class_names, crops, image_ids, tmp_path / "b", SETTINGS)
    model = onnx.load(tmp_path / "b" / "model.onnx")
    del model.metadata_props[:]
    save_model(model, tmp_path / "foreign.onnx")
    with pytest.raises(ConfigError, match="more than 2 GB of weights, which cannot be wrapped"):
        import_onnx(tmp_path / "foreign.onnx", tmp_path / "c", preprocessing, class_names, crops, image_ids, SETTINGS)
