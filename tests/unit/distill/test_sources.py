"""Folder, tar shards and Parquet give the same records; what cannot be used is refused in one line that names it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distill.config import digest_of
from distill.errors import SourceError
from distill.sources import ImageRecord, ShardInfo, Source, labelled_subset, open_source, scan_labels
from distill.sources.records import digest_of_shards

ROOT = Path(__file__).parents[3]
CLASSES = ("cat", "dog")


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


IMAGES = [(f"{number:03d}", png(number), number % 2) for number in range(10)]
"""(key, encoded image, label)"""


def write_folder(root: Path) -> str:
    for key, data, label in IMAGES:
        path = root / CLASSES[label] / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def tar_of(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def members_of(images: list[tuple[str, bytes, int]]) -> list[tuple[str, bytes]]:
    return [member for key, data, label in images for member in ((f"{key}.png", data), (f"{key}.cls", str(label).encode()))]


def write_shards(root: Path, ending: str = ".tar") -> str:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        data = tar_of(members_of(IMAGES[number * 5 : number * 5 + 5]))
        (root / f"train-{number:06d}{ending}").write_bytes(data if ending == ".tar" else gzip.compress(data))
    (root / "class_names.txt").write_text("cat\ndog\n")
    return f"{root}/train-*{ending}"


def write_parquet(path: Path, **changes: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [data for _, data, _ in IMAGES],
        "label": [label for _, _, label in IMAGES],
        "key": [key for key, _, _ in IMAGES],
        **changes,
    }
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path, row_group_size=4)
    return str(path)


def all_records(source: Source) -> list[ImageRecord]:
    return [record for index in range(len(source.shards)) for record in source.read_shard(index)]


def contents(source: Source) -> set[tuple[str, bytes, int | None]]:
    """Keys without what each kind puts around them."""
    return {(record.image_id.rpartition("/")[2].removesuffix(".png"), record.data, record.label) for record in all_records(source)}


class TestSameRecords:
    @pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tgz", "parquet", "parquet struct", "parquet names"])
    def test_every_kind(self, tmp_path: Path, kind: str) -> None:
        if kind == "folder":
            source = open_source(write_folder(tmp_path / "images"), records_per_shard=4)
        elif kind.startswith("parquet"):
            changes: dict[str, Any] = {}
            if kind == "parquet struct":
                changes["image"] = [{"bytes": data, "path": f"{key}.png"} for key, data, _ in IMAGES]
            if kind == "parquet names":
                changes["label"] = pa.array([CLASSES[label] for _, _, label in IMAGES]).dictionary_encode()
            source = open_source(write_parquet(tmp_path / "set.parquet", **changes), id_column="key")
        else:
            source = open_source(write_shards(tmp_path, f".{kind}"))
        assert contents(source) == set(IMAGES)
        assert source.num_images == 10 == sum(shard.num_records for shard in source.shards)
        for index, shard in enumerate(source.shards):
            records = source.read_shard(index)
            assert len(records) == shard.num_records
            assert source.read_labels(index) == [(record.image_id, record.label) for record in records]
        ids = [record.image_id for record in all_records(source)]
        assert len(set(ids)) == 10
        assert all_records(pickle.loads(pickle.dumps(source))) == all_records(source)
        if kind not in ("parquet", "parquet struct"):
            assert source.class_names == CLASSES

    def test_url_in_memory(self, tmp_path: Path) -> None:
        """Another file system than the local one; the same code reads object stores."""
        write_folder(tmp_path / "images")
        write_shards(tmp_path / "tars", ".tar.gz")
        write_parquet(tmp_path / "tables" / "a.parquet")
        memory = fsspec.filesystem("memory")
        root = f"/{tmp_path.name}"
        memory.put(str(tmp_path), root, recursive=True)
        for local, remote in [("images", "images"), ("tars/train-*.tar.gz", "tars/train-{000000..000001}.tar.gz"), ("tables", "tables")]:
            here, there = open_source(f"{tmp_path}/{local}"), open_source(f"memory:/{root}/{remote}")
            assert all_records(there) == all_records(here)
            assert there.digest() == here.digest()
            assert there.class_names == here.class_names
        memory.rm(root, recursive=True)


class TestFolder:
    def test_order_ids_and_shards(self, tmp_path: Path) -> None:
        source = open_source(write_folder(tmp_path), records_per_shard=4)
        ids = [record.image_id for record in all_records(source)]
        assert ids == sorted(f"{CLASSES[label]}/{key}.png" for key, _, label in IMAGES)
        assert source.shards == (ShardInfo("part-000000", 4), ShardInfo("part-000001", 4), ShardInfo("part-000002", 2))

    def test_flat_folder_has_no_labels(self, tmp_path: Path) -> None:
        write_folder(tmp_path)
        (tmp_path / "top.JPEG").write_bytes(b"x")
        source = open_source(str(tmp_path))
        assert source.class_names is None
        assert {record.label for record in all_records(source)} == {None}
        assert source.num_images == 11

    def test_other_and_hidden_files_are_left_out(self, tmp_path: Path) -> None:
        write_folder(tmp_path)
        for name in (".hidden.png", "notes.txt", ".cache/x.png", "cat/noextension", "dog/.x.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        assert open_source(str(tmp_path)).num_images == 10

    def test_given_class_names_keep_the_labels_of_a_smaller_test_set(self, tmp_path: Path) -> None:
        write_folder(tmp_path)
        assert set(scan_labels(open_source(str(tmp_path), class_names=["ant", "cat", "dog"])).values()) == {1, 2}
        with pytest.raises(SourceError, match=r"/dog: label 'dog' is not one of the 1 class names"):
            open_source(str(tmp_path), class_names=["cat"])

    def test_links_to_folders_are_followed_and_loops_end(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "all")
        subset = tmp_path / "subset"
        subset.mkdir()
        for name in CLASSES:
            (subset / name).symlink_to(tmp_path / "all" / name)
        (tmp_path / "all" / "cat" / "loop").symlink_to(subset)
        (subset / "broken.png").symlink_to(tmp_path / "nowhere")
        assert contents(open_source(str(subset))) == set(IMAGES)

    def test_names_with_magic_characters(self, tmp_path: Path) -> None:
        folder = tmp_path / "set[1]*"
        folder.mkdir()
        (folder / "a?[x].png").write_bytes(png(3))
        assert all_records(open_source(str(folder))) == [ImageRecord("a?[x].png", png(3), None)]

    def test_a_file_that_goes_away_is_named(self, tmp_path: Path) -> None:
        source = open_source(write_folder(tmp_path))
        (tmp_path / "cat" / "004.png").unlink()
        with pytest.raises(SourceError, match=r"cat/004\.png cannot be read: No such file or directory"):
            source.read_shard(0)


class TestTarShards:
    def test_ids_are_shard_and_key(self, tmp_path: Path) -> None:
        source = open_source(write_shards(tmp_path))
        assert [record.image_id for record in source.read_shard(1)] == [f"train-000001.tar/{number:03d}" for number in range(5, 10)]
        assert source.shards == (ShardInfo("train-000000.tar", 5), ShardInfo("train-000001.tar", 5))

    def test_same_file_name_in_two_folders(self, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            write_shards(tmp_path / folder)
        names = [shard.name for shard in open_source(f"{tmp_path}/*/train-000000.tar").shards]
        assert names == ["a/train-000000.tar", "b/train-000000.tar"]

    @pytest.mark.parametrize(
        ("members", "label"),
        [
            ([("a.cls", b"1\n")], 1),
            ([("a.cls", b"dog")], 1),
            ([("a.json", b'{"label": 1}')], 1),
            ([("a.json", b'{"cls": "dog", "width": 3}')], 1),
            ([("a.json", b'{"width": 3}')], None),
            ([("a.txt", b"1")], None),
            ([], None),
        ],
    )
    def test_labels(self, tmp_path: Path, members: list[tuple[str, bytes]], label: int | None) -> None:
        (tmp_path / "x.tar").write_bytes(tar_of([("a.png", png(1)), *members]))
        assert [record.label for record in all_records(open_source(f"{tmp_path}/x.tar", class_names=CLASSES))] == [label]

    @pytest.mark.parametrize(
        ("member", "complaint"),
        [
            (("a.cls", b"2"), r"x\.tar: a: label 2 is not one of the 2 classes"),
            (("a.cls", b"-1"), "label -1 is not one of the 2 classes"),
            (("a.cls", b"cow"), "label 'cow' is not one of the 2 class names"),
            (("a.json", b"{"), r"x\.tar: a\.json is not JSON"),
            (("a.json", b'{"label": 1.5}'), r"label 1\.5 is neither a whole number nor a name"),
        ],
    )
    def test_labels_that_are_none(self, tmp_path: Path, member: tuple[str, bytes], complaint: str) -> None:
        (tmp_path / "x.tar").write_bytes(tar_of([("a.png", png(1)), member]))
        source = open_source(f"{tmp_path}/x.tar", class_names=CLASSES)
        with pytest.raises(SourceError, match=complaint):
            source.read_shard(0)

    def test_samples_without_image_and_meta_members_do_not_count(self, tmp_path: Path) -> None:
        members = [("__meta__/x.png", png(0)), ("a.txt", b"x"), ("dir/b.JPG", png(1)), ("dir/b.webp", png(2)), ("c.seg.png", png(3))]
        (tmp_path / "x.tar").write_bytes(tar_of(members))
        assert all_records(open_source(f"{tmp_path}/x.tar")) == [ImageRecord("x.tar/dir/b", png(1), None)]

    @pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
    @pytest.mark.parametrize("kept", [0.0, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    def test_truncated_shard_is_named(self, tmp_path: Path, ending: str, kept: float) -> None:
        """Cut anywhere, between two members too, which tar readers take for the end."""
        write_shards(tmp_path, ending)
        path = tmp_path / f"train-000001{ending}"
        end_of_members = 10 * 1024 if ending == ".tar" else path.stat().st_size
        path.write_bytes(path.read_bytes()[: int(end_of_members * kept)])
        with pytest.raises(SourceError, match=r"train-000001.*(truncated|cannot be read)"):
            open_source(f"{tmp_path}/train-*{ending}")

    def test_every_cut_at_a_block_is_seen(self, tmp_path: Path) -> None:
        whole = tar_of(members_of(IMAGES[:3]))
        end_mark = 3 * 4 * 512
        for kept in range(0, end_mark + 1024, 512):
            (tmp_path / "x.tar").write_bytes(whole[:kept])
            with pytest.raises(SourceError, match=r"x\.tar.*truncated"):
                open_source(f"{tmp_path}/x.tar")

    def test_damage_in_the_middle_is_not_the_end(self, tmp_path: Path) -> None:
        data = bytearray(tar_of(members_of(IMAGES)))
        data[4 * 512 * 3 : 4 * 512 * 3 + 512] = b"\xff" * 512
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(SourceError, match=r"x\.tar is truncated or damaged \(data behind the end mark\)"):
            open_source(f"{tmp_path}/x.tar")

    def test_wrong_checksum_of_a_compressed_shard(self, tmp_path: Path) -> None:
        data = bytearray(gzip.compress(tar_of(members_of(IMAGES))))
        data[-6] ^= 1
        (tmp_path / "x.tar.gz").write_bytes(data)
        with pytest.raises(SourceError, match=r"x\.tar\.gz cannot be read: CRC"):
            open_source(f"{tmp_path}/x.tar.gz")

    def test_shard_that_changed_since_it_was_opened(self, tmp_path: Path) -> None:
        source = open_source(write_shards(tmp_path))
        (tmp_path / "train-000000.tar").write_bytes(tar_of(members_of(IMAGES[:4])))
        with pytest.raises(SourceError, match=r"train-000000\.tar has 4 images and had 5 when it was opened"):
            source.read_shard(0)

    @pytest.mark.parametrize("between", [[], [("b.png", png(2))]])
    def test_key_that_is_there_twice(self, tmp_path: Path, between: list[tuple[str, bytes]]) -> None:
        (tmp_path / "x.tar").write_bytes(tar_of([("a.png", png(1)), *between, ("a.png", png(3))]))
        with pytest.raises(SourceError, match=r"x\.tar (holds key 'a' twice|cannot be grouped)"):
            open_source(f"{tmp_path}/x.tar")

    def test_opening_keeps_no_image_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "x.tar").write_bytes(tar_of([(f"{number}.png", b"x" * 10**6) for number in range(20)]))
        open_source(f"{tmp_path}/x.tar")  # imports, once
        tracemalloc.start()
        open_source(f"{tmp_path}/x.tar")
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 3 * 10**6


class TestParquet:
    def test_ids_without_an_id_column(self, tmp_path: Path) -> None:
        source = open_source(write_parquet(tmp_path / "set.parquet"))
        assert [record.image_id for record in all_records(source)] == [f"set.parquet/{row:08d}" for row in range(10)]
        assert [shard.num_records for shard in source.shards] == [4, 4, 2]

    def test_folder_of_tables(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            write_parquet(tmp_path / f"{name}.parquet")
        source = open_source(str(tmp_path))
        assert source.num_images == 20
        assert source.shards[0].name == "a.parquet/000000"

    def test_class_names_of_hugging_face(self, tmp_path: Path) -> None:
        table = pa.table({"image": [data for _, data, _ in IMAGES], "label": [label for _, _, label in IMAGES]})
        features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "x.parquet")
        assert open_source(f"{tmp_path}/x.parquet").class_names == CLASSES

    def test_missing_labels_and_images(self, tmp_path: Path) -> None:
        labels: list[int | None] = [-1, None, *[1] * 8]
        images = [None, *[data for _, data, _ in IMAGES[1:]]]
        records = all_records(open_source(write_parquet(tmp_path / "x.parquet", label=labels, image=images)))
        assert [record.label for record in records] == [None, None, *[1] * 8]
        assert records[0].data == b""

    @pytest.mark.parametrize(
        ("changes", "options", "complaint"),
        [
            ({}, {"image_column": "photo"}, r"no column 'photo'; it has image \(binary\), label \(int64\), key \(string\)"),
            ({}, {"label_column": "class"}, r"no column 'class'; it has image \(binary\)"),
            ({}, {"id_column": "id"}, r"no column 'id'; it has image \(binary\)"),
            ({}, {"image_column": "label"}, "column 'label' holds int64; images must be binary"),
            ({"image": None}, {}, "no column that can hold images; name one with image_column: it has label"),
            ({"image": None, "a": [b""] * 10, "b": [b""] * 10}, {}, "several columns that can hold images; name one with image_column"),
            ({"label": [0.5] * 10}, {}, "label column 'label' holds double; it must hold whole numbers or names"),
            ({"key": ["a"] * 10}, {"id_column": "key"}, "id 'a' is there twice in column 'key'"),
        ],
    )
    def test_columns_that_do_not_fit(self, tmp_path: Path, changes: dict[str, Any], options: dict[str, str], complaint: str) -> None:
        with pytest.raises(SourceError, match=complaint) as caught:
            open_source(write_parquet(tmp_path / "x.parquet", **changes), **options)  # type: ignore[arg-type]
        assert "x.parquet" in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"label": [5] * 10}, r"x\.parquet: column 'label': label 5 is not one of the 2 classes"),
            ({"image": [{"bytes": None, "path": "a.png"}] * 10}, "keeps paths, not images; write the table again"),
        ],
    )
    def test_values_that_cannot_be_used(self, tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
        if "image" in changes:
            changes["image"] = pa.array(changes["image"], type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        source = open_source(write_parquet(tmp_path / "x.parquet", **changes), class_names=CLASSES)
        with pytest.raises(SourceError, match=complaint):
            source.read_shard(0)

    def test_damaged_table(self, tmp_path: Path) -> None:
        path = Path(write_parquet(tmp_path / "x.parquet"))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(SourceError, match=r"x\.parquet cannot be read as Parquet"):
            open_source(str(path))


class TestOpening:
    def test_what_cannot_be_opened(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.txt").write_text("x")
        write_shards(tmp_path / "tars")
        (tmp_path / "blank.tar").write_bytes(tar_of([("readme.txt", b"x")]))
        for path, complaint in [
            (f"{tmp_path}/nowhere", f"{tmp_path}/nowhere does not exist; check the path"),
            (f"{tmp_path}/tars/train-{{000000..000002}}.tar", f"{tmp_path}/tars/train-000002.tar does not exist; check the path"),
            (f"{tmp_path}/test-*.tar", f"no file matches {tmp_path}/test-*.tar; check the pattern"),
            (f"{tmp_path}/empty", f"{tmp_path}/empty holds no images; give a folder of images"),
            (f"{tmp_path}/notes.txt", f"{tmp_path}/notes.txt is not a folder of images"),
            (f"{tmp_path}/tars", f"{tmp_path}/tars is a folder of tar shards; name those to use, such as {tmp_path}/tars/train-*"),
            (f"{tmp_path}/blank.tar", f"{tmp_path}/blank.tar holds no images; members must be called KEY.jpg"),
            ("bogus://x", "bogus://x: Protocol not known: bogus"),
        ]:
            with pytest.raises(SourceError) as caught:
                open_source(path)
            assert str(caught.value).startswith(complaint)
            assert "\n" not in str(caught.value)

    def test_shard_size_out_of_range(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="records_per_shard 0 is below 1"):
            open_source(write_folder(tmp_path), records_per_shard=0)

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_digest_of_shards_is_that_of_their_list(self, count: int) -> None:
        shards, ids = [ShardInfo(f"shard \u00fc {n}", 100 + n) for n in range(count)], [f"{n:064x}" for n in range(count)]
        assert digest_of_shards(shards, ids) == digest_of([[s.name, s.num_records, i] for s, i in zip(shards, ids, strict=True)])

    def test_digest_names_the_set_of_images(self, tmp_path: Path) -> None:
        first = open_source(write_folder(tmp_path / "a")).digest()
        assert open_source(write_folder(tmp_path / "b")).digest() == first
        (tmp_path / "b" / "cat" / "000.png").write_bytes(b"other size")
        assert open_source(str(tmp_path / "b")).digest() != first
        (tmp_path / "a" / "cat" / "new.png").write_bytes(png(1))
        assert open_source(str(tmp_path / "a")).digest() != first


class TestLabels:
    def test_scan(self, tmp_path: Path) -> None:
        expected = {f"{CLASSES[label]}/{key}.png": label for key, _, label in IMAGES}
        assert scan_labels(open_source(write_folder(tmp_path))) == expected

    def test_one_class(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "a.png").write_bytes(png(1))
        with pytest.raises(SourceError, match=r"all 1 images have the label 0 \(cat\); a classifier needs at least two classes"):
            scan_labels(open_source(str(tmp_path)))

    def test_missing_labels(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(1))
        with pytest.raises(SourceError, match="1 of 1 images have no label, and this stage needs labels"):
            scan_labels(open_source(str(tmp_path)))

    def test_subset_takes_its_share_of_every_class(self) -> None:
        labels = {f"image-{number}": 0 if number < 900 else 1 for number in range(1000)}
        chosen = labelled_subset(labels, 0.1, seed=3)
        assert Counter(labels[image_id] for image_id in chosen) == {0: 90, 1: 10}
        assert len(set(chosen)) == 100
        assert chosen == labelled_subset(dict(reversed(labels.items())), 0.1, seed=3)
        assert chosen != labelled_subset(labels, 0.1, seed=4)
        assert set(labelled_subset(labels, 0.05, seed=3)) < set(chosen)
        assert labelled_subset(labels, 1, seed=3) == sorted(labels)

    def test_subset_is_the_same_in_another_process(self) -> None:
        program = (
            "import hashlib; from distill.sources import labelled_subset\n"
            "labels = {f'image-{n}': n % 7 for n in range(700)}\n"
            "print(hashlib.sha256('/'.join(labelled_subset(labels, 0.1, 5)).encode()).hexdigest())"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
        )
        here = labelled_subset({f"image-{number}": number % 7 for number in range(700)}, 0.1, 5)
        assert result.stdout.strip() == hashlib.sha256("/".join(here).encode()).hexdigest()

    @pytest.mark.parametrize(
        ("fraction", "complaint"),
        [
            (0, "fraction 0 of the labels is out of range"),
            (1.5, r"fraction 1\.5 of the labels is out of range"),
            (0.01, r"fraction 0\.01 of the 10 images of class 0 is none; give at least 0\.05"),
        ],
    )
    def test_subset_that_cannot_be(self, fraction: float, complaint: str) -> None:
        with pytest.raises(SourceError, match=complaint):
            labelled_subset({str(number): number % 2 for number in range(20)}, fraction, seed=0)
