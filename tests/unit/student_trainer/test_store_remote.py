"""The store on object stores: in memory, and behind a real S3 server where the libraries for one are installed.

What a folder gives by rename, append and lock must come from immutable objects and conditional writes alone.
"""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distill.errors import FingerprintMismatch, StoreError
from distill.soft_labels import encode
from student_trainer.store import Segment, SoftLabelStore, StoreIdentity
from student_trainer.store_cache import SegmentCache
from student_trainer.store_compact import compact
from student_trainer.store_files import open_files
from student_trainer.store_remote_files import RemoteFiles
from student_trainer.store_verify import verify

MAX_TV = 0.02
LOGITS = np.random.default_rng(0).normal(0, 4, (40, 10)).astype(np.float32)
RECORDS = encode(LOGITS, (1.0,), MAX_TV)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server_module = pytest.importorskip("moto.server", reason="moto's server is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/labels"
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/labels"


@pytest.fixture
def remote(url: str, identity: StoreIdentity) -> SoftLabelStore:
    return SoftLabelStore(url, identity)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL, logger="student_trainer"):
        yield


def put(store: SoftLabelStore, rows: list[int], view: int = 0, shard: int = 0) -> list[Segment]:
    return store.commit(view, shard, rows, [f"image-{row}" for row in rows], [RECORDS[row] for row in rows], (1.0,), MAX_TV)


def reopened(store: SoftLabelStore) -> SoftLabelStore:
    return SoftLabelStore(store.folder, store.identity)


def rows_read(store: SoftLabelStore, view: int = 0, shard: int = 0) -> set[int]:
    return set(store.read(view, shard, 1.0, MAX_TV).rows)


def held(store: SoftLabelStore) -> Counter[tuple[int, int, int]]:
    fresh = reopened(store)
    units = {(s.view, s.shard) for s in fresh.segments}
    return Counter((*unit, row) for unit in units for _, table in fresh.tables(*unit) for row in table["row"].to_pylist())


def test_what_is_committed_is_read_by_all_and_told_to_other_writers(remote: SoftLabelStore) -> None:
    other = reopened(remote)
    put(remote, [3, 1])
    assert [(s.shard, s.num_labels) for s in put(other, [7], shard=1)] == [(0, 2), (1, 1)]
    assert rows_read(remote) == rows_read(other) == rows_read(reopened(remote)) == {1, 3}
    assert rows_read(reopened(remote), shard=1) == {7}
    assert remote.refresh()
    assert remote.manifest_digest() == reopened(remote).manifest_digest()


def test_another_identity_is_refused_by_name(remote: SoftLabelStore) -> None:
    with pytest.raises(FingerprintMismatch, match=r"another fingerprint and seed \(.*store.path"):
        SoftLabelStore(remote.folder, remote.identity.replace(fingerprint="e" * 64, seed=3))


@pytest.mark.parametrize("damage", ["altered", "truncated", "gone"])
def test_a_damaged_segment_is_asked_for_again(remote: SoftLabelStore, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    (bad,) = put(remote, [1, 2])
    put(remote, [3])
    data = remote.files.read(bad.file)
    middle = len(data) // 2
    if damage == "gone":
        remote.files.remove(bad.file)
    else:
        tail = bytes([data[middle] ^ 1]) + data[middle + 1 :] if damage == "altered" else b""
        remote.files.replace(bad.file, data[:middle] + tail)
    for reader in (remote, reopened(remote)):
        assert rows_read(reader) == {3}
        assert reader.stats().num_labels == 1
    assert "asked for again" in caplog.text
    if damage == "altered":
        assert f"quarantine/{bad.file.rpartition('/')[2]}" in remote.files.names("quarantine")
    again = reopened(remote)
    put(again, [1, 2])
    assert held(again) == dict.fromkeys(((0, 0, row) for row in (1, 2, 3)), 1)


def test_data_without_an_entry_and_a_torn_entry_do_not_count(remote: SoftLabelStore, quiet: None) -> None:
    put(remote, [1])
    remote.files.replace("view-00000/shard-000000.crashed.parquet", b"PAR1 and then nothing")
    remote.files.replace("manifest/view-00000/shard-000000.000001.json", b'{"view": 0, "sha')
    again = reopened(remote)
    assert rows_read(again) == {1}
    put(again, [2])
    assert held(again) == {(0, 0, 1): 1, (0, 0, 2): 1}


def commit_in_threads(stores: list[SoftLabelStore], batches: list[list[int]]) -> None:
    """Every store commits every batch, all of them at once."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(stores))

    def work(store: SoftLabelStore) -> None:
        try:
            for rows in batches:
                start.wait(30)
                put(store, rows)
        except BaseException as error:  # noqa: BLE001 - raised by the test
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_writers_of_the_same_labels_at_once_keep_each_once(remote: SoftLabelStore) -> None:
    stores = [remote, reopened(remote), reopened(remote)]
    commit_in_threads(stores, [[n, n + 1] for n in range(0, 20, 2)])
    assert held(remote) == dict.fromkeys(((0, 0, row) for row in range(20)), 1)
    assert verify(reopened(remote)).problems == []
    assert verify(reopened(remote)).leftovers == []


def test_without_conditional_writes_nothing_is_overwritten(identity: StoreIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    real = MemoryFileSystem.pipe_file

    def ignores_the_condition(self: Any, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
        return real(self, path, value, **more)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", ignores_the_condition)
    stores = [reopened(remote) for _ in range(3)]
    for number, store in enumerate(stores):  # none has seen what the others wrote: all take the same number
        monkeypatch.setattr(store.manifest, "refresh", lambda view=None: [])
        put(store, [number])
    assert held(remote) == dict.fromkeys(((0, 0, row) for row in range(3)), 1)


def test_an_entry_that_is_taken_and_never_shown_ends_in_an_error(identity: StoreIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    put(reopened(store), [1])
    monkeypatch.setattr(store.manifest, "refresh", lambda view=None: [])
    with pytest.raises(StoreError, match="others committed first"):
        put(store, [2])
    assert list(store.files.names("view-00000")) == [reopened(store).segments[0].file]


def test_compacting_leaves_readers_and_writers_at_work(remote: SoftLabelStore) -> None:
    reader, writer = reopened(remote), reopened(remote)
    for number in range(4):
        put(remote, [number])
    reader.refresh()
    before = reader.read(0, 0, 1.0, MAX_TV)
    done = compact(remote)
    assert (done.num_segments_before, done.num_segments, done.num_labels) == (4, 1, 4)
    put(writer, [2, 9])  # it knows nothing of all that
    assert held(remote) == dict.fromkeys(((0, 0, row) for row in (0, 1, 2, 3, 9)), 1)
    after = reader.read(0, 0, 1.0, MAX_TV)  # its list names files that are gone
    assert after.rows.keys() >= before.rows.keys()
    for row, at in before.rows.items():
        np.testing.assert_array_equal(before.logits_NK[at], after.logits_NK[after.rows[row]])
    assert len(remote.files.names("view-00000")) == 2


def test_a_segment_is_fetched_once_and_a_spoilt_copy_again(
    identity: StoreIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SegmentCache(tmp_path / "cache", 10**6)
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity, cache)
    (segment,) = put(store, [1, 2])
    fetched = []
    real = RemoteFiles.read
    monkeypatch.setattr(RemoteFiles, "read", lambda self, name: fetched.append(name) or real(self, name))
    assert rows_read(store) == {1, 2}
    again = SoftLabelStore(store.folder, identity, SegmentCache(tmp_path / "cache", 10**6))
    assert rows_read(again) == {1, 2}
    assert fetched.count(segment.file) == 1
    (tmp_path / "cache" / segment.sha256).write_bytes(b"spoilt")
    assert rows_read(again) == {1, 2}
    assert fetched.count(segment.file) == 2


def test_the_cache_is_bounded_and_forgets_what_was_not_used_for_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import os

    monkeypatch.setattr("student_trainer.store_cache.LOOK_EVERY", 0)
    cache = SegmentCache(tmp_path, 250)
    parts = {hashlib.sha256(data).hexdigest(): data for data in (bytes([n]) * 100 for n in range(3))}
    first, second, third = parts
    for age, key in ((300, first), (200, second)):
        cache.keep(key, parts[key])
        os.utime(tmp_path / key, (10**9 - age, 10**9 - age))
    assert cache.get(first) == parts[first]  # now the one used last
    cache.keep(third, parts[third])
    assert cache.get(second) is None
    assert cache.get(first) == parts[first]
    cache.keep("x" * 64, bytes(300))
    assert not (tmp_path / ("x" * 64)).exists()


def test_a_cache_on_a_full_disk_only_keeps_nothing(identity: StoreIdentity, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity, SegmentCache(tmp_path / "file" / "cache", 10**6))
    put(store, [1])
    assert rows_read(store) == {1}


def test_a_store_is_copied_between_a_folder_and_an_object_store(identity: StoreIdentity, tmp_path: Path) -> None:
    local = SoftLabelStore(tmp_path / "store", identity)
    put(local, [1])
    url = f"memory://{uuid.uuid4().hex}"
    files = open_files(url)
    for name in local.files.names(""):
        files.replace(name, local.files.read(name))
    remote = SoftLabelStore(url, identity)
    assert rows_read(remote) == {1}
    put(remote, [1, 2])
    assert held(remote) == {(0, 0, 1): 1, (0, 0, 2): 1}
    shutil.rmtree(tmp_path / "store")
    for name in files.names(""):
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.read(name))
    back = SoftLabelStore(tmp_path / "store", identity)
    assert rows_read(back) == {1, 2}
    put(back, [2, 3])
    assert held(back) == dict.fromkeys(((0, 0, row) for row in (1, 2, 3)), 1)


def test_folded_entries_open_the_store_with_fewer_requests(identity: StoreIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    for shard in range(5):
        put(store, [shard], shard=shard)
    compact(store)
    put(store, [9], shard=9)
    asked: list[str] = []
    real = RemoteFiles.read_many
    monkeypatch.setattr(RemoteFiles, "read_many", lambda self, names: asked.extend(names) or real(self, names))
    again = reopened(store)
    assert asked == ["manifest/view-00000/shard-000009.000000.json"]
    assert {s.shard for s in again.segments} == {0, 1, 2, 3, 4, 9}


@pytest.mark.parametrize("fault", [PermissionError("denied"), RuntimeError("no route")])
def test_a_store_that_does_not_answer_is_a_store_error(identity: StoreIdentity, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    put(store, [1])

    def fail(*_: Any, **__: Any) -> Any:
        raise fault

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", fail)
        with pytest.raises(StoreError, match=r"cannot be written to .*committed labels are safe"):
            put(store, [2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "find", fail)
        with pytest.raises(StoreError, match="cannot be read"):
            store.refresh()
    put(store, [2])
    assert held(store) == {(0, 0, 1): 1, (0, 0, 2): 1}


def test_a_kind_of_url_that_nobody_knows_is_refused() -> None:
    with pytest.raises(StoreError, match="nonsense://x cannot be used"):
        open_files("nonsense://x")


def losing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every conditional create of a manifest entry is done, its answer lost, and tried again by the client library: refused."""
    real = RemoteFiles.create

    def create(self: RemoteFiles, name: str, data: bytes) -> bool:
        return real(self, name, data) and not name.startswith("manifest/")

    monkeypatch.setattr(RemoteFiles, "create", create)


def test_an_entry_whose_answer_was_lost_is_ours(identity: StoreIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    losing_answers(monkeypatch)
    put(store, [1])
    put(store, [2])
    assert held(store) == {(0, 0, 1): 1, (0, 0, 2): 1}
    assert compact(store).num_units == 1
    assert held(store) == {(0, 0, 1): 1, (0, 0, 2): 1}
    assert len(reopened(store).segments) == 1
    assert verify(reopened(store)).problems == []


def test_compacting_a_unit_whose_entry_is_taken_and_never_shown_ends_in_an_error(
    identity: StoreIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    put(store, [1])
    put(store, [2])
    put(reopened(store), [3])
    monkeypatch.setattr(store.manifest, "refresh", lambda view=None: [])
    with pytest.raises(StoreError, match="50 times in a row others committed first"):
        compact(store)
    monkeypatch.undo()
    assert held(store) == dict.fromkeys(((0, 0, row) for row in (1, 2, 3)), 1)
    assert verify(reopened(store)).leftovers == []


@pytest.mark.parametrize("damage", [b"no json", b"[1]", b'{"entry": "manifest/x.json"}', b'{"entry": [], "segment": 5}', b"\xff\xfe"])
def test_damaged_copies_of_entries_cost_nothing(identity: StoreIdentity, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    for shard in range(3):
        put(store, [shard], shard=shard)
    compact(store)
    good = store.files.read("manifest/folded.jsonl")
    store.files.replace("manifest/folded.jsonl", good.splitlines()[0] + b"\n" + damage)
    again = reopened(store)
    assert {s.shard for s in again.segments} == {0, 1, 2}
    assert "folded.jsonl is damaged" in caplog.text
    put(again, [9])
    compact(again)
    caplog.clear()
    assert {s.shard for s in reopened(store).segments} == {0, 1, 2}
    assert caplog.text == ""


def test_a_copy_of_an_entry_that_somebody_made_by_hand_has_no_number(identity: StoreIdentity) -> None:
    store = SoftLabelStore(f"memory://{uuid.uuid4().hex}", identity)
    put(store, [1])
    entry = "manifest/view-00000/shard-000000.000000.json"
    store.files.replace("manifest/view-00000/shard-000000.copy.json", store.files.read(entry))
    put(reopened(store), [2])
    assert held(store) == {(0, 0, 1): 1, (0, 0, 2): 1}


@pytest.mark.parametrize("fault", [ValueError("an odd answer"), TypeError("an odd answer"), NotImplementedError("an odd answer")])
def test_whatever_a_file_system_raises_is_an_os_error(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    """Claims, manifest and segments put up with an `OSError`; nothing else may come out of the files."""
    files = open_files(f"memory://{uuid.uuid4().hex}/labels")
    files.put("view-00000/one", b"1")

    def fail(*_: object, **__: object) -> None:
        raise fault

    for method in ("cat_file", "cat", "pipe_file", "rm_file", "find", "info"):
        monkeypatch.setattr(MemoryFileSystem, method, fail)
    for ask in (
        lambda: files.read("view-00000/one"),
        lambda: files.read_many(["view-00000/one"]),
        lambda: files.put("view-00000/two", b"2"),
        lambda: files.replace("view-00000/two", b"2"),
        lambda: files.remove("view-00000/one"),
        lambda: files.names("view-00000"),
        lambda: files.sizes(["view-00000/one"]),
    ):
        with pytest.raises(OSError, match="an odd answer"):
            ask()
