"""The steps of a change of versions, on a Triton that only remembers what it was told."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig

from distill.errors import ConfigError, DistillError
from distill.teacher_info import METADATA_KEY, Preprocessing, TeacherInfo
from teacher_server import activation
from teacher_server.activation import swap_version

CLASSES = ("ant", "bee", "cat")


def config_of(version: int, *, fingerprint: str = "", classes: tuple[str, ...] = CLASSES, count: int = 1) -> ModelConfig:
    info = TeacherInfo(
        name="m",
        version=version,
        fingerprint=fingerprint or f"{version:064x}",
        class_names=classes,
        preprocessing=Preprocessing(image_size=8),
    )
    config = ModelConfig(name="m")
    config.output.add(name="logits", data_type="TYPE_FP32", dims=[len(classes)])
    config.version_policy.specific.versions.append(version)
    config.instance_group.add(count=count)
    config.parameters[METADATA_KEY].string_value = info.model_dump_json()
    return config


class FakeTriton:
    """Serves what it was told to load: the disk, or a configuration given instead."""

    url = "h:1"

    def __init__(self, disk: ModelConfig, *, running: bool = True) -> None:
        self.disk = disk
        self.running = disk if running else None
        self.steps: list[Any] = []

    def config(self, model: str) -> ModelConfig | None:
        return self.running

    def load(self, model: str, config: ModelConfig | None = None) -> None:
        self.running = config or self.disk
        self.steps.append(list(self.running.version_policy.specific.versions))

    def unload(self, model: str) -> None:
        self.running = None
        self.steps.append("unload")

    def put(self, config: ModelConfig) -> None:
        self.disk = config
        self.steps.append("disk")


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Versions that were asked for a label; `fail` as the first entry makes the next question fail."""
    asked: list[Any] = []

    async def require_label(url: str, info: TeacherInfo) -> None:
        if asked[:1] == ["fail"]:
            raise DistillError("no label")
        asked.append(info.version)

    monkeypatch.setattr(activation, "_require_label", require_label)
    return asked


def swap(triton: FakeTriton, config: ModelConfig) -> str:
    return swap_version(triton, config, lambda: triton.put(config))  # type: ignore[arg-type]


def test_the_new_version_gives_a_label_beside_the_old_one_before_anything_is_final(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1, count=3))
    assert swap(triton, config_of(2)) == "swapped"
    assert triton.steps == [[1, 2], "disk", [2]]
    assert canary == [2, 2]


def test_while_both_are_loaded_clients_are_still_told_of_the_old_one(canary: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    triton = FakeTriton(config_of(1, count=3))
    seen: list[ModelConfig] = []
    real = triton.load

    def load(model: str, config: ModelConfig | None = None) -> None:
        real(model, config)
        assert triton.running is not None
        seen.append(triton.running)

    monkeypatch.setattr(triton, "load", load)
    swap(triton, config_of(2))
    assert activation.described(seen[0], "").version == 1
    assert seen[0].instance_group[0].count == 3
    assert list(triton.disk.version_policy.specific.versions) == [2]


def test_a_version_without_a_label_leaves_disk_and_server_as_they_were(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1))
    canary.append("fail")
    with pytest.raises(DistillError, match="no label"):
        swap(triton, config_of(2))
    assert triton.steps == [[1, 2], [1]]
    assert activation.described(triton.disk, "").version == 1


def test_a_version_with_other_tensors_and_no_label_gives_the_place_back(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1))
    canary.append("fail")
    with pytest.raises(DistillError, match="no label"):
        swap(triton, config_of(2, classes=("ant", "bee")))
    assert triton.steps == [[2], [1]]
    assert activation.described(triton.disk, "").version == 1


def test_where_nothing_was_served_a_version_without_a_label_is_not_either(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1), running=False)
    canary.append("fail")
    with pytest.raises(DistillError, match="no label"):
        swap(triton, config_of(2))
    assert triton.steps == [[2], "unload"]
    assert triton.running is None
    assert activation.described(triton.disk, "").version == 1


def test_a_disk_that_takes_nothing_gives_the_place_back(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1))

    def full() -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        swap_version(triton, config_of(2), full)  # type: ignore[arg-type]
    assert triton.steps == [[1, 2], [1]]


def test_the_same_number_with_another_teacher_is_refused(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1))
    with pytest.raises(ConfigError, match="version 1 of m is being served as teacher 000000000000, its file is ffffffffffff"):
        swap(triton, config_of(1, fingerprint="f" * 64))
    assert triton.steps == []


def test_the_served_version_is_not_loaded_again_unless_another_was_left_beside_it(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1))
    assert swap(triton, config_of(1)) == "served"
    assert triton.steps == ["disk"]
    both = config_of(1)
    both.version_policy.specific.versions.append(2)
    triton.running = both
    assert swap(triton, config_of(1)) == "served"
    assert triton.steps == ["disk", "disk", [1]]


def test_what_cannot_lie_side_by_side_changes_in_one_step(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1))
    assert swap(triton, config_of(2, classes=("ant", "bee"))) == "swapped"
    assert triton.steps == [[2], "disk", [2]]
    assert canary == [2, 2]


def test_a_model_that_is_not_loaded_yet_is_loaded(canary: list[Any]) -> None:
    triton = FakeTriton(config_of(1), running=False)
    assert swap(triton, config_of(2)) == "loaded"
    assert triton.steps == [[2], "disk", [2]]
