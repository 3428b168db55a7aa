"""What one does with a store: verify, compact, look at, compare. Every fault is made on purpose and must be named."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.cli.main import run_command
from distill.errors import StoreError
from distill.soft_labels import Encoding, Record, encode, softmax
from student_trainer import store as store_module
from student_trainer import store_manifest
from student_trainer.open_store import find_stores, open_any_store
from student_trainer.store import Segment, SoftLabelStore, StoreIdentity
from student_trainer.store_compact import compact, compact_unit
from student_trainer.store_stats import difference, summarize
from student_trainer.store_verify import verify

MAX_TV = 0.02
LOGITS = np.random.default_rng(0).normal(0, 4, (40, 10)).astype(np.float32)
RECORDS = encode(LOGITS, (1.0,), MAX_TV)


@pytest.fixture(params=["folder", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, identity: StoreIdentity) -> SoftLabelStore:
    where = str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"
    return SoftLabelStore(where, identity)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL, logger="student_trainer"):
        yield


def put(
    store: SoftLabelStore,
    rows: list[int],
    view: int = 0,
    shard: int = 0,
    records: list[Record] | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    name: str = "image",
) -> list[Segment]:
    kept = [RECORDS[row] for row in rows] if records is None else records
    return store.commit(view, shard, rows, [f"{name}-{row}" for row in rows], kept, temperatures)


def put_for_two_jobs(store: SoftLabelStore) -> None:
    """Labels that become two segments: each of two sets of temperatures has two now."""
    for row in range(4):
        temperatures = (1.0,) if row < 2 else (1.0, 2.0)
        put(store, [row], records=encode(LOGITS[[row]], temperatures, MAX_TV), temperatures=temperatures)


def keep_twice(store: SoftLabelStore, rows: list[int]) -> None:
    """As two writers without a lock would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftLabelStore, "_without_kept", lambda self, segment, table, limit: table)
        put(store, rows)


def reopened(store: SoftLabelStore) -> SoftLabelStore:
    return SoftLabelStore(store.folder, store.identity)


@pytest.fixture
def none_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is gone for good, as it is a minute later."""
    monkeypatch.setattr(store_manifest, "LATE_S", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """By which a file is late or gone."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(store_manifest, "time", clock)
    return clock


def hide(store: SoftLabelStore, segment: Segment) -> Callable[[], object]:
    """As a network file system that does not show a file yet; what is returned makes it show it."""
    path = Path(store.folder, segment.file)
    aside = path.rename(path.with_suffix(".hidden"))
    return lambda: aside.rename(path)


def labels_of(store: SoftLabelStore, view: int = 0, shard: int = 0) -> dict[int, bytes]:
    found = reopened(store).read(view, shard, 1.0, MAX_TV)
    return {row: found.logits_NK[at].tobytes() for row, at in found.rows.items()}


def copies(store: SoftLabelStore) -> list[int]:
    return sorted(row for _, table in reopened(store).tables(0, 0) for row in table["row"].to_pylist())


class TestVerify:
    def test_a_good_store_has_no_problems(self, anywhere: SoftLabelStore) -> None:
        put(anywhere, [1, 2])
        put(anywhere, [3], view=1)
        found = verify(reopened(anywhere))
        assert (found.num_segments, found.num_labels, found.problems, found.leftovers) == (2, 3, [], [])

    def test_every_kind_of_damage_is_named_and_mended(self, anywhere: SoftLabelStore, quiet: None, none_late: None) -> None:
        (altered,) = put(anywhere, [1, 2])
        (gone,) = put(anywhere, [3], shard=1)
        put(anywhere, [5, 6])
        keep_twice(anywhere, [5])
        nonsense = Record(Encoding.DENSE16, b"123", 0.0, 0.0)
        (undecodable,) = put(anywhere, [7], shard=2, records=[nonsense])
        data = anywhere.files.read(altered.file)
        anywhere.files.replace(altered.file, data[:-1] + bytes([data[-1] ^ 1]))
        anywhere.files.remove(gone.file)
        anywhere.files.replace("view-00000/shard-000000.left.parquet", b"left by a crash")

        found = verify(reopened(anywhere))
        kinds = {(problem.kind, problem.file) for problem in found.problems}
        assert {("altered", altered.file), ("gone", gone.file), ("undecodable", undecodable.file)} < kinds
        assert sum(kind == "kept twice" for kind, _ in kinds) == 1
        assert found.num_open == len(found.problems) == 4
        assert found.leftovers == ["view-00000/shard-000000.left.parquet"]
        assert anywhere.files.names("quarantine") == {}  # looking changes nothing

        mended = verify(reopened(anywhere), repair=True)
        assert mended.num_open == 0
        after = verify(reopened(anywhere))
        assert after.problems == []
        assert len(anywhere.files.names("quarantine")) == 2
        assert labels_of(anywhere).keys() == {5, 6}
        put(reopened(anywhere), [1, 2])
        put(reopened(anywhere), [3], shard=1)
        assert labels_of(anywhere).keys() == {1, 2, 5, 6}
        assert labels_of(anywhere, shard=1).keys() == {3}
        assert verify(reopened(anywhere)).problems == []

    def test_a_row_that_is_another_image_in_another_view_is_named(self, anywhere: SoftLabelStore) -> None:
        put(anywhere, [1, 2])
        put(anywhere, [1, 2], view=1)
        (bad,) = put(anywhere, [1, 2, 3], view=2, name="renamed")
        (problem,) = verify(reopened(anywhere)).problems
        assert (problem.kind, problem.file, problem.labels) == ("other image", bad.file, 2)
        assert "row 1 is 'renamed-1' here and 'image-1' elsewhere" in problem.says

    def test_a_label_made_again_more_exactly_or_for_other_temperatures_is_not_kept_twice(self, anywhere: SoftLabelStore) -> None:
        put(anywhere, [1])
        put(anywhere, [1], records=encode(LOGITS[[1]], (0.1, 1.0), MAX_TV), temperatures=(0.1, 1.0))
        put(anywhere, [1], records=[Record(Encoding.DENSE16, LOGITS[1].astype("<f2").tobytes(), 0.0, 0.001)])
        assert verify(reopened(anywhere)).problems == []

    def test_segments_that_are_merged_meanwhile_are_not_gone(self, anywhere: SoftLabelStore) -> None:
        put(anywhere, [1])
        put(anywhere, [2])
        reader = reopened(anywhere)
        compact(anywhere)
        assert verify(reader).problems == []

    def test_a_repair_waits_for_a_file_that_is_only_late(self, store: SoftLabelStore, clock: SimpleNamespace, quiet: None) -> None:
        put(store, [1])
        (late,) = put(store, [2])
        (lost,) = put(store, [3])
        Path(store.folder, lost.file).unlink()
        show = hide(store, late)
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            clock.now += seconds
            if len(pauses) == 3:
                show()

        found = verify(reopened(store), repair=True, pause=pause)
        assert [(problem.kind, problem.file, problem.repaired) for problem in found.problems] == [("gone", lost.file, True)]
        assert sum(pauses) == store_manifest.LATE_S
        assert labels_of(store).keys() == {1, 2}
        assert verify(reopened(store)).problems == []


class TestCompact:
    def test_many_segments_become_one_that_says_the_same(self, anywhere: SoftLabelStore) -> None:
        for row in range(6):
            put(anywhere, [row])
        keep_twice(anywhere, [2, 4])
        before = labels_of(anywhere)
        done = compact(reopened(anywhere), remove_leftovers=True)
        assert (done.num_units, done.num_segments_before, done.num_segments) == (1, 7, 1)
        assert (done.num_labels_before, done.num_labels, done.num_leftovers) == (8, 6, 0)
        assert done.size_bytes < done.size_bytes_before
        assert labels_of(anywhere) == before
        assert copies(anywhere) == list(range(6))
        assert len(anywhere.files.names("view-00000")) == 1
        assert compact(reopened(anywhere)).num_units == 0

    def test_labels_for_other_temperatures_stay_where_each_serves_a_read(self, anywhere: SoftLabelStore) -> None:
        rows = list(range(20))
        put(anywhere, rows)
        put(anywhere, rows, records=encode(LOGITS[:20], (0.1, 1.0), MAX_TV), temperatures=(0.1, 1.0))
        exact = [Record(Encoding.DENSE16, LOGITS[row].astype("<f2").tobytes(), 0.0, 0.0) for row in rows[:10]]
        put(anywhere, rows[:10], records=exact, temperatures=(0.1, 1.0, 2.0))
        before = {t: set(reopened(anywhere).read(0, 0, t, MAX_TV).rows) for t in (0.1, 1.0, 2.0, 5.0)}
        assert compact(anywhere).num_labels < 50
        assert {t: set(reopened(anywhere).read(0, 0, t, MAX_TV).rows) for t in before} == before
        assert [row for row in copies(anywhere) if row < 10] == rows[:10]  # the exact ones serve every read

    def test_two_labels_stay_where_each_is_the_more_exact_in_one_way(self, anywhere: SoftLabelStore) -> None:
        """One serves reads at the temperature foreseen, the other (by its logits' error) those at any other. Dominated ones go."""
        data = LOGITS[1].astype("<f2").tobytes()
        errors = [(0.02, 0.001), (0.001, 0.02), (0.02, 0.02), (0.01, 0.01)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SoftLabelStore, "_without_kept", lambda self, segment, table, limit: table)
            for tv, logit_error in errors:
                put(anywhere, [1, 2], records=[Record(Encoding.DENSE16, data, tv, logit_error), RECORDS[2]])
        before = {t: reopened(anywhere).read(0, 0, t, 0.5).tv_N.tolist() for t in (1.0, 3.0)}
        assert compact(anywhere).num_labels == 4
        assert copies(anywhere) == [1, 1, 1, 2]
        assert {t: reopened(anywhere).read(0, 0, t, 0.5).tv_N.tolist() for t in before} == before
        assert all(table["row"].to_pylist() == sorted(set(table["row"].to_pylist())) for _, table in anywhere.tables(0, 0))
        assert verify(reopened(anywhere)).problems == []
        assert compact(reopened(anywhere)).num_units == 0

    def test_an_empty_segment_stands_beside_others(self, anywhere: SoftLabelStore, quiet: None, none_late: None) -> None:
        (lost,) = put(anywhere, [1], records=encode(LOGITS[[1]], (0.1, 1.0), MAX_TV), temperatures=(0.1, 1.0))
        anywhere.files.remove(lost.file)
        compact(reopened(anywhere))  # an empty one in its place
        put(reopened(anywhere), [1, 2])
        assert compact(reopened(anywhere)).num_units == 1
        assert copies(anywhere) == [1, 2]

    @pytest.mark.parametrize("shown", ["before it begins", "after it has ended", "after it was looked for long enough"])
    def test_a_file_that_a_network_file_system_shows_late_loses_no_label(
        self, store: SoftLabelStore, shown: str, clock: SimpleNamespace, quiet: None
    ) -> None:
        put(store, [1])
        put(store, [2])
        show = hide(store, put(store, [3])[0])
        other = reopened(store)
        if shown == "after it was looked for long enough":
            clock.now += store_manifest.LATE_S
        if shown != "after it has ended":
            show()
        compact(other)
        if shown == "after it has ended":
            show()
        assert labels_of(store).keys() == {1, 2, 3}
        compact(reopened(store))
        assert labels_of(store).keys() == {1, 2, 3}
        assert len(reopened(store).segments) == 1

    def test_killed_at_any_step_nothing_is_lost(self, tmp_path: Path, identity: StoreIdentity, quiet: None) -> None:
        for at in range(60):
            store = SoftLabelStore(tmp_path / f"killed-{at}", identity)
            put_for_two_jobs(store)
            before = labels_of(store)
            with pytest.MonkeyPatch.context() as patch:
                survived = not killed_at(patch, at, lambda s=store: compact(s))
            assert labels_of(store) == before, at
            assert copies(store) == [0, 1, 2, 3], at
            compact(reopened(store), remove_leftovers=True)
            assert labels_of(store) == before, at
            assert copies(store) == [0, 1, 2, 3], at
            assert len(store.files.names("view-00000")) == 2
            if survived:
                assert at > 5
                return
        pytest.fail("compaction has no end")

    def test_two_that_compact_at_once_double_nothing(self, anywhere: SoftLabelStore) -> None:
        for row in range(3):
            put(anywhere, [row])
        other, before = reopened(anywhere), labels_of(anywhere)
        real: Callable[..., Any] = store_module.SoftLabelStore.tables

        def compact_meanwhile(self: SoftLabelStore, *arguments: Any) -> Any:
            found = real(self, *arguments)
            if self is anywhere:
                monkeypatch.undo()
                assert compact_unit(other, 0, 0)
            return found

        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(store_module.SoftLabelStore, "tables", compact_meanwhile)
        assert not compact_unit(anywhere, 0, 0)
        assert labels_of(anywhere) == before
        assert copies(anywhere) == [0, 1, 2]
        assert len(anywhere.files.names("view-00000")) == 1

    def test_two_that_compact_for_several_temperatures_at_once_double_nothing(self, anywhere: SoftLabelStore) -> None:
        """The other one comes at each moment at which the first holds no lock."""
        for at in range(10):
            store = SoftLabelStore(f"{anywhere.folder}-{at}", anywhere.identity)
            put_for_two_jobs(store)
            other, before, real, locks = reopened(store), labels_of(store), store.files.locked, 0

            def locked(at: int = at, other: SoftLabelStore = other, real: Callable[[], Any] = real) -> Any:
                nonlocal locks
                if locks == at:
                    assert compact_unit(other, 0, 0)
                locks += 1
                return real()

            store.files.locked = locked  # type: ignore[method-assign]
            was_first = compact_unit(store, 0, 0)
            assert labels_of(store) == before
            assert copies(store) == [0, 1, 2, 3]
            assert len(store.files.names("view-00000")) == len(reopened(store).segments) == 2
            assert verify(reopened(store)).problems == []
            if locks <= at:
                assert was_first
                return
        pytest.fail("compaction has no end")

    def test_a_line_that_names_several_segments_counts_whole_or_not_at_all(
        self, store: SoftLabelStore, monkeypatch: pytest.MonkeyPatch, quiet: None
    ) -> None:
        put_for_two_jobs(store)
        monkeypatch.setattr(type(store.files), "remove", lambda self, name: None)
        manifest = Path(store.folder, "manifest.jsonl")
        before = manifest.read_bytes()
        compact(store)
        after = manifest.read_bytes()
        for cut in (*range(len(before), len(after), 97), len(after) - 3, len(after) - 1):
            manifest.write_bytes(after[:cut])
            assert copies(store) == [0, 1, 2, 3], cut
        assert len(reopened(store).segments) == 2

    def test_a_merged_segment_that_is_damaged_while_the_old_ones_are_there_costs_nothing(
        self, anywhere: SoftLabelStore, monkeypatch: pytest.MonkeyPatch, quiet: None
    ) -> None:
        put(anywhere, [1])
        put(anywhere, [2])
        before = labels_of(anywhere)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(anywhere.files), "remove", lambda self, name: None)
            compact(anywhere)
        (merged,) = reopened(anywhere).segments
        anywhere.files.replace(merged.file, b"damaged")
        assert labels_of(anywhere) == before


class Killed(BaseException):
    """Stands for SIGKILL: no handler of errors runs."""


def killed_at(patch: pytest.MonkeyPatch, at: int, work: Callable[[], object]) -> bool:
    seen = 0

    def wrap(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at + 1:
                raise Killed
            return real(*args, **kwargs)

        patch.setattr(os, name, step)

    for name in ("open", "rename", "fsync", "write", "unlink"):
        wrap(name)
    try:
        work()
    except Killed:
        return True
    return False


class TestStatsAndDiff:
    def test_counts_sizes_and_errors(self, anywhere: SoftLabelStore) -> None:
        put(anywhere, list(range(10)))
        put(anywhere, list(range(10, 15)), shard=1)
        put(anywhere, [0, 1], view=3, records=encode(LOGITS[:2], (2.0,), MAX_TV), temperatures=(2.0,))
        found = summarize(reopened(anywhere), num_images=20)
        assert (found.num_labels, found.num_segments, found.num_read) == (17, 3, 17)
        assert [(v.view, v.num_labels, v.num_shards, v.complete) for v in found.views] == [(0, 15, 2, 0.75), (3, 2, 1, 0.1)]
        lengths = [len(record.data) for record in RECORDS[:15]] + [len(r.data) for r in encode(LOGITS[:2], (2.0,), MAX_TV)]
        assert found.record_bytes.mean == pytest.approx(np.mean(lengths))
        assert sum(found.encodings.values()) == 17
        (one, two) = found.errors
        assert (one.temperatures, one.num_labels, two.temperatures, two.num_labels) == ((1.0,), 15, (2.0,), 2)
        assert one.max_tv.largest == pytest.approx(max(record.max_tv for record in RECORDS[:15]))
        quick = summarize(reopened(anywhere), quick=True)
        assert (quick.num_labels, quick.num_read, quick.views[0].complete) == (17, 0, 1.0)

    def test_difference(self, anywhere: SoftLabelStore, tmp_path: Path, identity: StoreIdentity) -> None:
        other = SoftLabelStore(tmp_path / "other", identity.replace(fingerprint="e" * 64))
        put(anywhere, [0, 1, 2])
        moved = LOGITS[:10].copy()
        moved[2] = np.roll(moved[2], 1)
        records = encode(moved, (1.0,), 1e-3)
        put(other, [1, 2, 3], records=records[1:4])
        put(other, [4], view=1, records=records[4:5])
        found = difference(anywhere, other, 1.0)
        assert found.identity == {"fingerprint": ("f" * 64, "e" * 64)}
        assert (found.only_a, found.only_b, found.both, found.other_images) == (1, 2, 2, 0)
        true = 0.5 * np.abs(softmax(LOGITS[[2]], 1.0) - softmax(moved[[2]], 1.0)).sum()
        assert found.tv.largest == pytest.approx(true, abs=0.03)
        assert found.same_top_class == 0.5

    def test_other_numbers_of_classes_cannot_be_compared(self, anywhere: SoftLabelStore, tmp_path: Path, identity: StoreIdentity) -> None:
        other = SoftLabelStore(tmp_path / "other", identity.replace(num_classes=11))
        with pytest.raises(StoreError, match="labels of 10 and of 11 classes"):
            difference(anywhere, other, 1.0)


class TestCommandLine:
    """The commands that need no teacher, through the installed command line."""

    def test_stats_verify_compact_and_diff(self, tmp_path: Path, identity: StoreIdentity, capsys: pytest.CaptureFixture[str]) -> None:
        store = SoftLabelStore(tmp_path / "stores" / "one", identity)
        other = SoftLabelStore(tmp_path / "stores" / "two", identity.replace(seed=7))
        for row in range(4):
            put(store, [row])
        put(other, [3, 4])
        stores = str(tmp_path / "stores")

        def result(*words: str) -> Any:
            assert run_command(["store", *words, "--json"]) == 0
            return json.loads(capsys.readouterr().out)

        assert [s["num_labels"] for s in result("stats", stores)["stores"]] == [4, 2]
        assert [s["num_open"] for s in result("verify", stores)["stores"]] == [0, 0]
        compacted = result("compact", stores)["stores"]
        assert [(s["num_segments_before"], s["num_segments"]) for s in compacted] == [(4, 1), (1, 1)]
        found = result("diff", f"{stores}/one", f"{stores}/two")
        assert (found["only_a"], found["only_b"], found["both"], list(found["identity"])) == (3, 1, 1, ["seed"])
        for words in (["stats", stores], ["verify", stores], ["compact", stores], ["diff", f"{stores}/one", f"{stores}/two"]):
            assert run_command(["store", *words]) == 0
            assert "labels" in capsys.readouterr().out

    def test_verify_ends_with_1_where_something_is_wrong_and_0_after_the_repair(
        self, tmp_path: Path, identity: StoreIdentity, capsys: pytest.CaptureFixture[str], quiet: None
    ) -> None:
        store = SoftLabelStore(tmp_path / "store", identity)
        (bad,) = put(store, [1, 2])
        path = tmp_path / "store" / bad.file
        path.write_bytes(path.read_bytes()[::-1])
        assert run_command(["store", "verify", str(tmp_path / "store")]) == 1
        told = capsys.readouterr()
        assert "1 problems in" in told.err
        assert bad.file[-20:] in told.out.replace("\n", "").replace(" ", "").replace("│", "") or "altered" in told.out
        assert run_command(["store", "verify", str(tmp_path / "store"), "--repair"]) == 0
        assert run_command(["store", "verify", str(tmp_path / "store")]) == 0

    def test_what_is_no_store_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["store", "stats", str(tmp_path)]) == 1
        assert "no label store in" in capsys.readouterr().err
        assert run_command(["store", "stats"]) == 2
        assert "--config" in capsys.readouterr().err
        assert run_command(["store", "verify", str(tmp_path), "--against-teacher", "5"]) == 2
        assert "--config" in capsys.readouterr().err
        assert run_command(["store", "verify", "--against-teacher", "5", "--repair", "--config", "x.yaml"]) == 2
        assert "--repair mends" in capsys.readouterr().err

    def test_a_folder_of_several_stores_must_be_narrowed_to_compare(
        self, tmp_path: Path, identity: StoreIdentity, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("one", "two"):
            SoftLabelStore(tmp_path / name, identity)
        assert find_stores(str(tmp_path)) == [f"{tmp_path}/one", f"{tmp_path}/two"]
        assert open_any_store(f"{tmp_path}/one").identity == identity
        assert run_command(["store", "diff", str(tmp_path), str(tmp_path)]) == 2
        assert "holds 2 stores" in capsys.readouterr().err
