"""The list of bad images and its limit."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from distill.errors import ConfigError, TooManyRejected
from distill.rejections import RejectionLog
from distill.sources.folder import open_folder
from distill.sources.records import ShardInfo, Source

ROOT = Path(__file__).parents[3]


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Images:
    """What the log wants to know of a source."""

    shards: tuple[ShardInfo, ...]

    @property
    def num_images(self) -> int:
        return sum(shard.num_records for shard in self.shards)

    def digest(self) -> str:
        return repr(self.shards)


IMAGES = cast("Source", Images(tuple(ShardInfo(f"shard {number}", 100) for number in range(100))))
ROWS = np.stack(np.divmod(np.random.default_rng(0).permutation(10_000), 100), axis=1)
"""Every image of IMAGES, in some order."""


def see(log: RejectionLog, count: int) -> None:
    """All the images that there are, so many."""
    source = cast("Source", Images((ShardInfo("all", count),)))
    log.saw(log.begin(source), np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1))


def test_each_image_is_listed_once_with_its_reason(tmp_path: Path) -> None:
    with RejectionLog(tmp_path / "new" / "rejected.jsonl", max_share=1) as log:
        see(log, 3)
        log.reject("a.jpg", "truncated")
        log.reject("ü\n.jpg", "unsupported format GIF")
        log.reject("a.jpg", "truncated")
        assert lines(log.path) == [
            {"image_id": "a.jpg", "reason": "truncated"},
            {"image_id": "ü\n.jpg", "reason": "unsupported format GIF"},
        ]
        assert log.counts() == {"truncated": 1, "unsupported format GIF": 1}
        assert (log.num_seen, log.num_rejected) == (3, 2)


def test_no_bad_image_no_file(tmp_path: Path) -> None:
    with RejectionLog(tmp_path / "rejected.jsonl", max_share=0) as log:
        see(log, 10)
        log.check()
    assert not log.path.exists()


def test_check_names_share_limit_count_reason_and_file(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0.01)
    see(log, 200)
    for number in range(2):
        log.reject(f"{number}", "truncated")
    log.check()  # 1 % is not over 1 %
    log.reject("2", "empty file")
    with pytest.raises(TooManyRejected) as caught:
        log.check()
    for fact in ("3 of 200 images", "1.50%", "1.00%", "truncated (2)", str(log.path)):
        assert fact in str(caught.value)
    with pytest.raises(TooManyRejected):
        log.close()


def test_few_images_are_judged_at_the_end(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0.01, min_seen=100)
    see(log, 5)
    log.reject("a", "truncated")
    log.check()
    with pytest.raises(TooManyRejected, match=r"1 of 5 images \(20\.00%\)"):
        log.close()


def test_an_image_is_seen_once_however_often_it_comes(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0)
    for begin, end, seen in ((0, 64, 64), (32, 96, 96), (0, 96, 96), (96, 10_000, 10_000), (0, 10_000, 10_000)):
        log.saw(log.begin(IMAGES), ROWS[begin:end])
        assert log.num_seen == seen


def test_images_of_two_sources_are_told_apart(tmp_path: Path) -> None:
    """Two folders with as many images: their shards are called alike."""
    log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0.5)
    folders = [open_folder(name, ((f"{name}{n}.png", 10) for n in range(30)), None, 20) for name in ("train", "test")]
    assert folders[0].shards == folders[1].shards
    for folder in folders:
        log.saw(log.begin(folder), np.array([[0, 19], [1, 0]]))
        log.saw(log.begin(folder), np.array([[1, 0], [1, 9]]))
    assert log.num_seen == 6


def test_a_part_may_be_over_the_limit_by_chance_and_the_whole_may_not(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0.01)
    log.saw(log.begin(IMAGES), ROWS[:400])
    for number in range(9):  # 4 allowed and, by chance, 3 * sqrt(4 * 0.96) more
        log.reject(f"{number}", "truncated")
        log.check()
    log.reject("9", "truncated")
    with pytest.raises(TooManyRejected, match="10 of 400 images"):
        log.check()
    log.saw(log.begin(IMAGES), ROWS)
    for number in range(10, 100):
        log.reject(f"{number}", "truncated")
    log.check()
    log.reject("100", "truncated")
    with pytest.raises(TooManyRejected, match="101 of 10000 images"):
        log.check()


def test_another_error_is_not_hidden_by_the_last_check(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", max_share=0)
    see(log, 1)
    log.reject("a", "truncated")
    with pytest.raises(KeyError), log:
        raise KeyError


def test_reject_after_close_opens_the_file_again(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "rejected.jsonl", max_share=1)
    for name in ("a", "b"):
        see(log, 1)
        log.reject(name, "truncated")
        log.close()
    assert [line["image_id"] for line in lines(log.path)] == ["a", "b"]


def test_share_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_share 1\.5 of rejected images is out of range; give 0 to 1"):
        RejectionLog(tmp_path / "rejected.jsonl", max_share=1.5)


def test_threads_share_a_log(tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        log.saw(log.begin(IMAGES), ROWS[number : number + 1])
        log.reject(str(number % 100), "truncated")

    with RejectionLog(tmp_path / "rejected.jsonl", max_share=1) as log, ThreadPoolExecutor(8) as pool:
        list(pool.map(refuse, range(800)))
        assert (log.num_seen, log.num_rejected) == (800, 100)
    assert {line["image_id"] for line in lines(log.path)} == {str(number) for number in range(100)}


def test_processes_share_a_file(tmp_path: Path) -> None:
    """Whole lines from both, also lines of several kilobytes."""
    path = tmp_path / "rejected.jsonl"
    program = (
        "import sys; from pathlib import Path; from distill.rejections import RejectionLog\n"
        "log = RejectionLog(Path(sys.argv[1]), max_share=1)\n"
        "for number in range(500): log.reject(f'{sys.argv[2]}-{number}-' + sys.argv[2] * 5000, 'truncated')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), name], cwd=ROOT) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    ids = [line["image_id"] for line in lines(path)]
    assert len(ids) == len(set(ids)) == 1000
