"""A folder's listing: in the order of its sorted paths, passed over once, and a few bytes an image in memory."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.rejections import RejectionLog
from distill.sources.files import walk_files
from distill.sources.folder import open_folder

NAMES = st.sampled_from(["a", "a-b", "a.b", "a b", "ab", "A", "ä", "z", ".hidden", "a0"])


@settings(max_examples=30)
@given(paths=st.lists(st.lists(NAMES, min_size=1, max_size=3), max_size=25))
def test_files_come_sorted_by_their_whole_path(tmp_path_factory: object, paths: list[list[str]]) -> None:
    """`a-b/x` lies before `a/x`, though `a` lies before `a-b`."""
    root = tmp_path_factory.mktemp("tree")  # type: ignore[attr-defined]
    written = set()
    for parts in paths:
        path = "/".join([*parts[:-1], parts[-1] + ".jpg"])
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x" * len(parts))
        written.add((path, len(parts)))
    shown = sorted(entry for entry in written if not any(part.startswith(".") for part in entry[0].split("/")))
    assert list(walk_files(str(root))) == shown


def test_paths_are_held_in_few_bytes_and_come_back_as_they_were() -> None:
    def listing(count: int) -> list[tuple[str, int]]:
        return [(f"class-{number // 1000:04d}/holiday photograph \udcff {number:08d}.jpg", number) for number in range(count)]

    def bytes_held(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        source = open_folder("nowhere", iter(listing(count)), None, 1000)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert source.num_images == count
        return held

    small, large = bytes_held(5_000), bytes_held(45_000)
    assert (large - small) / 40_000 < 12
    source = open_folder("nowhere", iter(listing(2500)), None, 1000)
    found = [pair for shard in range(3) for pair in source.read_labels(shard)]
    assert found == [(path, int(path[6:10])) for path, _ in listing(2500)]


def test_refused_images_are_remembered_by_eight_bytes_each(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", 1.0)
    long_id = "a folder with a long name/" * 10
    for number in range(2000):
        log.reject(f"{long_id}{number % 1000}", "not an image" if number % 2 else "truncated")
    assert log.num_rejected == 1000
    assert log.counts() == {"not an image": 500, "truncated": 500}
    assert len(log.path.read_text().splitlines()) == 1000
    log.close()
