"""The images that ship with the project, and the script that made them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from distill.crops import decode_image
from distill.sources import open_source

FOLDER = Path(__file__).parents[3] / "data" / "fashion-mnist"
IDX_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts it

needs_idx = pytest.mark.skipif(not IDX_FOLDER.exists(), reason="the Debian package dataset-fashion-mnist is not installed")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_subset", FOLDER / "make_subset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("part", "num_shards", "num_per_class"), [("train", 12, 1200), ("test", 2, 200)])
def test_shipped_shards_are_balanced(part: str, num_shards: int, num_per_class: int) -> None:
    source = open_source(f"{FOLDER}/{part}-*.tar.gz")
    assert [shard.num_records for shard in source.shards] == [1000] * num_shards
    assert source.class_names is not None
    assert len(source.class_names) == 10
    ids: set[str] = set()
    total: Counter[int | None] = Counter()
    for index in range(num_shards):
        labels = source.read_labels(index)
        counts = Counter(label for _, label in labels)
        assert counts == dict.fromkeys(range(10), 100)
        total += counts
        ids.update(image_id for image_id, _ in labels)
    assert total == dict.fromkeys(range(10), num_per_class)
    assert len(ids) == source.num_images


def test_shipped_images_are_decoded() -> None:
    records = open_source(f"{FOLDER}/test-000000.tar.gz").read_shard(0)
    crops = np.stack([decode_image(record.data) for record in records])
    assert crops.shape == (1000, 28, 28, 3)
    assert (crops[..., 0] == crops[..., 2]).all()
    assert crops.mean() / 255 == pytest.approx(0.286, abs=0.01)  # the published mean of the data set
    assert crops.std() / 255 == pytest.approx(0.353, abs=0.01)


def test_digest_of_the_shipped_training_set() -> None:
    """Stored labels are named by it: it changes when the shards do, and never otherwise."""
    digest = open_source(f"{FOLDER}/train-*.tar.gz").digest()
    assert digest == "f602bd83ab6d34db862a4958a5a15e6a40382def15f496214d950904d4d0b14d"


def test_all_shards_are_below_8_mb_and_the_licence_is_beside() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.tar.gz")) < 8_000_000
    assert "Copyright (c) 2017 Zalando SE" in (FOLDER / "LICENSE").read_text()


@needs_idx
def test_the_script_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    first, second = (script().make_part(IDX_FOLDER, tmp_path / name, "test", 20) for name in ("first", "second"))
    assert [path.name for path in first] == ["test-000000.tar.gz"]
    assert first[0].read_bytes() == second[0].read_bytes()


@needs_idx
def test_shipped_pixels_are_those_of_the_original() -> None:
    module = script()
    images, labels = (module.read_idx(IDX_FOLDER / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    for record in open_source(f"{FOLDER}/test-000001.tar.gz").read_shard(0):
        position = int(record.image_id.rpartition("/")[2])
        assert record.label == labels[position]
        assert np.array_equal(decode_image(record.data)[:, :, 0], images[position])
