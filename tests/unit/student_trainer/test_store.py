"""The soft-label store under crashes, damage, races and full disks: what was committed is there, once, or the reader is told."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.crops import CropRecipe
from distill.errors import FingerprintMismatch, StoreError
from distill.soft_labels import Encoding, Record, decode, encode, softmax
from student_trainer import store_manifest
from student_trainer.store import Segment, SoftLabelStore, StoreIdentity
from student_trainer.store_compact import compact
from student_trainer.store_segments import ESCAPED
from student_trainer.store_stats import difference
from student_trainer.store_verify import verify

MAX_TV = 0.02
RANDOM = np.random.default_rng(0)
LOGITS = (RANDOM.normal(0, 4, (20, 10))).astype(np.float32)
RECORDS = encode(LOGITS, (1.0,), MAX_TV)
COMMITTERS = Path(__file__).with_name("commit_in_processes.py")


def put(store: SoftLabelStore, rows: list[int], view: int = 0, shard: int = 0) -> list[Segment]:
    return store.commit(view, shard, rows, [f"image-{row}" for row in rows], [RECORDS[row] for row in rows], (1.0,))


def reopened(store: SoftLabelStore) -> SoftLabelStore:
    return SoftLabelStore(store.folder, store.identity)


def rows_read(store: SoftLabelStore, view: int = 0, shard: int = 0) -> set[int]:
    return set(store.read(view, shard, 1.0, MAX_TV).rows)


def leftovers(store: SoftLabelStore) -> list[str]:
    """Files of segments that the manifest does not name."""
    named = {segment.file for segment in reopened(store).segments}
    return [str(path) for path in store.folder.glob("view-*/*") if f"{path.parent.name}/{path.name}" not in named]


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL, logger="student_trainer"):
        yield


def test_reads_back_what_was_committed(store: SoftLabelStore) -> None:
    put(store, [3, 1, 2])
    put(store, [7], shard=1)
    labels = reopened(store).read(0, 0, 1.0, MAX_TV)
    assert sorted(labels.rows) == [1, 2, 3]
    for row, position in labels.rows.items():
        assert labels.image_ids[position] == f"image-{row}"
        expected = decode([RECORDS[row].encoding], [RECORDS[row].data], 10)[0]
        np.testing.assert_array_equal(labels.logits_NK[position], expected)
        tv = 0.5 * np.abs(softmax(LOGITS[[row]], 1.0) - softmax(labels.logits_NK[[position]], 1.0)).sum()
        assert tv <= MAX_TV + 1e-6
    assert rows_read(store, view=1) == set()
    assert store.stats().num_labels == 4


def test_commit_tells_of_other_writers_segments_too(store: SoftLabelStore) -> None:
    other = reopened(store)
    put(other, [1])
    assert [(s.shard, s.num_labels) for s in put(store, [5], shard=2)] == [(0, 1), (2, 1)]
    assert store.refresh() == []


def test_what_another_thread_commits_at_any_moment_of_a_read_is_read_or_not(store: SoftLabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.manifest.of
    for at in range(4):  # before the first, the second, ... look at the manifest
        put(store, [1], shard=at)
        looks = 0

        def of(view: int, shard: int, at: int = at) -> list[Segment]:
            nonlocal looks
            if looks == at:
                monkeypatch.undo()
                put(store, [2], shard=shard)
                monkeypatch.setattr(store.manifest, "of", of)
            looks += 1
            return real(view, shard)

        monkeypatch.setattr(store.manifest, "of", of)
        rows = rows_read(store, shard=at)
        assert rows in ({1}, {1, 2}), at
        assert (rows == {1}) == (at >= looks)
        monkeypatch.undo()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of errors runs."""


def interrupting(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Make the `at`-th of all steps of a commit that touch the disk raise Killed before it does anything; returns the steps seen."""
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == at + 1:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    for name in ("mkdir", "open", "rename", "fsync", "write"):
        wrap(os, name)
    wrap(hashlib, "sha256")
    return seen


@pytest.mark.parametrize("view", [0, 1])  # a folder that exists, and one that the commit makes
def test_killed_at_any_step_of_a_commit_nothing_is_lost_or_doubled(
    tmp_path: Path, identity: StoreIdentity, view: int, held_by: Any, quiet: None
) -> None:
    """The next process reads every label whose commit returned, asks for the others, and ends with each once."""
    wanted = {(0, 0, 1): 1, (0, 0, 2): 1, (view, 0, 3): 1, (view, 0, 4): 1}
    for at in range(50):
        store = SoftLabelStore(tmp_path / f"killed-{at}", identity)
        put(store, [1, 2])
        with pytest.MonkeyPatch.context() as patch:
            seen = interrupting(patch, at)
            try:
                put(store, [3, 4], view=view)
                survived = True
            except Killed:
                survived = False
        again = reopened(store)
        assert rows_read(again) >= {1, 2}, seen
        missing = {3, 4} - rows_read(again, view=view)
        assert missing in (set(), {3, 4}), seen
        if missing:
            put(again, sorted(missing), view=view)
        assert held_by(again) == wanted, seen
        if survived:
            assert not missing
            assert len(seen) == at
            assert {"fsync", "rename", "write", "sha256"} <= set(seen)
            return
    pytest.fail("a commit has no end")


def test_manifest_cut_anywhere_loses_only_its_last_line(tmp_path: Path, identity: StoreIdentity, held_by: Any, quiet: None) -> None:
    store = SoftLabelStore(tmp_path / "store", identity)
    put(store, [1, 2])
    manifest = store.folder / "manifest.jsonl"
    before = manifest.read_bytes()
    put(store, [3, 4])
    after = manifest.read_bytes()
    size = len(after) - len(before)
    for cut in [len(before) + at for at in range(size + 1) if at < 5 or at > size - 5 or at % 7 == 0]:
        manifest.write_bytes(after[:cut])
        again = reopened(store)
        missing = sorted({1, 2, 3, 4} - rows_read(again))
        assert missing in ([], [3, 4])
        if missing:
            put(again, missing)
        put(again, [5])
        assert held_by(again) == dict.fromkeys(((0, 0, row) for row in (1, 2, 3, 4, 5)), 1), cut


def test_a_damaged_line_is_passed_over_and_said(store: SoftLabelStore, caplog: pytest.LogCaptureFixture) -> None:
    put(store, [1])
    with (store.folder / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"view": 0, "sha')
    again = reopened(store)
    put(again, [2])
    assert rows_read(again) == rows_read(reopened(store)) == {1, 2}
    assert "damaged line" in caplog.text


def run_committers(what: str, store: SoftLabelStore) -> list[tuple[int, ...]]:
    arguments = [sys.executable, str(COMMITTERS), what, str(store.folder), store.identity.model_dump_json()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(int(word) for word in line.split()) for line in done.stdout.splitlines()]


def test_sigkill_at_random_moments(store: SoftLabelStore, held_by: Any, quiet: None) -> None:
    """What returned is there once; at most the one commit in flight of each victim may be there beyond it, whole."""
    told = run_committers("kill", store)
    held = held_by(store)
    assert len(told) > 2 * 12  # each of the 12 victims committed at least once, and some more often
    assert set(told) <= set(held)
    assert set(held.values()) == {1}
    beyond = Counter(shard for _, shard, _ in set(held) - set(told))
    assert all(count == 2 for count in beyond.values())


def test_processes_that_commit_at_once_lose_nothing(store: SoftLabelStore, held_by: Any) -> None:
    told = run_committers("race", store)
    assert len(told) == 3 * 25 * 2
    assert held_by(store) == Counter(told)
    assert leftovers(store) == []


@pytest.mark.parametrize("damage", ["altered", "truncated", "gone"])
def test_a_damaged_segment_counts_as_not_there_and_the_rest_is_read(
    store: SoftLabelStore, damage: str, held_by: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (bad,) = put(store, [1, 2])
    put(store, [3])
    path = store.folder / bad.file
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:middle] + (bytes([data[middle] ^ 1]) + data[middle + 1 :] if damage == "altered" else b""))
    for reader in (store, reopened(store)):  # one that knew it before, one that starts now
        assert rows_read(reader) == {3}
        assert reader.stats().num_labels == 1
    assert "asked for again" in caplog.text
    again = reopened(store)
    put(again, [1, 2])
    assert not path.exists()
    assert (store.folder / "quarantine" / path.name).exists() == (damage != "gone")
    assert held_by(again) == {(0, 0, 1): 1, (0, 0, 2): 1, (0, 0, 3): 1}


def test_a_segment_that_was_cut_off_before_it_was_read_goes_into_quarantine_in_the_end(store: SoftLabelStore, held_by: Any) -> None:
    """Not while it is young: the file of another machine may be shown short for a moment."""
    (bad,) = put(store, [1, 2])
    path = store.folder / bad.file
    path.write_bytes(path.read_bytes()[:50])
    again = reopened(store)
    put(again, [1, 2])
    assert path.exists()
    os.utime(path, (0, 0))
    put(again, [3])
    assert not path.exists()
    assert (store.folder / "quarantine" / path.name).exists()
    assert held_by(again) == {(0, 0, 1): 1, (0, 0, 2): 1, (0, 0, 3): 1}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"fingerprint": "e" * 64}, ["fingerprint"]),
        ({"recipe": CropRecipe(image_size=8, min_area=0.5)}, ["recipe"]),
        ({"seed": 1}, ["seed"]),
        ({"images": "other"}, ["images"]),
        ({"num_classes": 11, "seed": 4}, ["num_classes", "seed"]),
    ],
)
def test_a_store_of_another_identity_is_refused_by_name(store: SoftLabelStore, change: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(FingerprintMismatch) as caught:
        SoftLabelStore(store.folder, store.identity.replace(**change))
    assert f"another {' and '.join(names)} (" in str(caught.value)
    assert "store.path" in str(caught.value)


def test_a_folder_that_cannot_be_used_is_a_store_error(tmp_path: Path, identity: StoreIdentity) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        SoftLabelStore(tmp_path / "file", identity)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "store.json").write_text('{"finger')
    with pytest.raises(StoreError, match="cannot be used"):
        SoftLabelStore(tmp_path / "torn", identity)


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_write(descriptor: int, data: bytes) -> int:
    with os.fdopen(os.dup(descriptor), "ab", buffering=0) as file:
        return file.write(data[: len(data) // 2]) or 0


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (Path, "open", full_disk),
        (os, "fsync", full_disk),
        (os, "rename", full_disk),
        (os, "write", full_disk),
        (os, "write", half_a_write),
    ],
    ids=["data", "flush", "rename", "manifest", "half a manifest line"],
)
def test_full_disk_is_said_and_leaves_no_half(
    store: SoftLabelStore, owner: Any, name: str, fault: Callable[..., Any], held_by: Any, quiet: None
) -> None:
    put(store, [1, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(StoreError, match="No space left on device; committed labels are safe"):
            put(store, [3])
    assert leftovers(store) == []
    assert rows_read(store) == rows_read(reopened(store)) == {1, 2}
    put(store, [3])
    assert held_by(store) == {(0, 0, 1): 1, (0, 0, 2): 1, (0, 0, 3): 1}


@pytest.mark.parametrize("limit", [1000, 4001], ids=["in the data", "in the manifest"])
def test_a_disk_that_is_really_full_is_said_and_the_same_process_goes_on_when_there_is_room(
    store: SoftLabelStore, limit: int, held_by: Any, quiet: None
) -> None:
    put(store, [19], shard=1)
    program = Path(__file__).with_name("fill_a_disk.py")
    arguments = [sys.executable, str(program), str(store.folder), store.identity.model_dump_json(), str(limit)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (refused,) = [line for line in lines if line.startswith("refused")]
    assert "File too large; committed labels are safe" in refused or "No space left on device; committed labels are safe" in refused
    told = [(0, 0, int(line.split()[1])) for line in lines if line.startswith("row")]
    assert held_by(store) == Counter([*told, (0, 1, 19)])
    assert leftovers(store) == []


def put_in_views(store: SoftLabelStore, returned: list[int]) -> None:
    """One label in each of very many views; `returned` are those whose commit returned."""
    for view in range(1000):
        put(store, [1], view=view)
        returned.append(view)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
def test_a_disk_of_limited_size_and_a_read_only_one(tmp_path: Path, identity: StoreIdentity, held_by: Any, quiet: None) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        store = SoftLabelStore(disk / "store", identity)
        returned: list[int] = []
        with pytest.raises(StoreError, match="No space left on device; committed labels are safe"):
            put_in_views(store, returned)
        committed = len(returned)
        assert committed > 2
        assert held_by(store) == Counter((view, 0, 1) for view in returned)
        assert leftovers(store) == []
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        put(store, [1], view=committed)
        assert len(held_by(store)) == committed + 1
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        reader = reopened(store)
        assert rows_read(reader, view=committed) == {1}
        with pytest.raises(StoreError, match="Read-only file system; committed labels are safe"):
            put(reader, [2])
        assert rows_read(reader) == {1}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_processes_that_commit_the_same_labels_at_once_keep_each_once(store: SoftLabelStore, held_by: Any) -> None:
    told = run_committers("same", store)
    assert set(held_by(store)) == set(told)
    assert set(held_by(store).values()) == {1}
    assert leftovers(store) == []


def test_a_store_of_the_first_format_is_read_and_added_to(tmp_path: Path, identity: StoreIdentity, held_by: Any) -> None:
    """As it was written before segments had `replaces` and encodings of their columns: a manifest.jsonl and plain Parquet."""
    import hashlib as hashes

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "old"
    (folder / "view-00000").mkdir(parents=True)
    (folder / "store.json").write_text(identity.model_dump_json(indent=1))
    columns = {
        "row": pa.array([1, 2], pa.int32()),
        "image_id": ["image-1", "image-2"],
        "encoding": pa.array([int(RECORDS[row].encoding) for row in (1, 2)], pa.uint8()),
        "record": pa.array([RECORDS[row].data for row in (1, 2)], pa.binary()),
        "max_tv": pa.array([RECORDS[row].max_tv for row in (1, 2)], pa.float32()),
        "max_logit_error": pa.array([RECORDS[row].max_logit_error for row in (1, 2)], pa.float32()),
    }
    path = folder / "view-00000" / "shard-000000.0123456789ab.parquet"
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    fields = {"view": 0, "shard": 0, "file": f"view-00000/{path.name}", "sha256": hashes.sha256(data).hexdigest(), "num_labels": 2}
    line = json.dumps({**fields, "size_bytes": len(data), "temperatures": [1.0]})
    (folder / "manifest.jsonl").write_text(f"\n{line}\n")
    store = SoftLabelStore(folder, identity)
    assert rows_read(store) == {1, 2}
    put(store, [2, 3])
    assert held_by(store) == dict.fromkeys(((0, 0, row) for row in (1, 2, 3)), 1)


def test_a_commit_whose_last_flush_failed_is_whole_or_not_there(store: SoftLabelStore, held_by: Any) -> None:
    """The line stands in the manifest when its flush fails: the file that it names must stay."""
    put(store, [1])
    real = os.fsync
    calls = iter(range(100))

    def fail_last(descriptor: int) -> None:
        if next(calls) == 2:  # data file, its folder, then the manifest
            full_disk()
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail_last)
        with pytest.raises(StoreError):
            put(store, [2])
    assert rows_read(store) == rows_read(reopened(store)) == {1, 2}
    assert held_by(store) == {(0, 0, 1): 1, (0, 0, 2): 1}


def true_tv(read_K: Any, true_K: Any, temperature: float) -> float:
    return float(0.5 * np.abs(softmax(true_K[None], temperature) - softmax(read_K[None], temperature)).sum())


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_at_another_temperature_only_certified_labels_are_read(tmp_path: Path, temperature: float) -> None:
    num_classes = 40
    random = np.random.default_rng(1)
    # From sure teachers (short records, coarse tails) to undecided ones (dense records, fine everywhere).
    logits_NK = np.concatenate([random.normal(0, scale, (30, num_classes)) for scale in (0.3, 3, 12)]).astype(np.float32)
    records = encode(logits_NK[:30], (1.0,), MAX_TV / 50) + encode(logits_NK[30:], (1.0,), MAX_TV)
    identity = StoreIdentity(fingerprint="f" * 64, num_classes=num_classes, recipe=CropRecipe(image_size=8), seed=0, images="images")
    store = SoftLabelStore(tmp_path / "store", identity)
    store.commit(0, 0, list(range(90)), [str(row) for row in range(90)], records, (1.0,))
    labels = store.read(0, 0, temperature, MAX_TV)
    certified = {row for row, record in enumerate(records) if np.tanh(record.max_logit_error / (2 * temperature)) <= MAX_TV}
    assert set(labels.rows) == certified
    assert 0 < len(certified) < 90
    for row, position in labels.rows.items():
        assert true_tv(labels.logits_NK[position], logits_NK[row], temperature) <= MAX_TV
    assert set(store.read(0, 0, 1.0, MAX_TV).rows) == set(range(90))
    assert store.read(0, 0, 1.0, 1e-9).rows.keys() <= {row for row, record in enumerate(records) if record.max_tv <= 1.1e-9}


def test_a_later_label_of_the_same_row_wins(store: SoftLabelStore) -> None:
    """A row asked for again, because the kept record was not exact enough for another job."""
    put(store, [1])
    better = Record(Encoding.DENSE16, LOGITS[1].astype("<f2").tobytes(), 0.0, 0.0)
    store.commit(0, 0, [1], ["image-1"], [better], (1.0,))
    np.testing.assert_array_equal(reopened(store).read(0, 0, 1.0, MAX_TV).logits_NK[0], LOGITS[1].astype("<f2").astype(np.float32))


def test_image_ids_that_are_no_utf8_are_kept_as_they_are(store: SoftLabelStore) -> None:
    """File names in another encoding, lone surrogates, and an id that looks like an escaped one."""
    names = ["caf\udce9.png", "plain é.png", "\ud83d\ude00 back\\slash\n", ESCAPED + "x\\udce9"]
    store.commit(0, 0, range(4), names, RECORDS[:4], (1.0,))
    store.commit(1, 0, range(4), names, RECORDS[:4], (1.0,))
    labels = reopened(store).read(0, 0, 1.0, MAX_TV)
    assert labels.image_ids == names
    _, table = store.tables(0, 0)[0]
    assert table["image_id"].to_pylist()[1] == names[1]  # only what needs it is escaped
    assert verify(store).problems == []
    assert difference(store, reopened(store), 1.0).other_images == 0
    store.commit(2, 0, [0], ["caf\udce8.png"], RECORDS[:1], (1.0,))
    (problem,) = verify(store).problems
    assert "is 'caf\\udce8.png' here and 'caf\\udce9.png' elsewhere" in problem.says


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../victim"},
        {"file": "/etc/victim"},
        {"file": "view-00000/../../shard-000000.00.parquet"},
        {"file": "view-00000/shard-000000.00.parquet\n"},
        {"replaces": ["../victim"]},
        {"sha256": "/etc/victim"},
        {"sha256": "A" * 64},
        {"view": -1},
        {"shard": -1},
    ],
)
def test_a_manifest_cannot_name_what_is_outside_the_store(
    store: SoftLabelStore, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (segment,) = put(store, [1])
    victim = store.folder.parent / "victim"
    victim.write_bytes(b"mine" * 10)
    other = {**segment.model_dump(mode="json"), "file": "view-00000/shard-000000.00.parquet", "size_bytes": 40, **change}
    with (store.folder / "manifest.jsonl").open("a") as manifest:
        manifest.write(json.dumps(other) + "\n")
    again = reopened(store)
    assert "a damaged line" in caplog.text
    assert again.segments == [segment]
    put(again, [2])
    compact(again, remove_leftovers=True)
    verify(again, repair=True)
    assert victim.read_bytes() == b"mine" * 10
    assert rows_read(again) == {1, 2}


def test_a_file_that_a_network_file_system_shows_late_counts_when_it_is_there(
    store: SoftLabelStore, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    now = [1000.0]
    monkeypatch.setattr(store_manifest, "time", SimpleNamespace(monotonic=lambda: now[0]))
    (early,), (late,) = put(store, [1]), put(store, [2], shard=1)
    paths = [store.folder / segment.file for segment in (early, late)]
    for path in paths:
        path.rename(path.with_suffix(".hidden"))
    other = reopened(store)
    assert other.segments == []
    now[0] += 5
    paths[0].with_suffix(".hidden").rename(paths[0])
    assert other.refresh() == [early]
    assert rows_read(other) == {1}
    assert other.refresh() == []
    now[0] += store_manifest.LATE_S
    paths[1].with_suffix(".hidden").rename(paths[1])
    assert other.refresh() == []  # looked for long enough
    other.manifest.drop(early)  # damaged, say: then it is not looked for
    assert other.refresh() == []


def test_a_small_file_that_cannot_be_written_leaves_nothing(store: SoftLabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", full_disk)
    before = set(store.folder.iterdir())
    with pytest.raises(OSError, match="No space"):
        store.files.replace("small.json", b"{}")
    assert set(store.folder.iterdir()) == before
