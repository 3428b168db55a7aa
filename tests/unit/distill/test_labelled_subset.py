"""Which labelled images a run may look at: a share of every class, or those that a file lists."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.config import validate
from distill.data_settings import DataSettings
from distill.errors import ConfigError, SourceError
from distill.image_sets import open_labelled_subset
from distill.sources import listed_subset

CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 cats and 10 dogs."""
    folder = tmp_path_factory.mktemp("images")
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(file, "PNG")
    for name, count in zip(CLASSES, (30, 10), strict=True):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number:02d}.png").write_bytes(file.getvalue())
    return folder


def data_of(images: Path, **changes: Any) -> DataSettings:
    sets = {name: {"path": str(images), "records_per_shard": 7} for name in ("unlabelled", "labelled", "test")}
    return validate(DataSettings, {**sets, **changes}, "run.yaml")


def ids_in(data: DataSettings, seed: int = 0) -> list[str]:
    source = open_labelled_subset(data, seed)
    records = [record for shard in range(len(source.shards)) for record in source.read_shard(shard)]
    assert source.num_images == len(records)
    assert all(CLASSES[record.label] == record.image_id.partition("/")[0] for record in records if record.label is not None)
    return sorted(record.image_id for record in records)


class TestFraction:
    def test_classes_keep_their_proportions(self, images: Path) -> None:
        chosen = ids_in(data_of(images, label_fraction=0.1))
        assert Counter(image_id.partition("/")[0] for image_id in chosen) == {"cat": 3, "dog": 1}
        assert chosen != ids_in(data_of(images, label_fraction=0.1), seed=1)
        assert len(ids_in(data_of(images))) == 40

    def test_an_empty_class_is_named(self, images: Path) -> None:
        with pytest.raises(SourceError, match=r"fraction 0\.02 of the 10 images of class 1 \(dog\) is none; give at least 0\.05"):
            open_labelled_subset(data_of(images, label_fraction=0.02), 0)


class TestList:
    def test_exactly_the_listed_ones(self, images: Path, tmp_path: Path) -> None:
        """Comments, empty lines, spaces around, another line ending and a name said twice change nothing; nor does the seed."""
        path = tmp_path / "labelled.txt"
        path.write_bytes(b"# twenty of us looked at these\n\ncat/07.png\r\n  dog/03.png \ncat/29.png\ncat/07.png\n")
        data = data_of(images, labelled_ids=str(path))
        assert ids_in(data) == ids_in(data, seed=5) == ["cat/07.png", "cat/29.png", "dog/03.png"]

    def test_a_file_name_alone_where_it_says_enough(self, images: Path, tmp_path: Path) -> None:
        """As in the authors' lists for ImageNet. Both classes have an 07.png: that name says nothing."""
        (images / "dog" / "n02_9.png").write_bytes((images / "dog" / "03.png").read_bytes())
        path = tmp_path / "l.txt"
        path.write_text("n02_9.png\ncat/07.png\n")
        assert ids_in(data_of(images, labelled_ids=str(path))) == ["cat/07.png", "dog/n02_9.png"]
        path.write_text("n02_9.png\n07.png\n")
        with pytest.raises(SourceError, match=r"'07\.png' in the list of labelled images stands for 2 images; say its folder as well"):
            ids_in(data_of(images, labelled_ids=str(path)))

    def test_the_digest_names_the_choice(self, images: Path, tmp_path: Path) -> None:
        digests = set()
        for number, text in enumerate(["cat/00.png\ndog/00.png", "dog/00.png\ncat/00.png", "cat/00.png\ndog/01.png"]):
            (tmp_path / f"{number}.txt").write_text(text)
            digests.add(open_labelled_subset(data_of(images, labelled_ids=str(tmp_path / f"{number}.txt")), 0).digest())
        assert len(digests) == 2

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                "cat/07.png\ncow/1.png\ndog/00.png",
                r"1 of the 3 ids listed in .*l\.txt are not among the labelled images: 'cow/1\.png'; ids look",
            ),
            ("a\nb\nc\nd", r"4 of the 4 ids listed in .* images: 'a', 'b', 'c', \.\.\.; ids look like 'cat/00\.png'"),
            ("cat/07.png", r"lists no image of class 1 \(dog\); list at least one of every class"),
            ("# nothing\n", r"lists no image of class 0 \(cat\), class 1 \(dog\); list at least"),
        ],
    )
    def test_refused(self, images: Path, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(SourceError, match=said):
            open_labelled_subset(data_of(images, labelled_ids=str(tmp_path / "l.txt")), 0)

    def test_no_such_list(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"nowhere\.txt cannot be read: No such file"):
            open_labelled_subset(data_of(images, labelled_ids=str(tmp_path / "nowhere.txt")), 0)

    def test_without_class_names(self, tmp_path: Path) -> None:
        (tmp_path / "l.txt").write_text("a")
        with pytest.raises(SourceError, match=r"lists no image of class 4, class 6, class 8, \.\.\.; list"):
            listed_subset({"a": 1, "b": 4, "c": 6, "d": 8, "e": 9}, tmp_path / "l.txt")

    def test_a_list_or_a_fraction(self, images: Path) -> None:
        with pytest.raises(ConfigError, match=r"labelled_ids and label_fraction 0\.1 both choose labels; give one of them"):
            data_of(images, labelled_ids="l.txt", label_fraction=0.1)

    def test_the_list_by_an_absolute_path(self, images: Path) -> None:
        assert data_of(images, labelled_ids="l.txt").absolute().labelled_ids == str(Path("l.txt").absolute())
        assert data_of(images).absolute().labelled_ids is None
